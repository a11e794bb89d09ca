"""Images: each is decoded once per machine, and a batch is cut from the pixels that were kept.

Decoding and resizing a JPEG takes a hundred times as long as copying a window of it, and gives the
same pixels in every epoch. So `prepare` does it once, in parallel, into one file per split:

    uint8 pixels of all images, one after another | index (n, 4) int64 | sha256, 32 bytes

The file is mapped, not read, so it may be larger than memory: the system keeps what was touched
only as long as there is room. The sha256 covers the names of the images and all before it. It is
checked when the file is opened, and it is the identity of the split: two folders with the same
names, labels and pixels are the same data.

Shapes: B images; pixels are (height, width, 3) uint8 on disk and (B, size, size, 3) in batches.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Resize
from tqdm import tqdm

from support.files import UsageError, build_once

# The endings of images that Pillow reads, and what operating systems leave among them.
ENDINGS = {
    *(".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
}
LEFT_BEHIND = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found", "Thumbs.db", "desktop.ini"}
NAMED = 10  # so many broken images are named at once
VERSION = "sha256, 16 bits scaled"  # of the cached pixels: files of another version are not used
Side = int | tuple[int, int]  # how an image is resized: its short side, or (height, width)
Files = list[tuple[str, int]]  # path below a folder, label
Random = np.random.Generator | None


class BrokenImages(UsageError):
    """Images that are missing or damaged: a sentence of each in `args`, named together."""

    def __str__(self) -> str:
        first = f" (the first {NAMED})" if len(self.args) > NAMED else ""
        return f"{'; '.join(self.args[:NAMED])}{first}; put whole copies in their place"


@dataclass
class Split:
    """Decoded images: `pixels` is one flat array, in memory or mapped from a file."""

    pixels: np.ndarray  # (bytes,) uint8
    index: np.ndarray  # (n, 4) int64: offset, height, width, label
    digest: str = ""  # of names, pixels and labels

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> np.ndarray:
        return self.index[:, 3]  # (n,)

    def image(self, i: int) -> np.ndarray:
        """A view (height, width, 3), not a copy."""
        offset, height, width, _ = self.index[i]
        return self.pixels[offset : offset + height * width * 3].reshape(height, width, 3)

    @classmethod
    def of(cls, images: np.ndarray, labels: np.ndarray) -> "Split":
        """From images (n, height, width, 3) uint8 of one size and labels (n,)."""
        n, height, width, _ = images.shape
        sides = np.full((n, 2), (height, width))
        index = np.column_stack([np.arange(n) * height * width * 3, sides, labels])
        made = hashlib.sha256(images.data)
        made.update(index.data)
        return cls(images.reshape(-1), index, made.hexdigest())

    @classmethod
    def open(cls, path: Path, files: Files) -> "Split":
        """What `decode` wrote, mapped. UsageError if it is not whole."""
        if path.stat().st_size:  # nothing cannot be mapped
            raw = np.asarray(np.memmap(path, np.uint8, "r"))
            body, digest = raw[:-32], raw[-32:]

            # Nothing in the file is believed before its digest is known to be right.
            made = names_digest(files)
            blocks = np.array_split(body, len(body) // 2**24 + 1)
            for block in tqdm(blocks, f"checking {path.name}", delay=2):
                made.update(block.data)
            if made.digest() == digest.tobytes():
                end = len(body) - 32 * len(files)
                index = np.frombuffer(body[end:].tobytes(), np.int64).reshape(-1, 4)
                return cls(body[:end], index, made.hexdigest())
        raise UsageError(f"{path} is damaged; delete it, and the next start makes it anew")


def names_digest(files: Files) -> "hashlib._Hash":
    """The digest of a split before its pixels and labels are added."""
    return hashlib.sha256(os.fsencode("\n".join(file for file, _ in files)))


def visible(name: str) -> bool:
    """Whether a file or folder can be data: it is not hidden, nor left behind by a system."""
    return not name.startswith(".") and name not in LEFT_BEHIND


def subfolders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and visible(p.name))


def image_files(top: Path) -> tuple[list[str], list[str]]:
    """Image files as paths below `top`, in torchvision's order; the endings of all other files.

    A folder in `top` may be a link. Links further below are not followed: they may lead in circles.
    """
    found, others = [], []
    for root, folders, files in os.walk(top, followlinks=True):
        below = root != str(top)
        folders[:] = [
            name
            for name in folders
            if visible(name) and not (below and os.path.islink(f"{root}/{name}"))
        ]
        for name in filter(visible, files):
            path = Path(root, name).relative_to(top)
            if path.suffix.lower() in ENDINGS:
                found.append(path.as_posix())
            else:
                others.append(path.suffix.lower() or "no ending")
    return sorted(found, key=lambda path: (path.split("/")[0], os.path.split(path))), others


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as 8-bit RGB. Grey of 16 or 32 bits is scaled by the range of its type.

    Pillow would clip it at 255, to white. ValueError for what has no such range, or would be black.
    """
    if image.mode == "F":
        raise ValueError("it holds floats, which are no pixels")
    if image.mode.startswith("I"):
        # A TIFF of mode I holds 32 signed bits; other formats keep their 16 bits in it.
        values = np.asarray(image).astype(np.int64)  # (height, width)
        bits = 31 if image.mode == "I" and image.format == "TIFF" else 16
        scaled = values >> (bits - 8)
        if scaled.min() < 0 or scaled.max() > 255 or (values.any() and not scaled.any()):
            raise ValueError(
                f"its values from {values.min()} to {values.max()} do not use the {bits} bits of "
                "their type; save it with 8 bits"
            )
        image = Image.fromarray(scaled.astype(np.uint8))  # (height, width)
    return image.convert("RGB")


def read_image(path: str | Path, resize: Side) -> np.ndarray:
    """Pixels (height, width, 3) uint8 of a file, resized as by torchvision. Else ValueError."""
    try:
        with Image.open(path) as image:
            return np.asarray(Resize(resize)(to_rgb(image)))
    except Exception as error:  # of many kinds, if the file is damaged
        raise ValueError(f"{path} cannot be read as an image ({error})") from error


def load_files(
    root: Path, task: str, base: Path, classes: list[str], files: dict[str, Files], resize: Side
) -> dict:
    """What a Dataset holds of image files. Broken images of all splits are named together."""
    splits: dict[str, Split] = {}
    faults: list[str] = []
    for split, part in files.items():
        try:
            splits[split] = prepare(root / "cache", f"{task}-{split}", base, part, resize)
        except BrokenImages as error:
            faults += error.args
    if faults:
        raise BrokenImages(*faults)
    return {"classes": classes, "splits": splits, "resize": resize}


def prepare(cache: Path, name: str, base: Path, files: Files, resize: Side) -> Split:
    """Images `files` (path below `base`, label), decoded once into a file in `cache` and mapped.

    The file is named after all that may change its content: how images are resized, and the name,
    label, size and time of change of each. UsageError for images that are missing or broken.
    """
    missing = [file for file, _ in files if not os.path.isfile(f"{base}/{file}")]
    if missing:
        said = f"belongs to {name}, but there is no such file"
        raise BrokenImages(*[f"{base}/{file} {said}" for file in missing])
    key = hashlib.sha256(f"{resize} {VERSION}".encode())
    for file, label in files:
        status = os.stat(f"{base}/{file}")
        key.update(os.fsencode(f"{file}\n{label} {status.st_size} {status.st_mtime_ns}\n"))
    side = "x".join(map(str, np.ravel(resize)))
    path = cache / f"{name}-{side}-{key.hexdigest()[:16]}.pixels"
    build_once(path, lambda temporary: decode(temporary, name, base, files, resize))
    return Split.open(path, files)


def decode(temporary: Path, name: str, base: Path, files: Files, resize: Side) -> None:
    """Write what `Split.open` reads. One thread per core decodes; memory holds a few images."""
    decoded = prefetch(lambda file: read_image(f"{base}/{file[0]}", resize), files, cores())
    made, index, faults = names_digest(files), np.empty((len(files), 4), np.int64), []
    with temporary.open("wb") as out:
        # Pixels, one image after another.
        for i, future in enumerate(tqdm(decoded, f"decoding {name}", len(files), delay=2)):
            try:
                image = future.result()
            except ValueError as error:
                faults.append(str(error))
                continue
            index[i] = out.tell(), *image.shape[:2], files[i][1]
            made.update(image.data)
            out.write(image.data)
        if faults:
            raise BrokenImages(*faults)

        # Where they are, and the digest.
        made.update(index.data)
        out.write(index.tobytes() + made.digest())
        out.flush()
        os.fsync(out.fileno())  # a power cut after the renaming finds it on the disk


class Batched:
    """What images and texts have in common: batches, each made while the one before is used.

    A kind of data says what its `examples` are, in what `order` they come, how they are `gather`ed.
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
        """With a seed: shuffled, and images augmented, by (seed, epoch) alone. Without: in order.

        pin: put the batches into page-locked memory, from which CUDA copies without waiting.
        """
        # One generator per epoch: first it shuffles, then it augments image after image.
        rng = None if seed is None else np.random.default_rng([seed, epoch])

        def make(chosen: list) -> tuple[Tensor, ...]:
            made = self.gather(chosen, rng)
            return tuple(tensor.pin_memory() for tensor in made) if pin else made

        order = self.order(self.examples(split, fraction), batch, rng)
        for future in prefetch(make, order, threads=1):
            yield future.result()


@dataclass
class Dataset(Batched):
    """One task, ready for a model that takes size x size pixels."""

    task: str
    classes: list[str]
    size: int
    augment: bool  # random crop and flip while training
    final: str  # what the protocol's last runs train on: "train" (FGVC) or "trainval" (VTAB-1K)
    splits: dict[str, Split] = field(repr=False)  # train, val, test
    resize: Side | None = None  # how image files were resized, if they were
    # Split -> file -> class, if the split was made here.
    listing: dict[str, dict[str, str]] | None = field(default=None, repr=False)

    text: ClassVar[Literal[False]] = False
    unit: ClassVar = "images"

    @property
    def metadata(self) -> dict:
        """What a trained model must know of its data to be used without them."""
        return {"classes": self.classes, "rule": self.resize}

    @property
    def identity(self) -> dict[str, str]:
        """A short digest of the classes, and of each split's names, labels and pixels."""
        classes = hashlib.sha256(json.dumps(self.classes).encode()).hexdigest()
        digests = {"classes": classes} | {name: part.digest for name, part in self.splits.items()}
        return {name: digest[:16] for name, digest in digests.items()}

    def examples(self, split: str, fraction: float = 1.0) -> list[tuple[np.ndarray, int]]:
        """A split's images (height, width, 3) and labels; `trainval` is train and val together.

        fraction: only that share of them, stratified, the same for every seed. A smaller share is
        part of a larger one.
        """
        names = ("train", "val") if split == "trainval" else (split,)
        parts = [self.splits[name] for name in names]
        examples = [
            (part.image(i), int(part.labels[i])) for part in parts for i in range(len(part))
        ]
        if fraction == 1:
            return examples
        order = stratified(np.array([label for _, label in examples]))
        return [examples[i] for i in order[: round(fraction * len(examples))]]

    def order(self, examples: list, batch: int, rng: Random) -> list[list]:
        """Shuffled if there is an rng. The last batch may be smaller."""
        if rng is not None:
            examples = [examples[i] for i in rng.permutation(len(examples))]
        return [examples[start : start + batch] for start in range(0, len(examples), batch)]

    def gather(self, examples: list[tuple[np.ndarray, int]], rng: Random) -> tuple[Tensor, Tensor]:
        """One batch. rng decides random crops and flips; without it, the centre is cut out."""
        pixels = np.empty((len(examples), self.size, self.size, 3), np.uint8)  # (B, size, size, 3)
        # One image after another: in this order the random numbers are drawn.
        for out, (image, _) in zip(pixels, examples, strict=True):
            crop(image, self.size, out, rng if self.augment else None)
        return torch.from_numpy(pixels), torch.tensor([label for _, label in examples])  # (B,)


def cores() -> int:
    """How many cores of the CPU this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def prefetch(make: Callable, items: Iterable, threads: int) -> Iterator[Future]:
    """make(item) for every item, in order; threads make the next ones while the caller uses one."""
    with ThreadPoolExecutor(threads) as pool:
        coming: deque[Future] = deque()
        for item in items:
            coming.append(pool.submit(make, item))
            if len(coming) > threads:
                yield coming.popleft()
        yield from coming


def crop(image: np.ndarray, size: int, out: np.ndarray, rng: Random) -> None:
    """Copy a size x size window of image (h, w, 3) into out.

    rng: at a random place, and flipped half the time. Without it: the centre.
    """
    spare = np.array(image.shape[:2]) - size
    if rng is None:
        top, left = np.round(spare / 2).astype(int)  # torchvision's CenterCrop rounds so
    else:
        top, left = rng.integers(0, spare + 1)
    window = image[top : top + size, left : left + size]  # (size, size, 3)
    if rng is None or rng.choice((1, -1)) == 1:
        out[:] = window
        return
    # NumPy mirrors one plane at a time faster than three planes at once
    for colour in range(3):
        out[..., colour] = window[:, ::-1, colour]


def stratified(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """A random order of range(len(labels)) any stretch of which holds every class in its share."""
    order = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels))  # where in its class an image stands, from 0 to 1
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return order[np.argsort(place[order], kind="stable")]
