"""Images: each is decoded once per machine, and a batch is cut from the pixels that were kept.

Decoding and resizing a JPEG takes a hundred times as long as copying a window of it, and gives the
same pixels in every epoch. So `prepare` does it once, in parallel, into one file per split:

    uint8 pixels of all images, one after another | index (n, 4) int64 | sha256, 32 bytes

The file is mapped, not read: memory holds what a batch touches, however large the file. The sha256
covers the names of the images and all before it. It is checked when the file is opened, and it is
the identity of the split: two folders with the same names, labels and pixels are the same data.

Shapes: B images; pixels are (height, width, 3) uint8 on disk and (B, size, size, 3) in batches.
"""

import contextlib
import hashlib
import json
import mmap
import os
import stat
from collections import Counter, deque
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

from support.files import UsageError, build_once, inside

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MOST = 89_478_485  # pixels of one image, before and after resizing: Pillow's own limit
# The endings of images that Pillow reads, and what operating systems leave among them.
ENDINGS = {
    *(".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
}
LEFT_BEHIND = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found", "Thumbs.db", "desktop.ini"}
NAMED = 10  # so many broken images are named at once
BLOCK = 1 << 24  # bytes that are hashed at once
VERSION = "sha256, 16 bits scaled"  # of the cached pixels: files of another version are not used
Side = int | tuple[int, int]  # how an image is resized: its short side, or (height, width)
Files = list[tuple[str, int]]  # path below a folder, label
Random = np.random.Generator | None


class BrokenImages(UsageError):
    """Images that are missing or damaged, named together."""

    def __init__(self, faults: list[str]):
        first = f" (the first {NAMED})" if len(faults) > NAMED else ""
        super().__init__(f"{'; '.join(faults[:NAMED])}{first}; put whole copies in their place")
        self.faults = faults


@dataclass
class Split:
    """Decoded images: `pixels` is one flat array, in memory or mapped from a file."""

    pixels: np.ndarray  # (bytes,) uint8
    index: np.ndarray  # (n, 4) int64: offset, height, width, label
    digest: str = ""  # of names, pixels and labels
    mapping: mmap.mmap | None = None

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
        with contextlib.suppress(ValueError), path.open("rb") as file:  # an empty file is no map
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            raw = np.frombuffer(mapping, np.uint8)
            body, digest = raw[:-32], raw[-32:].tobytes()

            # nothing in the file is believed before its digest is known to be right
            made = names_digest(files)
            for start in tqdm(range(0, len(body), BLOCK), f"checking {path.name}", delay=2):
                made.update(body[start : start + BLOCK].data)
                release(mapping)
            if made.digest() == digest:
                end = len(body) - 32 * len(files)
                index = np.frombuffer(body[end:].tobytes(), np.int64).reshape(-1, 4)
                return cls(body[:end], index, made.hexdigest(), mapping)
        raise UsageError(f"{path} is damaged; delete it, and the next start makes it anew")


def names_digest(files: Files) -> "hashlib._Hash":
    """The digest of a split before its pixels and labels are added."""
    return hashlib.sha256(os.fsencode("\n".join(file for file, _ in files)))


def release(mapping: mmap.mmap | None) -> None:
    """Forget the pages that were touched, or an epoch would pile up the whole file in memory."""
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def visible(name: str) -> bool:
    """Whether a file or folder can be data: it is not hidden, nor left behind by a system."""
    return not name.startswith(".") and name not in LEFT_BEHIND


def image_files(top: Path) -> tuple[list[str], Counter[str]]:
    """Image files as paths below `top`, in torchvision's order; how many others, by ending."""
    found: list[str] = []
    others: Counter[str] = Counter()
    seen = {os.path.realpath(folder) for folder in (top, *top.absolute().parents)}
    for root, folders, files in os.walk(top, followlinks=True):
        # a link to a folder that was seen leads in a circle
        places = {name: os.path.realpath(f"{root}/{name}") for name in sorted(folders)}
        folders[:] = [n for n, real in places.items() if visible(n) and real not in seen]
        seen.update(places.values())

        for name in filter(visible, files):
            path = Path(root, name).relative_to(top)
            ending = path.suffix.lower()
            if ending in ENDINGS:
                found.append(path.as_posix())
            else:
                others[ending or "no ending"] += 1
    return sorted(found, key=lambda path: (path.split("/")[0], os.path.split(path))), others


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as 8-bit RGB. Grey of 16 or 32 bits is scaled by the range of its type.

    Pillow would clip it at 255, to white. ValueError for what has no such range, or would be black.
    """
    if image.mode == "F":
        raise ValueError("it holds floats, which are no pixels")
    if image.mode.startswith("I"):
        # a TIFF of mode I holds 32 signed bits; other formats keep their 16 bits in it
        values = np.asarray(image).astype(np.int64)  # (height, width)
        bits = 31 if image.mode == "I" and image.format == "TIFF" else 16
        scaled = values >> (bits - 8)
        if scaled.min() < 0 or scaled.max() > 255 or (values.any() and not scaled.any()):
            raise ValueError(
                f"its values from {values.min()} to {values.max()} do not use the {bits} bits of "
                "their type; save it with 8 bits"
            )
        image = Image.fromarray(scaled.astype(np.uint8))
    return image.convert("RGB")


def read_image(path: str | Path, resize: Side) -> np.ndarray:
    """Pixels (height, width, 3) uint8 of a file, resized as by torchvision. Else ValueError."""
    try:
        with Image.open(path) as image:
            short, long = sorted(image.size)
            if isinstance(resize, int) and resize**2 * long > MOST * short:
                raise ValueError(f"{long} x {short} is too thin: resized, it fills the memory")
            return np.asarray(Resize(resize)(to_rgb(image)))
    except Exception as error:  # of many kinds, if the file is damaged
        raise ValueError(f"{path} cannot be read as an image ({error})") from error


def load_files(
    root: Path, task: str, base: Path, classes: list[str], files: dict[str, Files], resize: Side
) -> dict:
    """What a Dataset holds of image files. Broken images of all splits are named together."""
    splits, faults = {}, []
    for split, part in files.items():
        try:
            splits[split] = prepare(root / "cache", f"{task}-{split}", base, part, resize)
        except BrokenImages as error:
            faults += error.faults
    if faults:
        raise BrokenImages(faults)
    return {"classes": classes, "splits": splits, "resize": resize}


def prepare(cache: Path, name: str, base: Path, files: Files, resize: Side) -> Split:
    """Images `files` (path below `base`, label), decoded once into a file in `cache` and mapped.

    The file is named after all that may change its content: how images are resized, and the name,
    label, size and time of change of each. UsageError for images that are missing or broken.
    """
    key, faults = hashlib.sha256(f"{resize} {VERSION}".encode()), []
    for file, label in files:
        # a list of images may come from elsewhere: it must not lead out of its folder
        if not inside(file):
            raise UsageError(
                f"{name} names '{file}', which is not below {base}; do not use this list of images"
            )
        try:
            status = os.stat(f"{base}/{file}")
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is no file")
            key.update(os.fsencode(f"{file}\n{label} {status.st_size} {status.st_mtime_ns}\n"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", error)
            faults.append(f"{base}/{file} belongs to {name} but cannot be had ({reason})")
    if faults:
        raise BrokenImages(faults)

    side = f"{resize}" if isinstance(resize, int) else "x".join(map(str, resize))
    path = cache / f"{name}-{side}-{key.hexdigest()[:16]}.pixels"
    build_once(path, lambda temporary: decode(temporary, name, base, files, resize))
    return Split.open(path, files)


def decode(temporary: Path, name: str, base: Path, files: Files, resize: Side) -> None:
    """Write what `Split.open` reads. One thread per core decodes; memory holds a few images."""

    def read(file: tuple[str, int]) -> np.ndarray | str:
        try:
            return read_image(f"{base}/{file[0]}", resize)
        except ValueError as error:
            return str(error)

    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    images = prefetch(read, files, threads=cores)
    made, index, faults = names_digest(files), np.empty((len(files), 4), np.int64), []
    with temporary.open("wb") as out:
        # pixels, one image after another
        for i, image in enumerate(tqdm(images, f"decoding {name}", len(files), delay=2)):
            if isinstance(image, str):
                faults.append(image)
                continue
            index[i] = out.tell(), *image.shape[:2], files[i][1]
            made.update(image.data)
            out.write(image.data)
        if faults:
            raise BrokenImages(faults)

        # where they are, and the digest
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
        # one generator per epoch: first it shuffles, then it augments image after image
        rng = None if seed is None else np.random.default_rng([seed, epoch])

        def make(chosen: list) -> tuple[Tensor, ...]:
            made = self.gather(chosen, rng)
            return tuple(tensor.pin_memory() for tensor in made) if pin else made

        yield from prefetch(make, self.order(self.examples(split, fraction), batch, rng))


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
    # split -> file -> class, if the split was made here
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

    def examples(self, split: str, fraction: float = 1.0) -> list[tuple[Split, int]]:
        """A split's images as (split, number in it); `trainval` is train and val together.

        fraction: only that share of them, stratified, the same for every seed. A smaller share is
        part of a larger one.
        """
        names = ("train", "val") if split == "trainval" else (split,)
        images = [(self.splits[name], i) for name in names for i in range(len(self.splits[name]))]
        if fraction == 1:
            return images
        labels = np.array([part.labels[i] for part, i in images])
        return [images[i] for i in stratified(labels, seed=0)[: round(fraction * len(images))]]

    def order(self, images: list, batch: int, rng: Random) -> list[list]:
        """Shuffled if there is an rng. The last batch may be smaller."""
        if rng is not None:
            images = [images[i] for i in rng.permutation(len(images))]
        return [images[start : start + batch] for start in range(0, len(images), batch)]

    def gather(self, images: list[tuple[Split, int]], rng: Random) -> tuple[Tensor, Tensor]:
        """One batch. rng decides random crops and flips; without it, the centre is cut out."""
        pixels = np.empty((len(images), self.size, self.size, 3), np.uint8)  # (B, size, size, 3)
        # one image after another: in this order the random numbers are drawn
        for out, (part, i) in zip(pixels, images, strict=True):
            crop(part.image(i), self.size, out, rng if self.augment else None)
        labels = np.array([part.labels[i] for part, i in images])  # (B,)
        for part in self.splits.values():
            release(part.mapping)
        return torch.from_numpy(pixels), torch.from_numpy(labels)


def prefetch(make: Callable, items: Iterable, threads: int = 1) -> Iterator:
    """make(item) for every item, in order; threads make the next ones while the caller uses one."""
    with ThreadPoolExecutor(threads) as pool:
        coming: deque[Future] = deque()
        for item in items:
            coming.append(pool.submit(make, item))
            if len(coming) > threads:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


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
    # NumPy mirrors one plane at a time six times as fast as three planes at once
    for colour in range(3):
        out[..., colour] = window[:, ::-1, colour]


def normalise(pixels: Tensor) -> Tensor:
    """(B, size, size, 3) uint8 -> (B, 3, size, size) float, as torchvision does it."""
    both = pixels.new_tensor([IMAGENET_MEAN, IMAGENET_STD], dtype=torch.float32)
    mean, std = both.view(2, 3, 1, 1)
    # in place: half the time on a CPU
    return pixels.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)


def stratified(labels: np.ndarray, seed: int) -> np.ndarray:
    """A random order of range(len(labels)) any stretch of which holds every class in its share."""
    order = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels))  # where in its class an image stands, from 0 to 1
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return order[np.argsort(place[order], kind="stable")]
