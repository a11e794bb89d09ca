"""How fast it is, against what a user would take instead (support/peers.py), and how far from what the machine can do.

    python bench.py                     every row
    python bench.py vit gpt             some of them
    python bench.py --json FILE         the same figures for a program

How it is measured: support/measure.py. Read the ratios; a time depends on the machine and on what else it does.
"""

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import timm
import torch
from torch import Tensor, nn

import sweep
from data import TASKS, Dataset, UsageError, load, normalise, write
from support import peers
from support.measure import (
    DEVICE,
    PEAKS,
    Figures,
    flops,
    kept_for_backward,
    matrix_rate,
    peak_memory,
    rate,
    table,
    timed,
)
from support.measure import types as number_types
from support.options import Config, Parser, prepare_process, resolve
from support.pixels import Split
from support.usage import exit_code
from train import Tuned, image_loss, make_optimizer, text_loss, use_bf16
from vit import ViT, attend_fused

BATCH, LENGTH, CLASSES = 8, 10, 200  # of rows `vit`; on CUDA the protocol's batch of 64


def images(batch: int) -> tuple[Tensor, Tensor]:
    """Random pixels (B, 224, 224, 3) and labels (B,)."""
    made = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (batch, 224, 224, 3), dtype=torch.uint8, generator=made)
    return pixels.to(DEVICE), torch.randint(CLASSES, (batch,), generator=made).to(DEVICE)


def our_model(dtype: Any, length: int = LENGTH, peer: peers.Peer | None = None) -> tuple[Config, Tuned, ViT]:
    """This repository's Deep-share on ViT-B/16; with `peer`: with that one's weights."""
    config = resolve(Config(task="cub", share="deep", length=length, dtype=dtype, lr=1e-3, wd=0.0))
    vit = ViT().to(DEVICE).requires_grad_(False)
    model = Tuned(config, vit, CLASSES).to(DEVICE)
    if peer is not None:
        peer.give_weights(model, vit)
    if dtype == "bf16":
        vit.hold_in_bf16()
    return config, model, vit


def peer_model() -> peers.Peer:
    torch.manual_seed(0)
    return peers.Peer(LENGTH, CLASSES).to(DEVICE)


def our_step(config: Config, model: Tuned, vit: ViT, batch: int = BATCH, compiled: bool = False) -> Callable[[], None]:
    pixels, labels = images(batch)
    optimizer, bf16 = make_optimizer(config, model.train()), use_bf16(config, vit)
    loss_of = torch.compile(image_loss, dynamic=False) if compiled else image_loss

    def step() -> None:
        loss_of(model, vit, bf16, pixels, labels)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_step(name: str) -> Callable[[], None]:
    return peers.step(peer_model(), *images(BATCH)) if name == "peer" else our_step(*our_model(name))


def row_vit(rounds: int, compiled: bool) -> Figures:
    """Rows 1 to 3 and 7: training step, evaluation, full fine-tuning; FLOPs, memory, and the share of the machine's."""
    peer = peer_model()
    ours = {dtype: our_model(dtype, peer=peer) for dtype in number_types()}
    pixels, labels = images(BATCH)
    peer.check_equal(*ours["fp32"][1:], pixels, labels)
    steps = {"peer fp32": peers.step(peer, pixels, labels)} | {
        f"ours {t}": our_step(*model) for t, model in ours.items()
    }
    if compiled:
        steps |= {f"ours {t}, compiled": our_step(*our_model(t, peer=peer), compiled=True) for t in ours}
    whole = timm.create_model("vit_base_patch16_224", num_classes=CLASSES).to(DEVICE)
    times = timed(steps | {"full fine-tuning (timm), fp32": peers.step(whole, pixels, labels)}, rounds)
    made = table(f"training step, ViT-B/16, Deep-share, batch {BATCH}", times, "peer fp32", BATCH, "img")
    made |= count_and_compare(steps, times, rounds)

    def evaluate(t: str) -> Callable[[], object]:
        _, model, vit = ours[t]
        experts = model.eval().experts(vit)
        return lambda: image_loss(model, vit, t == "bf16", pixels, labels, experts)

    with torch.no_grad():
        runs = {"peer fp32": lambda: peer.eval()(pixels)} | {f"ours {t}": evaluate(t) for t in ours}
        return made | table(f"evaluation, batch {BATCH}", timed(runs, rounds), "peer fp32", BATCH, "img")


def count_and_compare(steps: dict[str, Callable], times: dict[str, float], rounds: int) -> Figures:
    """FLOPs counted, the share of the machine's best matrix rate that they reach, and peak memory."""
    counted = {"peer": flops(steps["peer fp32"]), "ours": flops(steps["ours fp32"])}
    made = {"FLOPs, ours / peer": counted["ours"] / counted["peer"]}
    print("  counted: " + ", ".join(f"{name} {n / BATCH / 1e9:.1f} GFLOP per image" for name, n in counted.items()))
    for dtype in number_types():
        rate = matrix_rate(getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[dtype]), rounds)
        best = min(s for name, s in times.items() if name.startswith(f"ours {dtype}"))
        made[f"share of the best matrix rate, {dtype}"] = counted["ours"] / best / rate
        print(
            f"  {dtype}: {counted['ours'] / best / 1e12:.2f} of {rate / 1e12:.2f} TFLOP/s that a matrix product reaches"
        )
        for card, peak in PEAKS.items():
            if DEVICE == "cuda" and card in torch.cuda.get_device_name() and dtype == "bf16":
                made["MFU, bf16"] = counted["ours"] / best / peak
                print(f"  MFU {100 * made['MFU, bf16']:.1f} % of {card}'s {peak / 1e12:.0f} TFLOP/s")
    memory = {name: peak_memory(make_step, name) for name in ("peer", *number_types())}
    print("  peak memory: " + ", ".join(f"{name} {mb:,.0f} MB" for name, mb in memory.items()))
    return made | {f"peak memory, {name} / peer": mb / memory["peer"] for name, mb in memory.items()}


def row_memory(rounds: int, compiled: bool) -> Figures:
    """What autograd keeps of a forward pass in bf16 with the fused kernel, hence a GPU's memory by batch size."""
    made: Figures = {}
    for length in (10, 200):
        _, model, vit = our_model("bf16", length)
        parameters = [*model.parameters(), *vit.parameters()]
        with patch("vit.mix", lambda q, k, v, gates: attend_fused(q, k, v)):
            kept = kept_for_backward(partial(image_loss, model.train(), vit, True, *images(4)), parameters)
        image = kept / 4 / 1e6
        fixed = (sum(p.nbytes for p in parameters) + 8 * sum(p.numel() for p in model.parameters())) / 1e6
        sizes = ", ".join(f"batch {b} {(fixed + b * image) / 1e3:.1f} GB" for b in (64, 128, 256))
        print(f"\nmemory in bf16, L {length}: {image:.0f} MB an image, {fixed:.0f} MB of weights and momenta; {sizes}")
        made[f"MB kept per image, bf16, L {length}"] = image
    return made


def row_scaling(rounds: int, compiled: bool) -> Figures:
    """Time per image-step over batch sizes, prefix lengths and numbers of cached images."""
    dtype, made = number_types()[-1], Figures()
    steps = {f"batch {b}": our_step(*our_model(dtype), batch=b) for b in (8, 16, 32, 64)}
    times = {name: s / int(name.split()[1]) for name, s in timed(steps, rounds).items()}
    made |= table(f"an image-step, {dtype}", times, "batch 8", 1, "img")
    steps = {f"L {n}": our_step(*our_model(dtype, n)) for n in (10, 50, 100, 200)}
    made |= table(f"training step, batch {BATCH}, {dtype}", timed(steps, rounds), "L 10", BATCH, "img")

    def epoch(count: int) -> Callable[[], object]:
        split = Split.of(np.zeros((count, 64, 64, 3), np.uint8), np.arange(count) % 10)
        data = Dataset("", [""] * 10, 56, True, "train", {"train": split})

        return lambda: [None for _ in data.batches("train", 64, seed=0)]

    counts = {f"{n:,} images": epoch(n) for n in (1_000, 10_000, 50_000)}
    times = {name: s / int(name.split()[0].replace(",", "")) for name, s in timed(counts, rounds).items()}
    return made | table("an image of an epoch of", times, "1,000 images", 1, "img")


def row_data(rounds: int, compiled: bool) -> Figures:
    """Row 5: training batches from the cache against decoding in every epoch, on one core."""
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(cores)})
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as root:
        size = peers.photographs(Path(folder), 640)
        print(f"\n640 JPEGs of 500 x 375, {size:.0f} kB each, cut to 224 x 224 and flipped at random; one core")
        slow = rate((peers.decoding_loader(Path(folder), 64) for _ in range(10**6)), 3.0 * rounds)
        data = load(folder, root, 224)
        fast = rate((data.batches("train", 64, seed=0, epoch=e) for e in range(10**6)), 2.0 * rounds)
        turns = ((normalise(x) for x, _ in data.batches("train", 64, seed=0, epoch=e)) for e in range(10**6))
        whole = rate(turns, 2.0 * rounds)
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)
    for name, found in (("decoding in every epoch", slow), ("decoded once", fast), ("and normalised here", whole)):
        print(f"  {name:<34}{64 * found:>9.0f} img/s   {found / slow:.1f} x")
    return {"input: cache / decoding": fast / slow, "input: seconds to decode an image": 1 / slow / 64}


def row_grid(rounds: int, compiled: bool) -> Figures:
    """Row 4: eight runs of a grid in one process against a process each, with identical numbers."""
    made: Figures = {}
    grid: dict[str, Any] = {"lr": (5.0, 2.5, 1.0, 0.5), "wd": (1e-3, 0.0), "methods": ("deep",), "epochs": 3}
    for compile_step in (False, True)[: 1 + compiled]:
        asked = sweep.Sweep(compare=True, compile=compile_step, **grid)
        print()
        made[f"a grid: sweep / processes, compile {compile_step}"] = sweep.compare(asked, sweep.cells(asked)[0])
    return made


def row_gpt(rounds: int, compiled: bool) -> Figures:
    """Row 6: GPT-2 124M, a step of 10 texts (64 + 64 tokens), and 32 tokens for 16 prompts of 20 by 5 beams."""
    theirs, tuned, ours = peers.gpt2(length=5)
    made, source = torch.Generator().manual_seed(0), 64
    tokens = torch.randint(50_000, (10, 2 * source), generator=made)
    at = torch.arange(source - 1, 2 * source - 1).expand(10, -1)
    held = type(ours)()
    held.load_state_dict(ours.state_dict())
    held.requires_grad_(False).hold_in_bf16()
    config = resolve(Config(task="e2e", share="deep", length=5))
    model = Tuned(config, ours, 0)

    def step(gpt: nn.Module, bf16: bool) -> Callable[[], None]:
        def run() -> None:
            text_loss(model, gpt, bf16, tokens, at, tokens[:, source:])[0].backward()
            model.zero_grad()

        return run

    steps = {"transformers + peft fp32": peers.peft_step(tuned, tokens, source), "ours fp32": step(ours, False)}
    steps |= {"ours bf16": step(held, True)} if "bf16" in number_types() else {}
    times = timed(steps, rounds)
    figures = table("training step, GPT-2 124M, 10 x (64 + 64) tokens", times, "transformers + peft fp32", 10, "texts")
    count = flops(steps["ours fp32"])
    print(f"  counted: {count / 1e9:.0f} GFLOP a step, {count / times['ours fp32'] / 1e12:.2f} TFLOP/s in fp32")
    figures["share of the best matrix rate, gpt fp32"] = count / times["ours fp32"] / matrix_rate(torch.float32, rounds)
    prompts = torch.randint(50_000, (16, 20), generator=made)
    beam = {"num_beams": 5, "max_new_tokens": 32, "do_sample": False, "pad_token_id": 50256}
    runs = {"transformers": lambda: theirs.generate(prompts, **beam)}
    runs |= {"ours": lambda: ours.generate(prompts.tolist(), beams=5, max_new=32)}
    title = "beam search, 16 prompts of 20 tokens, 5 beams, 32 tokens, fp32"
    return figures | table(title, timed(runs, rounds), "transformers", 16 * 32, "tokens")


def row_experiment(figures: Figures) -> Figures:
    """Row 8: hours of `sweep.py --tasks cub --methods deep`, put together from rows `vit` and `data`.

    The peer also evaluates val and test after every epoch and decodes every image each time, as the official code does.
    """
    train, val, test = TASKS["cub"].sizes.values()
    dtype, step = number_types()[-1], f"training step, ViT-B/16, Deep-share, batch {BATCH}"
    tests = f"evaluation, batch {BATCH}"
    ours, theirs = (
        [figures[f"{title}: {name}, seconds"] / BATCH for title in (step, tests)]
        for name in (f"ours {dtype}", "peer fp32")
    )
    decode, runs, finals, epochs = figures["input: seconds to decode an image"], 40, 5, 100
    mine = (runs + finals) * epochs * train * ours[0] + (runs * val + finals * test) * ours[1]
    every = train * theirs[0] + (val + test) * theirs[1] + (train + val + test) * decode / (os.cpu_count() or 1)
    hours = {"peer fp32": (runs + finals) * epochs * every / 3600, f"ours {dtype}": mine / 3600}
    print("\nsweep --tasks cub --methods deep (40 + 5 runs of 100 epochs), put together from the rows above")
    for name, value in hours.items():
        print(f"  {name:<34}{value:>9,.0f} hours   ratio {value / hours['peer fp32']:.3f}")
    return {f"cub, hours: {name}": value for name, value in hours.items()}


ROWS = {
    "vit": row_vit,
    "memory": row_memory,
    "data": row_data,
    "scaling": row_scaling,
    "grid": row_grid,
    "gpt": row_gpt,
}


def run(rows: list[str], rounds: int, compiled: bool, path: Path | None) -> None:
    if unknown := [row for row in rows if row not in ROWS]:
        raise UsageError(f"no row '{unknown[0]}'; rows: {', '.join(ROWS)}")
    if rounds < 1:
        raise UsageError(f"--rounds is {rounds}; it must be positive")
    if path and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError(f"--json {path} cannot be a file; name one in a folder that exists")
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{platform.machine()}, {card}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    prepare_process()
    figures: Figures = {}
    for row in rows or ROWS:
        figures |= ROWS[row](rounds, compiled)
    if {"vit", "data"} <= set(rows or ROWS):
        figures |= row_experiment(figures)
    if path:
        write(path, json.dumps(figures, indent=1).encode())


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("rows", nargs="*", metavar="row", help=f"some of {', '.join(ROWS)}; all of them by default")
    parser.add_argument("--rounds", type=int, default=3, help="how often candidates take turns (default: 3)")
    parser.add_argument("--compile", dest="compiled", action="store_true", help="torch.compile too; minutes on a CPU")
    parser.add_argument("--json", dest="path", type=Path, help="also write the figures to this file")
    return exit_code(lambda: run(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())
