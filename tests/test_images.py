"""images.py: torchvision's own pipeline makes the same pixels, bit for bit; decoded once."""

import json
import multiprocessing.synchronize
import os
import re
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import forks
from torchvision import transforms
from torchvision.datasets.folder import default_loader
from torchvision.transforms import functional

import train
from data import UsageError, load
from support import images as module
from support.images import Dataset, Split, crop, prepare, stratified
from vit import IMAGENET_MEAN, IMAGENET_STD, ViT


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def normalise() -> Callable:
    return ViT(n_layer=1, dim=8, n_head=1).normalise


def odd_images(folder: Path) -> list[tuple[str, int]]:
    """Portrait, landscape, tiny, exact, grey, CMYK, transparent palette, turned by its EXIF tag."""
    folder.mkdir()
    picture(300, 500).save(folder / "portrait.jpg")
    picture(501, 333).save(folder / "landscape.jpg")
    picture(31, 40).save(folder / "tiny.jpg")
    picture(256, 256).save(folder / "exact.jpg")
    picture(320, 280).convert("L").save(folder / "grey.jpg")
    picture(320, 280).convert("CMYK").save(folder / "cmyk.jpg")
    picture(300, 270).convert("P").save(folder / "palette.png", transparency=0)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees: torchvision's loader does not
    picture(400, 300).save(folder / "turned.jpg", exif=exif)
    return [(path.name, i) for i, path in enumerate(sorted(folder.iterdir()))]


def test_training_pixels_equal_torchvision_s_pipeline_bit_for_bit(tmp_path, normalise):
    files = odd_images(tmp_path / "images")
    split = prepare(tmp_path, "odd", tmp_path / "images", files, 256)
    to_float = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )
    flips, out = set(), np.empty((224, 224, 3), np.uint8)
    for turn in range(3):
        for i, (name, _) in enumerate(files):
            crop(split.image(i), 224, out, np.random.default_rng([turn, i]))
            rng = np.random.default_rng([turn, i])  # the same draws: top and left, then the flip
            resized = transforms.Resize(256)(default_loader(tmp_path / "images" / name))
            top, left = rng.integers(0, np.array([resized.height, resized.width]) - 224 + 1)
            theirs = functional.crop(resized, top, left, 224, 224)
            flipped = rng.choice((1, -1)) == -1
            theirs = to_float(functional.hflip(theirs) if flipped else theirs)
            assert torch.equal(normalise(torch.from_numpy(out)[None])[0], theirs), name
            flips.add(flipped)
    assert flips == {True, False}


def test_test_pixels_equal_torchvision_s_pipeline_bit_for_bit(tmp_path, normalise):
    files = odd_images(tmp_path / "images")
    for resize, augment, size, theirs in (
        (256, True, 224, [transforms.Resize(256), transforms.CenterCrop(224)]),  # FGVC
        ((224, 224), False, 224, [transforms.Resize((224, 224))]),  # VTAB-1K
    ):
        split = prepare(tmp_path, "odd", tmp_path / "images", files, resize)
        data = Dataset(
            "odd",
            [""] * len(files),
            size,
            augment,
            "train",
            {"train": split, "val": split, "test": split},
        )
        pipeline = transforms.Compose(
            [*theirs, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        )
        made = torch.cat([normalise(images) for images, _ in data.batches("test", 4)])
        for mine, (name, _) in zip(made, files, strict=True):
            assert torch.equal(mine, pipeline(default_loader(tmp_path / "images" / name))), name


def test_an_epoch_holds_every_image_once_in_an_order_of_its_own():
    images = (
        np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2).repeat(3, 3)
    )
    data = Dataset(
        "t", list("ab"), 4, False, "train", {"train": Split.of(images, np.arange(20) % 2)}
    )

    def order(seed, epoch):
        batches = list(data.batches("train", 6, seed, epoch))
        assert [len(labels) for _, labels in batches] == [6, 6, 6, 2]
        numbers = torch.cat([pixels[:, 0, 0, 0] for pixels, _ in batches])
        assert torch.equal(torch.cat([labels for _, labels in batches]), numbers.long() % 2)
        return numbers.tolist()

    assert sorted(order(1, 0)) == list(range(20))
    assert order(1, 0) == order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert order(None, 0) == list(range(20))


def test_a_fraction_is_stratified_and_part_of_every_larger_one():
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    number = np.stack([*np.divmod(np.arange(1000), 256), labels], -1).astype(np.uint8)
    images = number[:, None, None]  # (1000, 1, 1, 3): an image says which one it is
    data = Dataset("t", list("abc"), 1, False, "train", {"train": Split.of(images, labels)})
    chosen = {
        f: {int(image[0, 0] @ [256, 1, 0]) for image, _ in data.examples("train", f)}
        for f in (0.05, 0.1, 0.5, 1.0)
    }
    assert [len(part) for part in chosen.values()] == [50, 100, 500, 1000]
    assert chosen[0.05] < chosen[0.1] < chosen[0.5] < chosen[1.0]
    assert np.bincount(labels[list(chosen[0.1])]).tolist() == [60, 30, 10]
    assert stratified(labels, 0).tolist() != stratified(labels, 1).tolist()


def many(folder: Path, count: int = 300) -> list[tuple[str, int]]:
    folder.mkdir()
    for i in range(count):
        picture(300, 260, i).save(folder / f"{i:03}.jpg")
    return [(f"{i:03}.jpg", i % 3) for i in range(count)]


def test_two_processes_at_once_decode_once_and_hold_the_same_pixels(tmp_path):
    files = many(tmp_path / "images", 150)
    words = (tmp_path / "cache", "t", tmp_path / "images", files, 64)
    pair = [forks.Process(target=prepare, args=words) for _ in "ab"]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    assert [process.exitcode for process in pair] == [0, 0]
    cached = [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".pixels"]
    assert len(cached) == 1
    before = cached[0].stat().st_mtime_ns
    split = prepare(tmp_path / "cache", "t", tmp_path / "images", files, 64)
    assert cached[0].stat().st_mtime_ns == before
    expected = np.asarray(transforms.Resize(64)(default_loader(tmp_path / "images" / "077.jpg")))
    assert np.array_equal(split.image(77), expected)


def test_a_kill_while_decoding_leaves_nothing_that_is_taken_for_whole(tmp_path):
    files = many(tmp_path / "images")
    words = (tmp_path / "cache", "t", tmp_path / "images", files, 256)
    process = forks.Process(target=prepare, args=words)
    process.start()
    while not list((tmp_path / "cache").glob(".*.part")) and process.is_alive():
        time.sleep(0.001)
    process.kill()
    process.join()
    assert not list((tmp_path / "cache").glob("*.pixels"))
    split = prepare(tmp_path / "cache", "t", tmp_path / "images", files, 256)
    assert len(split) == 300
    assert not list((tmp_path / "cache").glob(".*.part"))


def test_a_truncated_cache_a_missing_and_an_unreadable_image_are_named(tmp_path):
    files = odd_images(tmp_path / "images")
    prepare(tmp_path / "cache", "t", tmp_path / "images", files, 32)
    (cached,) = (tmp_path / "cache").glob("*.pixels")
    whole = cached.read_bytes()
    for content in (
        whole[:-1000],
        whole[:20],
        b"",
        b"\0" + whole[1:],
        bytes(len(whole)),
        whole[40:],
    ):
        cached.write_bytes(content)
        with pytest.raises(UsageError, match="damaged; delete it"):
            prepare(tmp_path / "cache", "t", tmp_path / "images", files, 32)
    cached.write_bytes(whole)
    assert len(prepare(tmp_path / "cache", "t", tmp_path / "images", files, 32)) == len(files)
    with pytest.raises(UsageError, match=r"gone\.jpg belongs to t, but there is no such file"):
        prepare(tmp_path / "cache", "t", tmp_path / "images", [*files, ("gone.jpg", 0)], 32)
    (tmp_path / "images" / "broken.jpg").write_bytes(
        (tmp_path / "images" / "exact.jpg").read_bytes()[:300]
    )
    with pytest.raises(UsageError, match=re.escape("broken.jpg cannot be read as an image")):
        prepare(tmp_path / "cache", "t", tmp_path / "images", [*files, ("broken.jpg", 0)], 32)
    assert not list((tmp_path / "cache").glob(".*.part"))


def test_a_full_disk_while_decoding_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    files = odd_images(tmp_path / "images")
    monkeypatch.setattr(
        module.os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(UsageError, match=r"cannot be written \(No space left\)"):
        prepare(tmp_path / "cache", "t", tmp_path / "images", files, 32)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_decoding_needs_no_shared_memory(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device: /dev/shm")

    files = many(tmp_path / "images", 150)
    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", refuse)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    assert len(prepare(tmp_path / "cache", "t", tmp_path / "images", files, 32)) == 150


def test_an_epoch_does_not_load_the_cache_into_memory(tmp_path):
    n, side = 400, 256  # 79 MB in a file with holes, which takes no disk
    columns = [np.arange(n) * side * side * 3, np.full((n, 2), side), np.zeros(n)]
    index = np.column_stack(columns).astype(np.int64).tobytes()
    made = module.names_digest([("", 0)] * n)
    made.update(bytes(n * side * side * 3))
    made.update(index)
    with (tmp_path / "t.pixels").open("wb") as file:
        file.truncate(n * side * side * 3)
        file.seek(0, 2)
        file.write(index + made.digest())
    tracemalloc.start()
    split = Split.open(tmp_path / "t.pixels", [("", 0)] * n)
    data = Dataset("t", ["a"], 224, True, "train", {"train": split})
    for _ in data.batches("train", 16, seed=0):
        pass
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    batch = 16 * 224 * 224 * 3
    assert batch < most < 6 * batch < split.pixels.nbytes / 4


def test_the_user_s_own_folders_are_split_or_taken_as_they_are(tmp_path):
    for c in "ab":
        (tmp_path / "mine" / c).mkdir(parents=True)
        for i in range(20):
            picture(40, 40, i).save(tmp_path / "mine" / c / f"{i}.jpg")
    data = load(str(tmp_path / "mine"), tmp_path / "data", 32)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 32,
        "val": 4,
        "test": 4,
    }
    assert all(
        np.bincount(split.index[:, 3]).tolist() == [len(split) // 2] * 2
        for split in data.splits.values()
    )
    assert load(str(tmp_path / "mine"), tmp_path / "data", 32).listing == data.listing
    words = ["--backbone", "scratch", "--epochs", "1", "--length", "2", "--device", "cpu"]
    words += [
        "--task",
        str(tmp_path / "mine"),
        "--data-dir",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert train.main(words) == 0
    kept = json.loads((tmp_path / "out" / "split.json").read_text())
    assert kept == data.listing
    kept["val"], kept["test"] = kept["test"], kept["val"]  # a split.json in the folder is obeyed
    (tmp_path / "mine" / "split.json").write_text(json.dumps(kept))
    assert (
        load(str(tmp_path / "mine"), tmp_path / "data", 32).listing["val"] == data.listing["test"]
    )
    (tmp_path / "mine" / "split.json").write_text("{}")
    with pytest.raises(UsageError, match="mend or delete it"):
        load(str(tmp_path / "mine"), tmp_path / "data", 32)
