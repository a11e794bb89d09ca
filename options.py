"""Every option of a run, its default and its help in one place; the command line is made from it.

A default that depends on the task (length, learning rate, epochs, ...) is None or "auto" until `resolve` fills it in.
"""

import argparse
import ctypes
import math
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch

from data import UsageError, find
from prefix import SHARE


def opt(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """Every option of a run. None and "auto" are filled in by `resolve`."""

    task: str = opt("digits", "what to learn; a name that `python data.py` lists, a folder of images, or a .jsonl file")
    tune: Literal["prefix", "linear", "full"] = opt(
        "prefix", "train a prefix (and, for images, the head), the head alone, or everything"
    )
    share: Literal[SHARE] = opt("none", "how a prefix key and value share parameters")
    shallow: bool = opt(False, "put the prefix in the first layer only")
    length: int | None = opt(None, "number of prefix vectors L (default: the task's)")
    lr: float | None = opt(None, "learning rate; images: a step uses lr * batch / 256 (default: the task's)")
    wd: float | None = opt(None, "weight decay of all that is trained but the head's bias (default: the task's)")
    epochs: int | None = opt(None, "passes over the training examples (default: the task's)")
    batch: int | None = opt(None, "images or texts per step (default: the task's)")
    optimizer: Literal["auto", "sgd", "adamw"] = opt("auto", "auto is the protocol's: sgd for images, adamw for text")
    seed: int = opt(42, "decides initialisation, order, augmentation and dropout")
    fraction: float = opt(1.0, "share of the training examples to use, stratified; every seed uses the same ones")
    final: bool = opt(True, "train on the protocol's final split and test once; --no-final: train, then val only")
    beams: int = opt(5, "text: how many beams write the test set; 1 is greedy")
    backbone: str = opt(
        "auto",
        "auto (the task's), tiny, scratch (tiny, random), a timm name, a .npz or .safetensors file; "
        "text: tiny_gpt, scratch_gpt, gpt2, gpt2-medium, gpt2-large, a folder of such a model",
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
    values = dict(zip(("length", "lr", "wd"), task.settings.get(method(config), task.usual), strict=True))
    values |= {"epochs": task.epochs, "batch": task.batch, "backbone": task.backbone}
    values |= {"optimizer": "adamw" if task.text else "sgd", "device": "cuda" if torch.cuda.is_available() else "cpu"}
    values |= {"compile": config.device != "cpu" and torch.cuda.is_available()}
    config = replace(config, **{k: v for k, v in values.items() if getattr(config, k) in (None, "auto")})
    for name in ("length", "lr", "epochs", "batch", "beams"):
        if not 0 < getattr(config, name) < math.inf:
            raise UsageError(f"--{name} is {getattr(config, name)}; it must be positive")
    if config.fraction > 1 or config.fraction <= 0:
        raise UsageError(f"--fraction is {config.fraction}; it must be above 0 and at most 1")
    if not (0 <= config.wd < math.inf and config.seed >= 0):
        raise UsageError(f"--wd is {config.wd} and --seed is {config.seed}; neither may be negative")
    if config.tune == "linear" and task.text:
        raise UsageError(f"--tune linear trains a classifier's head, and {config.task} is text; use prefix or full")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device is cuda, but PyTorch finds no CUDA device here; use --device cpu")
    size = f"-L{config.length}" if config.tune == "prefix" else ""
    name = f"{method(config)}{size}-lr{config.lr:g}-wd{config.wd:g}-epochs{config.epochs}-seed{config.seed}"
    name += ("" if config.fraction == 1 else f"-fraction{config.fraction:g}") + ("" if config.final else "-val")
    folder = Path("out", Path(config.task).name, name)
    return replace(config, out=config.out or str(folder))


def prepare_process() -> None:
    """TF32 for what stays fp32 on CUDA; on Linux, memory that tensors free is kept.

    Otherwise the C library maps and clears new pages for every tensor above 32 MB.
    """
    torch.set_float32_matmul_precision("high")
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)  # glibc has it
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping for a tensor of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing goes back


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


def parser(description: str) -> argparse.ArgumentParser:
    """The command line of one run, made from Config."""
    made = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    add_options(made, Config)
    made.add_argument("--shared", dest="share", action="store_const", const="deep", help="the same as --share deep")
    return made
