"""Tasks: where the images or texts come from, how they are split, and what the paper trained them with.

    python data.py              every task: its group, classes and splits, and whether its images are here
    python data.py cub          get a task ready, say what is in it, and draw 64 of its images
    python data.py photos/      the same for a folder of your own images

FGVC, VTAB-1K and the text tasks come over the network, unless the folder given with --data-dir holds them in one of
their usual layouts; support/benchmarks.py and support/corpora.py have their addresses and the published settings. How
images become batches: support/images.py; how texts do: support/language.py.
"""

import difflib
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torchvision.datasets import FashionMNIST, ImageFolder

from support import benchmarks
from support.benchmarks import SPLITS
from support.corpora import TEXT_TASKS, Text, is_jsonl, load_jsonl
from support.files import Parser, UsageError, exit_code, fetch, write
from support.images import Dataset, Split, normalise, prepare_all, stratified

__all__ = [
    "TASKS",
    "Dataset",
    "Split",
    "Task",
    "Text",
    "UsageError",
    "find",
    "load",
    "normalise",
    "title",
    "write",
]

ASSETS = Path(__file__).parent / "assets"


def resized(grey: np.ndarray, side: int) -> np.ndarray:
    """Grey images (n, h, w) uint8 as (n, side, side, 3)."""
    images = [
        np.asarray(Image.fromarray(g).resize((side, side), Image.Resampling.BILINEAR)) for g in grey
    ]
    return np.stack(images)[..., None].repeat(3, axis=-1)


def load_digits(root: Path, size: int) -> dict:
    """UCI handwritten digits: 1,797 images of 8 x 8, split 800 / 200 / 797 in the style of VTAB-1K; in assets/."""
    path = ASSETS / "digits.npz"
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            images, labels = (
                file["images"],
                file["labels"],
            )  # (1797, 8, 8) uint8 from 0 to 16, (1797,)
    except FileNotFoundError:
        raise UsageError(
            f"{path} is missing; it comes with the repository: git checkout {path}"
        ) from None
    except Exception as error:
        raise UsageError(f"{path} is damaged ({error}); restore it: git checkout {path}") from error
    pixels = resized((images.astype(np.uint16) * 255 // 16).astype(np.uint8), size)
    parts = np.split(stratified(labels, seed=0), (800, 1000))
    splits = {split: Split.of(pixels[i], labels[i]) for split, i in zip(SPLITS, parts, strict=True)}
    return {"classes": [str(digit) for digit in range(10)], "splits": splits, "rule": (size, size)}


def fashion_mnist(name: str, root: Path) -> Path | None:
    """The user's own copy of a file, torchvision's, or the one of Debian's dataset-fashion-mnist."""
    folders = (
        root,
        root / "fashion_mnist",
        root / "FashionMNIST" / "raw",
        Path("/usr/share/datasets/fashion-mnist"),
    )
    return next((folder / name for folder in folders if (folder / name).exists()), None)


def load_fashion_mnist(root: Path, size: int) -> dict:
    """Fashion-MNIST: 70,000 garments of 28 x 28, with a border so that a random crop moves them by up to an eighth."""
    raw = []
    for name, md5 in FashionMNIST.resources:  # images, labels, test images, test labels
        own, url = fashion_mnist(name, root), FashionMNIST.mirrors[0] + name
        path = own or fetch([url], root / "fashion_mnist" / name, f"md5:{md5}")
        try:
            raw.append(
                np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8)
            )  # checks the sum inside
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(
                f"{path} is damaged ({error}); delete it, or put a whole copy in its place"
            ) from error
    images, labels = raw[0][16:].reshape(-1, 28, 28), raw[1][8:]  # behind the files' headers

    def split(images: np.ndarray, labels: np.ndarray) -> Split:
        border = size // 8
        inner = resized(images, size - border)
        return Split.of(np.pad(inner, ((0, 0), (border, border), (border, border), (0, 0))), labels)

    parts = zip(("train", "val"), np.split(stratified(labels, seed=0), (54_000,)), strict=True)
    splits = {name: split(images[part], labels[part]) for name, part in parts}
    splits["test"] = split(raw[2][16:].reshape(-1, 28, 28), raw[3][8:])
    return {"classes": FashionMNIST.classes, "splits": splits}


def load_folder(folder: Path, root: Path, size: int) -> dict:
    """Your own images: train/, val/ and test/ with a folder per class, or folders of classes that are split here.

    The split is 80 / 10 / 10, stratified and always the same; a run keeps it as split.json, and a split.json in the
    folder is obeyed.
    """
    listing = None
    if (folder / "train").is_dir():
        parts = {split: classes_and_files(folder / split) for split in SPLITS}
        classes = parts["train"][0]
        for split, (names, _) in parts.items():
            if strange := sorted(set(names) - set(classes)):
                raise UsageError(
                    f"{folder / split} has the class '{strange[0]}', but {folder / 'train'} has not"
                )
        files = {
            split: [(f"{split}/{file}", classes.index(name)) for file, name in images]
            for split, (_, images) in parts.items()
        }
    else:
        classes, images = classes_and_files(folder)
        listing = folder_listing(folder, classes, images)
        files = {
            split: [(file, classes.index(name)) for file, name in listing[split].items()]
            for split in SPLITS
        }
    rule = round(size * 256 / 224)
    splits = prepare_all(root, title(str(folder)), folder, files, rule)
    return {"classes": classes, "splits": splits, "rule": rule, "listing": listing}


def classes_and_files(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """The classes of torchvision's ImageFolder layout, and its images as (path below folder, class)."""
    try:
        found = ImageFolder(folder)
    except OSError as error:
        raise UsageError(f"{folder} needs a folder of images per class: {error}") from error
    return found.classes, [
        (Path(path).relative_to(folder).as_posix(), found.classes[i]) for path, i in found.samples
    ]


def once_each(pairs: list[tuple[str, object]]) -> dict:
    """For json: a name that stands twice in an object, of which it would quietly drop one, is a mistake."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def folder_listing(
    folder: Path, classes: list[str], images: list[tuple[str, str]]
) -> dict[str, dict[str, str]]:
    """The split {split: {file: class}}: the folder's own split.json, else 80 / 10 / 10."""
    if (folder / "split.json").exists():
        try:
            listing = json.loads((folder / "split.json").read_bytes(), object_pairs_hook=once_each)
            named = [pair for split in SPLITS for pair in listing[split].items()]
            if not all(listing[split] for split in SPLITS):
                raise ValueError("a split is empty")
            if strange := set(named) - set(images):
                raise ValueError(f"it has {min(strange)}, which is not in the folder")
            if len(dict(named)) < len(named):
                raise ValueError("an image is in two splits")
        except Exception as error:
            raise UsageError(
                f"{folder / 'split.json'} must give train, val and test as {{file: class}} ({error}); mend or delete it"
            ) from error
        return listing
    if len(images) < 10:
        raise UsageError(
            f"{folder} has {len(images)} images; a split into 80 / 10 / 10 % needs at least 10"
        )
    order = stratified(np.array([classes.index(name) for _, name in images]), seed=0)
    parts = np.split(order, (round(0.8 * len(images)), round(0.9 * len(images))))
    return {
        split: dict(sorted(images[i] for i in part))
        for split, part in zip(SPLITS, parts, strict=True)
    }


@dataclass(frozen=True)
class Task:
    """One name that --task takes.

    group: which benchmark. load: (root, image size or encoding) -> what Dataset or Text holds. here: root -> whether
    its images or texts are on this machine. sizes: examples per split.
    settings: per method of train.py (length, lr, weight decay); usual: for methods without published ones.
    """

    group: str
    load: Callable[..., dict]
    here: Callable[[Path], bool] = lambda root: True
    text: bool = False
    classes: int = 10
    sizes: dict[str, int] = field(default_factory=dict)
    augment: bool = False
    final: str = "train"
    backbone: str = "tiny"
    epochs: int = 100
    batch: int = 64
    settings: dict[str, tuple[int, float, float]] = field(default_factory=dict)
    usual: tuple[int, float, float] = (10, 1.0, 1e-4)


def fgvc(name: str) -> Task:
    rows = {
        split: benchmarks.SPLIT_FILES[f"{benchmarks.FGVC[name].splits}/{split}"] for split in SPLITS
    }
    return Task(
        "FGVC",
        partial(benchmarks.load_fgvc, name),
        lambda root: (
            benchmarks.fgvc_images(name, root, benchmarks.fgvc_splits(name, root, download=False))
            is not None
        ),
        classes=rows["train"][2],
        sizes={split: images for split, (_, images, _) in rows.items()},
        augment=True,
        backbone=benchmarks.IN21K,
        settings=dict(zip(benchmarks.METHODS, benchmarks.PUBLISHED[name], strict=True)),
    )


def vtab(name: str, group: str, classes: int, test: int) -> Task:
    return Task(
        f"VTAB-1K {group}",
        partial(benchmarks.load_vtab, name, classes),
        lambda root: benchmarks.vtab_images(name, root) is not None,
        classes=classes,
        sizes={"train": 800, "val": 200, "test": test},
        final="trainval",
        backbone=benchmarks.IN21K,
    )


def language(name: str) -> Task:
    task = TEXT_TASKS[name]
    return Task(
        "text",
        task.load,
        task.here,
        text=True,
        classes=0,
        sizes=task.sizes,
        backbone=task.backbone,
        epochs=task.epochs,
        batch=task.batch,
        settings={share: (task.length, lr, 0.0) for share, lr in task.lr.items()},
        usual=(task.length, 1e-4, 0.0),
    )


DIGITS_SETTINGS = {  # chosen on val by `python sweep.py --methods probe none simple deep full`
    "none": (10, 5, 0),
    "simple": (10, 2.5, 1e-2),
    "deep": (10, 2.5, 1e-4),
    "probe": (10, 5, 0),
    "full": (10, 0.05, 0),
}
TASKS: dict[str, Task] = {
    "digits": Task(
        "demo",
        load_digits,
        sizes={"train": 800, "val": 200, "test": 797},
        final="trainval",
        epochs=15,
        settings=DIGITS_SETTINGS,
    ),
    "fashion_mnist": Task(
        "demo",
        load_fashion_mnist,
        lambda root: all(fashion_mnist(name, root) for name, _ in FashionMNIST.resources),
        sizes={"train": 54_000, "val": 6_000, "test": 10_000},
        augment=True,
    ),
    **{name: fgvc(name) for name in benchmarks.FGVC},
    **{
        name: vtab(name, group, *row)
        for group, rows in benchmarks.VTAB_TASKS.items()
        for name, row in rows.items()
    },
    **{name: language(name) for name in TEXT_TASKS},
}


def find(name: str) -> Task:
    """The task of that name, folder of images or file of texts. UsageError, with the names there are, if none is."""
    if name in TASKS:
        return TASKS[name]
    if is_jsonl(name) and Path(name).is_file():
        usual = Task(
            "your texts",
            partial(load_jsonl, Path(name)),
            text=True,
            classes=0,
            backbone="gpt2-medium",
        )
        return replace(usual, epochs=5, batch=10, usual=(5, 1e-4, 0.0))  # E2E's
    if name and Path(name).is_dir():  # Path("") is this folder
        return Task(
            "your images", partial(load_folder, Path(name)), augment=True, backbone=benchmarks.IN21K
        )
    close = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise UsageError(
        f"no task '{name}', nor a folder or .jsonl file; {hint}tasks: {', '.join(TASKS)}"
    )


def title(name: str) -> str:
    """What the files of a task are called: its name, or the last part of its path. It leads out of no folder."""
    return Path(os.path.abspath(name)).name


def load(
    name: str, root: str | Path = "data", image_size: int = 224, encoding: str = ""
) -> Dataset | Text:
    """Everything a run needs of a task: `load(task, root, **backbone.inputs)`.

    image_size: what a ViT takes. encoding: what a GPT takes, "gpt2" or "bytes"; "" is the task's own.
    UsageError says what the user can do.
    """
    task, root = find(name), data_dir(root)
    if task.text:
        encoding = encoding or ("bytes" if task.backbone == "tiny_gpt" else "gpt2")
        return Text(name, encoding, **task.load(root))
    images = task.load(root, image_size)
    return Dataset(name, size=image_size, augment=task.augment, final=task.final, **images)


def data_dir(root: str | Path) -> Path:
    if Path(root).exists() and not Path(root).is_dir():
        raise UsageError(
            f"--data-dir {root} is a file; name a folder, which is made if it is missing"
        )
    return Path(root)


def table(root: Path) -> str:
    """One line per task: name, group, classes, split sizes and where its images are."""
    lines = [f"{'task':<22}{'group':<22}{'classes':>7}{'train':>8}{'val':>7}{'test':>8}  images"]
    for name, task in TASKS.items():
        manual = name in benchmarks.FGVC and benchmarks.FGVC[name].manual
        state = "ready" if task.here(root) else manual or "downloaded at first use"
        train, val, test = task.sizes.values()
        lines.append(
            f"{name:<22}{task.group:<22}{task.classes:>7}{train:>8,}{val:>7,}{test:>8,}  {state}"
        )
    return "\n".join(lines)


def describe(data: Dataset | Text) -> str:
    if data.text:
        pairs = data.splits["train"][:3]
        counts = [
            f"{name} {len(split):,} sources, {data.count(name):,} texts"
            for name, split in data.splits.items()
        ]
        return "\n  ".join(
            [
                f"{data.task}: " + "; ".join(counts),
                *(f"{p.source} -> {p.references[0]}" for p in pairs),
            ]
        )
    lines = [f"{data.task}: {len(data.classes)} classes"]
    for name, split in data.splits.items():
        per_class = np.bincount(split.index[:, 3], minlength=len(data.classes))
        span = f"{per_class.min()} to {per_class.max()} per class"
        lines.append(
            f"  {name:<6}{len(split):>7,} images, {span}, {split.pixels.nbytes / 1e6:,.1f} MB of pixels"
        )
    return "\n".join(lines)


def contact_sheet(data: Dataset) -> bytes:
    """A PNG of 64 training images with their classes."""
    split, figure = data.splits["train"], Figure(figsize=(16, 18), layout="constrained")
    for axes, i in zip(
        figure.subplots(8, 8).flat, stratified(split.index[:, 3], seed=0), strict=False
    ):
        axes.imshow(split.image(i))
        axes.set_title(data.classes[split.index[i, 3]][:24], fontsize=8, parse_math=False)
    for axes in figure.axes:
        axes.axis("off")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


def show(name: str | None, root: Path, size: int) -> None:
    """What `python data.py` prints; of a task of images, also a contact sheet."""
    if name is None:
        print(table(data_dir(root)))
        return
    if size < 1:
        raise UsageError(f"--size is {size}; it must be positive")
    data = load(name, root, size)
    print(describe(data))
    if not data.text:
        sheet = root / f"{title(name)}.png"
        root.mkdir(parents=True, exist_ok=True)
        write(sheet, contact_sheet(data))
        print(f"  64 of the training images: {sheet}")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="List the tasks, or get one ready.", allow_abbrev=False)
    parser.add_argument(
        "name",
        metavar="task",
        nargs="?",
        help="a task, or a folder of images; without it: the list",
    )
    parser.add_argument(
        "--data-dir", dest="root", type=Path, default=Path("data"), help="where data sets are kept"
    )
    parser.add_argument(
        "--size", type=int, default=224, help="input size of the model (default: 224)"
    )
    return exit_code(
        lambda: show(**vars(parser.parse_args(argv))),
        "stopped; the same command goes on where it was",
    )


if __name__ == "__main__":
    sys.exit(main())
