"""The tables of docs/results.md that sweep.py cannot make; from the repository's root:

    python -m docs.controls restaurants    the 2 x 4 table in the tiny GPT, 240 texts
    python -m docs.controls fashion        the same in a ViT, from five classes of garments to five
    python -m docs.controls width          one vector and two with about as many parameters

The learning rate is chosen on val, with one seed or three; then every seed is tested once.
"""

import sys
from dataclasses import replace
from functools import partial

import numpy as np

import train as protocol
from data import load, stratified
from prefix import SHARE, Prefix
from support.images import Split
from support.report import called, standard_error
from train import Config, evaluate, load_backbone, resolve, train

TEXT_LR = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
IMAGE_LR = (25.0, 10.0, 5.0, 2.5, 1.0, 0.5)


def run(config, backbone, data, final, lr, seed):
    """One run: its loss on texts or accuracy on images, and how many parameters its prefix has."""
    out = f"out/controls/{config.out}/{config.share}/{final}-{lr}-{seed}"
    config = resolve(replace(config, wd=1e-4, out=out, final=final, lr=lr, seed=seed))
    split = "test" if final else "val"
    # A final run on texts would write them all, and here only the loss is wanted.
    result = train(replace(config, final=final and not data.text), backbone, data)
    score = result.metrics.get(split, np.nan)
    if data.text:
        score = evaluate(config, result.model, backbone, data, split)
    return score, sum(p.numel() for p in result.model.prefix.parameters())


def row(config, backbone, data, rates, seeds, choice=(42,)):
    """Of one method: the chosen learning rate, every seed's test score, parameters of a prefix."""
    sign = 1 if data.text else -1  # the smallest loss, the largest accuracy
    one = partial(run, config, backbone, data)
    tried = {lr: sign * np.mean([one(False, lr, seed)[0] for seed in choice]) for lr in rates}
    best = min((lr for lr in rates if not np.isnan(tried[lr])), key=tried.__getitem__)
    found = [one(True, best, seed) for seed in range(seeds)]
    return best, [score for score, _ in found], found[0][1]


def show(rows):
    """Mean and standard error of every row, and of two vectors minus one, paired by seed."""
    said = {f"{called(a)}, {n:,} parameters, lr {lr:g}": xs for a, (lr, xs, n) in rows.items()}
    for one, two in (("identity", "none"), *((s, f"{s}-separate") for s in SHARE[1:4])):
        if one in rows and two in rows:
            said[f"{called(two)} minus {called(one)}"] = np.subtract(rows[two][1], rows[one][1])
    for name, values in said.items():
        print(f"{name}: {np.mean(values):.3f} ({standard_error(values):.3f})", flush=True)


def all_eight(config, data, *others):
    backbone = load_backbone(config)
    show({s: row(replace(config, share=s), backbone, data, *others) for s in SHARE})


def restaurants():
    config = Config(task="restaurants", fraction=0.1, device="cpu", out="restaurants")
    all_eight(config, load("restaurants", encoding="bytes"), TEXT_LR, 3)


def five_classes(data, first, most=None):
    """The images of five classes, labelled from 0; of train and val at most `most` each."""
    splits = {}
    for name, part in data.splits.items():
        chosen = np.flatnonzero((part.labels >= first) & (part.labels < first + 5))
        chosen = chosen[stratified(part.labels[chosen])][: None if name == "test" else most]
        images = np.stack([part.image(i) for i in chosen])  # (n, height, width, 3)
        splits[name] = Split.of(images, part.labels[chosen] - first)
    return replace(data, classes=data.classes[first : first + 5], splits=splits)


def fashion():
    config, data = Config(task="fashion_mnist", device="cpu"), load("fashion_mnist", image_size=32)
    full = replace(config, backbone="scratch", tune="full", epochs=10, optimizer="adamw", lr=4e-3)
    full = replace(full, wd=1e-4, out="out/controls/fashion/backbone")
    train(full, load_backbone(full), five_classes(data, first=0))
    config = replace(config, backbone=f"{full.out}/backbone.safetensors", epochs=15, out="fashion")
    all_eight(config, five_classes(data, 5, most=1000), IMAGE_LR, 5, (42, 43, 44))


def width():
    backbone, data = load_backbone(Config(device="cpu")), load("digits", image_size=32)
    for share, hidden in (("deep", 51), ("deep-separate", 48), ("deep", 3), ("none", 48)):
        protocol.Prefix = partial(Prefix, hidden=hidden)  # no option of train.py has it
        config = Config(share=share, device="cpu", out=f"width/{hidden}")
        show({share: row(config, backbone, data, IMAGE_LR, seeds=10)})


if __name__ == "__main__":
    {"restaurants": restaurants, "fashion": fashion, "width": width}[sys.argv[1]]()
