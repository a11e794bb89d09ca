"""A file that a disk has changed is refused in one sentence, or healed, and never used: cut or flipped at random.

FAULTS=long pytest tests/test_damage.py         ten times as many
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_images import many, picture

import data as data_module
from data import ASSETS, Dataset, UsageError, load
from gpt import GPT
from support import runs
from support.images import prepare
from train import Config, TunedModel, make_optimizer, open_backbone, resolve, train
from vit import ViT

CASES = 200 if os.environ.get("FAULTS") == "long" else 20
QUICK = {"fraction": 0.05, "epochs": 3, "length": 2, "lr": 1.0, "wd": 0.001, "device": "cpu"}


def damaged(content: bytes, seed: int) -> bytes:
    """Cut somewhere, or a bit turned, or a few bytes replaced, by the seed."""
    rng = random.Random(seed)
    at = rng.randrange(len(content))
    if seed % 3 == 0:
        return content[:at]
    if seed % 3 == 1:
        return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    return content[:at] + rng.randbytes(rng.randint(1, 16)) + content[at + 16 :]


def refused_or_healed(path: Path, use: Callable, cases: int = CASES) -> int:
    """Damage a file in many ways: whatever uses it refuses it in one sentence, or ends in the same result as ever.

    How often it was refused.
    """
    content, expected, reasons = path.read_bytes(), use(), []
    for seed in range(cases):
        path.write_bytes(damaged(content, seed))
        try:
            assert use() == expected, f"{path.name}, case {seed}: used, with another result"
        except UsageError as error:
            reasons.append(str(error))
    path.write_bytes(content)
    assert use() == expected
    assert not [reason for reason in reasons if "\n" in reason or str(path.parent) not in reason]
    return len(reasons)


def resumed(out: Path, config: Config, backbone: ViT, seed: int = 1) -> tuple:
    """The weights, momentum and metrics with which a run goes on."""
    torch.manual_seed(seed)
    model = TunedModel(config, backbone, 10)
    optimizer = make_optimizer(config, model)
    history = runs.resume(out, json.loads(json.dumps(vars(config))), model, optimizer)
    return history, [p.tolist() for p in model.parameters()], str(optimizer.state_dict())


def test_a_damaged_checkpoint_is_refused_or_healed_and_never_used(frozen, digits16, tmp_path):
    for name, method in (("deep", {"share": "deep"}), ("full", {"tune": "full", "lr": 0.1})):
        config = resolve(Config(**QUICK | method, out=str(tmp_path / name)))
        train(config, frozen, digits16, stop=2)
        use = lambda config=config, name=name: resumed(tmp_path / name, config, frozen)  # noqa: E731
        assert refused_or_healed(tmp_path / name / "state.pt", use) > CASES / 2
        assert refused_or_healed(tmp_path / name / "config.json", use, CASES // 2) > CASES / 10
        assert (
            refused_or_healed(tmp_path / name / "metrics.jsonl", use, 6) == 0
        )  # state.pt knows better
        train(config, frozen, digits16)
        assert refused_or_healed(tmp_path / name / "prefix.safetensors", use) > CASES / 2
        assert (
            refused_or_healed(tmp_path / name / "metrics.jsonl", use, 6) == 0
        )  # prefix.safetensors knows better
    assert refused_or_healed(tmp_path / "full" / "backbone.safetensors", use) > CASES / 2


def test_a_damaged_cache_is_refused_and_never_used(tmp_path):
    files = many(tmp_path / "images", 12)

    def use() -> bytes:
        split = prepare(tmp_path / "cache", "t", tmp_path / "images", files, 32)
        data = Dataset("t", list("abc"), 32, False, "train", {"train": split})
        return b"".join(
            tensor.numpy().tobytes() for batch in data.batches("train", 5) for tensor in batch
        )

    use()
    (cached,) = (tmp_path / "cache").glob("*.pixels")
    assert refused_or_healed(cached, use) == CASES


def test_a_damaged_asset_is_refused_and_never_used(tmp_path, monkeypatch):
    for name in ("digits.npz", *(path.name for path in ASSETS.glob("*.safetensors"))):
        shutil.copy(ASSETS / name, tmp_path / name)
    monkeypatch.setattr(data_module, "ASSETS", tmp_path)

    def images() -> bytes:
        splits = load("digits", image_size=8).splits.values()
        return b"".join(split.pixels.tobytes() + split.index.tobytes() for split in splits)

    assert refused_or_healed(tmp_path / "digits.npz", images) > CASES / 2
    for path in tmp_path.glob(
        "*.safetensors"
    ):  # one that fails here has no checksum yet: weights.py says how
        kind = GPT if "gpt" in path.name else ViT

        def weights(path=path, kind=kind) -> str:
            return runs.fingerprint(open_backbone(kind, str(path)))

        assert refused_or_healed(path, weights) == CASES


def test_a_damaged_split_file_is_refused_and_never_used(tmp_path):
    for name in ("robin", "heron", "stork"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for i in range(6):
            picture(20, 20, i).save(tmp_path / "mine" / name / f"{i}.png")

    def use() -> dict:
        return load(str(tmp_path / "mine"), tmp_path / "data", 16).listing

    (tmp_path / "mine" / "split.json").write_text(json.dumps(use(), indent=1))
    assert refused_or_healed(tmp_path / "mine" / "split.json", use) > CASES / 2


def test_a_run_that_says_done_and_has_no_weights_is_refused(frozen, digits16, tmp_path):
    config = resolve(Config(**QUICK, out=str(tmp_path)))
    train(config, frozen, digits16)
    (tmp_path / "prefix.safetensors").rename(tmp_path / "lost")
    with pytest.raises(UsageError, match=r"prefix\.safetensors is missing\); delete that folder"):
        train(config, frozen, digits16)
    (tmp_path / "lost").rename(tmp_path / "prefix.safetensors")
    (tmp_path / "metrics.jsonl").unlink()  # the other way round, the weights know
    history = train(config, frozen, digits16).history
    assert [
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == history
