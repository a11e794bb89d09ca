"""How fast it is, beside what a user would take instead (peers.py), and beside the machine's best.

    python -m extras.bench                  every row
    python -m extras.bench vit gpt          some of them

Loss and gradients of both sides are compared before anything is timed. How it is measured:
measure.py. Read the ratios.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import load
from extras import peers
from extras.measure import DEVICE, flops, measure, number_types, seconds_of, table
from gpt import GPT, HUB
from support.files import Parser, UsageError, exit_code
from sweep import METHODS
from train import (
    Config,
    TunedModel,
    image_loss,
    make_optimizer,
    prepare_process,
    resolve,
    text_loss,
    train_step,
)
from vit import ViT

LENGTH, CLASSES = 10, 200
TOKENS = 64  # of a text's source, and of its target
GPT2 = "gpt2-medium" if DEVICE == "cuda" else "gpt2"
# What an image passes through, and which of sweep.py's methods trains it.
SIDES: dict[str, tuple[Callable, str]] = {
    "ours": (ViT, "deep"),
    "peer": (peers.Peer, "deep"),
    "modern peer": (peers.ModernPeer, "deep"),
    "full fine-tuning": (ViT, "full"),
    "Simple-share": (ViT, "simple"),
    "prompts as tokens": (peers.PromptTokens, "simple"),
}
ROOT = Path(__file__).parent.parent


def sides(who: str, length: int) -> tuple[Callable, Config, Any, Any]:
    """What a step needs: (loss, config, model, backbone)."""
    torch.manual_seed(0)
    if who in SIDES:
        make, method = SIDES[who]
        config = resolve(Config(task="cub", length=length, **METHODS[method]))
        vit = make().to(DEVICE).requires_grad_(False)
        return image_loss, config, TunedModel(config, vit, CLASSES).to(DEVICE), vit

    # Texts.
    config = resolve(Config(task="e2e", share="deep", length=length))
    if who == "peft":
        return peers.peft_loss, config, peers.peft_gpt2(length, HUB[GPT2]).to(DEVICE), None
    gpt = GPT(**HUB[GPT2]).to(DEVICE).requires_grad_(False)
    return text_loss, config, TunedModel(config, gpt, 0).to(DEVICE), gpt


def images(batch: int) -> tuple[Tensor, Tensor]:
    """Random pixels (B, 224, 224, 3) and labels (B,)."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (batch, 224, 224, 3), dtype=torch.uint8, generator=draw)
    return pixels.to(DEVICE), torch.randint(CLASSES, (batch,), generator=draw).to(DEVICE)


def texts(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens (B, T), where the targets are (B, Q), and the targets (B, Q)."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(50_000, (batch, 2 * TOKENS), generator=draw).to(DEVICE)
    positions = torch.arange(TOKENS - 1, 2 * TOKENS - 1, device=DEVICE).expand(batch, -1)
    return tokens, positions, tokens[:, TOKENS:]


def check_equal(who: str, batch: tuple[Tensor, Tensor]) -> None:
    """AssertionError if our ViT with a peer's weights has another loss or other gradients."""
    torch.set_float32_matmul_precision("highest")
    _, _, model, peer = sides(who, LENGTH)
    vit = ViT().to(DEVICE).requires_grad_(False)
    vit.load_state_dict(peer.state_dict())
    model.eval()
    found = []
    for backbone in (peer, vit):
        model.zero_grad()
        loss, _ = image_loss(model, backbone, False, *batch)
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-3)


def candidate(
    name: str, batch: int = 2, length: int = LENGTH, training: bool = True
) -> Callable[[], object]:
    """The training step of train.py, or the evaluation of a batch.

    name: "WHO, DTYPE, MODE". The modes eager, compiled and CUDA graphs have train.py's settings for
    memory and TF32; "as started" has PyTorch's own.
    """
    who, dtype, mode = name.split(", ")
    if mode != "as started":
        prepare_process()
    loss_of, config, model, backbone = sides(who, length)
    bf16 = dtype == "bf16"
    if bf16:
        backbone.cast_frozen_weights()
    if mode in ("compiled", "CUDA graphs"):
        graphs = "reduce-overhead" if mode == "CUDA graphs" else None
        loss_of = torch.compile(loss_of, dynamic=False, mode=graphs)
    examples = images(batch) if who in SIDES else texts(batch)
    if training:
        optimizer = make_optimizer(config, model.train())  # its learning rate is 0
        return partial(train_step, loss_of, model, backbone, bf16, optimizer, examples)

    # In evaluation the prefix is made once for all batches.
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
        prefix_kv = model.eval().prefix_kv(backbone)  # (depth, 2, H, L, Dh)
    return torch.no_grad()(partial(loss_of, model, backbone, bf16, *examples, prefix_kv))


@cache
def operations(who: str, length: int, training: bool) -> float:
    """FLOPs of one example, counted."""
    return flops(candidate(f"{who}, fp32, eager", length=length, training=training)) / 2


def compare(
    title: str,
    names: list[str],
    rounds: int,
    batch: int,
    length: int = LENGTH,
    training: bool = True,
) -> None:
    """Measure some candidates and print their table."""
    makes, counted = {}, {}
    for name in names:
        makes[name] = partial(candidate, name, batch, length, training)
        counted[name] = batch * operations(name.split(", ")[0], length, training)
    what = "training step" if training else "evaluation"
    seconds, memory = measure(makes, rounds)
    table(f"{title}, {what}, batch {batch}", seconds, memory, batch, "examples", counted)


def row_vit(options: argparse.Namespace) -> None:
    """Deep-share on ViT-B/16, as users of others, a good engineer and train.py have it."""
    check_equal("peer", images(4))
    for batch, training in product(options.batch, (True, False)):
        names = ["peer, fp32, as started", "peer, fp32, eager", "full fine-tuning, fp32, eager"]
        for dtype, mode in product(number_types(), options.modes):
            names += [f"modern peer, {dtype}, {mode}", f"ours, {dtype}, {mode}"]
        compare("ViT-B/16, Deep-share", names, options.rounds, batch, training=training)


def row_vpt(options: argparse.Namespace) -> None:
    """VPT-deep with its prompts as tokens, as VPT computes it, against Simple-share."""
    check_equal("prompts as tokens", images(4))
    for length, dtype, training in product((10, 50, 100, 200), number_types(), (True, False)):
        names = [f"prompts as tokens, {dtype}, eager", f"Simple-share, {dtype}, eager"]
        title = f"VPT-deep, L {length}"
        compare(title, names, options.rounds, options.batch[0], length, training)


def row_gpt(options: argparse.Namespace) -> None:
    """GPT-2: a training step and beam search, against transformers and peft."""
    names = ["peft, fp32, as started", "peft, fp32, eager"]
    names += [f"our GPT, {d}, {mode}" for d, mode in product(number_types(), options.modes)]
    compare(f"{GPT2}, texts of {TOKENS} + {TOKENS} tokens", names, options.rounds, 10)

    # Beam search.
    names = ["transformers, fp32", *(f"ours, {dtype}" for dtype in number_types())]
    makes = {name: partial(beams, name) for name in names}
    seconds, memory = measure(makes, options.rounds)
    table(f"{GPT2}, 16 prompts, 5 beams, 32 tokens", seconds, memory, 16 * 32, "tokens")


def beams(name: str) -> Callable[[], object]:
    """32 tokens for 16 prompts of 20 by 5 beams: transformers' `generate`, or ours."""
    prompts = texts(16)[0][:, :20]  # (B, 20)
    if name == "transformers, fp32":
        model = peers.transformers_gpt2(HUB[GPT2]).to(DEVICE)
        beam = {"num_beams": 5, "max_new_tokens": 32, "do_sample": False, "pad_token_id": 50256}
        every = torch.ones_like(prompts)
        return partial(model.generate, prompts, attention_mask=every, **beam)
    prepare_process()
    gpt = GPT(**HUB[GPT2]).to(DEVICE).requires_grad_(False)
    if name == "ours, bf16":
        gpt.cast_frozen_weights()
    return partial(gpt.generate, prompts.tolist(), beams=5, max_new=32)


def row_data(options: argparse.Namespace) -> None:
    """An epoch of training batches: decoding in every epoch against the cache, in one thread."""
    count = 128
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as root:
        peers.photographs(Path(folder), count)
        loader, cached = peers.decoding_loader(Path(folder), 64), load(folder, root, 224)
        cached_epoch = partial(cached.batches, "train", 64, seed=0)

        # A deque of length 0 reads all and keeps nothing. The cache is split, the loader is not.
        decoding = seconds_of(lambda: deque(loader, maxlen=0), options.rounds)
        reading = seconds_of(lambda: deque(cached_epoch(), maxlen=0), options.rounds)
        seconds = {"decoding in every epoch": decoding / count}
        seconds["decoded once"] = reading / cached.count("train")
    table("JPEGs of 500 x 375 to crops of 224 x 224", seconds, {}, 1, "images")


def row_grid(options: argparse.Namespace) -> None:
    """Eight runs of a grid on digits: a process per run against one for all."""
    lr, wd = ("5", "2.5", "1", "0.5"), ("0.001", "0")
    apart = [["train.py", "--no-final", "--lr", a, "--wd", b] for a, b in product(lr, wd)]
    sweep = ["sweep.py", "--methods", "none", "--workers", "1", "--seed", "--lr", *lr, "--wd", *wd]
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, commands in {"a process per run": apart, "one process": [sweep]}.items():
            start = time.perf_counter()
            for script, *words in commands:
                command = [sys.executable, str(ROOT / script), *words, "--epochs", "3"]
                subprocess.run(command, cwd=folder, check=True, capture_output=True)
            seconds[name] = time.perf_counter() - start
    table("A grid of 8 runs of 3 epochs", seconds, {}, 8, "runs")


ROWS = {"vit": row_vit, "vpt": row_vpt, "gpt": row_gpt, "data": row_data, "grid": row_grid}


def run(options: argparse.Namespace) -> None:
    """The rows asked for. UsageError for one that there is not."""
    for row in options.rows:
        if row not in ROWS:
            raise UsageError(f"no row '{row}'; rows: {', '.join(ROWS)}")
    for name, value in (("rounds", options.rounds), ("batch", min(options.batch))):
        if value < 1:
            raise UsageError(f"--{name} is {value}; it must be positive")
    card = f"{torch.get_num_threads()} threads"
    options.modes = ["eager", "compiled"] if options.compile else ["eager"]
    if DEVICE == "cuda":
        card = torch.cuda.get_device_name()
        options.modes = ["eager", "compiled", "CUDA graphs"]
    print(f"{platform.machine()}, {card}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    for row in options.rows or ROWS:
        ROWS[row](options)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("rows", nargs="*", metavar="row", help=f"{', '.join(ROWS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each candidate (default 3)")
    batch = [64, 128, 256] if DEVICE == "cuda" else [8]
    words = "images per step (default: %(default)s)"
    parser.add_argument("--batch", type=int, nargs="+", default=batch, help=words)
    parser.add_argument("--compile", action="store_true", help="on a CPU: torch.compile too")
    return exit_code(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
