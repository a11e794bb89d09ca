"""The tables of docs/results.md that sweep.py cannot make; from the repository's root:

    python -m docs.controls restaurants    the 2 x 4 table in the tiny GPT, 240 texts
    python -m docs.controls fashion        the same in a ViT, from five classes of garments to five
    python -m docs.controls width          one vector and two with about as many parameters

The learning rate is chosen on val with one seed; then every seed is tested once. out/controls keeps
the runs, and a second start goes on from them.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np

import train as protocol
from data import load, stratified
from prefix import SHARE, Prefix
from support.images import Split
from support.report import called, markdown, standard_error
from train import Config, evaluate, load_backbone, resolve, train

OUT = Path("out/controls")
PAIRS = (("identity", "none"), *((kind, f"{kind}-separate") for kind in SHARE[1:4]))
TEXT_LR, IMAGE_LR = (0.3, 0.1, 0.03, 0.01, 0.003), (25.0, 10.0, 5.0, 2.5, 1.0, 0.5)


def run(config, backbone, data, **values):
    """One run: its loss on texts or accuracy on images, and how many parameters its prefix has."""
    name = "-".join(str(values[key]) for key in ("final", "lr", "seed"))
    out = f"{config.out}/{config.share}/{name}"
    config = resolve(replace(config, wd=1e-4, out=out, **values))
    result = train(replace(config, final=config.final and not data.text), backbone, data)
    score = result.metrics.get("val loss" if data.text else "val", np.nan)
    if config.final:
        score = evaluate(config, result.model, backbone, data, "test")
    return score, sum(p.numel() for p in result.model.prefix.parameters())


def row(config, backbone, data, rates, seeds):
    """Of one method: the chosen learning rate, every seed's test score, parameters of a prefix."""
    sign = 1 if data.text else -1  # the smallest loss, the largest accuracy
    tried = {lr: sign * run(config, backbone, data, lr=lr, final=False, seed=42)[0] for lr in rates}
    best = min((lr for lr in rates if not np.isnan(tried[lr])), key=tried.__getitem__)
    found = [run(config, backbone, data, lr=best, final=True, seed=seed) for seed in range(seeds)]
    return best, [score for score, _ in found], found[0][1]


def show(rows, digits):
    """The rows, and two vectors minus one, paired by seed."""
    cells = []
    for name, (lr, scores, count) in rows.items():
        numbers = [f"{x:.{digits}f}" for x in (mean(scores), standard_error(scores))]
        cells.append([called(name), f"{count:,}", f"{lr:g}", *numbers])
    print(markdown(["method", "parameters of the prefix", "lr", "test", "s.e."], cells), flush=True)
    for one, two in PAIRS:
        if one in rows and two in rows:
            gains = [b - a for a, b in zip(rows[one][1], rows[two][1], strict=True)]
            error = f"{standard_error(gains):.{digits}f}"
            print(f"{called(two)} minus {called(one)}: {mean(gains):+.{digits}f} (s.e. {error})")


def all_eight(config, data, rates, seeds, digits):
    backbone = load_backbone(config)
    methods = [replace(config, share=share) for pair in PAIRS for share in pair]
    show({c.share: row(c, backbone, data, rates, seeds) for c in methods}, digits)


def restaurants():
    config = Config(task="restaurants", fraction=0.1, device="cpu", out=f"{OUT}/restaurants")
    all_eight(config, load("restaurants", encoding="bytes"), TEXT_LR, seeds=3, digits=3)


def five_classes(data, first, most=None):
    """The images of five classes, labelled from 0; of train and val at most `most` each."""
    splits = {}
    for name, part in data.splits.items():
        chosen = np.flatnonzero((part.labels >= first) & (part.labels < first + 5))
        chosen = chosen[stratified(part.labels[chosen], seed=0)]
        chosen = chosen[:most] if name != "test" else chosen
        images = np.stack([part.image(i) for i in chosen])  # (n, height, width, 3)
        splits[name] = Split.of(images, part.labels[chosen] - first)
    return replace(data, classes=data.classes[first : first + 5], splits=splits)


def fashion():
    garments, out = load("fashion_mnist", image_size=32), f"{OUT}/fashion"
    config = Config(task="fashion_mnist", device="cpu", backbone="scratch", tune="full", epochs=10)
    config = replace(config, optimizer="adamw", lr=4e-3, wd=1e-4, out=f"{out}/backbone")
    train(config, load_backbone(config), five_classes(garments, first=0))
    config = Config(task="fashion_mnist", device="cpu", epochs=15, out=out)
    config = replace(config, backbone=f"{out}/backbone/backbone.safetensors")
    all_eight(config, five_classes(garments, 5, most=1000), IMAGE_LR, seeds=5, digits=2)


def width():
    backbone, data = load_backbone(Config(device="cpu")), load("digits", image_size=32)
    for share, hidden in (("deep", 51), ("deep-separate", 48), ("deep", 3), ("none", 48)):
        protocol.Prefix = partial(Prefix, hidden=hidden)  # no option of train.py has it
        cell = Config(share=share, device="cpu", out=f"{OUT}/width/{hidden}")
        print(f"hidden {hidden}")
        show({share: row(cell, backbone, data, IMAGE_LR, seeds=10)}, digits=2)


if __name__ == "__main__":
    {"restaurants": restaurants, "fashion": fashion, "width": width}[sys.argv[1]]()
