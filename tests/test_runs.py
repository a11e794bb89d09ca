"""runs.py: what a run must know of its data, backbone and machine before it starts."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from local_server import serve
from PIL import Image
from test_train import QUICK

from data import UsageError
from support.runs import fingerprint, say_idle_gpu
from train import Config, load_backbone, main, resolve, train
from vit import ViT


def test_a_missing_or_corrupt_asset_is_named(capsys, monkeypatch, tmp_path):
    import data
    import vit

    monkeypatch.setattr(vit, "TINY_WEIGHTS", tmp_path / "tiny_vit.safetensors")
    assert main(["--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "tiny_vit.safetensors" in error
    assert "git checkout" in error
    (tmp_path / "tiny_vit.safetensors").write_bytes(b"\x00" * 100)
    assert main(["--out", str(tmp_path / "run")]) == 2
    assert "damaged" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(data, "ASSETS", tmp_path)
    assert main(["--out", str(tmp_path / "run")]) == 2
    assert "git checkout" in capsys.readouterr().err
    (tmp_path / "digits.npz").write_bytes(b"PK but not a zip")
    assert main(["--out", str(tmp_path / "run")]) == 2
    assert "damaged" in capsys.readouterr().err


def test_a_run_knows_its_backbone_and_its_data(frozen, digits16, tmp_path):
    quick = QUICK | {"device": "cpu"}
    other = ViT(**frozen.sizes)
    other.fingerprint = "other"
    swapped = replace(digits16, splits=digits16.splits | {"val": digits16.splits["test"]})
    renamed = replace(digits16, classes=[f"digit {name}" for name in digits16.classes])
    for stop in (1, None):  # under way, and over
        config = Config(**quick, out=str(tmp_path / str(stop)))
        train(config, frozen, digits16, stop)
        before = {path.name: path.read_bytes() for path in Path(config.out).iterdir()}
        clashes = {
            "another backbone": (other.requires_grad_(False), digits16),
            r"other data \(digits: val differ": (frozen, swapped),
            r"other data \(digits: classes differ": (frozen, renamed),
        }
        for expected, (backbone, data) in clashes.items():
            with pytest.raises(UsageError, match=expected):
                train(config, backbone, data)
        assert {path.name: path.read_bytes() for path in Path(config.out).iterdir()} == before
        same = replace(digits16, splits=dict(digits16.splits))
        assert train(config, frozen, same).status == "done"


def test_a_backbone_is_its_weights_and_its_normalisation():
    torch.manual_seed(0)
    usual = ViT(image=16, patch=8, dim=16, n_layer=3, n_head=2)
    other = ViT(**usual.sizes | {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)})
    other.load_state_dict(usual.state_dict())
    assert fingerprint(usual) != fingerprint(other)
    # What runs of older versions keep is still true.
    assert load_backbone(Config(device="cpu")).fingerprint == "5ad0270e1b7a8858"
    texts = Config(task="restaurants", device="cpu")
    assert load_backbone(texts).fingerprint == "2ca32205286882e1"


def test_a_gpu_that_pytorch_cannot_use_is_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    for driver, lines in ((None, 0), ("/usr/bin/nvidia-smi", 1)):
        monkeypatch.setattr(shutil, "which", lambda name, driver=driver: driver)
        say_idle_gpu.cache_clear()
        assert resolve(Config()).device == resolve(Config()).device == "cpu"  # said once
        said = capsys.readouterr().err
        assert said.count("an NVIDIA driver is here, but") == said.count("\n") == lines
    say_idle_gpu.cache_clear()
    assert resolve(Config(device="cpu")).device == "cpu"  # as you asked
    assert capsys.readouterr().err == ""
    monkeypatch.undo()
    say_idle_gpu.cache_clear()


def photos(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(20):
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(path)
    return folder


def test_own_images_are_the_same_however_their_path_is_typed_and_other_when_they_change(
    small, tmp_path, capsys, monkeypatch
):
    folder = photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    words = ["--backbone", small, "--epochs", "1", "--length", "2", "--out", "run", "--lr", "0.1"]
    for path in ("photos", "photos/", "./photos", str(folder)):
        assert main(["--task", path, *words]) == 0
    capsys.readouterr()
    listing = (tmp_path / "run" / "split.json").read_bytes()
    Image.new("RGB", (20, 20)).save(folder / "class0" / "0.png")
    assert main(["--task", "photos", *words]) == 2
    assert "holds a run with other data (" in capsys.readouterr().err
    (folder / "class0").rename(folder / "class2")
    assert main(["--task", "photos", *words]) == 2
    assert "classes" in capsys.readouterr().err
    assert (tmp_path / "run" / "split.json").read_bytes() == listing


@pytest.mark.parametrize(
    "words",
    [
        ["--backbone", "vit_base_patch16_224"],
        ["--backbone", "timm/of_nobody"],
        ["--task", "restaurants", "--backbone", "gpt2"],
    ],
)
def test_without_a_network_a_backbone_of_the_hub_is_one_sentence_at_once(
    words, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    start = time.perf_counter()
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    assert time.perf_counter() - start < 10
    (error,) = capsys.readouterr().err.splitlines()
    offline = "tiny_gpt" if "--task" in words else "tiny"
    assert f"cannot be reached; without a network use --backbone {offline}, or give one" in error


def test_the_hub_is_asked_where_it_answers_and_the_cache_alone_where_it_does_not(
    tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(ViT, "load", lambda *_: asked.append(constants.HF_HUB_OFFLINE) or ViT(32))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    load_backbone(Config(backbone="vit_base_patch16_224", device="cpu"))
    with serve(tmp_path) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        load_backbone(Config(backbone="vit_base_patch16_224", device="cpu"))
    assert asked == [True, False]
    assert not constants.HF_HUB_OFFLINE
