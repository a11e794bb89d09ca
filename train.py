"""The protocol: train one prefix (and a linear head) on one frozen backbone, as VPT and the paper do.

    python train.py --task digits --shared          Deep-share on the shipped digits; needs no network
    python train.py --task digits                   No-share: free keys and values

SGD with momentum 0.9 on softmax cross-entropy; the learning rate is base_lr * batch / 256, rises linearly from 0 over
the first tenth of the steps and falls to 0 along a cosine. Only the prefix and the head are trained. The backbone is
loaded, cast and compiled once, and any number of runs pass through it.

Shapes: B images, D width, C classes; the prefix's are in prefix.py.
Sources: Jia et al., ECCV 2022 (VPT); Le et al., ICLR 2025, arXiv 2410.02200, section 5.
"""

import argparse
import copy
import json
import math
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
from data import Dataset, UsageError, find, load, normalise, write
from prefix import Prefix
from vit import ViT

BAR = {"mininterval": 0.2 if sys.stderr.isatty() else 30, "dynamic_ncols": True, "leave": None, "delay": 2}


def opt(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """Every option of a run, its default and its help. None and "auto" are filled in by `resolve`."""

    task: str = opt("digits", "what to learn; a name that `python data.py` lists")
    tune: Literal["prefix", "linear", "full"] = opt(
        "prefix", "train a prefix and the head, the head alone, or everything"
    )
    share: Literal["none", "simple", "linear", "deep"] = opt("none", "how a prefix key and value share parameters")
    shallow: bool = opt(False, "put the prefix in the first layer only")
    length: int | None = opt(None, "number of prefix vectors L (default: the task's)")
    lr: float | None = opt(None, "base learning rate: a step uses lr * batch / 256 (default: the task's)")
    wd: float | None = opt(None, "weight decay of all that is trained but the head's bias (default: the task's)")
    epochs: int | None = opt(None, "passes over the training images; the first tenth warms up (default: the task's)")
    batch: int = opt(64, "images per step")
    optimizer: Literal["sgd", "adamw"] = opt("sgd", "sgd is the protocol; adamw trains a backbone from scratch sooner")
    seed: int = opt(42, "decides initialisation, order, augmentation and dropout")
    fraction: float = opt(1.0, "share of the training images to use, stratified; every seed uses the same ones")
    final: bool = opt(True, "train on the protocol's final split and test once; --no-final: train, then val only")
    backbone: str = opt(
        "auto", "auto (the task's), tiny, scratch (tiny, random), a timm name, a .npz or .safetensors file"
    )
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "where to compute")
    dtype: Literal["auto", "fp32", "bf16"] = opt("auto", "type of the matrix products and of the frozen weights")
    compile: bool | None = opt(None, "torch.compile the step (default: on CUDA)")
    data_dir: str = opt("data", "where data sets are kept")
    out: str = opt("", "folder of the run (default: out/TASK/SETTINGS)")


def method(config: Config) -> str:
    """The name under which settings and tables know a run: none, deep-shallow, ..., probe, full."""
    if config.tune == "prefix":
        return config.share + ("-shallow" if config.shallow else "")
    return {"linear": "probe", "full": "full"}[config.tune]


def resolve(config: Config) -> Config:
    """Fill in every None and "auto" but dtype, which depends on the backbone. UsageError for what cannot be."""
    task = find(config.task)
    values = dict(zip(("length", "lr", "wd"), task.settings.get(method(config), (10, 1.0, 1e-4)), strict=True))
    values |= {"epochs": task.epochs, "compile": config.device != "cpu" and torch.cuda.is_available()}
    values |= {"backbone": task.backbone, "device": "cuda" if torch.cuda.is_available() else "cpu"}
    config = replace(config, **{k: v for k, v in values.items() if getattr(config, k) in (None, "auto")})
    for name in ("length", "lr", "epochs", "batch"):
        if not 0 < getattr(config, name) < math.inf:
            raise UsageError(f"--{name} is {getattr(config, name)}; it must be positive")
    if config.fraction > 1 or config.fraction <= 0:
        raise UsageError(f"--fraction is {config.fraction}; it must be above 0 and at most 1")
    if not (0 <= config.wd < math.inf and config.seed >= 0):
        raise UsageError(f"--wd is {config.wd} and --seed is {config.seed}; neither may be negative")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device is cuda, but PyTorch finds no CUDA device here; use --device cpu")
    size = f"-L{config.length}" if config.tune == "prefix" else ""
    name = f"{method(config)}{size}-lr{config.lr:g}-wd{config.wd:g}-epochs{config.epochs}-seed{config.seed}"
    name += ("" if config.fraction == 1 else f"-fraction{config.fraction:g}") + ("" if config.final else "-val")
    folder = Path("out", Path(config.task).name, name)
    return replace(config, out=config.out or str(folder))


def use_bf16(config: Config, backbone: ViT) -> bool:
    """On CUDA yes; on a CPU only if it has matrix units (AMX) and the model is wide, else fp32 is faster."""
    if config.dtype != "auto":
        return config.dtype == "bf16"
    return config.device == "cuda" or (backbone.dim >= 256 and torch.cpu.get_capabilities().get("amx_bf16", False))


def load_backbone(config: Config, pretrained: bool = True) -> ViT:
    """The frozen ViT, on its device and in the type it computes in. UsageError if it cannot be had.

    pretrained: False gives a timm ViT random weights and needs no download; enough to measure how fast it is.
    """
    config = resolve(config)
    torch.manual_seed(config.seed)  # for a backbone from scratch
    try:
        vit = ViT.load(config.backbone, pretrained)
    except (ValueError, RuntimeError, OSError, KeyError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        mend = "git checkout assets" if config.backbone == "tiny" else "give a file, such as --backbone ViT-B_16.npz"
        raise UsageError(f"the backbone '{config.backbone}' cannot be used ({reason}); {mend}") from error
    vit.to(config.device).requires_grad_(False)
    if use_bf16(config, vit) and config.tune != "full":
        vit.hold_in_bf16()
    return vit


class Tuned(nn.Module):
    """All that a run trains: a linear head, and by `tune` a prefix, a copy of the backbone, or nothing else."""

    def __init__(self, config: Config, backbone: ViT, classes: int):
        super().__init__()
        self.prefix = self.backbone = None
        if config.tune == "prefix":
            sizes = (backbone.n_layer, backbone.n_head, backbone.dim, config.length, config.share)
            self.prefix = Prefix(*sizes, shallow=config.shallow, init_scale=backbone.prompt_scale)
        elif config.tune == "full":
            self.backbone = copy.deepcopy(backbone).requires_grad_(True)
        self.head = nn.Linear(backbone.dim, classes)
        nn.init.kaiming_normal_(self.head.weight, mode="fan_out")
        nn.init.zeros_(self.head.bias)

    def experts(self, backbone: ViT, batch: int | None = None) -> Tensor | None:
        return None if self.prefix is None else self.prefix(backbone, batch)  # (depth, 2, [B,] H, L, Dh)

    def forward(self, backbone: ViT, pixels: Tensor, experts: Tensor | None) -> Tensor:
        """pixels (B, size, size, 3) uint8 -> logits (B, C) in fp32."""
        backbone = backbone if self.backbone is None else self.backbone
        return self.head(backbone(normalise(pixels), experts)).float()


def loss_and_hits(model: Tuned, backbone: ViT, pixels: Tensor, labels: Tensor, bf16: bool) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of B images, and how many labels the model got right. torch.compile compiles this."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
        logits = model(backbone, pixels, model.experts(backbone, batch=len(pixels)))  # (B, C)
    return F.cross_entropy(logits, labels), (logits.argmax(-1) == labels).sum()


def predict(model: Tuned, backbone: ViT, pixels: Tensor, experts: Tensor | None, bf16: bool) -> Tensor:
    """The classes (B,) that the model gives to B images."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
        return model(backbone, pixels, experts).argmax(-1)


def batches(config: Config, data: Dataset, split: str, **order) -> Iterator[tuple[Tensor, Tensor]]:
    """data.batches on the device: copied from pinned memory while the GPU is still busy with the batch before."""
    for batch in data.batches(split, config.batch, pin=config.device == "cuda", **order):
        yield tuple(tensor.to(config.device, non_blocking=True) for tensor in batch)


@torch.no_grad()
def evaluate(config: Config, model: Tuned, backbone: ViT, data: Dataset, split: str) -> float:
    """Top-1 accuracy in % on a split: centre crops, no dropout, the prefix generated once for all batches."""
    config, bf16 = resolve(config), use_bf16(config, backbone)
    forward = torch.compile(predict, dynamic=False) if config.compile else predict
    with torch.autocast(config.device, torch.bfloat16, enabled=bf16):
        experts = model.eval().experts(backbone)  # (depth, 2, H, L, Dh)
    hits = torch.zeros((), dtype=torch.long, device=config.device)
    for pixels, labels in tqdm(batches(config, data, split), desc=split, unit="batch", leave=False, delay=2):
        hits += (forward(model, backbone, pixels, experts, bf16) == labels).sum()
    return 100 * hits.item() / data.count(split)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Step 0 ... steps - 1: up a line to the peak over the first tenth, then down a cosine to 0."""
    warmup = steps / 10
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def make_optimizer(config: Config, model: Tuned) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW; weight decay on all that is trained, MLP biases too, but the head's bias."""
    decayed = [p for name, p in model.named_parameters() if name != "head.bias"]
    groups = [{"params": decayed, "weight_decay": config.wd}, {"params": [model.head.bias], "weight_decay": 0.0}]
    fused = config.device == "cuda"
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=fused)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=fused)


def run_epoch(
    config: Config, model: Tuned, backbone: ViT, optimizer: torch.optim.Optimizer, data: Dataset, epoch: int, bar: tqdm
) -> dict:
    """One pass over the training images -> its row of metrics. The GPU is waited for every 50 steps, not in one."""
    step_fn = torch.compile(loss_and_hits, dynamic=False) if config.compile else loss_and_hits
    split, bf16, peak = training_split(config, data), use_bf16(config, backbone), config.lr * config.batch / 256
    count = data.count(split, config.fraction)
    steps = math.ceil(count / config.batch)  # of one epoch
    torch.manual_seed(config.seed + 1_000_003 * (epoch + 1))  # dropout: an epoch needs no state of those before it
    model.train()
    loss_sum, hits_sum = torch.zeros(2, device=config.device)
    for i, (pixels, labels) in enumerate(
        batches(config, data, split, seed=config.seed, epoch=epoch, fraction=config.fraction)
    ):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch * steps + i, config.epochs * steps, peak)
        loss, hits = step_fn(model, backbone, pixels, labels, bf16)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_sum += loss.detach() * len(labels)
        hits_sum += hits
        bar.update(len(labels))
        if (i + 1) % 50 == 0 or i + 1 == steps:
            bar.set_postfix(loss=f"{loss_sum.item() / min((i + 1) * config.batch, count):.3f}", refresh=False)
            if not loss_sum.isfinite():
                break
    return {"epoch": epoch + 1, "loss": loss_sum.item() / count, "train": 100 * hits_sum.item() / count}


def training_split(config: Config, data: Dataset) -> str:
    return data.final if config.final else "train"


@dataclass
class Result:
    """What a run leaves. metrics: its last epoch's loss and train accuracy, and at the end val's or test's, in %."""

    status: Literal["running", "done", "diverged"]
    metrics: dict
    history: list[dict]  # one row of metrics per epoch
    model: Tuned
    out: Path

    @property
    def prefix(self) -> Prefix | None:
        return self.model.prefix

    @property
    def head(self) -> nn.Linear:
        return self.model.head


def train(config: Config, backbone: ViT, data: Dataset, stop: int | None = None) -> Result:
    """Train by the protocol, or go on where an earlier call was cut off. The backbone stays as it was.

    stop: return "running" after that many epochs; a later call goes on. A loss that is not finite ends the run as
    "diverged". UsageError if the folder holds a run with other settings, or files that cannot be read.
    """
    config = resolve(config)
    torch.manual_seed(config.seed)
    model = Tuned(config, backbone, len(data.classes)).to(config.device)
    optimizer = make_optimizer(config, model)
    history = checkpoint.resume(Path(config.out), asdict(config), model, optimizer)
    if data.listing is not None:  # a split made here, to be repeated
        write(Path(config.out) / "split.json", json.dumps(data.listing, indent=1).encode())
    count = data.count(training_split(config, data), config.fraction)
    stop = min(stop or config.epochs, config.epochs)
    name = f"{data.task} {method(config)}"
    with tqdm(desc=name, total=config.epochs * count, initial=len(history) * count, unit="img", **BAR) as bar:
        while len(history) < stop and "status" not in (history or [{}])[-1]:
            row = run_epoch(config, model, backbone, optimizer, data, len(history), bar)
            if not math.isfinite(row["loss"]):
                row = {"epoch": row["epoch"], "status": "diverged"}
            elif row["epoch"] == config.epochs:
                split = "test" if config.final else "val"
                row |= {split: evaluate(config, model, backbone, data, split), "status": "done"}
            history.append(row)
            title = f"{config.task}, {method(config)}: {summary(history)}"
            checkpoint.save(Path(config.out), asdict(config), model, optimizer, history, title)
    return Result(history[-1].get("status", "running"), history[-1], history, model, Path(config.out))


def summary(history: list[dict]) -> str:
    last = history[-1]
    if last.get("status") == "diverged":
        return f"diverged in epoch {last['epoch']}: the loss is not finite"
    return ", ".join(f"{split} accuracy {last[split]:.2f} %" for split in ("val", "test") if split in last)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{message}; see --help")


def add_options(made: argparse.ArgumentParser, options: type) -> None:
    """A command-line option for every field of a dataclass; a list takes any number of values."""
    for f in fields(options):
        kind = {"type": get_args(f.type)[0] if get_args(f.type) else f.type}
        if bool in (f.type, kind["type"]):
            kind = {"action": argparse.BooleanOptionalAction}
        elif get_origin(f.type) is Literal:
            kind = {"choices": get_args(f.type)}
        elif get_origin(f.type) is list:
            kind["nargs"] = "*"
        made.add_argument(f"--{f.name.replace('_', '-')}", help=f.metadata["help"], **kind | f.metadata.get("kind", {}))


def parser() -> argparse.ArgumentParser:
    """The command line, made from Config."""
    made = Parser(description=__doc__.split("\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS)
    add_options(made, Config)
    made.add_argument("--shared", dest="share", action="store_const", const="deep", help="the same as --share deep")
    return made


def run(config: Config) -> int:
    """One run from the command line; its exit code: 0 done, 3 diverged."""
    config = resolve(config)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32 on CUDA; a CPU has none
    backbone = load_backbone(config)
    data = load(config.task, config.data_dir, backbone.image)
    length = f"L {config.length}, " if config.tune == "prefix" else ""
    known, used = find(config.task).settings.get(method(config)), (config.length, config.lr, config.wd)
    source = {None: "none is published", used: "the task's own"}.get(known, "yours")
    settings = f"{length}base lr {config.lr:g}, weight decay {config.wd:g} ({source}), batch {config.batch}"
    images = f"{config.epochs} epochs of {data.count(training_split(config, data), config.fraction)} images"
    print(f"{config.task}: {method(config)}, {settings}, {images}, {config.device}")
    result = train(config, backbone, data)
    trained = sum(p.numel() for p in result.model.parameters())
    whole = sum(p.numel() for p in backbone.parameters())
    print(f"{summary(result.history)}; trained {trained:,} parameters beside a backbone of {whole:,}; {result.out}")
    return 3 if result.status == "diverged" else 0


def main(argv: list[str] | None = None) -> int:
    try:
        return run(Config(**vars(parser().parse_args(argv))))
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last finished epoch", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
