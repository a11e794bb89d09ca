"""How the benchmark measures: seconds in turns, operations, memory, the best matrix product.

Every candidate runs in a process of its own, as its user would start it: what one program sets for
memory or precision helps no other, and only one model is in memory at a time. Candidates take
turns, and the best round of each counts, so that a busy machine disturbs all alike. Read the
ratios: a time depends on the machine and on what else it does.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Dense bf16 FLOP/s from NVIDIA's data sheets; the first that the card's name contains counts.
PEAKS = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12}
Figures = dict[str, float]
Make = Callable[[], Callable[[], object]]  # makes what is run, in its own process


def number_types() -> list[str]:
    """fp32, and bf16 where the machine has units for it."""
    amx = hasattr(torch.cpu, "get_capabilities") and torch.cpu.get_capabilities().get("amx_bf16")
    return ["fp32", "bf16"] if DEVICE == "cuda" or amx else ["fp32"]


def wait() -> None:
    """Until the GPU, if there is one, has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], object], at_least: float) -> float:
    """Mean seconds of a run, over as many runs as take `at_least` seconds, after a warm-up."""
    for _ in range(5 if DEVICE == "cuda" else 1):
        run()
    wait()
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < at_least:
        run()
        count += 1
        if DEVICE == "cuda" and count % 10 == 0:
            wait()  # the queue of kernels would run far ahead of the clock
    wait()
    return (time.perf_counter() - start) / count


def turn(make: Make, at_least: float) -> tuple[float, float]:
    """One turn of a candidate: (seconds of a run, MB that it added to the process or the GPU)."""
    before = most_resident()
    seconds = seconds_of(make(), at_least)
    if DEVICE == "cuda":
        return seconds, torch.cuda.max_memory_allocated() / 1e6
    return seconds, most_resident() - before


def measure(candidates: Mapping[str, Make], rounds: int, at_least: float = 1.0) -> tuple:
    """Seconds and MB of every candidate, each turn in a new process: two dicts.

    Whatever goes wrong in a candidate is raised here.
    """
    seconds = dict.fromkeys(candidates, float("inf"))
    memory = dict.fromkeys(candidates, 0.0)
    turns = [candidate for _ in range(rounds) for candidate in candidates.items()]
    for name, make in tqdm(turns, unit="turn", leave=False, delay=2):
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as process:
            took, peak = process.submit(turn, make, at_least).result()
        seconds[name] = min(seconds[name], took)
        memory[name] = max(memory[name], peak)
    return seconds, memory


def most_resident() -> float:
    """MB of memory this process has had at most; ru_maxrss would count its parent's too."""
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1e3


def flops(run: Callable[[], object]) -> float:
    """Operations of the matrix products; attention is made of countable ones for this."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def matrix_rate(dtype: torch.dtype, rounds: int) -> float:
    """The best FLOP/s of a matrix product here, over shapes such as a ViT-B's and a GPT-2's."""
    rates = []
    for n, k, m in ((1576, 768, 3072), (1576, 3072, 768), (1280, 768, 2304), (4096, 4096, 4096)):
        x = torch.randn(n, k, dtype=dtype, device=DEVICE)
        w = torch.randn(m, k, dtype=dtype, device=DEVICE)
        took = min(seconds_of(partial(F.linear, x, w), 0.1) for _ in range(rounds))
        rates.append(2 * n * k * m / took)
    return max(rates)


def peak_rate() -> float | None:
    """Dense bf16 FLOP/s of this card by its data sheet; None for an unknown one and for a CPU."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else ""
    return next((peak for card, peak in PEAKS.items() if card in name), None)


def rate(epochs: Iterable[Iterable], seconds: float) -> float:
    """Batches per second; the first batch, which starts things, is not timed."""
    count, start = 0, 0.0
    for epoch in epochs:
        for _ in epoch:
            start = start or time.perf_counter()
            count += 1
            passed = time.perf_counter() - start
            if passed > seconds:
                return (count - 1) / passed
    return 0.0


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
    """Print a Markdown table of time, rate and ratio; return the same figures."""
    print(f"\n{title}\n\n| | ms | {unit}/s | ratio |\n|---|---|---|---|")
    figures: Figures = {}
    for name, s in seconds.items():
        ratio = s / seconds[against]
        print(f"| {name} | {1e3 * s:,.2f} | {per / s:,.2f} | {ratio:.3f} |")
        figures[f"{title}: {name} / {against}"] = ratio
        figures[f"{title}: {name}, seconds"] = s
    return figures
