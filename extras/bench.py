"""How fast it is, beside what a user would take instead (peers.py), and beside the machine's best.

    python -m extras.bench                  every row
    python -m extras.bench vit gpt          some of them
    python -m extras.bench --json FILE      the same figures for a program

How it is measured: measure.py. Read the ratios.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from torch import Tensor

from data import load, normalise
from extras import peers
from extras.measure import (
    DEVICE,
    Figures,
    flops,
    kept_for_backward,
    matrix_rate,
    measure,
    number_types,
    peak_rate,
    rate,
    table,
)
from prefix import SHARE
from support.files import Parser, UsageError, exit_code, write
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
SOURCE = 64  # tokens of a source, and of a target, in row `gpt`
ROOT = Path(__file__).parent.parent


def images(batch: int) -> tuple[Tensor, Tensor]:
    """Random pixels (B, 224, 224, 3) and labels (B,)."""
    made = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (batch, 224, 224, 3), dtype=torch.uint8, generator=made)
    return pixels.to(DEVICE), torch.randint(CLASSES, (batch,), generator=made).to(DEVICE)


def our_model(
    dtype: Any, length: int, share: str, peer: torch.nn.Module | None = None
) -> tuple[Config, TunedModel, ViT]:
    """This repository's prefix on ViT-B/16; with `peer`: with that one's weights."""
    config = resolve(Config(task="cub", share=share, length=length, dtype=dtype, lr=1e-3, wd=0.0))
    vit = ViT().to(DEVICE).requires_grad_(False)
    model = TunedModel(config, vit, CLASSES).to(DEVICE)
    if peer is not None:
        peer.give_weights(model, vit)
    if dtype == "bf16":
        vit.cast_frozen_weights()
    return config, model, vit


def peer_model(kind: str, dtype: str = "fp32", length: int = LENGTH) -> torch.nn.Module:
    """peer: as repositories do it; modern: as one writes it today; vpt: prompts as tokens.

    whole: timm's ViT, every parameter trained.
    """
    torch.manual_seed(0)
    if kind == "whole":
        return timm.create_model("vit_base_patch16_224", num_classes=CLASSES).to(DEVICE)
    if kind == "vpt":
        model = peers.PromptTokens(length, CLASSES).to(DEVICE)
    else:
        model = peers.Peer(length, CLASSES, modern=kind == "modern").to(DEVICE)
    if dtype == "bf16":
        peers.hold_in_bf16(model)
    return model


def candidate(
    kind: str,
    dtype: str,
    batch: int,
    length: int = LENGTH,
    mode: str = "",
    training: bool = True,
    prepared: bool = True,
) -> Callable[[], object]:
    """A training step, or the evaluation of a batch, of ours (deep, simple) or of a peer.

    mode: "", "compiled" or "CUDA graphs". prepared: with train.py's settings for memory and TF32.
    """
    if prepared:
        prepare_process()
    bf16 = dtype == "bf16"
    pixels, labels = images(batch)

    def compiled(function: Callable) -> Callable:
        graphs = "reduce-overhead" if mode == "CUDA graphs" else None
        return torch.compile(function, dynamic=False, mode=graphs) if mode else function

    # Ours: the step that train.py takes, or the evaluation with a prefix that is made once.
    if kind in SHARE:
        config, model, vit = our_model(dtype, length, kind)
        loss_of = compiled(image_loss)
        if training:
            optimizer = make_optimizer(config, model.train())
            arguments = (loss_of, model, vit, bf16, optimizer, (pixels, labels))
            return partial(train_step, *arguments)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            prefix_kv = model.eval().prefix_kv(vit).detach()  # (depth, 2, H, L, Dh)
        return torch.no_grad()(partial(loss_of, model, vit, bf16, pixels, labels, prefix_kv))

    # A peer.
    peer = peer_model(kind, dtype, length)
    peer.forward = compiled(peer.forward)
    if training:
        return peers.step(peer, pixels, labels, bf16)
    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=bf16)
    return torch.no_grad()(autocast(partial(peer.eval(), pixels)))


def row_vit(options: argparse.Namespace) -> Figures:
    """Training step, evaluation, full fine-tuning; FLOPs, memory, share of the machine's best."""
    peer = peer_model("peer")
    peers.check_equal(peer, *our_model("fp32", LENGTH, "deep", peer)[1:], *images(4))
    del peer
    figures: Figures = {}
    for batch in options.batch:
        # Training: the peer as its user starts it, with our settings, a good engineer's; ours.
        plain = partial(candidate, "peer", "fp32", batch)
        runs = {"peer, fp32": partial(plain, prepared=False), "peer, fp32, our settings": plain}
        runs["timm, full fine-tuning, fp32"] = partial(candidate, "whole", "fp32", batch)
        for dtype in number_types():
            for mode in options.modes:
                name = f"{dtype}, {mode}" if mode else dtype
                runs[f"modern peer, {name}"] = partial(candidate, "modern", dtype, batch, mode=mode)
                runs[f"ours, {name}"] = partial(candidate, "deep", dtype, batch, mode=mode)
        seconds, memory = measure(runs, options.rounds)
        title = f"Training step, ViT-B/16, Deep-share, batch {batch}"
        figures |= table(title, seconds, "peer, fp32", batch, "images")
        figures |= counts_and_memory(seconds, memory, batch, options.rounds)

        # Evaluation.
        runs = {"peer, fp32": partial(plain, training=False, prepared=False)}
        for dtype in number_types():
            for name, kind in (("modern peer", "modern"), ("ours", "deep")):
                runs[f"{name}, {dtype}"] = partial(candidate, kind, dtype, batch, training=False)
        seconds, _ = measure(runs, options.rounds)
        figures |= table(f"Evaluation, batch {batch}", seconds, "peer, fp32", batch, "images")
    return figures


def counts_and_memory(seconds: dict, memory: dict, batch: int, rounds: int) -> Figures:
    """FLOPs counted, the share of the machine's best matrix rate that they reach, peak memory."""
    ours = flops(candidate("deep", "fp32", batch)) / batch
    theirs = flops(candidate("peer", "fp32", batch)) / batch
    print(f"\nCounted per image: peer {theirs / 1e9:.1f} GFLOP, ours {ours / 1e9:.1f} GFLOP.")
    figures = {"FLOPs, ours / peer": ours / theirs}
    for dtype in number_types():
        best = matrix_rate({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], rounds)
        fastest = min(s for name, s in seconds.items() if name.startswith(f"ours, {dtype}"))
        reached = ours * batch / fastest
        figures[f"share of the best matrix rate, {dtype}"] = reached / best
        print(
            f"{dtype}: {reached / 1e12:.2f} of the {best / 1e12:.2f} TFLOP/s of a matrix product."
        )
        peak = peak_rate()
        if dtype == "bf16" and peak is not None:
            figures["MFU, bf16"] = reached / peak
            print(f"MFU {100 * reached / peak:.1f} % of {peak / 1e12:.0f} TFLOP/s.")
    for name, mb in memory.items():
        figures[f"peak memory, {name}, MB"] = mb
    print("Peak memory: " + ", ".join(f"{name} {mb:,.0f} MB" for name, mb in memory.items()))
    return figures


def row_vpt(options: argparse.Namespace) -> Figures:
    """VPT-deep with its prompts as tokens, as VPT computes it, against Simple-share."""
    peer = peer_model("vpt")
    peers.check_equal(peer, *our_model("fp32", LENGTH, "simple", peer)[1:], *images(4))
    del peer
    figures: Figures = {}
    batch = options.batch[0]
    kinds = {"prompts as tokens": "vpt", "Simple-share": "simple"}
    for length, dtype in product((10, 50, 100, 200), number_types()):
        for training in (True, False):
            runs = {
                name: partial(candidate, kind, dtype, batch, length, training=training)
                for name, kind in kinds.items()
            }
            seconds, memory = measure(runs, options.rounds)
            what = "Training step" if training else "Evaluation"
            title = f"{what}, VPT-deep, L {length}, batch {batch}, {dtype}"
            figures |= table(title, seconds, "prompts as tokens", batch, "images")
            print("Peak memory: " + ", ".join(f"{n} {mb:,.0f} MB" for n, mb in memory.items()))
    for length in (10, 50, 100, 200):
        vpt, simple = (flops(candidate(k, "fp32", 2, length)) for k in kinds.values())
        figures[f"FLOPs, Simple-share / prompts as tokens, L {length}"] = simple / vpt
        print(f"FLOPs of a training step, L {length}: {simple / vpt:.3f} of prompts as tokens")
    return figures


def row_memory(options: argparse.Namespace) -> Figures:
    """What autograd keeps of a bf16 forward pass with the fused kernel: a GPU's memory by batch."""
    figures: Figures = {}
    fused = torch.nn.functional.scaled_dot_product_attention
    for length in (10, 200):
        _, model, vit = our_model("bf16", length, "deep")
        parameters = [*model.parameters(), *vit.parameters()]
        forward = partial(image_loss, model.train(), vit, True, *images(4))
        with patch("vit.attention", lambda q, k, v, **rest: fused(q.contiguous(), k, v)):
            image = kept_for_backward(forward, parameters) / 4 / 1e6
        trained = sum(p.numel() for p in model.parameters())
        fixed = (sum(p.nbytes for p in parameters) + 8 * trained) / 1e6  # gradients and momenta
        sizes = [f"batch {b} {(fixed + b * image) / 1e3:.1f} GB" for b in (64, 128, 256)]
        print(f"\nMemory in bf16, L {length}: {image:.0f} MB an image, {fixed:.0f} MB of weights,")
        print(f"gradients and momenta; {', '.join(sizes)}")
        figures[f"MB kept per image, bf16, L {length}"] = image
    return figures


def row_scaling(options: argparse.Namespace) -> Figures:
    """Time per image over batch sizes and prefix lengths."""
    dtype, batch = number_types()[-1], options.batch[0]
    runs = {f"batch {b}": partial(candidate, "deep", dtype, b) for b in (8, 16, 32, 64)}
    seconds, _ = measure(runs, options.rounds)
    per_image = {name: s / int(name.split()[1]) for name, s in seconds.items()}
    figures = table(f"An image of a training step, {dtype}", per_image, "batch 8", 1, "images")
    for dtype in number_types():
        runs = {f"L {n}": partial(candidate, "deep", dtype, batch, n) for n in (10, 50, 100, 200)}
        seconds, _ = measure(runs, options.rounds)
        title = f"Training step, batch {batch}, {dtype}, by prefix length"
        figures |= table(title, seconds, "L 10", batch, "images")
    return figures


def row_data(options: argparse.Namespace) -> Figures:
    """Training batches from the cache against decoding in every epoch, on one core."""
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(cores)})
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as root:
        size = peers.photographs(Path(folder), 640)
        print(f"\n640 JPEGs of 500 x 375, {size:.0f} kB each, random crops of 224 x 224; one core")
        loader = peers.decoding_loader(Path(folder), 64)
        slow = 64 * rate((loader for _ in range(10**6)), 3.0 * options.rounds)
        data = load(folder, root, 224)
        epochs = (data.batches("train", 64, seed=0, epoch=e) for e in range(10**6))
        fast = 64 * rate(epochs, 2.0 * options.rounds)
        epochs = (data.batches("train", 64, seed=0, epoch=e) for e in range(10**6))
        whole = 64 * rate(((normalise(x) for x, _ in e) for e in epochs), 2.0 * options.rounds)
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)
    named = {"decoding in every epoch": slow, "decoded once": fast, "and normalised": whole}
    seconds = {name: 1 / found for name, found in named.items()}
    figures = table("Input", seconds, "decoding in every epoch", 1, "images")
    return figures


def row_grid(options: argparse.Namespace) -> Figures:
    """Eight runs of a grid in one process against one process per run."""
    lr, wd = (5.0, 2.5, 1.0, 0.5), (1e-3, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        common = ["--epochs", "3", "--device", "cpu"] if DEVICE == "cpu" else ["--epochs", "3"]
        start = time.perf_counter()
        for i, (rate_, decay) in enumerate((a, b) for a in lr for b in wd):
            words = ["--share", "deep", "--no-final", "--lr", str(rate_), "--wd", str(decay)]
            call("train.py", *words, *common, "--out", f"{folder}/{i}")
        apart = time.perf_counter() - start
        words = ["--methods", "deep", "--seed", "--lr", *map(str, lr), "--wd", *map(str, wd)]
        start = time.perf_counter()
        call("sweep.py", *words, *common, "--out", f"{folder}/sweep")
        together = time.perf_counter() - start
    seconds = {"a process per run": apart, "one sweep": together}
    return table("A grid of 8 runs of 3 epochs on digits", seconds, "a process per run", 8, "runs")


def call(script: str, *words: str) -> None:
    """`python SCRIPT WORDS` in the repository. UsageError if it fails."""
    ended = subprocess.run([sys.executable, str(ROOT / script), *words], capture_output=True)
    if ended.returncode:
        raise UsageError(f"{script} failed: {ended.stderr.decode().strip().splitlines()[-1]}")


def gpt_step(name: str, prepared: bool = True) -> Callable[[], None]:
    """A training step of 10 texts of 64 + 64 tokens: peft's, or ours in a type."""
    if prepared:
        prepare_process()
    _, tuned, gpt = peers.gpt2(length=5)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50_000, (10, 2 * SOURCE), generator=generator).to(DEVICE)
    if name == "peer":
        return peers.peft_step(tuned.to(DEVICE), tokens, SOURCE)
    gpt.to(DEVICE)
    if name == "bf16":
        gpt.cast_frozen_weights()
    targets = torch.arange(SOURCE - 1, 2 * SOURCE - 1, device=DEVICE).expand(10, -1)
    model = TunedModel(resolve(Config(task="e2e", share="deep", length=5)), gpt, 0).to(DEVICE)
    batch = (tokens, targets, tokens[:, SOURCE:])

    def step() -> None:
        text_loss(model, gpt, name == "bf16", *batch)[0].backward()
        model.zero_grad()

    return step


def gpt_beams(name: str, prepared: bool = True) -> Callable[[], object]:
    """32 tokens for 16 prompts of 20 by 5 beams: transformers' `generate`, or ours in a type."""
    if prepared:
        prepare_process()
    theirs, _, gpt = peers.gpt2(length=5)
    prompts = torch.randint(50_000, (16, 20), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    if name == "peer":
        beam = {"num_beams": 5, "max_new_tokens": 32, "do_sample": False, "pad_token_id": 50256}
        theirs.to(DEVICE)
        return lambda: theirs.generate(prompts, attention_mask=torch.ones_like(prompts), **beam)
    gpt.to(DEVICE)
    if name == "bf16":
        gpt.cast_frozen_weights()
    return lambda: gpt.generate(prompts.tolist(), beams=5, max_new=32)


def row_gpt(options: argparse.Namespace) -> Figures:
    """GPT-2 124M: a training step and beam search, against transformers and peft."""
    figures: Figures = {}
    titles = {
        gpt_step: ("Training step, GPT-2 124M, 10 x (64 + 64) tokens", "peft, fp32", 10, "texts"),
        gpt_beams: ("Beam search, 16 prompts, 5 beams", "transformers, fp32", 512, "tokens"),
    }
    for make, (title, peer, per, unit) in titles.items():
        runs = {peer: partial(make, "peer", False), f"{peer}, our settings": partial(make, "peer")}
        runs |= {f"ours, {dtype}": partial(make, dtype) for dtype in number_types()}
        seconds, _ = measure(runs, options.rounds)
        figures |= table(title, seconds, peer, per, unit)
    print(f"\nCounted: {flops(gpt_step('fp32')) / 1e9:.0f} GFLOP a training step")
    return figures


ROWS = {
    "vit": row_vit,
    "vpt": row_vpt,
    "memory": row_memory,
    "data": row_data,
    "scaling": row_scaling,
    "grid": row_grid,
    "gpt": row_gpt,
}


def run(options: argparse.Namespace) -> None:
    """The rows asked for. UsageError for one that there is not."""
    unknown = [row for row in options.rows if row not in ROWS]
    if unknown:
        raise UsageError(f"no row '{unknown[0]}'; rows: {', '.join(ROWS)}")
    for name, value in (("rounds", options.rounds), ("batch", min(options.batch))):
        if value < 1:
            raise UsageError(f"--{name} is {value}; it must be positive")
    path = options.path
    if path and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError(f"--json {path} cannot be a file; name one in a folder that exists")
    threads = f"{torch.get_num_threads()} threads"
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else threads
    print(f"{platform.machine()}, {card}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    options.modes = ["", "compiled", "CUDA graphs"] if DEVICE == "cuda" else [""]
    if options.compiled and DEVICE == "cpu":
        options.modes.append("compiled")
    figures: Figures = {}
    for row in options.rows or ROWS:
        figures |= ROWS[row](options)
    if path:
        write(path, json.dumps(figures, indent=1).encode())


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("rows", nargs="*", metavar="row", help=f"{', '.join(ROWS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each candidate (default 3)")
    batch = [64, 128, 256] if DEVICE == "cuda" else [8]
    parser.add_argument(
        "--batch", type=int, nargs="+", default=batch, help="images per step (default: %(default)s)"
    )
    parser.add_argument(
        "--compile", dest="compiled", action="store_true", help="on a CPU: torch.compile too"
    )
    parser.add_argument(
        "--json", dest="path", type=Path, help="also write the figures to this file"
    )
    return exit_code(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
