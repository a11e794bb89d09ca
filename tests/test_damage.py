"""A damaged file is refused in one sentence, or healed from another that knows better."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import data as data_module
from data import ASSETS, Dataset, UsageError, load
from support import runs
from train import Config, TunedModel, make_optimizer, open_backbone, resolve, train
from vit import ViT

QUICK = {"fraction": 0.05, "epochs": 3, "length": 2, "lr": 1.0, "wd": 0.001, "device": "cpu"}
DAMAGE = {
    "empty": lambda content: b"",
    "cut at the start": lambda content: content[:7],
    "cut in the middle": lambda content: content[: len(content) // 2],
    "garbage": lambda content: b"\xff\x00garbage" * 50,
    "wrong JSON": lambda content: b'{"a": [1, 2',
    "other JSON": lambda content: b'[{"a": 1}]',
}


def refused(path: Path, use: Callable, expected: object) -> None:
    """Whatever the damage: one sentence that names the place. The undamaged file works again."""
    content = path.read_bytes()
    for damage, make in DAMAGE.items():
        path.write_bytes(make(content))
        with pytest.raises(UsageError) as caught:
            use()
        said = str(caught.value)
        assert "\n" not in said, damage
        assert str(path.parent) in said, damage
    path.write_bytes(content)
    assert use() == expected


def resumed(config: Config, backbone: ViT, data: Dataset) -> tuple:
    """The weights, momentum and metrics with which a run goes on."""
    torch.manual_seed(1)
    model = TunedModel(config, backbone, 10)
    optimizer = make_optimizer(config, model)
    settings = json.loads(json.dumps(vars(config)))
    identity = {"config": settings, "fingerprint": backbone.fingerprint, "data": data.identity}
    history = runs.resume(Path(config.out), identity, model, optimizer)
    return history, [p.tolist() for p in model.parameters()], str(optimizer.state_dict())


@pytest.mark.parametrize("method", [{"share": "deep"}, {"tune": "full", "lr": 0.1}])
def test_a_damaged_run_is_refused_and_metrics_are_healed(method, frozen, digits16, tmp_path):
    config = resolve(Config(**QUICK | method, out=str(tmp_path)))
    train(config, frozen, digits16, stop=2)
    expected = resumed(config, frozen, digits16)
    for name in ("state.pt", "config.json"):
        refused(tmp_path / name, lambda: resumed(config, frozen, digits16), expected)
    (tmp_path / "metrics.jsonl").write_bytes(b"garbage")  # state.pt knows them
    assert resumed(config, frozen, digits16) == expected

    train(config, frozen, digits16)
    expected = resumed(config, frozen, digits16)
    names = ["prefix.safetensors", "config.json"]
    names += ["backbone.safetensors"] if "tune" in method else []
    for name in names:
        refused(tmp_path / name, lambda: resumed(config, frozen, digits16), expected)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    for damaged in (b"", b"garbage", metrics[:50]):  # prefix.safetensors knows them
        (tmp_path / "metrics.jsonl").write_bytes(damaged)
        assert resumed(config, frozen, digits16) == expected
        assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
    refused(
        tmp_path / "prefix.safetensors", lambda: runs.metadata(tmp_path)["history"], expected[0]
    )


def test_the_file_of_another_model_is_refused(frozen, digits16, tmp_path):
    for length in (2, 3):
        config = Config(**QUICK | {"length": length}, out=str(tmp_path / str(length)))
        train(config, frozen, digits16)
    shutil.copy(tmp_path / "3" / "prefix.safetensors", tmp_path / "2" / "prefix.safetensors")
    with pytest.raises(UsageError, match=r"cannot be resumed \(.*; delete that folder"):
        train(Config(**QUICK, out=str(tmp_path / "2")), frozen, digits16)


def test_a_damaged_asset_is_refused(tmp_path, monkeypatch):
    for path in (ASSETS / "digits.npz", *ASSETS.glob("*.safetensors")):
        shutil.copy(path, tmp_path / path.name)
    monkeypatch.setattr(data_module, "ASSETS", tmp_path)
    refused(tmp_path / "digits.npz", lambda: len(load("digits", image_size=8).classes), 10)
    path = tmp_path / "tiny_vit.safetensors"
    expected = runs.fingerprint(open_backbone(ViT, str(path)))
    refused(path, lambda: runs.fingerprint(open_backbone(ViT, str(path))), expected)


def test_a_run_that_says_done_and_has_no_weights_is_refused(frozen, digits16, tmp_path):
    config = resolve(Config(**QUICK, out=str(tmp_path)))
    train(config, frozen, digits16)
    (tmp_path / "prefix.safetensors").rename(tmp_path / "lost")
    with pytest.raises(UsageError, match=r"prefix\.safetensors is missing\); delete that folder"):
        train(config, frozen, digits16)
    (tmp_path / "lost").rename(tmp_path / "prefix.safetensors")
    (tmp_path / "metrics.jsonl").unlink()  # the other way round, the weights know
    history = train(config, frozen, digits16).history
    written = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == history


def test_a_run_of_an_older_version_is_refused_in_one_sentence(frozen, digits16, tmp_path):
    config = resolve(Config(**QUICK, out=str(tmp_path)))
    train(config, frozen, digits16, stop=1)
    identity = json.loads((tmp_path / "config.json").read_text())
    older = {name: value for name, value in identity["config"].items() if name != "beams"}
    for old in (identity["config"], identity | {"config": older}):
        (tmp_path / "config.json").write_text(json.dumps(old))
        with pytest.raises(UsageError, match=r"older version.*; delete that folder"):
            train(config, frozen, digits16)
