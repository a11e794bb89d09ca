"""How fast it is, and against what.

python bench.py data        training batches from decoded pixels, against decoding them again in every epoch
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from data import load, normalise
from pixels import IMAGENET_MEAN, IMAGENET_STD

IMAGES, BATCH, SECONDS = 640, 64, 10.0


def photographs(folder: Path) -> float:
    """640 JPEGs of 500 x 375 with detail at all scales, as photographs have it, in ten classes; their mean size, kB."""
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        picture = np.zeros((375, 500, 3))
        for cells in (4, 12, 36, 108, 324):
            noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
            picture += np.asarray(noise.resize((500, 375), Image.Resampling.BICUBIC)) / cells**0.5
        picture = (picture / picture.max() * 255).astype(np.uint8)
        path = folder / f"class{i % 10}" / f"{i:04}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(path, quality=90)
    return sum(path.stat().st_size for path in folder.rglob("*.jpg")) / IMAGES / 1e3


def rate(epochs: Iterable[Iterable]) -> float:
    """Batches per second over about ten seconds; the first batch, which starts things, is not timed."""
    count, start = 0, None
    for epoch in epochs:
        for _ in epoch:
            start = start or time.perf_counter()
            count += 1
            if (passed := time.perf_counter() - start) > SECONDS:
                return (count - 1) / passed
    return 0.0


def bench_data() -> None:
    """Both on one core, on the same images, cut to 224 x 224 and flipped at random as FGVC's are."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    pipeline = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.RandomCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        size = photographs(Path(folder))
        print(f"{IMAGES} JPEGs of 500 x 375, {size:.0f} kB each; batches of {BATCH}; one core")
        loader = DataLoader(ImageFolder(folder, pipeline), BATCH, shuffle=True, drop_last=True)
        slow = rate(loader for _ in range(10**6))
        with tempfile.TemporaryDirectory() as root:
            start = time.perf_counter()
            data = load(folder, root, 224)
            prepared = time.perf_counter() - start
            turns = [data.batches("train", BATCH, seed=0, epoch=epoch) for epoch in range(2000)]
            fast = rate(turns)
            whole = rate((normalise(x) for x, _ in data.batches("train", BATCH, seed=0, epoch=e)) for e in range(2000))
    print(f"  torchvision, decoding in every epoch   {slow:8.2f} batches/s")
    print(f"  decoded once ({prepared:.0f} s), uint8           {fast:8.2f} batches/s  {fast / slow:6.1f} x")
    print(f"  the same, normalised on this core      {whole:8.2f} batches/s  {whole / slow:6.1f} x")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="How fast it is, and against what.", allow_abbrev=False)
    parser.add_argument("what", choices=["data"])
    parser.parse_args(argv)
    bench_data()
    return 0


if __name__ == "__main__":
    sys.exit(main())
