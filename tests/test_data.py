"""data.py, benchmarks.py and pixels.py: from archives on a server to the pixels that a model sees."""

import hashlib
import io
import json
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from local_server import serve
from PIL import Image

import benchmarks
import data
import download
import train
from data import load

SCRATCH = ["--backbone", "scratch", "--device", "cpu", "--batch", "4", "--epochs", "1", "--length", "2"]


def jpeg(seed: int, width: int = 40, height: int = 30) -> bytes:
    """A picture with structure, no two alike."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


KEYS = {  # how an image of class c is called in VPT's splits and in the archive, and its class id
    "cub": (lambda c, i: f"{c:03}.Bird_{c}/Bird_{i}.jpg", lambda c: f"{c:03}", "CUB_200_2011/images/"),
    "nabirds": (lambda c, i: f"{290 + 7 * c:04}/{i:032x}.jpg", lambda c: 290 + 7 * c, "nabirds/images/"),
    "flowers": (lambda c, i: f"jpg/image_{100 * c + i:05}.jpg", lambda c: c, ""),
    "dogs": (lambda c, i: f"n0{c}-Dog_{c}/n0{c}_{i}.jpg", lambda c: c, "Images/"),
    "cars": (lambda c, i: f"car_ims/{100 * c + i:06}.jpg", lambda c: c, ""),
}


def publish_fgvc(task: str, folder: Path, url: str, patch) -> None:
    """Three classes, with 4 + 1 + 2 images each, in the real layout of archive and split files; val lacks class 2."""
    key, class_id, top = KEYS[task]
    source = benchmarks.FGVC[task]
    parts = {"train": range(4), "val": range(4, 5), "test": range(5, 7)}
    splits = {
        split: {key(c, i): class_id(c) for c in (1, 2, 3) for i in numbers if (split, c) != ("val", 2)}
        for split, numbers in parts.items()
    }
    pictures = {f"{top}{key(c, i)}": jpeg(10 * c + i) for c in (1, 2, 3) for i in range(7)}
    tar(folder / source.archive, pictures)
    md5 = hashlib.md5((folder / source.archive).read_bytes()).hexdigest()
    urls = () if source.manual else (f"{url}/gone.tgz", f"{url}/{source.archive}")
    patch.setitem(benchmarks.FGVC, task, replace(source, urls=urls, checksum=f"md5:{md5}"))
    (folder / source.splits).mkdir()
    for split, images in splits.items():
        path = folder / source.splits / f"{split}.json"
        path.write_text(json.dumps(images))
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        patch.setitem(benchmarks.SPLIT_FILES, f"{source.splits}/{split}", (sha256, len(images), 3))
    patch.setattr(benchmarks, "SPLITS_URL", url)


def publish_vtab(tasks: list[str], folder: Path, url: str, patch) -> None:
    """The usual archive with some of its tasks: lists of `path label`, and a copy of the pictures for every list."""
    with zipfile.ZipFile(folder / "vtab-1k.zip", "w") as archive:
        for task in tasks:
            lists = {"train800": range(6), "val200": range(6, 8), "train800val200": range(8), "test": range(8, 12)}
            for split, numbers in lists.items():
                names = [f"images/{split}/{i:06}.jpg" for i in range(len(numbers))]
                rows = [f"{name} {number % 2}\n" for name, number in zip(names, numbers, strict=True)]
                archive.writestr(f"vtab-1k/{task}/{split}.txt", "".join(rows))
                for name, number in zip(names, numbers, strict=True):
                    archive.writestr(f"vtab-1k/{task}/{name}", jpeg(number))
    patch.setattr(benchmarks, "VTAB", replace(benchmarks.VTAB, urls=(f"{url}/vtab-1k.zip",)))


@pytest.fixture
def site(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    monkeypatch.setattr(download, "PAUSE", 0.001)
    with serve(tmp_path / "site") as server:
        yield server


def run(task: str, tmp_path: Path) -> int:
    return train.main(["--task", task, "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "out"), *SCRATCH])


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("task", list(benchmarks.FGVC))
def test_an_fgvc_task_goes_from_nothing_to_a_trained_prefix_and_is_not_fetched_or_decoded_again(
    task, site, tmp_path, monkeypatch, capsys
):
    publish_fgvc(task, site.folder, site.url, monkeypatch)
    if benchmarks.FGVC[task].manual:
        assert run(task, tmp_path) == 2
        error = capsys.readouterr().err
        assert "https://dl.allaboutbirds.org/nabirds" in error
        assert f"put nabirds.tar.gz, or the unpacked folder, into {tmp_path / 'data'}" in error
        (site.folder / "nabirds.tar.gz").rename(tmp_path / "data" / "nabirds.tar.gz")
    assert run(task, tmp_path) == 0
    assert "test" in json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    before, asked = files(tmp_path / "data"), len(site.log)
    dataset = load(task, tmp_path / "data", 32)
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 12, "val": 2, "test": 6}
    assert (files(tmp_path / "data"), len(site.log)) == (before, asked)
    assert asked >= 3  # the three split files at least


@pytest.mark.parametrize("task", ["cifar", "svhn", "eurosat", "kitti", "dsprites_loc"])
def test_a_vtab_task_goes_from_nothing_to_a_trained_prefix_and_is_not_fetched_or_decoded_again(
    task, site, tmp_path, monkeypatch
):
    publish_vtab([task], site.folder, site.url, monkeypatch)
    assert run(task, tmp_path) == 0
    assert "test" in json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    before = files(tmp_path / "data")
    dataset = load(task, tmp_path / "data", 32)
    assert dataset.count("trainval") == 8
    assert len(dataset.classes) == data.TASKS[task].classes  # of the table; the lists name two
    assert (files(tmp_path / "data"), site.log) == (before, [("/vtab-1k.zip", 0)])
