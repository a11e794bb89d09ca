"""data.py and benchmarks.py: from archives on a server to the pixels that a model sees."""

import hashlib
import io
import json
import re
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import train
from data import load
from support import benchmarks

SCRATCH = [
    "--backbone",
    "scratch",
    "--device",
    "cpu",
    "--batch",
    "4",
    "--epochs",
    "1",
    "--length",
    "2",
]


def jpeg(seed: int, width: int = 40, height: int = 30) -> bytes:
    """A picture with structure, no two alike."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(
        buffer, "JPEG", quality=90
    )
    return buffer.getvalue()


def tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


KEYS = {  # how an image of class c is called in VPT's splits and in the archive, and its class id
    "cub": (
        lambda c, i: f"{c:03}.Bird_{c}/Bird_{i}.jpg",
        lambda c: f"{c:03}",
        "CUB_200_2011/images/",
    ),
    "nabirds": (
        lambda c, i: f"{290 + 7 * c:04}/{i:032x}.jpg",
        lambda c: 290 + 7 * c,
        "nabirds/images/",
    ),
    "flowers": (lambda c, i: f"jpg/image_{100 * c + i:05}.jpg", lambda c: c, ""),
    "dogs": (lambda c, i: f"n0{c}-Dog_{c}/n0{c}_{i}.jpg", lambda c: c, "Images/"),
    "cars": (lambda c, i: f"car_ims/{100 * c + i:06}.jpg", lambda c: c, ""),
}


def publish_fgvc(task: str, folder: Path, url: str, patch) -> None:
    """Three classes of 4 + 1 + 2 images in the layout of the real archive; val lacks class 2."""
    key, class_id, top = KEYS[task]
    source = benchmarks.SOURCES[task]
    parts = {"train": range(4), "val": range(4, 5), "test": range(5, 7)}
    splits = {
        split: {
            key(c, i): class_id(c) for c in (1, 2, 3) for i in numbers if (split, c) != ("val", 2)
        }
        for split, numbers in parts.items()
    }
    pictures = {f"{top}{key(c, i)}": jpeg(10 * c + i) for c in (1, 2, 3) for i in range(7)}
    tar(folder / source.archive, pictures)
    md5 = hashlib.md5((folder / source.archive).read_bytes()).hexdigest()
    urls = (f"{url}/gone.tgz", f"{url}/{source.archive}") if source.urls else ()
    patch.setitem(benchmarks.SOURCES, task, replace(source, urls=urls, checksum=f"md5:{md5}"))
    (folder / source.splits).mkdir()
    for split, images in splits.items():
        path = folder / source.splits / f"{split}.json"
        path.write_text(json.dumps(images))
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        patch.setitem(benchmarks.SPLIT_FILES, f"{source.splits}/{split}", {"sha256": sha256})
    patch.setattr(benchmarks, "SPLITS_URL", url)


def publish_vtab(tasks: list[str], folder: Path, url: str, patch) -> None:
    """The usual archive with some of its tasks: lists of `path label`, and the images of each."""
    with zipfile.ZipFile(folder / "vtab-1k.zip", "w") as archive:
        for task in tasks:
            lists = {
                "train800": range(6),
                "val200": range(6, 8),
                "train800val200": range(8),
                "test": range(8, 12),
            }
            for split, numbers in lists.items():
                names = [f"images/{split}/{i:06}.jpg" for i in range(len(numbers))]
                rows = [
                    f"{name} {number % 2}\n" for name, number in zip(names, numbers, strict=True)
                ]
                archive.writestr(f"vtab-1k/{task}/{split}.txt", "".join(rows))
                for name, number in zip(names, numbers, strict=True):
                    archive.writestr(f"vtab-1k/{task}/{name}", jpeg(number))
    source = replace(benchmarks.SOURCES["vtab-1k"], urls=(f"{url}/vtab-1k.zip",))
    patch.setitem(benchmarks.SOURCES, "vtab-1k", source)


def run(task: str, tmp_path: Path) -> int:
    return train.main(
        [
            "--task",
            task,
            "--data-dir",
            str(tmp_path / "data"),
            "--out",
            str(tmp_path / "out"),
            *SCRATCH,
        ]
    )


def prepare_or_train(task: str, tmp_path: Path) -> None:
    """Training is the same for all tasks, so three stand for it."""
    if task not in ("cub", "nabirds", "cifar"):
        load(task, tmp_path / "data", 32)
        return
    assert run(task, tmp_path) == 0
    assert "test" in json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("task", list(benchmarks.PUBLISHED))
def test_an_fgvc_task_goes_from_nothing_to_a_trained_prefix_and_is_not_fetched_or_decoded_again(
    task, site, tmp_path, monkeypatch, capsys
):
    publish_fgvc(task, site.folder, site.url, monkeypatch)
    if task in benchmarks.MANUAL:
        assert run(task, tmp_path) == 2
        error = capsys.readouterr().err
        assert "https://dl.allaboutbirds.org/nabirds" in error
        assert f"put nabirds.tar.gz, or the unpacked folder, into {tmp_path / 'data'}" in error
        (site.folder / "nabirds.tar.gz").rename(tmp_path / "data" / "nabirds.tar.gz")
    prepare_or_train(task, tmp_path)
    before, asked = files(tmp_path / "data"), len(site.log)
    dataset = load(task, tmp_path / "data", 32)
    assert {name: len(split) for name, split in dataset.splits.items()} == {
        "train": 12,
        "val": 2,
        "test": 6,
    }
    assert (files(tmp_path / "data"), len(site.log)) == (before, asked)
    assert asked >= 3  # the three split files at least


@pytest.mark.parametrize("task", ["cifar", "svhn", "eurosat", "kitti", "dsprites_loc"])
def test_a_vtab_task_goes_from_nothing_to_a_trained_prefix_and_is_not_fetched_or_decoded_again(
    task, site, tmp_path, monkeypatch
):
    publish_vtab([task], site.folder, site.url, monkeypatch)
    prepare_or_train(task, tmp_path)
    before = files(tmp_path / "data")
    dataset = load(task, tmp_path / "data", 32)
    assert dataset.count("trainval") == 8
    assert len(dataset.classes) == data.TASKS[task].classes  # of the table; the lists name two
    assert (files(tmp_path / "data"), site.log) == (before, [("/vtab-1k.zip", 0)])


PAPER = {  # task: (train, val, test, classes), as the paper prints them
    "cub": (5394, 600, 5794, 200),
    "nabirds": (21536, 2393, 24633, 555),
    "flowers": (1020, 1020, 6149, 102),
    "dogs": (10800, 1200, 8580, 120),
    "cars": (7329, 815, 8041, 196),
}
TOTALS = {"cub": 11_788, "nabirds": 48_562, "flowers": 8_189, "dogs": 20_580, "cars": 16_185}


@pytest.mark.parametrize("task", PAPER)
def test_the_recorded_splits_have_the_paper_s_sizes_and_sha256_of_their_own(task):
    names = [f"{benchmarks.SOURCES[task].splits}/{split}" for split in benchmarks.SPLITS]
    checksums = [benchmarks.SPLIT_FILES[name]["sha256"] for name in names]
    assert all(len(bytes.fromhex(checksum)) == 32 for checksum in checksums)
    found = data.TASKS[task]
    assert (*found.sizes.values(), found.classes) == PAPER[task]
    assert sum(found.sizes.values()) == TOTALS[task]
    assert len({row["sha256"] for row in benchmarks.SPLIT_FILES.values()}) == 15


def test_vtab_has_its_19_tasks_in_three_groups():
    groups = {
        name: task.group for name, task in data.TASKS.items() if task.group.startswith("VTAB")
    }
    sizes = [
        list(groups.values()).count(f"VTAB-1K {group}")
        for group in ("natural", "specialized", "structured")
    ]
    assert sizes == [7, 4, 8]
    assert all(
        data.TASKS[name].final == "trainval" and not data.TASKS[name].augment for name in groups
    )


@pytest.mark.parametrize(
    ("task", "options", "expected"),
    [
        ("cub", {"share": "deep"}, (10, 25, 1e-4)),
        ("cub", {"share": "none", "shallow": True}, (100, 10, 1e-4)),
        ("nabirds", {"share": "simple", "shallow": True}, (50, 1, 0)),
        ("flowers", {"share": "simple"}, (5, 50, 1e-3)),
        ("dogs", {"share": "deep", "shallow": True}, (100, 0.1, 1e-4)),
        ("cars", {"share": "none"}, (200, 50, 0)),
    ],
)
def test_published_settings_are_the_defaults_and_what_the_user_passes_wins(task, options, expected):
    config = train.resolve(train.Config(task=task, **options))
    assert (config.length, config.lr, config.wd, config.epochs) == (*expected, 100)
    config = train.resolve(train.Config(task=task, **options, lr=0.7, length=3))
    assert (config.length, config.lr, config.wd) == (3, 0.7, expected[2])


def test_classes_are_numbered_by_the_train_split_even_if_another_split_lacks_one(
    site, tmp_path, monkeypatch
):
    publish_fgvc("nabirds", site.folder, site.url, monkeypatch)
    (tmp_path / "data").mkdir()
    (site.folder / "nabirds.tar.gz").rename(tmp_path / "data" / "nabirds.tar.gz")
    splits = load("nabirds", tmp_path / "data", 32).splits
    assert sorted(set(splits["train"].index[:, 3])) == [0, 1, 2]
    assert sorted(splits["val"].index[:, 3]) == [
        0,
        2,
    ]  # ranked within val alone, the last would be 1


@pytest.mark.parametrize("layout", ["", "cub", "CUB_200_2011", "cub/CUB_200_2011"])
def test_a_folder_that_the_user_has_is_found_and_nothing_is_downloaded(
    layout, site, tmp_path, monkeypatch
):
    publish_fgvc("cub", site.folder, site.url, monkeypatch)
    home = tmp_path / "data" / layout
    home.mkdir(parents=True)
    with tarfile.open(site.folder / "CUB_200_2011.tgz") as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (tmp_path / "unpacked" / "CUB_200_2011" / "images").rename(home / "images")
    for split in benchmarks.SPLITS:
        (site.folder / "cub" / f"{split}.json").rename(home / f"{split}.json")
    assert load("cub", tmp_path / "data", 32).count("train") == 12
    assert site.log == []


def test_a_split_file_that_names_a_missing_image_is_one_sentence(
    site, tmp_path, monkeypatch, capsys
):
    publish_fgvc("cub", site.folder, site.url, monkeypatch)
    load("cub", tmp_path / "data", 32)
    missing = next((tmp_path / "data").rglob("Bird_2.jpg"))
    missing.unlink()
    assert run("cub", tmp_path) == 2
    error = capsys.readouterr().err
    assert f"{missing} belongs to cub" in error


def test_the_task_list_and_the_preparation_of_one_task_print_what_they_found(
    site, tmp_path, monkeypatch, capsys
):
    publish_fgvc("flowers", site.folder, site.url, monkeypatch)
    words = ["--data-dir", str(tmp_path / "data")]
    assert data.main(words) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in data.TASKS)
    assert "https://dl.allaboutbirds.org/nabirds" in listed
    assert data.main(["flowers", *words, "--size", "32"]) == 0
    described = capsys.readouterr().out
    assert "train      12 images, 4 to 4 per class" in described
    # The picture has the training images in the order of their classes, 2 pixels apart.
    train = load("flowers", tmp_path / "data", 32)
    with Image.open(tmp_path / "data" / "flowers.png") as sheet:
        pixels = np.asarray(sheet)
    tiles = [pixels[2 + 34 * (i // 8) :, 2 + 34 * (i % 8) :][:32, :32] for i in range(12)]
    mine, labels = next(train.batches("train", 12))
    order = labels.argsort(stable=True)
    assert sorted(tile.tobytes() for tile in tiles[:4]) == sorted(
        mine[i].numpy().tobytes() for i in order[:4]
    )
    assert sorted(tile.tobytes() for tile in tiles[8:]) == sorted(
        mine[i].numpy().tobytes() for i in order[8:]
    )
    assert data.main(words) == 0
    assert re.search(r"^flowers .* ready$", capsys.readouterr().out, re.MULTILINE)
    assert data.main(["flowerz", *words]) == 2
    assert "did you mean 'flowers'" in capsys.readouterr().err
