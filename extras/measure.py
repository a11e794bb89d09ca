"""Measuring: seconds by turns, operations counted, the best a matrix product reaches here, memory.

Candidates take turns and the best round of each counts, so that a busy machine disturbs all alike: read the ratios.
What is compared runs in a process of its own, started as its user would: what one sets for memory helps no other.
"""

import multiprocessing
import re
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PEAKS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}  # dense bf16 FLOP/s, from NVIDIA's data sheets
Figures = dict[str, float]


def types() -> list[str]:
    """fp32, and bf16 where the machine has units for it."""
    return ["fp32"] + ["bf16"] * (
        DEVICE == "cuda" or torch.cpu.get_capabilities().get("amx_bf16", False)
    )


def wait() -> None:
    """Until the GPU, if there is one, has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each candidate: the best of `rounds`, in which they take turns, after one round to warm up."""
    best = dict.fromkeys(candidates, float("inf"))
    turns = [(turn, *candidate) for turn in range(rounds + 1) for candidate in candidates.items()]
    for turn, name, run in tqdm(turns, unit="run", leave=False, delay=2):
        wait()
        start = time.perf_counter()
        run()
        wait()
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
        x, w = (
            torch.randn(n, k, dtype=dtype, device=DEVICE),
            torch.randn(m, k, dtype=dtype, device=DEVICE),
        )
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


class Apart:
    """What make(*args) makes, in a process of its own, as its user would start it: call it, and it runs there once.

    It is made, and run for the first time, at once and beside all others; the first call only waits for that. Whatever
    goes wrong there is raised here. peak: MB that all this has added to the process; on CUDA, of the GPU's memory.
    """

    peak = -1.0

    def __init__(self, make: Callable[..., Callable], *args: object):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, make, *args), daemon=True).start()
        theirs.close()

    def __call__(self) -> None:
        if self.peak >= 0:
            self.pipe.send("again")
        said = self.pipe.recv()
        if isinstance(said, Exception):
            raise said
        self.peak = said


def _serve(pipe: Connection, make: Callable[..., Callable], *args: object) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is the parent's affair, who ends this process too
    before = most_resident()
    try:
        run = make(*args)
        while True:
            run()
            wait()
            pipe.send(
                torch.cuda.max_memory_allocated() / 1e6
                if DEVICE == "cuda"
                else most_resident() - before
            )
            pipe.recv()
    except (EOFError, BrokenPipeError):  # nobody listens any more
        pass
    except Exception as error:  # noqa: BLE001  whatever it is, it belongs to who asked
        pipe.send(error)


def most_resident() -> float:
    """MB of memory that this process has had at most; its parent's do not count, as they do in ru_maxrss."""
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    ]
    return int(line.split()[1]) / 1e3


FORMULA = re.compile(  # what a step computes, rather than moves, as PyTorch names it with and without autograd
    "_*(linear|matmul|mm|addmm|bmm|baddbmm|convolution|scaled_dot_product[a-z_]*|(log_)?softmax|gelu|(native_)?layer_norm"
    "|bernoulli_|add|topk)(_backward|_backward_data)?"
)


class Calls(TorchDispatchMode):
    """Remembers the calls of all of PyTorch's operations whose names match."""

    def __init__(self, names: re.Pattern):
        super().__init__()
        self.names = names
        self.calls: list[partial] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        call = partial(function, *args, **kwargs or {})
        if self.names.fullmatch(function.overloadpacket.__name__):
            self.calls.append(call)
        return call()


def formula_alone(make: Callable[..., Callable], *args: object) -> Callable[[], None]:
    """Of what make(*args) runs: products, attention, GELU, norms, sums, dropout's mask, on the same tensors.

    Its time is what is left if every copy, cast, concatenation and the optimiser cost nothing. A faster kernel for one
    of these operations would go below it.
    """
    run = make(*args)
    with Calls(FORMULA) as made:
        run()

    def alone() -> None:
        for call in made.calls:
            call()

    return torch.inference_mode()(alone)


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
        print(
            f"  {name:<34}{1e3 * s:>10.2f} ms {per / s:>10.2f} {unit}/s   ratio {s / seconds[against]:.3f}"
        )
    ratios = {f"{title}: {name} / {against}": s / seconds[against] for name, s in seconds.items()}
    return ratios | {f"{title}: {name}, seconds": s for name, s in seconds.items()}
