"""docs/controls.py, which makes tables of docs/results.md."""

import json

from data import load
from docs import controls
from train import Config, load_backbone


def last_row(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def test_the_rate_is_chosen_on_val_and_every_seed_is_tested_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config(share="identity", device="cpu", epochs=1, fraction=0.1, out="here")
    backbone = load_backbone(config)
    data = load("digits", **backbone.inputs)
    rates, choice = (0.001, 5.0), (42, 43)
    best, scores, parameters = controls.row(config, backbone, data, rates, 2, choice)
    home = tmp_path / "out/controls/here/identity"
    val = {r: sum(last_row(home / f"False-{r}-{s}")["val"] for s in choice) for r in rates}
    assert best == max(val, key=val.get)
    assert val[0.001] != val[5.0]
    assert scores == [last_row(home / f"True-{best}-{seed}")["test"] for seed in (0, 1)]
    assert parameters == 8 * 10 * 32  # layers, L, D: one vector for key and value


def test_five_classes_are_labelled_anew_and_most_counts_for_train_and_val():
    data = load("digits", image_size=32)
    part = controls.five_classes(data, 5, most=20)
    assert part.classes == ["5", "6", "7", "8", "9"]
    assert [len(part.splits[name]) for name in ("train", "val")] == [20, 20]
    assert len(part.splits["test"]) == sum(data.splits["test"].labels >= 5)
    assert set(part.splits["train"].labels) == {0, 1, 2, 3, 4}


def test_two_vectors_minus_one_are_paired_by_seed(capsys):
    rows = {"identity": (5.0, [80.0, 82.0], 1), "none": (5.0, [81.0, 85.0], 2)}
    controls.show(rows)
    assert "No-share minus one vector, no map: 2.000 (1.000)" in capsys.readouterr().out
