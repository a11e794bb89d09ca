"""What a sweep costs before it is started: runs, image-steps, floating-point operations, hours.

Only matrix products count, 2 operations per multiply-add. With N tokens, width D, MLP width M and L prefix experts,
a block that computes n of its tokens needs per image
    linear     2 D (2 n D + 2 N D + 2 n M)       query and projection of n tokens, key and value of all N, MLP of n
    attention  4 D n (L + N)                     scores, and the mixture of values
with n = N, and n = 1 in the last block. Backward, a frozen linear layer costs as much again (only its input has a
gradient) and attention twice as much; below the first prefix nothing is needed. Full fine-tuning costs three times
the forward pass.
"""

import time
from dataclasses import replace

import torch

from data import UsageError, find
from prefix import Prefix
from support.options import Config, method
from train import Tuned, image_loss, load_backbone, make_optimizer, use_bf16
from vit import ViT


def block_flops(vit: ViT, n: int, length: int) -> tuple[int, int]:
    """(linear, attention) of one image in one block that computes n tokens."""
    tokens, dim = vit.pos_embed.shape[1:]
    linear = 2 * dim * (2 * n * dim + 2 * tokens * dim + 2 * n * vit.sizes["hidden"])
    return linear, 4 * dim * n * (length + tokens)


def generator_flops(config: Config, dim: int) -> float:
    """Making one layer's keys and values, per image: once per batch, or per image where Simple-share drops out on p."""
    simple = config.share == "simple"  # its map is the frozen layer's own
    maps = Prefix(n_layer=1, n_head=1, dim=dim, length=1, share=config.share).map.named_parameters()
    per_vector = dim * 2 * dim if simple else sum(p.numel() for name, p in maps if name.endswith("weight"))
    return 2 * config.length * per_vector / (1 if simple and not config.shallow else config.batch)


def image_flops(config: Config, vit: ViT, classes: int) -> tuple[float, float]:
    """Operations of one image: (in a training step, in evaluation)."""
    tokens, dim = vit.pos_embed.shape[1:]
    depth = 0 if config.tune != "prefix" else 1 if config.shallow else vit.n_layer
    blocks = [
        block_flops(vit, 1 if i == vit.n_layer - 1 else tokens, config.length if i < depth else 0)
        for i in range(vit.n_layer)
    ]
    patches, head = 2 * (tokens - 1) * vit.patch_embed.proj.weight[0].numel() * dim, 2 * dim * classes
    forward = patches + sum(linear + attention for linear, attention in blocks) + head
    if config.tune == "full":
        return 3 * forward, forward
    if config.tune == "linear":
        return forward + head, forward
    backward = sum(linear + 2 * attention for linear, attention in blocks) + 2 * head
    backward -= 6 * tokens * dim**2  # the first block's own queries, keys and values come before any prefix
    made = depth * generator_flops(config, dim)
    return forward + backward + made * (2 if config.share == "simple" else 3), forward  # W_k, W_v are frozen


def images(split: str, sizes: dict[str, int]) -> int:
    return sizes["train"] + sizes["val"] if split == "trainval" else sizes[split]


def cost(runs: list[tuple[Config, int, int]], vit: ViT) -> tuple[int, int, float]:
    """Of one cell's runs (a config, how many, epochs of each): (runs, image-steps, operations, evaluation included)."""
    steps, flops, count = 0, 0.0, runs[0][1] + runs[-1][1]  # later stages go on with runs of the first
    for config, number, epochs in runs:
        task = find(config.task)
        if not task.sizes:
            raise UsageError(f"how many images {config.task} has is not written down; leave it out of --dry-run")
        split, judged = (task.final, "test") if config.final else ("train", "val")
        seen = number * epochs * round(config.fraction * images(split, task.sizes))
        training, evaluation = image_flops(config, vit, task.classes)
        steps += seen
        flops += seen * training + number * images(judged, task.sizes) * evaluation
    return count, steps, flops


def measure(config: Config, vit: ViT, classes: int, seconds: float = 3.0) -> float:
    """Training images per second of this machine, on random pixels, after one step to warm up."""
    model = Tuned(config, vit, classes).to(config.device)
    optimizer = make_optimizer(replace(config, lr=0.0), model)
    step = torch.compile(image_loss, dynamic=False) if config.compile else image_loss
    pixels = torch.randint(256, (config.batch, vit.image, vit.image, 3), dtype=torch.uint8, device=config.device)
    labels = torch.randint(classes, (config.batch,), device=config.device)

    def run(limit: float) -> float:
        start, count = time.perf_counter(), 0
        while not count or time.perf_counter() - start < limit:
            loss, _ = step(model, vit, use_bf16(config, vit), pixels, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # wait for the GPU
            count += 1
        return count * config.batch / (time.perf_counter() - start)

    run(0)
    return run(seconds)


def show(cells: list[list[tuple[Config, int, int]]], img_per_s: float | None) -> None:
    """Print the plan, a line per cell. The speed is measured in a backbone's first cell; others have as many FLOP/s."""
    vits, speeds, total = {}, {}, [0, 0, 0.0, 0.0]
    print(f"{'task':<16}{'method':<16}{'L':>4}{'fraction':>9}{'runs':>6}{'image-steps':>15}{'PFLOP':>12}{'hours':>9}")
    for runs in cells:
        config = runs[0][0]
        key = (config.backbone, config.tune == "full")
        if key not in vits:
            vits[key] = load_backbone(config, pretrained=False)
        training, _ = image_flops(config, vits[key], find(config.task).classes)
        if img_per_s is None and key not in speeds:
            speeds[key] = training * measure(config, vits[key], find(config.task).classes)
        count, steps, flops = cost(runs, vits[key])
        hours = flops / (training * img_per_s if img_per_s else speeds[key]) / 3600
        total = [a + b for a, b in zip(total, (count, steps, flops, hours), strict=True)]
        length = config.length if config.tune == "prefix" else ""
        row = f"{config.task:<16}{method(config):<16}{length:>4}{config.fraction:>9g}{count:>6}{steps:>15,}"
        print(f"{row}{flops / 1e15:>12.4g}{hours:>9.3g}")
    print(f"{'together':<45}{total[0]:>6}{total[1]:>15,}{total[2] / 1e15:>12.4g}{total[3]:>9.3g}")
    source = "as stated" if img_per_s else f"measured here in {'bf16' if use_bf16(config, vits[key]) else 'fp32'}"
    rate = img_per_s or speeds[key] / training
    print(f"hours: on one device, at {rate:,.0f} training images/s in the last line ({source}); evaluation is included")
