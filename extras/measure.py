"""How the benchmark measures: seconds in turns, operations, memory, the best matrix product.

Every candidate runs in a process of its own, as its user would start it: what one program sets for
memory or precision helps no other, and only one model is in memory at a time. Candidates take
turns, and the best round of each counts, so that a busy machine disturbs all alike. Read the
ratios: a time depends on the machine and on what else it does.
"""

import multiprocessing
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Dense bf16 FLOP/s from NVIDIA's data sheets; the first that the card's name contains counts.
PEAKS = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12}
Make = Callable[[], Callable[[], object]]  # makes what is run, in its own process


def number_types() -> list[str]:
    """fp32, and bf16 where the machine has units for it."""
    amx = torch.cpu.get_capabilities().get("amx_bf16", False)
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
    wait()
    return (time.perf_counter() - start) / count


def turn(make: Make, at_least: float) -> tuple[float, float]:
    """One turn of a candidate: (seconds of a run, MB that it added to the process or the GPU)."""
    before = most_resident()
    seconds = seconds_of(make(), at_least)
    if DEVICE == "cuda":
        return seconds, torch.cuda.max_memory_allocated() / 1e6
    return seconds, most_resident() - before


def most_resident() -> float:
    """MB of memory this process has had at most; ru_maxrss would count its parent's too."""
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1e3


def measure(candidates: Mapping[str, Make], rounds: int, at_least: float = 1.0) -> tuple:
    """Seconds and MB of every candidate, each turn in a new process: two dicts.

    One that needs more memory than the GPU has is left out. Any other error is raised here.
    """
    seconds: dict[str, float] = {}
    memory: dict[str, float] = {}
    turns = [candidate for _ in range(rounds) for candidate in candidates.items()]
    for name, make in tqdm(turns, unit="turn", leave=False, delay=2):
        context = multiprocessing.get_context("spawn")
        try:
            with ProcessPoolExecutor(1, mp_context=context) as process:
                took, peak = process.submit(turn, make, at_least).result()
        except torch.OutOfMemoryError:
            print(f"out of memory: {name}")
            continue
        seconds[name] = min(seconds.get(name, took), took)
        memory[name] = max(memory.get(name, peak), peak)
    return seconds, memory


def flops(run: Callable[[], object]) -> float:
    """Operations of the matrix products; attention is made of countable ones for this."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


@cache
def matrix_rate(dtype: str) -> float:
    """The best FLOP/s of a matrix product here, over shapes such as a ViT-B's and a GPT-2's."""
    torch.set_float32_matmul_precision("high")  # TF32, as train.py has it
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    rates = []
    for n, k, m in ((1576, 768, 3072), (1576, 3072, 768), (1280, 768, 2304), (4096, 4096, 4096)):
        x = torch.randn(n, k, dtype=kind, device=DEVICE)
        w = torch.randn(m, k, dtype=kind, device=DEVICE)
        took = min(seconds_of(partial(F.linear, x, w), 0.1) for _ in range(3))
        rates.append(2 * n * k * m / took)
    return max(rates)


def mfu(rate: float, dtype: str) -> str:
    """A rate as a share of the card's data sheet; TF32 is half of bf16. "" for an unknown card."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else ""
    for card, peak in PEAKS.items():
        if card in name:
            return f"{100 * rate / (peak if dtype == 'bf16' else peak / 2):.1f} %"
    return ""


def table(
    title: str,
    seconds: Mapping[str, float],
    memory: Mapping[str, float],
    per: float,
    unit: str,
    operations: Mapping[str, float] | None = None,
) -> None:
    """Print a Markdown table. Ratios are to its first line.

    Names are "WHO, DTYPE, MODE" if their operations are given.
    """
    columns = ["", "ms", f"{unit}/s", "ratio"]
    columns += ["peak MB"] if memory else []
    columns += ["GFLOP", "of the best product", "MFU"] if operations else []
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    first = next(iter(seconds.values()), 0.0)
    for name, s in seconds.items():
        cells = [name, f"{1e3 * s:,.2f}", f"{per / s:,.2f}", f"{s / first:.3f}"]
        cells += [f"{memory[name]:,.0f}"] if memory else []
        if operations:
            dtype, rate = name.split(", ")[1], operations[name] / s
            cells += [f"{operations[name] / 1e9:,.1f}", f"{rate / matrix_rate(dtype):.2f}"]
            cells.append(mfu(rate, dtype))
        print(f"| {' | '.join(cells)} |")
