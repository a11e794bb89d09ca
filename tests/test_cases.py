"""What people trip over, through the real commands in one process: no traceback, no wrong number.

A case is a list of steps in a folder of its own: a command with its exit code and a part of what
it says, or a change to a file. The right values follow from how the inputs are made: the colour of
an image tells its class, so a run that sees the right pixels and labels is right on all of them.
"""

import gzip
import json
import os
import shlex
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

COLOURS = ((220, 40, 40), (40, 220, 40), (40, 40, 220))
# Options of every command, before its own.
IMAGES = "--backbone vit.safetensors --epochs 8 --batch 4 --length 2 --lr 2 --wd 0 --device cpu"
TEXTS = "--backbone scratch_gpt --epochs 1 --length 2 --lr 0.001 --device cpu --beams 1"
SWEEP = "--backbone vit.safetensors --epochs 2 --length 2 --lr 1 --wd 0 --device cpu --seed 1 2"
OPTIONS = {"train": f"{IMAGES} --out run --task", "sweep": f"{SWEEP} --workers 1 --tasks"}
OPTIONS |= {"texts": f"{TEXTS} --out run --task", "data": "--size 16", "sample": ""}
SCRIPTS = {"texts": "train", "sample": "extras.sample"}


def picture(label: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    return Image.new("RGB", size, COLOURS[label % 3])


def classes(folder: str, names: str = "a b c", count: int = 12, **saving) -> None:
    """A folder per class, each of one colour."""
    for label, name in enumerate(names.split()):
        Path(folder, name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(label).save(Path(folder, name, f"{i:02}.png"), **saving)


def splits(folder: str, names: str) -> None:
    for name in names.split():
        classes(f"{folder}/{name}")


def recoloured(folder: str, convert: Callable[[Image.Image], Image.Image], ending: str) -> None:
    """The same classes with images of another mode or format."""
    classes(folder)
    for path in Path(folder).rglob("*.png"):
        image = convert(Image.open(path))
        path.unlink()
        image.save(path.with_suffix(ending))


def grey16(folder: str) -> None:
    """Brightness tells the classes apart, in 16 bits."""
    classes(folder)
    for label, name in enumerate("abc"):
        for path in Path(folder, name).iterdir():
            values = np.full((20, 24), 5_000 + 25_000 * label, np.uint16)
            Image.fromarray(values).save(path)


def pairs(path: str, count: int = 20, **changed) -> None:
    """Pairs of texts, a line each; `changed` replaces what is written between and around them."""
    lines = [json.dumps({"source": f"name : R{i}", "target": f"R{i}."}) for i in range(count)]
    text = changed.get("start", "") + changed.get("between", "\n").join(lines)
    raw = (text + changed.get("end", "\n")).encode()
    Path(path).write_bytes(gzip.compress(raw) if path.lower().endswith("gz") else raw)


def other_weights(path: str) -> None:
    """The backbone's file now holds other weights."""
    state = {name: value + 0.01 for name, value in load_file(path).items()}
    save_file(
        state,
        path,
        {"vit": json.dumps({"image": 16, "patch": 8, "dim": 16, "n_layer": 3, "n_head": 2})},
    )


def normalised_otherwise(path: str) -> None:
    """The backbone's file now says another mean of its pixels; its weights stay."""
    sizes = {"image": 16, "patch": 8, "dim": 16, "n_layer": 3, "n_head": 2, "mean": [0.5] * 3}
    save_file(load_file(path), path, {"vit": json.dumps(sizes)})


def swapped_splits() -> None:
    """The run's own split, with val and test in each other's place, lies in the folder."""
    listing = json.loads(Path("run/split.json").read_text())
    listing["val"], listing["test"] = listing["test"], listing["val"]
    Path("it/split.json").write_text(json.dumps(listing))


def swap(first: str, second: str) -> None:
    content = Path(first).read_bytes()
    Path(first).write_bytes(Path(second).read_bytes())
    Path(second).write_bytes(content)


RIGHT = (0, "test accuracy 100.00 % of")


def changed(change, says: str) -> list:
    """A run, a change to its data, and the same command: it must say what changed."""
    return [lambda: classes("it"), ("train it", *RIGHT), change, ("train it", 2, says)]


CASES: dict[str, list] = {}

# Images: what is read.
CASES |= {
    "plain": [
        lambda: classes("it"),
        ("train it", 0, "it: 3 classes; 29 train, 3 val, 4 test"),
        ("train it", *RIGHT),
        ("data it", 0, "3 classes"),
    ],
    "capital splits": [
        lambda: splits("it", "Train Val Test"),
        ("train it", *RIGHT),
        ("train it", 0, "3 classes; 36 train, 36 val, 36 test"),
    ],
    "no val": [lambda: splits("it", "train test"), ("train it", 0, "32 train, 4 val, 36 test")],
    "no test": [lambda: splits("it", "train val"), ("train it", 0, "32 train, 4 val, 36 test")],
    "one level too high": [lambda: classes("it/photos"), ("train it", 2, "it/photos")],
    "two levels too high": [lambda: classes("it/x/photos"), ("train it", 2, "one class")],
    "grey, 16 bits": [lambda: grey16("it"), ("train it", *RIGHT)],
    "grey, floats": [
        lambda: recoloured("it", lambda i: i.convert("F"), ".tif"),
        ("train it", 2, "cannot be read as"),
    ],
    "palette": [lambda: recoloured("it", lambda i: i.convert("P"), ".png"), ("train it", *RIGHT)],
    "with alpha": [
        lambda: recoloured("it", lambda i: i.convert("RGBA"), ".png"),
        ("train it", *RIGHT),
    ],
    "for print": [
        lambda: recoloured("it", lambda i: i.convert("CMYK"), ".jpg"),
        ("train it", *RIGHT),
    ],
    "gif": [lambda: recoloured("it", lambda i: i, ".gif"), ("train it", *RIGHT)],
    "webp, upper case": [lambda: recoloured("it", lambda i: i, ".WEBP"), ("train it", *RIGHT)],
    "hidden files": [
        lambda: classes("it"),
        lambda: shutil.copytree("it/a", "it/.thumbnails"),
        lambda: shutil.copytree("it/a", "it/b/.ipynb_checkpoints"),
        lambda: shutil.copytree("it/a", "it/__MACOSX/a"),
        lambda: Path("it/b/._00.png").write_bytes(b"Mac OS X"),
        ("train it", 0, "3 classes; 29 train, 3 val, 4 test"),
    ],
    "other endings": [
        lambda: classes("it"),
        lambda: Path("it/a/00.png").rename("it/a/00.heic"),
        lambda: Path("it/note.txt").write_text("x"),
        ("data it", 0, ".heic"),
    ],
    "five broken": [
        lambda: classes("it"),
        lambda: [Path(f"it/b/0{i}.png").write_bytes(b"") for i in range(5)],
        ("train it", 2, "00.png", "01.png", "02.png", "03.png", "04.png"),
    ],
    "cut short": [
        lambda: classes("it"),
        lambda: os.truncate("it/b/03.png", 40),
        ("train it", 2, "it/b/03.png"),
    ],
    "a name that is not UTF-8": [
        lambda: classes("it"),
        lambda: os.rename("it/c", b"it/caf\xe9"),
        ("train it", *RIGHT),
    ],
    "a name with blanks and signs": [
        lambda: classes("my 'cats' & #dogs"),
        ("train \"my 'cats' & #dogs\"", *RIGHT),
    ],
    "a circle of links": [
        lambda: classes("it"),
        lambda: os.symlink("..", "it/a/up"),
        ("train it", 0, "3 classes; 29 train, 3 val, 4 test"),
    ],
    "an empty class": [
        lambda: classes("it"),
        lambda: Path("it/d").mkdir(),
        ("train it", 2, "it/d holds no images"),
    ],
    "one image a class": [lambda: classes("it", count=1), ("train it", 2, "it")],
    "the folder is a file": [lambda: Path("it").write_text("x"), ("train it", 2, "no task 'it'")],
    "a broken split": [
        lambda: classes("it"),
        lambda: Path("it/split.json").write_text("{"),
        ("train it", 2, "split.json"),
    ],
}

# A run knows its data, its backbone and its settings.
CASES |= {
    "the same again": [
        lambda: classes("it"),
        ("train it", *RIGHT),
        ("train it/", *RIGHT),
        ("train ./it", *RIGHT),
        lambda: Path("it/a/00.png").touch(),
        ("train it", *RIGHT),
    ],
    "moved": [
        lambda: classes("it"),
        ("train it", *RIGHT),
        lambda: Path("it").rename("moved"),
        ("train moved", *RIGHT),
    ],
    "an image changed": changed(lambda: picture(2).save("it/a/03.png"), "other data"),
    "labels changed": changed(lambda: swap("it/a/03.png", "it/b/03.png"), "other data"),
    "an image more": changed(lambda: picture(0).save("it/a/99.png"), "other data"),
    "a class renamed": changed(lambda: Path("it/a").rename("it/aa"), "classes"),
    "another split": [
        lambda: classes("it"),
        ("train it", *RIGHT),
        lambda: shutil.copy("run/split.json", "it"),
        ("train it", *RIGHT),
        swapped_splits,
        ("train it", 2, "other data"),
    ],
    "another backbone": [
        lambda: classes("it"),
        ("train it", *RIGHT),
        lambda: other_weights("vit.safetensors"),
        ("train it", 2, "another backbone"),
        ("sample run it/a", 2, "weights"),
    ],
    "another normalisation": changed(
        lambda: normalised_otherwise("vit.safetensors"), "another backbone"
    ),
    "another seed": [
        lambda: classes("it"),
        ("train it", *RIGHT),
        ("train it --seed 7", 2, "seed 42 (not 7)"),
    ],
    "another folder": [
        lambda: classes("it"),
        ("train it", *RIGHT),
        ("train it --seed 7 --out other", *RIGHT),
    ],
    "no backbone any more": [
        lambda: classes("it"),
        ("train it", *RIGHT),
        lambda: Path("vit.safetensors").unlink(),
        ("train it", 2, "vit.safetensors"),
        ("sample run it/a/00.png", 2, "vit.safetensors"),
    ],
    "a rate too high": [
        lambda: classes("it"),
        ("train it --lr 1e30", 3, "diverged in epoch 1"),
        ("train it --lr 1e30", 3, "diverged in epoch 1"),
        ("sample run it/a/00.png", 2, "not the folder of a finished run"),
    ],
    "metrics lost": [
        lambda: classes("it"),
        ("train it", *RIGHT),
        lambda: Path("run/metrics.jsonl").unlink(),
        ("train it", *RIGHT),
    ],
    "weights lost": changed(lambda: Path("run/prefix.safetensors").unlink(), "cannot be resumed"),
    "settings lost": changed(lambda: Path("run/config.json").unlink(), "cannot be resumed"),
}

# Using a run, and many runs.
CASES |= {
    "a prediction": [
        lambda: classes("it"),
        ("train it", *RIGHT),
        ("sample run it/b/00.png", 0, "b "),
    ],
    "a folder of images": [
        lambda: classes("it"),
        ("train it", *RIGHT),
        ("sample run it/c", 0, "it/c/11.png"),
    ],
    "a broken image": [
        lambda: classes("it"),
        ("train it", *RIGHT),
        lambda: Path("x.png").write_bytes(b"x"),
        ("sample run x.png it/a/00.png", 0, "skipped: x.png"),
        ("sample run x.png", 2, "none of the images could be read"),
    ],
    "an image of another mode": [
        lambda: classes("it"),
        ("train it", *RIGHT),
        lambda: picture(1).convert("RGBA").save("x.png"),
        ("sample run x.png", 0, "b "),
    ],
    "a text for images": [
        lambda: classes("it"),
        ("train it", *RIGHT),
        ("sample run hello", 2, "hello cannot be read as an image"),
    ],
    "a sweep": [
        lambda: classes("it"),
        ("sweep it --methods probe", 0, "report"),
        ("sweep it/ --methods probe", 0, "report"),
        lambda: swap("it/a/03.png", "it/b/03.png"),
        ("sweep it --methods probe", 2, "another"),
    ],
    "a sweep with another backbone": [
        lambda: classes("it"),
        ("sweep it --methods probe", 0, "report"),
        lambda: other_weights("vit.safetensors"),
        ("sweep it --methods probe", 2, "another backbone"),
    ],
    "a sweep of two folders with one name": [
        lambda: classes("x/it"),
        lambda: classes("y/it"),
        ("sweep x/it y/it", 2, "would share a folder"),
    ],
    "a sweep that diverges": [
        lambda: classes("it"),
        ("sweep it --methods none --lr 1e30", 0, "diverged"),
    ],
    "a sweep of texts": [lambda: pairs("it.jsonl"), ("sweep it.jsonl", 2, "is text")],
}

# Texts.
CASES |= {
    "pairs": [
        lambda: pairs("it.jsonl"),
        ("texts it.jsonl --no-final", 0, "16 train, 2 val, 2 test"),
    ],
    "pairs in a .gz": [
        lambda: pairs("it.jsonl.gz"),
        ("texts it.jsonl.gz --no-final", 0, "16 train, 2 val, 2 test texts"),
    ],
    "pairs in upper case": [
        lambda: pairs("IT.JSONL"),
        ("texts IT.JSONL --no-final", 0, "16 train, 2 val, 2 test texts"),
    ],
    "BOM, CRLF and blank lines are the same pairs": [
        lambda: pairs("it.jsonl"),
        ("texts it.jsonl --no-final", 0, "16 train"),
        lambda: pairs("it.jsonl", start="\ufeff", between="\r\n\n", end="\n\n"),
        ("texts it.jsonl --no-final", 0, "16 train"),
        lambda: pairs("it.jsonl", count=21),
        ("texts it.jsonl --no-final", 2, "other data"),
    ],
    "commas between lines": [
        lambda: pairs("it.jsonl", between=",\n"),
        ("texts it.jsonl", 2, "line 1", "Extra data"),
    ],
    "a list of pairs": [
        lambda: pairs("it.jsonl", start="[", between=",", end="]"),
        ("texts it.jsonl", 2, "line 1"),
    ],
    "a .gz that is none": [
        lambda: Path("it.jsonl.gz").write_bytes(b"\x1f\x8b no"),
        ("texts it.jsonl.gz", 2, "cannot be read"),
    ],
    "too few pairs": [lambda: pairs("it.jsonl", count=9), ("texts it.jsonl", 2, "9 distinct")],
    "no network": [
        lambda: pairs("it.jsonl"),
        ("texts it.jsonl --backbone gpt2", 2, "use --backbone tiny_gpt"),
    ],
    "a source too long": [
        lambda: pairs("it.jsonl", end='\n{"source": "' + "x " * 400 + '", "target": "y"}\n'),
        ("texts it.jsonl", 2, "do not fit"),
    ],
    "sources in every form": [
        lambda: pairs("it.jsonl"),
        ("texts it.jsonl --no-final", 0, "16 train"),
        lambda: Path("a.jsonl").write_bytes(b'\xef\xbb\xbf{"source": "name :\\u2028R0"}\r\n'),
        lambda: Path("b.txt").write_text("name :  R0 \n\n"),
        ("sample run a.jsonl --json --beams 1", 0, '{"source": "name : R0", "text"'),
        ("sample run b.txt --json --beams 1", 0, '{"source": "name : R0", "text"'),
    ],
}


def command(line: str) -> tuple[str, list[str]]:
    """A script, and what it is called with."""
    script, *words = shlex.split(line)
    return SCRIPTS.get(script, script), [*OPTIONS[script].split(), *words]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_command_says_what_is_right(case, small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shutil.copy(small, "vit.safetensors")
    for step in CASES[case]:
        if callable(step):
            step()
            continue
        script, words = command(step[0])
        code = import_module(script).main(words)
        said = "".join(capsys.readouterr())
        assert code == step[1], said
        assert all(part in said for part in step[2:]), said
        if code == 2:
            assert said.splitlines()[-1].startswith("error: ")
            assert said.count("error: ") == 1
