"""Measuring: seconds by turns, operations counted, the best a matrix product reaches here, memory.

Candidates take turns and the best round of each counts, so that a busy machine disturbs all alike: read the ratios.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense bf16 FLOP/s, from NVIDIA's data sheets
Figures = dict[str, float]


def types() -> list[str]:
    """fp32, and bf16 where the machine has units for it."""
    return ["fp32"] + ["bf16"] * (DEVICE == "cuda" or torch.cpu.get_capabilities().get("amx_bf16", False))


def timed(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each candidate: the best of `rounds`, in which they take turns, after one round to warm up."""
    best = dict.fromkeys(candidates, float("inf"))
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def flops(run: Callable[[], object]) -> float:
    """Operations of the matrix products; attention is made of countable ones for this."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def matrix_rate(dtype: torch.dtype, rounds: int) -> float:
    """The best FLOP/s of a matrix product on this machine, over shapes such as a ViT-B's and a GPT-2's."""
    rates = []
    for n, k, m in ((1576, 768, 3072), (1576, 3072, 768), (1280, 768, 2304), (4096, 4096, 4096)):
        x, w = torch.randn(n, k, dtype=dtype, device=DEVICE), torch.randn(m, k, dtype=dtype, device=DEVICE)
        rates.append(2 * n * k * m / timed({"": partial(F.linear, x, w)}, 3 * rounds)[""])
    return max(rates)


def rate(epochs: Iterable[Iterable], seconds: float) -> float:
    """Batches per second; the first batch, which starts things, is not timed."""
    count, start = 0, None
    for epoch in epochs:
        for _ in epoch:
            start = start or time.perf_counter()
            count += 1
            if (passed := time.perf_counter() - start) > seconds:
                return (count - 1) / passed
    return 0.0


def peak_memory(make: Callable[..., Callable], *args: object) -> float:
    """MB that make(*args) and two calls of what it makes add to a new process; on CUDA, of the GPU's memory."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(queue, make, *args))
    process.start()
    made = queue.get()
    process.join()
    return made / 1024


def most_resident() -> int:
    """kB of memory that this process has had at most; its parent's do not count, as they do in ru_maxrss."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])


def _peak(queue: multiprocessing.Queue, make: Callable[..., Callable], *args: object) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    before = most_resident()
    run = make(*args)
    for _ in range(2):
        run()
    queue.put(torch.cuda.max_memory_allocated() / 1024 if DEVICE == "cuda" else most_resident() - before)


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


def table(title: str, seconds: dict[str, float], against: str, per: float, unit: str) -> Figures:
    """Print time, rate and ratio of every candidate."""
    print(f"\n{title}")
    for name, s in seconds.items():
        print(f"  {name:<34}{1e3 * s:>10.2f} ms {per / s:>10.2f} {unit}/s   ratio {s / seconds[against]:.3f}")
    ratios = {f"{title}: {name} / {against}": s / seconds[against] for name, s in seconds.items()}
    return ratios | {f"{title}: {name}, seconds": s for name, s in seconds.items()}
