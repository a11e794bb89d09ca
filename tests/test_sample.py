"""sample.py and explain.py: it predicts as train.py does, and its pictures show what they say."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data import ASSETS, load, normalise
from extras.explain import (
    attention_of,
    cosines,
    effective_rank,
    last_layer,
    prefix_share,
    rollout,
)
from extras.sample import load_run, main
from support import runs as run_folder
from support.images import stratified
from train import Config, load_backbone, train

QUICK = {"task": "digits", "fraction": 0.2, "epochs": 2, "length": 4, "lr": 2.5, "wd": 0.0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Finished runs on digits: Deep-share, No-share and full fine-tuning."""
    folder, data = tmp_path_factory.mktemp("runs"), load("digits", image_size=32)
    methods = {
        "deep": {"share": "deep"},
        "none": {"share": "none"},
        "full": {"tune": "full", "lr": 0.05, "epochs": 5},
    }
    for name, method in methods.items():
        config = Config(**QUICK | method, out=str(folder / name))
        train(config, load_backbone(config), data)
    return {name: folder / name for name in methods}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """The 797 test digits as PNG files named after their label, in the order of the split."""
    folder = tmp_path_factory.mktemp("pictures")
    with np.load(ASSETS / "digits.npz") as file:
        images, labels = file["images"], file["labels"]
    for n, i in enumerate(stratified(labels, seed=0)[1000:]):
        Image.fromarray((images[i].astype(np.uint16) * 255 // 16).astype(np.uint8)).save(
            folder / f"{n:04}-{labels[i]}.png"
        )
    return folder


def said(capsys, *words: str) -> list[dict]:
    assert main([*map(str, words), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", ["deep", "none", "full"])
def test_predictions_on_exported_images_equal_the_evaluation_of_the_training(
    name, runs, pictures, capsys
):
    lines = said(capsys, runs[name], pictures)
    assert len(lines) == 797
    right = sum(
        max(line["classes"], key=line["classes"].get) == line["image"][-5] for line in lines
    )
    metrics = json.loads((runs[name] / "metrics.jsonl").read_text().splitlines()[-1])
    assert 100 * right / 797 == metrics["test"]
    assert 15 < metrics["test"] < 99  # neither chance nor perfect, so the equality says something
    assert all(
        len(line["classes"]) == 5 and sum(line["classes"].values()) <= 1.0001 for line in lines
    )


def test_a_run_needs_no_data_set_and_no_name_of_a_task(runs, pictures, tmp_path, capsys):
    moved = shutil.copytree(runs["deep"], tmp_path / "moved")
    facts = run_folder.metadata(moved)
    facts["config"]["task"] = "a folder that is gone"
    known = {name: json.dumps(value) for name, value in facts.items()}
    save_file(load_file(moved / "prefix.safetensors"), moved / "prefix.safetensors", known)
    some = sorted(pictures.iterdir())[:3]
    assert [line["classes"] for line in said(capsys, moved, *some)] == [
        line["classes"] for line in said(capsys, runs["deep"], *some)
    ]


def test_an_unreadable_file_is_named_and_skipped(runs, pictures, tmp_path, capsys):
    whole = sorted(pictures.iterdir())[0]
    (tmp_path / "a.png").write_bytes(b"no image")
    shutil.copy(whole, tmp_path / "b.png")
    assert main([str(runs["deep"]), str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert "b.png: " in out
    assert "skipped: " in err
    assert "a.png" in err


def test_the_shares_of_prefix_and_tokens_sum_to_one_and_without_a_prefix_nothing_changes(
    runs, small_vit
):
    run, images = load_run(runs["deep"]), torch.randn(3, 3, 32, 32)
    attn_weights = attention_of(run.backbone, images, run.prefix_kv)
    share = prefix_share(attn_weights, tokens=17)  # (layers, B, H)
    assert share.shape == (8, 3, 4)
    on_tokens = torch.stack([w[:, :, 0, 4:].sum(-1) for w in attn_weights])
    torch.testing.assert_close(share + on_tokens, torch.ones_like(share))
    assert share.min() > 0
    empty = run.prefix_kv[..., :0, :]  # L = 0
    for look in (last_layer, rollout):
        without = look(attention_of(run.backbone, images, None), 17)
        torch.testing.assert_close(
            look(attention_of(run.backbone, images, empty), 17), without, atol=0, rtol=0
        )
        torch.testing.assert_close(without.sum(-1), torch.ones(3))
        assert (look(attn_weights, 17) - without).abs().max() > 1e-4


def test_maps_are_upright(runs):
    """Attention to one patch alone lights up the place of that patch: the top right corner."""
    tokens, corner = 17, 1 + 3  # CLS, then the first row of four patches
    attn_weights = [torch.full((1, 2, tokens, tokens), 1e-6) for _ in range(2)] + [
        torch.full((1, 2, 1, tokens), 1e-6)
    ]
    for gate in attn_weights:
        gate[..., corner] = 1.0
    for look in (last_layer, rollout):
        seen = look(attn_weights, tokens)[0, 1:].view(4, 4)
        assert seen.argmax() == 3
    image = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    image[:, :8, 24:] = 255  # the model's own first layer sees it in the same place
    patches = load_run(runs["deep"]).backbone.patch_embed(normalise(image))
    assert (patches - patches.median(1, keepdim=True).values).norm(dim=-1).argmax() == 3


def test_pictures_are_drawn_for_images_and_for_experts(runs, pictures, tmp_path, capsys):
    (line,) = said(
        capsys, runs["none"], sorted(pictures.iterdir())[0], "--explain", "--out", tmp_path
    )
    with Image.open(line["picture"]) as drawn:
        assert min(drawn.size) > 400
    (line,) = said(capsys, runs["deep"], runs["none"], "--experts", "--out", tmp_path)
    with Image.open(line["picture"]) as drawn:
        assert min(drawn.size) > 400
    assert {path.name for path in tmp_path.iterdir()} == {"experts.png", "explain-0000-2.png"}


def test_the_effective_rank_counts_directions_and_cosines_compare_all_pairs():
    assert effective_rank(torch.eye(5, 8)) == pytest.approx(5)
    assert effective_rank(torch.ones(5, 8)) == pytest.approx(1, abs=1e-3)
    assert 1.1 < effective_rank(torch.eye(5, 8) + 1) < 4.9
    a, b = torch.randn(3, 8), torch.randn(4, 8)
    expected = torch.tensor([[(x @ y / x.norm() / y.norm()).item() for y in b] for x in a])
    torch.testing.assert_close(cosines(a, b), expected)


@pytest.mark.parametrize(
    ("case", "sentence"),
    {
        "not a run": "is not the folder of a finished run",
        "unfinished": "is not the folder of a finished run",
        "other backbone": "has other weights than the one",
        "missing backbone": "the backbone 'gone.safetensors' cannot be used",
        "damaged": "is not the folder of a finished run",
        "empty folder": "holds no image",
        "missing image": "does not exist",
        "only bad images": "none of the images could be read",
        "no image": "no image is named",
        "no prefix to explain": "has no prefix",
        "no experts": "has no prefix",
        "unknown option": "--explian",
    }.items(),
)
def test_wrong_input_is_one_sentence_and_exit_code_2(
    case, sentence, runs, pictures, tmp_path, capsys
):
    deep, image = str(runs["deep"]), str(sorted(pictures.iterdir())[0])
    other = load_backbone(Config(backbone="scratch"))
    save_file(other.state_dict(), tmp_path / "other.safetensors", {"vit": json.dumps(other.sizes)})
    for name in ("empty", "damaged", "bad"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged" / "prefix.safetensors").write_bytes(
        (runs["deep"] / "prefix.safetensors").read_bytes()[:300]
    )
    (tmp_path / "bad" / "x.png").write_bytes(b"no image")
    words = {
        "not a run": [str(tmp_path / "nowhere"), image],
        "unfinished": [str(tmp_path / "empty"), image],
        "other backbone": [deep, image, "--backbone", str(tmp_path / "other.safetensors")],
        "missing backbone": [deep, image, "--backbone", "gone.safetensors"],
        "damaged": [str(tmp_path / "damaged"), image],
        "empty folder": [deep, str(tmp_path / "empty")],
        "missing image": [deep, str(tmp_path / "nowhere.png")],
        "only bad images": [deep, str(tmp_path / "bad")],
        "no image": [deep],
        "no prefix to explain": [str(runs["full"]), image, "--explain"],
        "no experts": [str(runs["full"]), "--experts"],
        "unknown option": [deep, image, "--explian"],
    }[case]
    assert main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert sentence in error
