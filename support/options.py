"""Every option of a run, its default and its help in one place; the command line is made from it.

A default that depends on the task (length, learning rate, epochs, ...) is None or "auto" until `resolve` fills it in.
"""

import argparse
import ctypes
import math
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from torch import nn

from data import Dataset, Text, UsageError, find, title
from prefix import SHARE
from support.usage import Parser


def opt(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """Every option of a run, in the type it has after `resolve`, which fills in None and "auto"."""

    task: str = opt("digits", "what to learn; a name that `python data.py` lists, a folder of images, or a .jsonl file")
    tune: Literal["prefix", "linear", "full"] = opt(
        "prefix", "train a prefix (and, for images, the head), the head alone, or everything"
    )
    share: Literal[SHARE] = opt(  # type: ignore[valid-type]
        "none", "how a prefix key and value share parameters"
    )
    shallow: bool = opt(False, "put the prefix in the first layer only")
    length: int = opt(None, "number of prefix vectors L (default: the task's)")
    lr: float = opt(None, "learning rate; images: a step uses lr * batch / 256 (default: the task's)")
    wd: float = opt(None, "weight decay of all that is trained but the head's bias (default: the task's)")
    epochs: int = opt(None, "passes over the training examples (default: the task's)")
    batch: int = opt(None, "images or texts per step (default: the task's)")
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
    compile: bool = opt(None, "torch.compile the step (default: on CUDA)")
    data_dir: str = opt("data", "where data sets are kept")
    out: str = opt("", "folder of the run (default: out/TASK/SETTINGS)")


def method(config: Config) -> str:
    """The name under which settings and tables know a run: none, deep-shallow, ..., probe, full."""
    if config.tune == "prefix":
        return config.share + ("-shallow" if config.shallow else "")
    return {"linear": "probe", "full": "full"}[config.tune]


def device(name: str) -> Any:
    """Where to compute; auto is the GPU if there is one. UsageError for a GPU that there is not."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device is cuda, but PyTorch finds no CUDA device here; use --device cpu")
    return {"auto": "cuda" if torch.cuda.is_available() else "cpu"}.get(name, name)


def resolve(config: Config) -> Config:
    """Fill in every None and "auto" but dtype, which depends on the backbone. UsageError for what cannot be."""
    task = find(config.task)
    values: dict[str, Any] = dict(
        zip(("length", "lr", "wd"), task.settings.get(method(config), task.usual), strict=True)
    )
    values |= {"epochs": task.epochs, "batch": task.batch, "backbone": task.backbone}
    values |= {"optimizer": "adamw" if task.text else "sgd", "device": device(config.device)}
    values |= {"compile": config.device != "cpu" and torch.cuda.is_available()}
    config = replace(config, **{k: v for k, v in values.items() if getattr(config, k) in (None, "auto")})
    for name in ("length", "lr", "epochs", "batch", "beams"):
        if not 0 < getattr(config, name) < math.inf:
            raise UsageError(f"--{name} is {getattr(config, name)}; it must be positive")
    if not 0 < config.fraction <= 1:
        raise UsageError(f"--fraction is {config.fraction}; it must be above 0 and at most 1")
    if not 0 <= config.wd < math.inf:
        raise UsageError(f"--wd is {config.wd}; it must not be negative")
    if not 0 <= config.seed < 2**63 - 1_000_003 * (config.epochs + 1):  # what PyTorch takes, in every epoch
        raise UsageError(f"--seed is {config.seed}; it must not be negative, nor have more than 18 digits")
    if config.tune == "linear" and task.text:
        raise UsageError(f"--tune linear trains a classifier's head, and {config.task} is text; use prefix or full")
    size = f"-L{config.length}" if config.tune == "prefix" else ""
    name = f"{method(config)}{size}-lr{config.lr:g}-wd{config.wd:g}-epochs{config.epochs}-seed{config.seed}"
    name += ("" if config.fraction == 1 else f"-fraction{config.fraction:g}") + ("" if config.final else "-val")
    folder = Path("out", title(config.task), name)
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


def check(config: Config, backbone: nn.Module, data: Dataset | Text, split: str) -> None:
    """UsageError for a run that this backbone cannot have with these data: before it starts, not when it tests."""
    if data.count(split, config.fraction) < 1:
        raise UsageError(f"--fraction {config.fraction:g} leaves no image of {config.task}; take a larger one")
    if data.text:
        room = backbone.context - (config.length if config.tune == "prefix" else 0)
        data.must_fit(room, {split, "val", "test" if config.final else "val"})
        if data.encoding.n_vocab > backbone.vocab:
            raise UsageError(f"{config.backbone} knows fewer tokens than {config.task} has; take another --backbone")
        if config.beams > (most := data.encoding.n_vocab // 2):
            raise UsageError(f"--beams is {config.beams}; with this vocabulary it can be {most} at most")


def add_options(made: argparse.ArgumentParser, options: type) -> None:
    """A command-line option for every field of a dataclass; a list takes any number of values."""
    for f in fields(options):
        kind: dict[str, Any] = {"type": f.type}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif get_origin(f.type) is Literal:
            kind = {"choices": get_args(f.type)}
        elif get_origin(f.type) is list:
            kind = {"type": get_args(f.type)[0], "nargs": "*"}
        made.add_argument(f"--{f.name.replace('_', '-')}", help=f.metadata["help"], **kind | f.metadata.get("kind", {}))


def parser(description: str) -> argparse.ArgumentParser:
    """The command line of one run, made from Config."""
    made = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    add_options(made, Config)
    made.add_argument("--shared", dest="share", action="store_const", const="deep", help="the same as --share deep")
    return made
