"""What somebody made to do harm is refused in one sentence: it is not run, unpacked or followed."""

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import data
import sweep
import train
from data import UsageError, load, title
from extras import sample
from support.files import obtain
from support.images import prepare
from train import Config, resolve
from vit import TINY

# Archives.


def tar(path: Path, *members: tarfile.TarInfo) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            content = bytes(member.size) if member.size else b"data" if member.isreg() else b""
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def member(name: str, **values) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    for key, value in values.items():
        setattr(made, key, value)
    return made


def in_zip(name: str, mode: int = 0o100644) -> zipfile.ZipInfo:
    made = zipfile.ZipInfo(name)
    made.external_attr = mode << 16
    return made


MEMBERS = {
    "tar, an absolute path": member("/tmp/evil"),
    "tar, an upward path": member("images/../../evil"),
    "tar, a symbolic link": member("images/link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "tar, a hard link": member("images/link", type=tarfile.LNKTYPE, linkname="images/a.jpg"),
    "tar, a device": member("images/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    "tar, a pipe": member("images/pipe", type=tarfile.FIFOTYPE),
}
IN_ZIP = {
    "an absolute path": in_zip("/tmp/evil"),
    "an upward path": in_zip("images/../../evil"),
    "a symbolic link": in_zip("images/link", 0o120777),
    "a device": in_zip("images/null", 0o020666),
}


def zipped(path: Path, hostile: zipfile.ZipInfo) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images/a.jpg", b"data")
        archive.writestr(hostile, b"/etc/passwd", zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize("kind", MEMBERS)
def test_a_hostile_tar_file_is_refused_whole(kind, tmp_path):
    tar(tmp_path / "a.archive", member("images/a.jpg"), MEMBERS[kind])
    with pytest.raises(UsageError, match="do not use this archive"):
        obtain(tmp_path / "out", tmp_path / "a.archive", [], None)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "evil").exists()
    assert not Path("/tmp/evil").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


@pytest.mark.parametrize("kind", IN_ZIP)
def test_a_hostile_zip_file_becomes_plain_files_in_its_folder(kind, tmp_path):
    zipped(tmp_path / "a.archive", IN_ZIP[kind])
    out = obtain(tmp_path / "out", tmp_path / "a.archive", [], None)
    files = [path for path in out.rglob("*") if not path.is_dir()]
    assert sorted(path.read_bytes() for path in files) == [b"/etc/passwd", b"data"]
    assert not [path for path in files if path.is_symlink()]
    assert not (tmp_path / "evil").exists()
    assert not Path("/tmp/evil").exists()


def test_an_archive_with_a_password_or_with_two_files_in_one_place_is_one_sentence(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("images/a.jpg", b"data")
    raw = bytearray((tmp_path / "a.zip").read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(signature) + offset] |= 1  # encrypted
    (tmp_path / "a.zip").write_bytes(raw)
    with pytest.raises(UsageError, match=r"is damaged .*password"):
        obtain(tmp_path / "out", tmp_path / "a.zip", [], None)
    tar(
        tmp_path / "b.tgz", member("images"), member("images/a.jpg")
    )  # a file that is to be a folder
    with pytest.raises(UsageError, match="cannot be written"):
        obtain(tmp_path / "out", tmp_path / "b.tgz", [], None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a.tgz", "a.zip"])
def test_an_archive_with_changed_bytes_is_refused_in_one_sentence_or_unpacked(name, tmp_path):
    if name == "a.tgz":
        tar(tmp_path / name, member("images/a.jpg"), member("b"))
    else:
        zipped(tmp_path / name, in_zip("b"))
    content, refused = (tmp_path / name).read_bytes(), 0
    for seed in range(60):
        changed, rng = bytearray(content), np.random.default_rng(seed)
        changed[rng.integers(len(content))] = rng.integers(256)
        (tmp_path / name).write_bytes(changed)
        for leftover in tmp_path.glob("*.sha256"):
            leftover.unlink()
        try:
            obtain(tmp_path / f"out{seed}", tmp_path / name, [], None)
        except UsageError:
            refused += 1
    assert refused > 20


# Images.


def png_bomb(path: Path, width: int, height: int) -> None:
    """A few kB that say they are a picture of width x height grey pixels, and are."""
    rows = zlib.compress(bytes(height * (width // 8 + 1)), 9)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", rows),
        (b"IEND", b""),
    )
    raw = b"".join(
        struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + raw)


def jpeg_bomb(path: Path) -> None:
    """A picture of 16 x 16 whose header says 65,500 x 65,500."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    raw = bytearray(buffer.getvalue())
    at = raw.index(b"\xff\xc0") + 5
    raw[at : at + 4] = struct.pack(">HH", 65_500, 65_500)
    path.write_bytes(raw)


BOMBS = {
    "png": lambda path: png_bomb(path, 20_000, 20_000),
    "jpeg": jpeg_bomb,
}


@pytest.mark.parametrize("kind", BOMBS)
def test_an_image_that_would_fill_the_memory_is_refused_by_its_name(kind, tmp_path):
    (tmp_path / "images").mkdir()
    BOMBS[kind](tmp_path / "images" / "bomb.png")
    assert (tmp_path / "images" / "bomb.png").stat().st_size < 10**5
    with pytest.raises(UsageError, match=r"bomb\.png cannot be read as an image"):
        prepare(tmp_path / "cache", "t", tmp_path / "images", [("bomb.png", 0)], 256)


# Weights.


class Payload:
    """What a hostile pickle does when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["a.safetensors", "a.npz", "a.pt", "a.bin"])
def test_a_pickle_where_weights_are_expected_is_refused_and_not_run(name, tmp_path, capsys):
    ran = tmp_path / "ran"
    (tmp_path / name).write_bytes(pickle.dumps({"cls": Payload(ran)}))
    assert train.main(["--backbone", str(tmp_path / name), "--out", str(tmp_path / "run")]) == 2
    assert name in capsys.readouterr().err
    np.savez(
        tmp_path / "b.npz",
        **{"cls": np.array([Payload(ran)], dtype=object), "embedding/kernel": np.zeros(3)},
    )
    assert train.main(["--backbone", str(tmp_path / "b.npz"), "--out", str(tmp_path / "run")]) == 2
    assert not ran.exists()
    pickle.loads((tmp_path / name).read_bytes())
    assert ran.exists()  # so it would have run


def test_a_pickle_in_the_place_of_a_checkpoint_or_an_asset_is_refused_and_not_run(
    tmp_path, capsys, monkeypatch
):
    ran, out = tmp_path / "ran", tmp_path / "run"
    out.mkdir()
    config = resolve(Config(out=str(out), device="cpu"))
    backbone = train.load_backbone(config)
    identity = {"config": vars(config), "fingerprint": backbone.fingerprint}
    identity["data"] = data.load("digits", image_size=32).identity
    (out / "config.json").write_text(json.dumps(identity))
    torch.save({"model": Payload(ran), "optimizer": {}, "history": []}, out / "state.pt")
    assert train.main(["--out", str(out), "--device", "cpu"]) == 2
    assert "cannot be resumed" in capsys.readouterr().err
    monkeypatch.setattr(data, "ASSETS", tmp_path)
    for content in (
        np.array([Payload(ran)], dtype=object),
        np.array({"images": Payload(ran)}, dtype=object),
    ):
        np.savez(tmp_path / "digits.npz", images=content, labels=content)
        assert train.main(["--out", str(tmp_path / "other")]) == 2
        assert "digits.npz is missing or damaged" in capsys.readouterr().err
    assert not ran.exists()


def claims(**sizes) -> str:
    return json.dumps(TINY | sizes)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LIES = {  # what a header says of a file with two numbers in it, or of a model that is made of them
    "more data than there is": {"a": F32 | {"shape": [2**40], "data_offsets": [0, 2**42]}},
    "a shape of another size": {"a": F32 | {"shape": [2**20]}},
    "offsets that overlap": {"a": F32, "b": F32},
    "offsets that go back": {"a": F32 | {"data_offsets": [8, 0]}},
    "a type that there is not": {"a": F32 | {"dtype": "PICKLE"}},
    "a model of 10^15 parameters": claims(dim=10**7),
    "a model of 10^9 layers": claims(n_layer=10**9),
    "sizes that are none": claims(image="x", n_head=[]),
    "no patches": claims(patch=0),
    "brackets without end": "[" * 10**5,
}


@pytest.mark.parametrize("kind", LIES)
def test_a_safetensors_header_that_lies_is_refused_in_one_sentence(kind, tmp_path, capsys):
    header = (
        LIES[kind]
        if isinstance(LIES[kind], dict)
        else {"__metadata__": {"vit": LIES[kind]}, "a": F32}
    )
    raw = json.dumps(header).encode()
    for length in (len(raw), 2**63):  # the second lies about its own length as well
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + raw + bytes(8))
        assert (
            train.main(
                ["--backbone", str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "run")]
            )
            == 2
        )
        error = capsys.readouterr().err
        assert error.startswith("error: the backbone ")
        assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_version_or_with_facts_that_are_none_is_one_sentence(tmp_path, capsys):
    facts = {
        "config": {"task": "digits", "unheard_of": 1},
        "fingerprint": "",
        "classes": [],
        "history": [],
    }
    for strings in (
        {name: json.dumps(value) for name, value in facts.items()},
        dict.fromkeys(facts, "[" * 10**5),
    ):
        save_file({"a": torch.zeros(1)}, tmp_path / "prefix.safetensors", strings)
        assert sample.main([str(tmp_path), "a.png"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {tmp_path} ")
        assert error.count("\n") == 1


# Names.


def own(folder: Path, count: int = 12) -> Path:
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 20), (i, 0, 0)).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a/../../secret.png", "a/\0.png", "\ud800.png"]
)
def test_a_split_that_names_a_file_outside_its_folder_is_refused(name, tmp_path):
    folder = own(tmp_path / "mine")
    Image.new("RGB", (20, 20)).save(tmp_path / "secret.png")
    listing = load(str(folder), tmp_path / "data", 16).listing
    listing["test"][name] = "a"
    (folder / "split.json").write_text(json.dumps(listing))
    with pytest.raises(UsageError, match=r"split\.json must give .*mend or delete it"):
        load(str(folder), tmp_path / "data", 16)


def test_a_split_with_an_image_in_two_parts_or_under_another_class_is_refused(tmp_path):
    folder = own(tmp_path / "mine")
    listing = load(str(folder), tmp_path / "data", 16).listing
    image = next(iter(listing["train"]))
    for change, reason in (
        ({"test": {image: "a"}}, "an image is in two splits"),
        ({"train": {image: "b"}}, "not in the folder"),
        ({"val": {}}, "a split is empty"),
        ({"val": [image]}, "has no attribute"),
    ):
        (folder / "split.json").write_text(json.dumps(listing | change))
        with pytest.raises(UsageError, match=reason):
            load(str(folder), tmp_path / "data", 16)


def test_a_list_of_vtab_with_other_labels_is_refused_and_a_changed_one_is_other_data(tmp_path):
    base = tmp_path / "data" / "vtab-1k" / "kitti"
    base.mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(base / "a.png")
    for name, rows in {"train800": 4, "val200": 1, "test": 3}.items():
        (base / f"{name}.txt").write_text("a.png 1\n" * rows)
    known = load("kitti", tmp_path / "data", 16)
    assert known.count("test") == 3
    (base / "test.txt").write_text("a.png 1\na.png 1\na.png 2\n")  # a digit was turned
    changed = load("kitti", tmp_path / "data", 16).identity
    assert {name for name in changed if changed[name] != known.identity[name]} == {"test"}
    for line in ("a.png 4", "a.png -1", "a.png", "a.png x"):
        (base / "test.txt").write_text(f"{line}\n")
        with pytest.raises(UsageError, match=r"test\.txt is no list of images and labels"):
            load("kitti", tmp_path / "data", 16)


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", "../../etc/passwd"])
def test_a_task_with_path_separators_is_no_task_and_leads_nowhere(
    name, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(own(tmp_path / "work" / "here"))
    for script, option in ((train, "--task"), (sweep, "--tasks")):
        assert script.main([option, name, "--backbone", "nowhere.npz"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert "/" not in title(name)
    assert title(name) != ".."
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["here"]
    assert sorted(path.name for path in Path().iterdir()) == ["a", "b"]


def test_a_folder_beside_or_above_this_one_gets_its_results_in_out_and_nowhere_else(
    tmp_path, monkeypatch
):
    own(tmp_path / "mine")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = {path.relative_to(tmp_path) for path in (tmp_path / "mine").rglob("*")}
    words = [
        "--backbone",
        "scratch",
        "--epochs",
        "1",
        "--length",
        "2",
        "--device",
        "cpu",
        "--lr",
        "1",
        "--wd",
        "0",
    ]
    codes = []
    for task in ("../mine", str(tmp_path / "mine"), "../here/../mine"):
        codes.append(train.main(["--task", task, *words]))
        codes.append(sweep.main(["--tasks", task, *words, "--seed", "1", "--methods", "probe"]))
    assert codes == [0] * 6  # however its path is typed, it is one task
    assert {path.name for path in Path().iterdir()} == {"out", "data"}
    assert {path.name for path in Path("out").iterdir()} == {"mine", "sweep"}
    assert {path.relative_to(tmp_path) for path in (tmp_path / "mine").rglob("*")} == before
