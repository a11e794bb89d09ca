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
from torch import Tensor

import sweep
from data import TASKS, Dataset, UsageError, load, normalise, write
from extras import peers
from extras.measure import (
    DEVICE,
    PEAKS,
    Apart,
    Figures,
    flops,
    formula_alone,
    kept_for_backward,
    matrix_rate,
    rate,
    table,
    timed,
)
from extras.measure import types as number_types
from support.files import exit_code
from support.images import Split
from train import (
    Config,
    Parser,
    TunedModel,
    image_loss,
    make_optimizer,
    prepare_process,
    resolve,
    text_loss,
    use_bf16,
)
from vit import ViT

BATCH = 64 if DEVICE == "cuda" else 8  # the protocol's, or what a CPU does in two seconds
LENGTH, CLASSES = 10, 200
SOURCE = 64  # tokens of a source, and of a target, in row `gpt`


def images(batch: int) -> tuple[Tensor, Tensor]:
    """Random pixels (B, 224, 224, 3) and labels (B,)."""
    made = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (batch, 224, 224, 3), dtype=torch.uint8, generator=made)
    return pixels.to(DEVICE), torch.randint(CLASSES, (batch,), generator=made).to(DEVICE)


def our_model(
    dtype: Any, length: int = LENGTH, peer: peers.Peer | None = None
) -> tuple[Config, TunedModel, ViT]:
    """This repository's Deep-share on ViT-B/16; with `peer`: with that one's weights."""
    config = resolve(Config(task="cub", share="deep", length=length, dtype=dtype, lr=1e-3, wd=0.0))
    vit = ViT().to(DEVICE).requires_grad_(False)
    model = TunedModel(config, vit, CLASSES).to(DEVICE)
    if peer is not None:
        peer.give_weights(model, vit)
    if dtype == "bf16":
        vit.cast_frozen_weights()
    return config, model, vit


def peer_model() -> peers.Peer:
    torch.manual_seed(0)
    return peers.Peer(LENGTH, CLASSES).to(DEVICE)


def vit_step(
    name: str, length: int = LENGTH, batch: int = BATCH, compiled: bool = False
) -> Callable[[], None]:
    """A training step of the peer, of timm's whole ViT, or ours in a type."""
    pixels, labels = images(batch)
    if name == "peer":
        return peers.step(peer_model(), pixels, labels)
    if name == "whole":
        whole = timm.create_model("vit_base_patch16_224", num_classes=CLASSES).to(DEVICE)
        return peers.step(whole, pixels, labels)
    config, model, vit = our_model(name, length)
    optimizer, bf16 = make_optimizer(config, model.train()), use_bf16(config, vit)
    loss_of = torch.compile(image_loss, dynamic=False) if compiled else image_loss

    def step() -> None:
        loss_of(model, vit, bf16, pixels, labels)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def vit_evaluation(name: str) -> Callable[[], object]:
    """A batch of images through the peer, or through ours in a type."""
    pixels, labels = images(BATCH)
    if name == "peer":
        peer = peer_model().eval()
        return torch.no_grad()(lambda: peer(pixels))
    _, model, vit = our_model(name)
    prefix_kv = model.eval().prefix_kv(vit).detach()
    return torch.no_grad()(
        lambda: image_loss(model, vit, name == "bf16", pixels, labels, prefix_kv)
    )


def prepared(make: Callable[..., Callable], *args: object) -> Callable:
    """make(*args) in a process that keeps freed memory, as train.py does; who uses a peer would not think of it."""
    prepare_process()
    return make(*args)


def side_by_side(
    make: Callable, peer: str, extra: dict[str, Apart], rounds: int
) -> tuple[dict, dict]:
    """Seconds and MB of the peer as it is and prepared, of ours in every type, and of ours reduced to its formula."""
    runs = {peer: Apart(make, "peer"), f"{peer}, prepared": Apart(prepared, make, "peer")} | extra
    for dtype in number_types():
        runs[f"ours {dtype}"] = Apart(prepared, make, dtype)
        runs[f"formula alone, {dtype}"] = Apart(prepared, formula_alone, make, dtype)
    return timed(runs, rounds), {name: run.peak for name, run in runs.items()}


def row_vit(rounds: int, compiled: bool) -> Figures:
    """Rows 1 to 3 and 7: training step, evaluation, full fine-tuning; FLOPs, memory, and the share of the machine's."""
    peer = peer_model()
    peer.check_equal(*our_model("fp32", peer=peer)[1:], *images(BATCH))
    extra = {"full fine-tuning (timm), fp32": Apart(vit_step, "whole")}
    if compiled:
        extra |= {
            f"ours {t}, compiled": Apart(prepared, vit_step, t, LENGTH, BATCH, True)
            for t in number_types()
        }
    times, memory = side_by_side(vit_step, "peer fp32", extra, rounds)
    made = table(
        f"training step, ViT-B/16, Deep-share, batch {BATCH}", times, "peer fp32", BATCH, "img"
    )
    made |= count_and_compare(times, memory, rounds)
    times, _ = side_by_side(vit_evaluation, "peer fp32", {}, rounds)
    return made | table(f"evaluation, batch {BATCH}", times, "peer fp32", BATCH, "img")


def count_and_compare(times: dict[str, float], memory: dict[str, float], rounds: int) -> Figures:
    """FLOPs counted, the share of the machine's best matrix rate that they reach, and peak memory."""
    counted = {"peer": flops(vit_step("peer")), "ours": flops(vit_step("fp32"))}
    made = {"FLOPs, ours / peer": counted["ours"] / counted["peer"]}
    print(
        "  counted: "
        + ", ".join(f"{name} {n / BATCH / 1e9:.1f} GFLOP per image" for name, n in counted.items())
    )
    for dtype in number_types():
        best = matrix_rate(getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[dtype]), rounds)
        reached = counted["ours"] / min(
            s for name, s in times.items() if name.startswith(f"ours {dtype}")
        )
        made[f"share of the best matrix rate, {dtype}"] = reached / best
        print(
            f"  {dtype}: {reached / 1e12:.2f} of {best / 1e12:.2f} TFLOP/s that a matrix product reaches"
        )
        for card, peak in PEAKS.items():
            if DEVICE == "cuda" and card in torch.cuda.get_device_name() and dtype == "bf16":
                made["MFU, bf16"] = reached / peak
                print(
                    f"  MFU {100 * made['MFU, bf16']:.1f} % of {card}'s {peak / 1e12:.0f} TFLOP/s"
                )
    peaks = {name: memory[name] for name in ("peer fp32", *(f"ours {t}" for t in number_types()))}
    print("  peak memory: " + ", ".join(f"{name} {mb:,.0f} MB" for name, mb in peaks.items()))
    return made | {
        f"peak memory, {name} / peer fp32": mb / memory["peer fp32"] for name, mb in peaks.items()
    }


def row_memory(rounds: int, compiled: bool) -> Figures:
    """What autograd keeps of a forward pass in bf16 with the fused kernel, hence a GPU's memory by batch size."""
    made: Figures = {}
    for length in (10, 200):
        _, model, vit = our_model("bf16", length)
        parameters = [*model.parameters(), *vit.parameters()]
        fused = torch.nn.functional.scaled_dot_product_attention
        with patch("vit.attention", lambda q, k, v, *_: fused(q.contiguous(), k, v)):
            kept = kept_for_backward(
                partial(image_loss, model.train(), vit, True, *images(4)), parameters
            )
        image = kept / 4 / 1e6
        fixed = (
            sum(p.nbytes for p in parameters) + 8 * sum(p.numel() for p in model.parameters())
        ) / 1e6
        sizes = ", ".join(f"batch {b} {(fixed + b * image) / 1e3:.1f} GB" for b in (64, 128, 256))
        print(
            f"\nmemory in bf16, L {length}: {image:.0f} MB an image, {fixed:.0f} MB of weights and momenta; {sizes}"
        )
        made[f"MB kept per image, bf16, L {length}"] = image
    return made


def row_scaling(rounds: int, compiled: bool) -> Figures:
    """Time per image-step over batch sizes, prefix lengths and numbers of cached images."""
    made: Figures = {}
    runs = {
        f"batch {b}": Apart(prepared, vit_step, number_types()[-1], LENGTH, b)
        for b in (8, 16, 32, 64)
    }
    times = {name: s / int(name.split()[1]) for name, s in timed(runs, rounds).items()}
    made |= table(f"an image-step, {number_types()[-1]}", times, "batch 8", 1, "img")
    for dtype in number_types():
        runs = {f"L {n}": Apart(prepared, vit_step, dtype, n) for n in (10, 50, 100, 200)}
        made |= table(
            f"training step, batch {BATCH}, {dtype}", timed(runs, rounds), "L 10", BATCH, "img"
        )
        runs = {f"L {n}": Apart(prepared, formula_alone, vit_step, dtype, n) for n in (10, 200)}
        made |= table(f"its formula alone, {dtype}", timed(runs, rounds), "L 10", BATCH, "img")

    def epoch(count: int) -> Callable[[], object]:
        split = Split.of(np.zeros((count, 64, 64, 3), np.uint8), np.arange(count) % 10)
        data = Dataset("", [""] * 10, 56, True, "train", {"train": split})

        return lambda: [None for _ in data.batches("train", 64, seed=0)]

    counts = {f"{n:,} images": epoch(n) for n in (1_000, 10_000, 50_000)}
    times = {
        name: s / int(name.split()[0].replace(",", "")) for name, s in timed(counts, rounds).items()
    }
    return made | table("an image of an epoch of", times, "1,000 images", 1, "img")


def row_data(rounds: int, compiled: bool) -> Figures:
    """Row 5: training batches from the cache against decoding in every epoch, on one core."""
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(cores)})
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as root:
        size = peers.photographs(Path(folder), 640)
        print(
            f"\n640 JPEGs of 500 x 375, {size:.0f} kB each, cut to 224 x 224 and flipped at random; one core"
        )
        slow = rate((peers.decoding_loader(Path(folder), 64) for _ in range(10**6)), 3.0 * rounds)
        data = load(folder, root, 224)
        fast = rate(
            (data.batches("train", 64, seed=0, epoch=e) for e in range(10**6)), 2.0 * rounds
        )
        turns = (
            (normalise(x) for x, _ in data.batches("train", 64, seed=0, epoch=e))
            for e in range(10**6)
        )
        whole = rate(turns, 2.0 * rounds)
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)
    for name, found in (
        ("decoding in every epoch", slow),
        ("decoded once", fast),
        ("and normalised here", whole),
    ):
        print(f"  {name:<34}{64 * found:>9.0f} img/s   {found / slow:.1f} x")
    return {
        "input: cache / decoding": fast / slow,
        "input: seconds to decode an image": 1 / slow / 64,
    }


def row_grid(rounds: int, compiled: bool) -> Figures:
    """Row 4: eight runs of a grid in one process against a process each, with identical numbers."""
    made: Figures = {}
    grid: dict[str, Any] = {
        "lr": (5.0, 2.5, 1.0, 0.5),
        "wd": (1e-3, 0.0),
        "methods": ("deep",),
        "epochs": 3,
    }
    for compile_step in (False, True)[: 1 + compiled]:
        asked = sweep.Sweep(compare=True, compile=compile_step, **grid)
        print()
        made[f"a grid: sweep / processes, compile {compile_step}"] = sweep.compare(
            asked, sweep.cells(asked)[0]
        )
    return made


def gpt_step(name: str) -> Callable[[], None]:
    """A training step of 10 texts of 64 + 64 tokens: peft's, or ours in a type."""
    _, tuned, gpt = peers.gpt2(length=5)
    tokens = torch.randint(50_000, (10, 2 * SOURCE), generator=torch.Generator().manual_seed(0))
    if name == "peer":
        return peers.peft_step(tuned, tokens, SOURCE)
    if name == "bf16":
        gpt.cast_frozen_weights()
    at, labels = torch.arange(SOURCE - 1, 2 * SOURCE - 1).expand(10, -1), tokens[:, SOURCE:]
    model = TunedModel(resolve(Config(task="e2e", share="deep", length=5)), gpt, 0)

    def step() -> None:
        text_loss(model, gpt, name == "bf16", tokens, at, labels)[0].backward()
        model.zero_grad()

    return step


def gpt_beams(name: str) -> Callable[[], object]:
    """32 tokens for 16 prompts of 20 by 5 beams: transformers' `generate`, or ours in a type."""
    theirs, _, gpt = peers.gpt2(length=5)
    prompts = torch.randint(50_000, (16, 20), generator=torch.Generator().manual_seed(0))
    if name == "peer":
        beam = {"num_beams": 5, "max_new_tokens": 32, "do_sample": False, "pad_token_id": 50256}
        return lambda: theirs.generate(prompts, attention_mask=torch.ones_like(prompts), **beam)
    if name == "bf16":
        gpt.cast_frozen_weights()
    return lambda: gpt.generate(prompts.tolist(), beams=5, max_new=32)


def row_gpt(rounds: int, compiled: bool) -> Figures:
    """Rows 6 and 7: GPT-2 124M, a training step and beam search, against transformers and peft."""
    peer = "transformers + peft fp32"
    times, _ = side_by_side(gpt_step, peer, {}, rounds)
    figures = table("training step, GPT-2 124M, 10 x (64 + 64) tokens", times, peer, 10, "texts")
    count, best = flops(gpt_step("fp32")), matrix_rate(torch.float32, rounds)
    reached = count / times["ours fp32"]
    print(
        f"  counted: {count / 1e9:.0f} GFLOP a step; fp32: {reached / 1e12:.2f} of {best / 1e12:.2f} TFLOP/s"
    )
    figures["share of the best matrix rate, gpt fp32"] = reached / best
    times, _ = side_by_side(gpt_beams, "transformers fp32", {}, rounds)
    title = "beam search, 16 prompts of 20 tokens, 5 beams, 32 tokens"
    return figures | table(title, times, "transformers fp32", 16 * 32, "tokens")


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
    every = (
        train * theirs[0]
        + (val + test) * theirs[1]
        + (train + val + test) * decode / (os.cpu_count() or 1)
    )
    hours = {"peer fp32": (runs + finals) * epochs * every / 3600, f"ours {dtype}": mine / 3600}
    print(
        "\nsweep --tasks cub --methods deep (40 + 5 runs of 100 epochs), put together from the rows above"
    )
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
    card = (
        torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} threads"
    )
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
    parser.add_argument(
        "rows", nargs="*", metavar="row", help=f"some of {', '.join(ROWS)}; all of them by default"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="how often candidates take turns (default: 3)"
    )
    parser.add_argument(
        "--compile",
        dest="compiled",
        action="store_true",
        help="torch.compile too; minutes on a CPU",
    )
    parser.add_argument(
        "--json", dest="path", type=Path, help="also write the figures to this file"
    )
    return exit_code(lambda: run(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())
