"""Folders of your own images: what is read, what is left out, what is refused in a sentence."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data as module
from data import ASSETS, Dataset, UsageError, canonical, load, title
from support.images import image_files, read_image

SIZE = 16


def colour(path: Path, label: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), ((220, 40, 40), (40, 220, 40), (40, 40, 220))[label]).save(path)


def classes(folder: Path, names: str = "abc", count: int = 12) -> Path:
    """A folder per class, each of one colour."""
    for label, name in enumerate(names):
        for i in range(count):
            colour(folder / name / f"{i:02}.png", label)
    return folder


def read(folder: Path) -> Dataset:
    return load(str(folder), folder.parent / "data", SIZE)


def counts(data: Dataset) -> dict[str, int]:
    return {name: len(split) for name, split in data.splits.items()}


def colours_are_right(data: Dataset) -> bool:
    """Whether every image has its class's colour as its brightest channel."""
    return all(
        split.image(i).mean((0, 1)).argmax() == split.labels[i]
        for split in data.splits.values()
        for i in range(len(split))
    )


# Splits.


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val", "test"),
        ("Train", "Val", "Test"),
        ("TRAINING", "Validation", "Testing"),
        ("training_set", "valid", "test-data"),
    ],
)
def test_folders_with_the_names_of_splits_are_splits_in_any_usual_spelling(names, tmp_path):
    for name, count in zip(names, (4, 2, 3), strict=True):
        classes(tmp_path / "mine" / name, count=count)
    data = read(tmp_path / "mine")
    assert counts(data) == {"train": 12, "val": 6, "test": 9}
    assert data.classes == ["a", "b", "c"]
    assert data.listing is None
    assert colours_are_right(data)


def test_a_train_can_also_be_a_vehicle(tmp_path):
    folder = tmp_path / "vehicles"
    for label, name in enumerate(("bus", "car", "train")):
        for i in range(10):
            colour(folder / name / f"{i}.png", label)
    data = read(folder)
    assert data.classes == ["bus", "car", "train"]
    assert counts(data) == {"train": 24, "val": 3, "test": 3}


@pytest.mark.parametrize(
    "names", [("train", "test", "notes"), ("val", "test"), ("train", "training", "test")]
)
def test_what_may_be_splits_or_classes_is_asked_and_not_guessed(names, tmp_path):
    for name in names:
        classes(tmp_path / "mine" / name)
    with pytest.raises(UsageError, match="are these splits or classes"):
        read(tmp_path / "mine")


def test_without_val_a_tenth_of_train_becomes_val_and_a_line_says_so(tmp_path, capsys):
    for split in ("train", "test"):
        classes(tmp_path / "mine" / split, count=20)
    data = read(tmp_path / "mine")
    assert "no folder for val: val is a tenth of train" in capsys.readouterr().err
    assert counts(data) == {"train": 54, "val": 6, "test": 60}
    assert np.bincount(data.splits["val"].labels).tolist() == [2, 2, 2]
    assert not set(data.listing["train"]) & set(data.listing["val"])
    assert colours_are_right(data)
    assert read(tmp_path / "mine").listing == data.listing


def test_without_test_val_is_tested_on_and_a_tenth_of_train_becomes_val(tmp_path, capsys):
    classes(tmp_path / "mine" / "train", count=20)
    classes(tmp_path / "mine" / "val", count=5)
    data = read(tmp_path / "mine")
    assert "val is tested on, and a tenth of train becomes val" in capsys.readouterr().err
    assert counts(data) == {"train": 54, "val": 6, "test": 15}
    assert all(file.startswith("val/") for file in data.listing["test"])
    assert all(file.startswith("train/") for file in data.listing["val"])
    assert colours_are_right(data)


def test_one_folder_level_too_high_is_refused_with_the_folder_that_was_meant(tmp_path):
    classes(tmp_path / "download" / "photos")
    (tmp_path / "download" / "__MACOSX").mkdir()
    meant = re.escape(str(tmp_path / "download" / "photos"))
    with pytest.raises(UsageError, match=rf"has one class, 'photos', .* name {meant}$"):
        read(tmp_path / "download")
    for split in ("train", "val", "test"):
        classes(tmp_path / "deep" / split / "images")
    with pytest.raises(UsageError, match=r"has one class, 'images', .*name .*deep/train/images$"):
        read(tmp_path / "deep")
    classes(tmp_path / "alone", "a")
    with pytest.raises(UsageError, match="put a folder for each class into it"):
        read(tmp_path / "alone")
    classes(tmp_path / "only" / "train")
    with pytest.raises(UsageError, match=r"has one class, 'train', .*name .*only/train$"):
        read(tmp_path / "only")


def test_classes_without_images_or_without_training_images_are_named(tmp_path):
    for split in ("train", "val", "test"):
        classes(tmp_path / "mine" / split, count=1)
    (tmp_path / "mine" / "train" / "empty").mkdir()
    with pytest.raises(UsageError, match="train/empty holds no images"):
        read(tmp_path / "mine")
    (tmp_path / "mine" / "train" / "empty").rmdir()
    (tmp_path / "mine" / "test" / "c").rename(tmp_path / "mine" / "test" / "y")
    with pytest.raises(UsageError, match="has the class 'y'"):
        read(tmp_path / "mine")
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="needs a folder of images per class"):
        read(tmp_path / "none")
    with pytest.raises(UsageError, match="9 images are too few"):
        read(classes(tmp_path / "few", count=3))


def test_a_split_made_here_is_obeyed_when_it_lies_in_the_folder(tmp_path):
    for split in ("train", "test"):
        classes(tmp_path / "mine" / split)
    listing = read(tmp_path / "mine").listing
    listing["val"], listing["test"] = listing["test"], listing["val"]
    (tmp_path / "mine" / "split.json").write_text(json.dumps(listing))
    assert read(tmp_path / "mine").listing == listing


# Files that are no data.


def test_hidden_files_and_what_systems_leave_behind_are_no_data(tmp_path, capsys):
    folder = classes(tmp_path / "mine")
    expected = read(folder)
    shutil.copytree(folder / "a", folder / ".thumbnails")
    shutil.copytree(folder / "a", folder / "a" / ".ipynb_checkpoints")
    shutil.copytree(folder / "a", folder / "a" / "@eaDir")
    shutil.copytree(folder / "a", folder / "__MACOSX" / "a")
    (folder / "b" / "._00.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(50))
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (folder / "b" / name).write_bytes(b"x")
    data = read(folder)
    assert (data.listing, data.identity) == (expected.listing, expected.identity)
    assert capsys.readouterr().err == ""


def test_files_left_out_are_counted_in_a_line(tmp_path, capsys):
    folder = classes(tmp_path / "mine")
    for file in sorted((folder / "a").iterdir())[1:]:
        file.rename(file.with_suffix(".heic"))
    assert sum(counts(read(folder)).values()) == 25
    assert "11 files ignored: .heic\n" in capsys.readouterr().err
    (folder / "a" / "LABELS").touch()
    colour(folder / "loose.png", 0)
    read(folder)
    assert "13 files ignored: .heic, images in no class, no ending" in capsys.readouterr().err


@pytest.mark.parametrize("ending", [".gif", ".jfif", ".avif", ".tif", ".webp", ".JPG", ".bmp"])
def test_the_usual_endings_are_read(ending, tmp_path, capsys):
    folder = classes(tmp_path / "mine")
    kind = {".jfif": "JPEG", ".jpg": "JPEG", ".tif": "TIFF"}.get(ending.lower(), ending[1:])
    for file in folder.rglob("*.png"):
        with Image.open(file) as image:
            image.save(file.with_suffix(ending), kind)
        file.unlink()
    data = read(folder)
    assert sum(counts(data).values()) == 36
    assert colours_are_right(data)
    assert capsys.readouterr().err == ""


def test_links_that_lead_in_circles_do_not_multiply_images(tmp_path):
    folder = classes(tmp_path / "mine")
    expected = read(folder).identity
    (folder / "a" / "self").symlink_to(folder / "a")
    (folder / "a" / "up").symlink_to("..")
    (folder / "b" / "root").symlink_to(tmp_path.parent)
    (folder / "b" / "other").symlink_to(folder / "c")
    assert read(folder).identity == expected
    (folder / "c").rename(tmp_path / "elsewhere")
    (folder / "c").symlink_to(tmp_path / "elsewhere")  # a link that leads in no circle is followed
    (folder / "b" / "other").unlink()
    assert read(folder).identity == expected


def test_the_order_of_images_is_torchvision_s(tmp_path):
    for name in ("a/2.png", "a/sub/1.png", "a-b/3.png", "a/1.png", "a/sub-x/9.png", "b/1.png"):
        colour(tmp_path / name, 0)
    torchvision = pytest.importorskip("torchvision.datasets").ImageFolder(tmp_path)
    expected = [Path(path).relative_to(tmp_path).as_posix() for path, _ in torchvision.samples]
    assert image_files(tmp_path)[0] == expected


def test_all_broken_and_missing_images_are_named_at_once_up_to_ten(tmp_path):
    folder = classes(tmp_path / "mine")
    broken = sorted((folder / "b").iterdir())
    for path in broken[:5]:
        path.write_bytes(b"")
    with pytest.raises(UsageError) as caught:
        read(folder)
    assert [str(path) in str(caught.value) for path in broken] == [True] * 5 + [False] * 7
    assert not list((tmp_path / "data").rglob("*.part"))
    for path in broken:
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UsageError, match=r"the first 10") as caught:
        read(folder)
    assert sum(f"{path} cannot be read as an image" in str(caught.value) for path in broken) == 10
    shutil.rmtree(folder / "b")
    classes(folder)
    for i in range(3):
        (folder / "b" / f"{i:02}.png").unlink()
        (folder / "b" / f"{i:02}.png").symlink_to("nowhere")
    os.mkfifo(folder / "b" / "pipe.png")  # opening it would wait for ever
    with pytest.raises(UsageError) as caught:
        read(folder)
    assert str(caught.value).count("there is no such file") == 4


# Names.


def test_a_name_that_is_not_utf_8_works(tmp_path, capsys):
    folder = classes(tmp_path / "mine")
    (folder / "c").rename(os.fsdecode(os.fsencode(folder / "caf") + b"\xe9"))
    assert module.main([str(folder), "--data-dir", str(tmp_path / "data"), "--size", "16"]) == 0
    assert "3 classes" in capsys.readouterr().out
    data = read(folder)
    assert data.classes[2] == "caf\udce9"
    assert json.loads(json.dumps(data.listing)) == data.listing


def test_a_task_does_not_depend_on_how_its_path_was_typed(tmp_path, monkeypatch):
    classes(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    names = [
        "photos",
        "photos/",
        "./photos",
        str(tmp_path / "photos"),
        "../" + tmp_path.name + "/photos",
    ]
    assert {canonical(name) for name in names} == {str(tmp_path / "photos")}
    assert {title(name) for name in names} == {"photos"}
    assert len({json.dumps(load(name, "data", SIZE).identity) for name in names}) == 1
    assert len(list(Path("data", "cache").glob("*.pixels"))) == 3
    assert canonical("digits") == title("digits") == "digits"


def test_the_identity_of_a_folder_is_its_content_and_not_its_time_or_place(tmp_path):
    folder = classes(tmp_path / "mine")
    first = read(folder).identity
    assert set(first) == {"classes", "train", "val", "test"}
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert read(tmp_path / "copy").identity == first

    # Each change is seen, in the part that it concerns.
    file = next(iter(read(folder).listing["val"]))
    colour(folder / file, 1 if file[0] != "b" else 2)
    changed = read(folder).identity
    assert {name for name in first if first[name] != changed[name]} == {"val"}
    shutil.copytree(tmp_path / "copy", folder, dirs_exist_ok=True)
    assert read(folder).identity == first
    (folder / "c").rename(folder / "d")
    assert read(folder).identity["classes"] != first["classes"]
    (folder / "d").rename(folder / "c")
    colour(folder / "c" / "new.png", 2)
    assert read(folder).identity["train"] != first["train"]


def test_the_identity_of_digits_is_fixed_and_its_file_can_be_classified(tmp_path):
    data = load("digits", tmp_path, 32)
    assert data.identity == load("digits", tmp_path, 32).identity
    assert data.identity["train"] != load("digits", tmp_path, 16).identity["train"]
    assert len({*data.identity.values()}) == 4
    # The digit that the README shows is the first test image, a 2, read as the task's images are.
    assert data.splits["test"].labels[0] == 2
    pixels = read_image(ASSETS / "digit.png", data.resize)
    assert np.array_equal(pixels, data.splits["test"].image(0))


# Grey of more than eight bits.


def brightness(path: Path) -> list[int]:
    return read_image(path, (1, 3))[0, :, 0].tolist()


def test_16_bit_grey_is_scaled_by_the_range_of_its_type(tmp_path):
    row = np.array([[0, 32768, 65535]], np.uint16)
    Image.fromarray(row).save(tmp_path / "a.png")
    Image.fromarray(row).save(tmp_path / "a.tif")
    Image.fromarray(row.astype(">u2")).save(tmp_path / "big_endian.tif")
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 65535\n" + row.astype(">u2").tobytes())
    Image.fromarray(row.astype(np.int32) << 15).save(tmp_path / "32_bits.tif")
    found = {path.name: brightness(path) for path in tmp_path.iterdir()}
    assert set(map(tuple, found.values())) == {(0, 128, 255)}, found


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), "it holds floats"),
        (np.array([[-5, 0, 5]], np.int32), "its values from -5 to 5 do not use the 31 bits"),
        (np.array([[0, 100, 255]], np.int32), "its values from 0 to 255 do not use the 31 bits"),
    ],
)
def test_what_cannot_be_shown_in_8_bits_is_refused(values, reason, tmp_path):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=f"a.tif cannot be read as an image .{reason}"):
        read_image(tmp_path / "a.tif", (1, 3))


def test_16_bit_classes_are_told_apart_in_training_pixels(tmp_path):
    for label, name in enumerate("abc"):
        (tmp_path / "grey" / name).mkdir(parents=True)
        for i in range(12):
            values = np.full((20, 20), 10_000 + 20_000 * label + i, np.uint16)
            Image.fromarray(values).save(tmp_path / "grey" / name / f"{i}.png")
    train = read(tmp_path / "grey").splits["train"]
    seen = {int(train.labels[i]): int(train.image(i).mean()) for i in range(len(train))}
    assert seen == {0: 39, 1: 117, 2: 195}  # 10,000, 30,000 and 50,000 of 65,536
