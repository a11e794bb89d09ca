"""Tasks: where the images or texts come from, how they are split, and what they are trained with.

    python data.py              every task: its group, classes and splits, and whether it is here
    python data.py cub          get a task ready, say what is in it, and draw 64 of its images
    python data.py photos/      the same for a folder of your own images

FGVC, VTAB-1K and the text tasks come over the network, unless the folder given with --data-dir
holds them in one of their usual layouts. Their addresses and published settings stand in
support/benchmarks.py and support/corpora.py. How images become batches: support/images.py; how
texts do: support/language.py.
"""

import difflib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torchvision.datasets import FashionMNIST
from torchvision.utils import save_image

from support import benchmarks, corpora
from support.files import Parser, UsageError, exit_code
from support.images import Dataset, Split, stratified
from support.language import Text, is_jsonl

ASSETS = Path(__file__).parent / "assets"


class Settings(NamedTuple):
    """What a method is trained with: length of the prefix, base learning rate, weight decay.

    batch: 0 is the task's. optimizer: "" is SGD for images and AdamW for texts. warmup: % of the
    steps in which the learning rate rises (images). whose: who chose them.
    """

    length: int
    lr: float
    wd: float
    batch: int = 0
    optimizer: str = ""
    warmup: int = 10
    whose: str = "the task's default"


USUAL = Settings(length=10, lr=1.0, wd=1e-4)  # where none are published
# Of the official code on FGVC and VTAB-1K; full fine-tuning tries 0.0001 to 0.005 there.
OFFICIAL = {
    "probe": USUAL._replace(batch=1024),
    "full": USUAL._replace(lr=1e-4, batch=384, optimizer="adamw", warmup=5),
}


def settings(row: dict[str, str], **others: Any) -> dict[str, Settings]:
    """From the row of a table: each of its columns is a method, each cell "length,lr,wd"."""
    return {method: Settings(*json.loads(f"[{cell}]"), **others) for method, cell in row.items()}


@dataclass(frozen=True)
class Task:
    """One name that --task takes.

    load(root, image size), or load(root) of texts: what a Dataset or Text is made of. here(root):
    whether it is on this machine. settings: by method; usual: for a method that has none there.
    """

    # What it is.
    group: str
    load: Callable[..., dict]
    here: Callable[[Path], bool] = lambda root: True
    text: bool = False
    classes: int = 10
    sizes: dict[str, int] = field(default_factory=dict)  # examples per split
    # How a run uses it, unless told otherwise.
    augment: bool = False  # random crops and flips
    final: str = "train"  # the split that the last runs of the protocol train on
    backbone: str = "tiny"
    epochs: int = 100
    batch: int = 64
    settings: dict[str, Settings] = field(default_factory=dict)
    usual: Settings = USUAL


def resized(grey: np.ndarray, side: int) -> np.ndarray:
    """Grey images (n, h, w) uint8 as (n, side, side, 3)."""
    squares = [
        np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
        for image in grey
    ]  # n x (side, side)
    return np.stack(squares)[..., None].repeat(3, -1)


def load_digits(root: Path, size: int) -> dict:
    """UCI handwritten digits, 1,797 of 8 x 8 in assets/, split in the style of VTAB-1K."""
    path = ASSETS / "digits.npz"
    try:
        with path.open("rb") as raw, np.load(raw) as file:
            images, labels = file["images"], file["labels"]  # (1797, 8, 8) from 0 to 16, (1797,)
    except Exception as error:
        raise UsageError(
            f"{path} is missing or damaged ({error}); restore it: git checkout {path}"
        ) from error

    # From 0..16 to 0..255, then to the size that the model takes.
    pixels = resized((images.astype(np.uint16) * 255 // 16).astype(np.uint8), size)
    # Any stretch of a stratified order holds every class in its share.
    parts = zip(benchmarks.SPLITS, np.split(stratified(labels), (800, 1000)), strict=True)
    splits = {split: Split.of(pixels[i], labels[i]) for split, i in parts}
    return {"classes": [str(i) for i in range(10)], "splits": splits, "resize": (size, size)}


def load_fashion_mnist(root: Path, size: int) -> dict:
    """Fashion-MNIST, 70,000 garments of 28 x 28, with a border so that a random crop moves them."""
    # torchvision downloads the files, checks them and reads them.
    try:
        train, test = (FashionMNIST(root, part, download=True) for part in (True, False))
    except Exception as error:
        raise UsageError(
            f"Fashion-MNIST cannot be had ({error}); put its four files, unpacked, into "
            f"{root}/FashionMNIST/raw, and delete what is damaged"
        ) from error

    # With an eighth more on every side, a crop of size x size moves a garment by up to an eighth.
    def split(images: np.ndarray, labels: np.ndarray) -> Split:
        border = size // 8
        inner = resized(images, size - border)  # (n, size - border, size - border, 3)
        return Split.of(np.pad(inner, ((0, 0), (border, border), (border, border), (0, 0))), labels)

    # The published training images become train and val.
    images, labels = train.data.numpy(), train.targets.numpy()  # (60000, 28, 28), (60000,)
    first, last = np.split(stratified(labels), (54_000,))
    splits = {
        "train": split(images[first], labels[first]),
        "val": split(images[last], labels[last]),
        "test": split(test.data.numpy(), test.targets.numpy()),
    }
    return {"classes": FashionMNIST.classes, "splits": splits}


def benchmark(name: str) -> Task:
    """A task of FGVC (birds, flowers, dogs or cars) or of VTAB-1K (1,000 labelled images)."""
    group, *numbers = benchmarks.TASKS[name].values()
    classes, *sizes = map(int, numbers)
    # FGVC crops at random and has published settings; VTAB-1K does neither, and its final runs
    # train on train and val
    fgvc = group == "FGVC"
    return Task(
        group if fgvc else f"VTAB-1K {group}",
        partial(benchmarks.load_fgvc if fgvc else benchmarks.load_vtab, name),
        partial(benchmarks.fgvc_here if fgvc else benchmarks.vtab_here, name),
        classes=classes,
        sizes=dict(zip(benchmarks.SPLITS, sizes, strict=True)),
        augment=fgvc,
        final="train" if fgvc else "trainval",
        backbone=benchmarks.IN21K,
        settings=OFFICIAL | settings(benchmarks.PUBLISHED.get(name, {}), whose="published"),
    )


def language(name: str) -> Task:
    """A task of texts."""
    task = corpora.TEXT_TASKS[name]
    usual = Settings(task.length, 1e-4, 0.0)
    whose = usual.whose if task.backbone == "tiny_gpt" else "published"
    return Task(
        "text",
        partial(corpora.load, name),
        partial(corpora.here, name),
        text=True,
        classes=0,
        sizes=task.sizes,
        backbone=task.backbone,
        epochs=task.epochs,
        batch=task.batch,
        settings={share: usual._replace(lr=lr, whose=whose) for share, lr in task.lr.items()},
        usual=usual,
    )


# Chosen on val by `python sweep.py --methods probe none simple deep full`.
DIGITS = benchmarks.table("""
task    none    simple       deep         probe   full
digits  10,5,0  10,2.5,1e-2  10,2.5,1e-4  10,5,0  10,0.05,0
""")
TASKS: dict[str, Task] = {
    # Small ones, for the small backbone in assets/.
    "digits": Task(
        "demo",
        load_digits,
        sizes={"train": 800, "val": 200, "test": 797},
        final="trainval",
        epochs=15,
        settings=settings(DIGITS["digits"]),
    ),
    "fashion_mnist": Task(
        "demo",
        load_fashion_mnist,
        # The last of its four files.
        lambda root: (root / "FashionMNIST/raw/t10k-labels-idx1-ubyte").exists(),
        sizes={"train": 54_000, "val": 6_000, "test": 10_000},
        augment=True,
    ),
    # The paper's image tasks: FGVC has published settings, VTAB-1K's are found by sweep.py.
    **{name: benchmark(name) for name in benchmarks.TASKS},
    # Its text tasks, and two small ones that are made here.
    **{name: language(name) for name in corpora.TEXT_TASKS},
}


def find(name: str) -> Task:
    """The task of that name, folder of images or file of texts. UsageError if there is none."""
    # A name wins over a folder of that name.
    if name in TASKS:
        return TASKS[name]

    # Your own texts or images.
    if is_jsonl(name) and Path(name).is_file():
        return Task(
            "your texts",
            partial(corpora.load_jsonl, Path(name)),
            text=True,
            classes=0,
            backbone="gpt2-medium",
            epochs=5,  # this, the batch and the settings are E2E's
            batch=10,
            usual=Settings(5, 1e-4, 0.0),
        )
    if name and Path(name).is_dir():  # Path("") is this folder
        folder = partial(benchmarks.load_folder, Path(name))
        return Task("your images", folder, augment=True, backbone=benchmarks.IN21K)

    # A near match helps more than the list of all.
    close = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise UsageError(
        f"no task '{name}', nor a folder or .jsonl file; {hint}tasks: {', '.join(TASKS)}"
    )


def canonical(name: str) -> str:
    """One name for a task: `photos`, `photos/` and the absolute path of it are the same task."""
    return name if name in TASKS else os.path.abspath(name)


def title(name: str) -> str:
    """What the files of a task are called: its name, or the last part of its path."""
    return Path(canonical(name)).name


def load(
    name: str, root: str | Path = "data", image_size: int = 224, encoding: str = ""
) -> Dataset | Text:
    """Everything a run needs of a task: `load(task, root, **backbone.inputs)`.

    image_size: what a ViT takes. encoding: what a GPT takes, "gpt2" or "bytes"; "" is the task's
    own. UsageError says what you can do.
    """
    task, root = find(name), folder_for_data(root)

    # texts: pairs of source and target, as tokens of this encoding
    if task.text:
        encoding = encoding or ("bytes" if task.backbone == "tiny_gpt" else "gpt2")
        return Text(title(name), encoding, **task.load(root))

    # images: decoded, and a little larger than image_size where crops are to be random
    images = task.load(root, image_size)
    return Dataset(title(name), size=image_size, augment=task.augment, final=task.final, **images)


def folder_for_data(root: str | Path) -> Path:
    """The folder for data sets. UsageError if it is a file."""
    root = Path(root)
    if root.exists() and not root.is_dir():
        raise UsageError(
            f"--data-dir {root} is a file; name a folder, which is made if it is missing"
        )
    return root


def list_tasks(root: Path) -> None:
    """Print a line per task: name, group, classes, sizes of the splits, and where its data are."""
    print(f"{'task':<22}{'group':<22}{'classes':>7}{'train':>8}{'val':>7}{'test':>8}  data")
    for name, task in TASKS.items():
        # What is on this machine, and what has to be done about the rest.
        state = "ready"
        if not task.here(root):
            state = benchmarks.MANUAL.get(name, "downloaded at first use")
        # The row of the table.
        train, val, test = task.sizes.values()
        sizes = f"{task.classes:>7}{train:>8,}{val:>7,}{test:>8,}"
        print(f"{name:<22}{task.group:<22}{sizes}  {state}")


def describe(data: Dataset | Text) -> None:
    """Print how much is in each split; of texts also the first three pairs."""
    # texts: a source may have several targets
    if data.text:
        print(f"{data.task}: texts")
        for name, pairs in data.splits.items():
            print(f"  {name:<6}{len(pairs):>7,} sources, {data.count(name):,} texts")
        for pair in data.splits["train"][:3]:
            print(f"  {pair.source} -> {pair.references[0]}")
        return

    # images: a class that is rare in a split shows here
    print(f"{data.task}: {len(data.classes)} classes, for a model of {data.size} x {data.size}")
    for name, split in data.splits.items():
        per_class = np.bincount(split.labels, minlength=len(data.classes))
        print(
            f"  {name:<6}{len(split):>7,} images, {per_class.min()} to {per_class.max()} per class"
            f", {split.pixels.nbytes / 1e6:,.1f} MB of pixels"
        )


def draw(data: Dataset, path: Path) -> None:
    """A picture of 64 training images, as the model gets them and in the order of their classes."""
    # A share of train is stratified.
    examples = data.examples("train", min(1.0, 64 / data.count("train")))
    examples.sort(key=lambda example: example[1])  # by label
    pixels, _ = data.gather(examples, rng=None)  # (64, size, size, 3)
    save_image(pixels.permute(0, 3, 1, 2) / 255, path)


def show(task: str | None, data_dir: Path, size: int | None) -> None:
    """What `python data.py` prints; of a task of images, also a picture."""
    # Without a task: the list of all.
    if task is None:
        list_tasks(folder_for_data(data_dir))
        return

    # The size that training uses decides what is decoded, and how much.
    if size is None:
        size = 32 if find(task).backbone == "tiny" else 224
    if size < 1:
        raise UsageError(f"--size is {size}; it must be positive")

    # Read it, which downloads and decodes what is not here yet.
    data = load(task, data_dir, size)
    describe(data)
    if not data.text:
        data_dir.mkdir(parents=True, exist_ok=True)
        path = data_dir / f"{data.task}.png"
        draw(data, path)
        print(f"  64 of the training images, by class: {path}")


def main(argv: list[str] | None = None) -> int:
    parser = Parser("List the tasks, or get one ready.")
    parser.add_argument(
        "task",
        nargs="?",
        help="a task, a folder of images or a .jsonl file of texts; without it: the list",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default="data",
        help="where data sets are kept (default: data)",
    )
    parser.add_argument(
        "--size",
        type=int,
        help="input size of the model (default: that of the task's own backbone, 32 or 224)",
    )
    return exit_code(
        lambda: show(**vars(parser.parse_args(argv))),
        "stopped; the same command goes on where it was",
    )


if __name__ == "__main__":
    sys.exit(main())
