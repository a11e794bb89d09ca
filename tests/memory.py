"""Memory: what autograd keeps of a forward pass, what the page foresees, what takes some."""

import re
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from support.files import UsageError

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def kept_for_backward(run: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps of a forward pass, parameters left out."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        alive = run()
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    del alive
    return sum(size for place, size in kept.items() if place not in known)


def foreseen() -> dict[int, list[float]]:
    """The page's memory table: prefix length -> MB per image, GB at batch 64, 128 and 256."""
    row = re.compile(r"^\| (\d+) \| (\d+) MB" + 3 * r" \| ([\d.]+) GB" + r" \|$", re.M)
    found = row.findall(PAGE.read_text())
    return {int(length): [float(x) for x in rest] for length, *rest in found}


def take(mb: int) -> Callable[[], None]:
    """What allocates and fills so much memory; or fails, if it is asked for none."""
    if not mb:
        raise UsageError("nothing to take")
    return partial(fill, mb)


def fill(mb: int) -> None:
    torch.ones(mb * 250_000)
    time.sleep(mb / 1000)
