"""The same seed gives the same bits, whatever happened on the way; a NaN is caught and named."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_images import many

import train as train_module
from data import UsageError
from support import report
from support.images import prepare
from sweep import Worker
from train import Config, main, resolve, train
from vit import ViT

QUICK = {"fraction": 0.05, "epochs": 3, "length": 2, "lr": 1.0, "wd": 0.001, "device": "cpu"}


def left(folder: str | Path) -> tuple[list[str], bytes]:
    return sorted(path.name for path in Path(folder).iterdir()), (
        Path(folder) / "metrics.jsonl"
    ).read_bytes()


def test_a_run_that_is_stopped_after_any_epoch_ends_as_an_unbroken_one(frozen, digits16, tmp_path):
    config = Config(**QUICK | {"epochs": 5}, out=str(tmp_path / "whole"))
    whole = train(config, frozen, digits16)
    for stop in range(1, 5):
        parts = replace(config, out=str(tmp_path / str(stop)))
        assert train(parts, frozen, digits16, stop=stop).status == "running"
        assert train(parts, frozen, digits16).history == whole.history
        assert left(parts.out) == left(config.out)


def test_the_cache_does_not_depend_on_the_number_of_decoding_processes(tmp_path, monkeypatch):
    files, made = many(tmp_path / "images", 200), []
    for cores in (1, 2, 3):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores))
        prepare(tmp_path / str(cores), "t", tmp_path / "images", files, 32)
        made += [path.read_bytes() for path in (tmp_path / str(cores)).glob("*.pixels")]
    assert len(made) == 3
    assert made[0] == made[1] == made[2]


def test_a_backbone_with_a_nan_is_refused_by_the_name_of_its_weights(small, tmp_path, capsys):
    vit = ViT.load(small)
    vit.blocks[1].mlp.fc1.weight.data[3, 4] = torch.nan
    save_file(vit.state_dict(), tmp_path / "nan.safetensors", {"vit": json.dumps(vit.sizes)})
    assert (
        main(["--backbone", str(tmp_path / "nan.safetensors"), "--out", str(tmp_path / "run")]) == 2
    )
    assert "blocks.1.mlp.fc1.weight holds NaN" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_image_with_a_nan_is_refused_by_its_name(tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(np.full((20, 20), np.nan, np.float32)).save(tmp_path / "images" / "a.tiff")
    with pytest.raises(UsageError, match=r"a\.tiff cannot be read as an image \(it holds floats"):
        prepare(tmp_path / "cache", "t", tmp_path / "images", [("a.tiff", 0)], 16)


def test_a_nan_in_one_batch_ends_its_run_as_diverged_and_no_other(
    frozen, digits16, tmp_path, monkeypatch
):
    original, steps = train_module.image_loss, iter(range(10**6))

    def poisoned(*words, **named):
        loss, right = original(*words, **named)
        return (loss * torch.nan if next(steps) == 2 else loss), right

    config = Config(**QUICK, out=str(tmp_path / "poisoned"))
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "image_loss", poisoned)
        result = train(config, frozen, digits16)
    assert result.history[-1] == {"epoch": 3, "status": "diverged"}
    assert "diverged in epoch 3" in report.summary(result.history, digits16)
    assert train(replace(config, out=str(tmp_path / "sound")), frozen, digits16).status == "done"


def test_weights_that_the_very_last_step_made_nan_are_not_judged_by_an_accuracy(
    small, frozen, digits16, tmp_path
):
    config = resolve(
        Config(**QUICK | {"epochs": 1, "lr": 3e38}, backbone=small, out=str(tmp_path / "run"))
    )
    result = train(
        config, frozen, digits16
    )  # 50 images, one step: its loss is finite, what it leaves is not
    assert "loss" in result.history[0]
    assert (result.status, "test" in result.metrics) == ("diverged", False)
    assert not (tmp_path / "run" / "prefix.safetensors").exists()
    stage = Worker(1).run(
        replace(config, epochs=2, out=str(tmp_path / "stage"), final=False), stop=1
    )
    assert (stage["status"], "val" in stage) == ("diverged", False)  # a stage of successive halving


def test_a_clock_that_was_set_back_changes_nothing(frozen, digits16, tmp_path, monkeypatch):
    config = Config(**QUICK, out=str(tmp_path / "whole"))
    train(config, frozen, digits16)
    for year in (1, 4_000_000_000):  # 1970 and 2096
        parts = replace(config, out=str(tmp_path / str(year)))
        train(parts, frozen, digits16, stop=1)
        for path in Path(parts.out).iterdir():
            os.utime(path, (year, year))
        train(parts, frozen, digits16)
        assert left(parts.out) == left(config.out)
    times = iter(range(10**9, 0, -1))
    for name in ("time", "time_ns", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: next(times))
    train(replace(config, out=str(tmp_path / "back")), frozen, digits16)
    assert left(tmp_path / "back") == left(config.out)


def test_an_image_that_was_changed_while_the_clock_was_set_back_is_decoded_again(tmp_path):
    files = many(tmp_path / "images", 3)
    before = prepare(tmp_path / "cache", "t", tmp_path / "images", files, 32).image(0).copy()
    shutil.copy(tmp_path / "images" / "001.jpg", tmp_path / "images" / "000.jpg")
    os.utime(tmp_path / "images" / "000.jpg", (1, 1))
    after = prepare(tmp_path / "cache", "t", tmp_path / "images", files, 32).image(0)
    assert not np.array_equal(before, after)
