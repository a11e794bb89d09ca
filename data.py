"""Tasks: where the images come from, how they are split, and how a batch of pixels is made of them.

An image is decoded once and kept as uint8 pixels. A training batch is then an integer crop and a flip of those pixels,
copied into one array; `normalise` makes floats of it on the device.

Shapes: B images; pixels are (height, width, 3) uint8 on disk and in batches, (B, 3, size, size) float for the model.
"""

import difflib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import FashionMNIST
from torchvision.datasets.utils import extract_archive

ASSETS = Path(__file__).parent / "assets"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class UsageError(Exception):
    """Something the user can mend: the command line prints it as one sentence and exits with code 2."""


def write(path: Path, content: bytes) -> None:
    """All of it or nothing: under a temporary name, then rename. OSError if the disk is full or read-only."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class Split:
    """Decoded images: `pixels` is one flat uint8 array, in memory or mapped from a file; `index` says where."""

    pixels: np.ndarray  # (bytes,) uint8
    index: np.ndarray  # (n, 4) int64: offset, height, width, label

    def __len__(self) -> int:
        return len(self.index)

    def image(self, i: int) -> np.ndarray:
        offset, height, width, _ = self.index[i]
        return self.pixels[offset : offset + height * width * 3].reshape(height, width, 3)  # a view, not a copy

    @classmethod
    def of(cls, images: np.ndarray, labels: np.ndarray) -> "Split":
        """From images (n, height, width, 3) uint8 of one size and labels (n,)."""
        n, height, width, _ = images.shape
        offsets = np.arange(n) * height * width * 3
        sides = np.full((n, 2), (height, width))
        return cls(images.reshape(-1), np.column_stack([offsets, sides, labels]).astype(np.int64))


@dataclass
class Dataset:
    """One task, ready for a model of `size` x `size` input. `final` is the split the protocol's last runs train on."""

    task: str
    classes: list[str]
    size: int
    augment: bool  # random crop and flip while training
    final: str  # "train" (FGVC) or "trainval" (VTAB-1K)
    splits: dict[str, Split] = field(repr=False)  # train, val, test

    def images(self, split: str, fraction: float = 1.0) -> list[tuple[Split, int]]:
        """A split's images as (where it lies, its number there); `trainval` is train and val together.

        fraction: only that share of them, the same for every seed, stratified; a smaller share is part of a larger one.
        """
        names = ("train", "val") if split == "trainval" else (split,)
        images = [(self.splits[name], i) for name in names for i in range(len(self.splits[name]))]
        if fraction == 1:
            return images
        labels = np.array([part.index[i, 3] for part, i in images])
        return [images[i] for i in stratified(labels, seed=0)[: round(fraction * len(images))]]

    def count(self, split: str, fraction: float = 1.0) -> int:
        return len(self.images(split, fraction))

    def batches(
        self,
        split: str,
        batch: int,
        seed: int | None = None,
        epoch: int = 0,
        fraction: float = 1.0,
        pin: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of images (B, size, size, 3) uint8 and labels (B,) int64; the last batch may be smaller.

        With a seed: shuffled and augmented by (seed, epoch) alone. Without: in order, centre crop.
        The next batch is made in a thread while the caller uses this one. pin: in page-locked memory, for CUDA.
        """
        images, rng = self.images(split, fraction), None
        if seed is not None:
            rng = np.random.default_rng([seed, epoch])
            images = [images[i] for i in rng.permutation(len(images))]

        def make(start: int) -> tuple[Tensor, Tensor]:
            chosen = images[start : start + batch]
            pixels = np.empty((len(chosen), self.size, self.size, 3), np.uint8)  # (B, size, size, 3)
            for out, (part, i) in zip(pixels, chosen, strict=True):
                crop(part.image(i), self.size, out, rng if self.augment else None)
            labels = np.array([part.index[i, 3] for part, i in chosen])  # (B,)
            made = torch.from_numpy(pixels), torch.from_numpy(labels)
            return tuple(t.pin_memory() for t in made) if pin else made

        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(make, 0)
            for start in range(batch, len(images) + batch, batch):
                ready = coming.result()
                if start < len(images):
                    coming = pool.submit(make, start)
                yield ready


def crop(image: np.ndarray, size: int, out: np.ndarray, rng: np.random.Generator | None) -> None:
    """Copy a size x size window of image (h, w, 3) into out: at random and flipped half the time, or the centre."""
    spare = np.array(image.shape[:2]) - size
    if rng is None:
        top, left = np.round(spare / 2).astype(int)  # torchvision's CenterCrop rounds so
        out[:] = image[top : top + size, left : left + size]
    else:
        top, left = rng.integers(0, spare + 1)
        out[:] = image[top : top + size, left : left + size][:, :: rng.choice((1, -1))]


def normalise(pixels: Tensor) -> Tensor:
    """(B, size, size, 3) uint8 -> (B, 3, size, size) float32, as torchvision's ToTensor and Normalize do."""
    mean, std = pixels.new_tensor([IMAGENET_MEAN, IMAGENET_STD], dtype=torch.float32).view(2, 3, 1, 1)
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def stratified(labels: np.ndarray, seed: int) -> np.ndarray:
    """A random order of range(len(labels)) any stretch of which holds every class in its share."""
    order = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels))  # where in its class an image stands, from 0 to 1
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return order[np.argsort(place[order], kind="stable")]


def resized(grey: np.ndarray, side: int) -> np.ndarray:
    """Grey images (n, h, w) uint8 as (n, side, side, 3)."""
    images = [np.asarray(Image.fromarray(g).resize((side, side), Image.Resampling.BILINEAR)) for g in grey]
    return np.stack(images)[..., None].repeat(3, axis=-1)


def load_digits(root: Path, size: int) -> dict[str, Split]:
    """UCI handwritten digits: 1,797 images of 8 x 8, split 800 / 200 / 797 in the style of VTAB-1K; in assets/."""
    path = ASSETS / "digits.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["images"], file["labels"]  # (1797, 8, 8) uint8 from 0 to 16, (1797,)
    except FileNotFoundError:
        raise UsageError(f"{path} is missing; it comes with the repository: git checkout {path}") from None
    except Exception as error:
        raise UsageError(f"{path} is damaged ({error}); restore it: git checkout {path}") from error
    pixels = resized((images.astype(np.uint16) * 255 // 16).astype(np.uint8), size)
    parts = np.split(stratified(labels, seed=0), (800, 1000))
    return {name: Split.of(pixels[i], labels[i]) for name, i in zip(("train", "val", "test"), parts, strict=True)}


def load_fashion_mnist(root: Path, size: int) -> dict[str, Split]:
    """Fashion-MNIST: 70,000 garments of 28 x 28, with a border so that a random crop moves them by up to an eighth."""
    raw = root / "FashionMNIST" / "raw"
    for folder in (root, Path("/usr/share/datasets/fashion-mnist")):  # the user's, or Debian's dataset-fashion-mnist
        if not raw.exists():
            for archive in folder.glob("*-ubyte.gz"):
                raw.mkdir(parents=True, exist_ok=True)
                extract_archive(str(archive), str(raw))  # torchvision downloads nothing that it finds here
    try:
        sets = [FashionMNIST(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"Fashion-MNIST cannot be had ({error}); without internet, put its four .gz files into {raw} "
            "or install Debian's package dataset-fashion-mnist"
        ) from error

    def split(images: np.ndarray, labels: np.ndarray) -> Split:
        border = size // 8
        inner = resized(images, size - border)
        return Split.of(np.pad(inner, ((0, 0), (border, border), (border, border), (0, 0))), labels)

    (images, labels), (test_images, test_labels) = [(s.data.numpy(), s.targets.numpy()) for s in sets]
    train, val = np.split(stratified(labels, seed=0), (54_000,))
    return {
        "train": split(images[train], labels[train]),
        "val": split(images[val], labels[val]),
        "test": split(test_images, test_labels),
    }


@dataclass(frozen=True)
class Task:
    """group: which benchmark. load: (root, size) -> splits. settings: per method (length, base lr, weight decay).

    sizes: the number of images in train, val and test, known before anything is downloaded.
    """

    group: str
    classes: list[str]
    load: Callable[[Path, int], dict[str, Split]]
    augment: bool = False
    final: str = "train"
    backbone: str = "tiny"
    epochs: int = 100
    settings: dict[str, tuple[int, float, float]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


GARMENTS = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
DIGITS_SETTINGS = {}
DIGITS_SIZES = {"train": 800, "val": 200, "test": 797}
GARMENTS_SIZES = {"train": 54_000, "val": 6_000, "test": 10_000}
TASKS: dict[str, Task] = {
    "digits": Task(
        "demo",
        [str(d) for d in range(10)],
        load_digits,
        final="trainval",
        settings=DIGITS_SETTINGS,
        sizes=DIGITS_SIZES,
    ),
    "fashion_mnist": Task("demo", GARMENTS, load_fashion_mnist, augment=True, sizes=GARMENTS_SIZES),
}


def find(name: str) -> Task:
    """The task of that name. UsageError, with the names there are, if there is none."""
    if name in TASKS:
        return TASKS[name]
    close = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise UsageError(f"no task '{name}'; {hint}tasks: {', '.join(TASKS)}")


def load(name: str, root: str | Path = "data", size: int = 224) -> Dataset:
    """Everything a run needs of a task, for a model of size x size input. UsageError says what the user can do."""
    task = find(name)
    return Dataset(name, task.classes, size, task.augment, task.final, task.load(Path(root), size))
