"""Pixels: an image is decoded once per machine, and a batch is integer crops and flips of what was kept.

Decoding and resizing a JPEG takes a hundred times as long as copying a window of it, and gives the same pixels in every
epoch. So `prepare` does it once, in parallel, into one file: the uint8 pixels of all images of a split, one after
another, then the index (offset, height, width, label, checksum), its checksum, and the number of images. The file is
mapped, not read: memory holds what a batch touches, however large the file, and an image is compared with its checksum
when it is first touched. `normalise` makes floats of a batch on the device.

Shapes: B images; pixels are (height, width, 3) uint8 on disk and in batches, (B, 3, size, size) float for the model.
"""

import contextlib
import hashlib
import mmap
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import Resize
from tqdm import tqdm

from support.files import UsageError, build_once, inside, need

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    Image.DecompressionBombError,
)  # what Pillow raises
MOST = 89_478_485  # pixels of one image, before and after resizing: Pillow's own limit
Rule = int | tuple[int, int]  # of resizing: the short side, or (height, width)


@dataclass
class Split:
    """Decoded images: `pixels` is one flat uint8 array, in memory or mapped from a file; `index` says where."""

    pixels: np.ndarray  # (bytes,) uint8
    index: np.ndarray  # (n, 4) int64: offset, height, width, label
    path: Path | None = None  # the file that holds `pixels`
    mapping: mmap.mmap | None = None
    unseen: dict[int, int] = field(
        default_factory=dict
    )  # of it: the crc32 of images that were not used yet

    def __len__(self) -> int:
        return len(self.index)

    def image(self, i: int) -> np.ndarray:
        """A view (height, width, 3), not a copy. UsageError if the disk has changed it."""
        offset, height, width, _ = self.index[i]
        pixels = self.pixels[offset : offset + height * width * 3]
        if i in self.unseen:
            if zlib.crc32(pixels.data) != self.unseen[i]:
                raise UsageError(
                    f"{self.path} is damaged; delete it, and the next start makes it anew"
                )
            del self.unseen[i]
        return pixels.reshape(height, width, 3)

    @cached_property
    def stack(self) -> np.ndarray | None:
        """All images as one view (n, height, width, 3) if they have one size, else None."""
        height, width = self.index[0, 1:3]
        return (
            self.pixels.reshape(-1, height, width, 3)
            if (self.index[:, 1:3] == (height, width)).all()
            else None
        )

    def release(self) -> None:
        """Forget the file's pages that were touched, so that an epoch does not pile up the whole file in memory."""
        if self.mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED)

    @classmethod
    def of(cls, images: np.ndarray, labels: np.ndarray) -> "Split":
        """From images (n, height, width, 3) uint8 of one size and labels (n,)."""
        n, height, width, _ = images.shape
        offsets = np.arange(n) * height * width * 3
        sides = np.full((n, 2), (height, width))
        return cls(images.reshape(-1), np.column_stack([offsets, sides, labels]).astype(np.int64))

    @classmethod
    def open(cls, path: Path) -> "Split":
        """What `prepare` wrote, mapped. UsageError if it is not whole."""
        with contextlib.suppress(ValueError), path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            raw = np.frombuffer(mapping, np.uint8)
            crc32, n = raw[-16:].copy().view(np.int64).tolist()
            end = len(raw) - 16 - 40 * n
            index = raw[end:-16].copy().view(np.int64).reshape(n, 5)
            if (
                n > 0
                and zlib.crc32(index.data) == crc32
                and (index[:, 1] * index[:, 2]).sum() * 3 == end
            ):
                return cls(
                    raw[:end], index[:, :4], path, mapping, dict(enumerate(index[:, 4].tolist()))
                )
        raise UsageError(f"{path} is damaged; delete it, and the next start makes it anew")


@dataclass
class Files:
    """Image files as a map-style data set of decoded and resized pixels, for DataLoader's worker processes."""

    paths: list[str]
    rule: Rule

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> np.ndarray | str:
        """Pixels (height, width, 3) uint8, as torchvision's ImageFolder and Resize give them; else the fault."""
        try:
            with Image.open(self.paths[i]) as image:
                if image.mode == "F":
                    raise ValueError("it holds floats, which are no pixels")
                if isinstance(self.rule, int) and self.rule**2 * max(image.size) > MOST * min(
                    image.size
                ):
                    raise ValueError(
                        f"{image.width} x {image.height} is too thin: resized, it would fill the memory"
                    )
                return np.asarray(Resize(self.rule)(image.convert("RGB")))
        except UNREADABLE as error:
            return f"{self.paths[i]} cannot be read as an image ({error}); put a whole copy in its place"


def prepare(cache: Path, name: str, base: Path, files: list[tuple[str, int]], rule: Rule) -> Split:
    """Images `files` (path below `base`, label), decoded once per machine into a file in `cache` and mapped from there.

    The file is named after everything that decides its content: the rule of resizing, and of every image path, label,
    size and time of change. UsageError for an image that is missing or unreadable, and for a full disk.
    """
    key = hashlib.sha256(f"{rule} crc32".encode())
    for file, label in files:
        try:
            status = os.stat(f"{base}/{file}")
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{base}/{file} belongs to {name} but cannot be had ({getattr(error, 'strerror', error)}); put it "
                f"there, or delete {base} if it was downloaded, and the next start does it again"
            ) from error
        if not inside(file):
            raise UsageError(
                f"{name} names '{file}', which is not below {base}; do not use this list of images"
            )
        key.update(os.fsencode(f"{file}\n{label} {status.st_size} {status.st_mtime_ns}\n"))
    paths, labels = [f"{base}/{file}" for file, _ in files], [label for _, label in files]
    side = f"{rule}" if isinstance(rule, int) else "x".join(map(str, rule))
    path = cache / f"{name}-{side}-{key.hexdigest()[:16]}.pixels"
    return Split.open(
        build_once(path, lambda temporary: decode(temporary, name, Files(paths, rule), labels))
    )


def prepare_all(
    root: Path, task: str, base: Path, files: dict[str, list[tuple[str, int]]], rule: Rule
) -> dict[str, Split]:
    return {
        split: prepare(root / "cache", f"{task}-{split}", base, part, rule)
        for split, part in files.items()
    }


def decode(temporary: Path, name: str, files: Files, labels: list[int]) -> None:
    """Write the file that `Split.open` reads. Worker processes decode; memory holds a few images of each."""
    least = files.rule if isinstance(files.rule, tuple) else (files.rule, files.rule)
    need(len(files) * least[0] * least[1] * 3, temporary.parent)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    workers = min(cores, len(files) // 64)  # a few images are not worth a process
    images = chain.from_iterable(
        DataLoader(files, batch_size=8, num_workers=workers, collate_fn=list)
    )
    index, offset = np.empty((len(files), 5), np.int64), 0
    with temporary.open("wb") as out:
        for i, image in enumerate(
            tqdm(images, f"decoding {name}", len(files), unit="img", delay=2)
        ):
            if isinstance(image, str):
                raise UsageError(image)
            index[i] = offset, *image.shape[:2], labels[i], zlib.crc32(image)
            offset += out.write(image.data)
        out.write(index.tobytes() + np.array([zlib.crc32(index.data), len(files)]).tobytes())
        out.flush()
        os.fsync(out.fileno())  # a power cut after the renaming finds it on the disk


class Batched:
    """What images and texts have in common: their examples in batches, each made while the one before is used.

    A kind of data says what its `examples` are, in what `order` they come, and how a batch of them is `gather`ed.
    """

    examples: Callable[..., list]
    order: Callable[..., list[list]]
    gather: Callable[..., tuple[Tensor, ...]]

    def count(self, split: str, fraction: float = 1.0) -> int:
        return len(self.examples(split, fraction))

    def batches(
        self,
        split: str,
        batch: int,
        seed: int | None = None,
        epoch: int = 0,
        fraction: float = 1.0,
        pin: bool = False,
    ) -> Iterator[tuple[Tensor, ...]]:
        """With a seed: shuffled, and images augmented, by (seed, epoch) alone. Without: always the same.

        The next batch is made in a thread while the caller uses this one. pin: in page-locked memory, for CUDA.
        """
        rng = None if seed is None else np.random.default_rng([seed, epoch])

        def make(chosen: list) -> tuple[Tensor, ...]:
            made = self.gather(chosen, rng)
            return tuple(tensor.pin_memory() for tensor in made) if pin else made

        yield from prefetch(make, self.order(self.examples(split, fraction), batch, rng))


@dataclass
class Dataset(Batched):
    """One task, ready for a model of `size` x `size` input. `final` is the split the protocol's last runs train on."""

    task: str
    classes: list[str]
    size: int
    augment: bool  # random crop and flip while training
    final: str  # "train" (FGVC) or "trainval" (VTAB-1K)
    splits: dict[str, Split] = field(repr=False)  # train, val, test
    rule: Rule | None = None  # how image files were resized, if they were
    listing: dict[str, dict[str, str]] | None = field(
        default=None, repr=False
    )  # split -> file -> class, if made here

    text: ClassVar[Literal[False]] = False
    unit: ClassVar = "images"

    @property
    def metadata(self) -> dict:
        """What a trained model must know of its data to be used without them."""
        return {"classes": self.classes, "rule": self.rule}

    def examples(self, split: str, fraction: float = 1.0) -> list[tuple[Split, int]]:
        """A split's images as (where it lies, its number there); `trainval` is train and val together.

        fraction: only that share of them, the same for every seed, stratified; a smaller share is part of a larger one.
        """
        names = ("train", "val") if split == "trainval" else (split,)
        images = [(self.splits[name], i) for name in names for i in range(len(self.splits[name]))]
        if fraction == 1:
            return images
        labels = np.array([part.index[i, 3] for part, i in images])
        return [images[i] for i in stratified(labels, seed=0)[: round(fraction * len(images))]]

    def order(self, images: list, batch: int, rng: np.random.Generator | None) -> list[list]:
        """Shuffled if there is an rng. The last batch may be smaller."""
        chosen = images if rng is None else [images[i] for i in rng.permutation(len(images))]
        return [chosen[start : start + batch] for start in range(0, len(chosen), batch)]

    def gather(self, images: list, rng: np.random.Generator | None) -> tuple[Tensor, ...]:
        """Images (B, size, size, 3) uint8 and labels (B,) int64; with an rng augmented, without it centre crops."""
        return gather(images, self.size, rng if self.augment else None)


def prefetch(make: Callable, items: Iterable) -> Iterator:
    """make(item) for every item, the next one in a thread while the caller uses this one."""
    with ThreadPoolExecutor(1) as pool:
        coming: deque[Future] = deque()
        for item in items:
            coming.append(pool.submit(make, item))
            if len(coming) == 2:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def gather(
    images: list[tuple[Split, int]], size: int, rng: np.random.Generator | None
) -> tuple[Tensor, Tensor]:
    """One batch: pixels (B, size, size, 3) uint8 and labels (B,) int64. rng decides random crops and flips."""
    pixels = np.empty((len(images), size, size, 3), np.uint8)  # (B, size, size, 3)
    parts = {id(part): part for part, _ in images}.values()
    if rng is None and all(
        part.stack is not None and part.stack.shape[1:3] == (size, size) for part in parts
    ):
        for part in parts:  # nothing to cut: all of a part's images at once
            rows = [row for row, (other, _) in enumerate(images) if other is part]
            chosen = [images[row][1] for row in rows]
            for i in chosen:
                part.image(i)  # compares it with its checksum
            pixels[rows] = part.stack[chosen]  # type: ignore[index]
    else:
        for out, (part, i) in zip(pixels, images, strict=True):
            crop(part.image(i), size, out, rng)
    labels = np.array([part.index[i, 3] for part, i in images])  # (B,)
    for part in parts:
        part.release()
    return torch.from_numpy(pixels), torch.from_numpy(labels)


def crop(image: np.ndarray, size: int, out: np.ndarray, rng: np.random.Generator | None) -> None:
    """Copy a size x size window of image (h, w, 3) into out: at random and flipped half the time, or the centre."""
    spare = np.array(image.shape[:2]) - size
    if rng is None:
        top, left = np.round(spare / 2).astype(int)  # torchvision's CenterCrop rounds so
        out[:] = image[top : top + size, left : left + size]
    else:
        top, left = rng.integers(0, spare + 1)
        window, step = image[top : top + size, left : left + size], rng.choice((1, -1))
        for colour in range(
            3
        ):  # NumPy mirrors a plane at a time six times as fast as three planes at once
            out[..., colour] = window[:, ::step, colour]


def normalise(pixels: Tensor) -> Tensor:
    """(B, size, size, 3) uint8 -> (B, 3, size, size) float32, as torchvision's ToTensor and Normalize do."""
    mean, std = pixels.new_tensor([IMAGENET_MEAN, IMAGENET_STD], dtype=torch.float32).view(
        2, 3, 1, 1
    )
    return (
        pixels.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)
    )  # in place: half the time on a CPU


def stratified(labels: np.ndarray, seed: int) -> np.ndarray:
    """A random order of range(len(labels)) any stretch of which holds every class in its share."""
    order = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels))  # where in its class an image stands, from 0 to 1
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return order[np.argsort(place[order], kind="stable")]
