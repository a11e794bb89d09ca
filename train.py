"""The protocol: train one prefix (and, for images, a linear head) on one frozen backbone, as VPT and the paper do.

    python train.py --task digits --shared          Deep-share on the shipped digits; needs no network
    python train.py --task digits                   No-share: free keys and values
    python train.py --task e2e --shared             the same prefix in GPT-2: table to text

Images: SGD with momentum 0.9 on the mean cross-entropy; the learning rate is lr * batch / 256, rises linearly from 0
over the first tenth of the steps and falls to 0 along a cosine. Text: AdamW on the cross-entropy summed over a text's
target tokens, gradients clipped to norm 1; the learning rate falls to 0 along a line. Only the prefix and the head are
trained. The backbone is loaded, cast and compiled once, and any number of runs pass through it.

Shapes: B examples, D width, C classes; T tokens, Q targets of a text, V vocabulary; the prefix's are in prefix.py.
Sources: Jia et al., ECCV 2022 (VPT); Li & Liang, ACL 2021; Le et al., ICLR 2025, arXiv 2410.02200, section 5.
"""

import argparse
import copy
import ctypes
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import Dataset, Text, find, load, normalise, title
from gpt import GPT
from prefix import SHARE, Prefix
from support import runs
from support.files import GOES_ON, Parser, UsageError, add_options, exit_code, opt, write
from support.metrics import RULES, score
from vit import ViT

BAR = {
    "mininterval": 0.2 if sys.stderr.isatty() else 30,
    "dynamic_ncols": True,
    "leave": None,
    "delay": 2,
}
WRITE = 16  # texts that are written at once


@dataclass(frozen=True)
class Config:
    """Every option of a run, in the type it has after `resolve`, which fills in None and "auto"."""

    task: str = opt(
        "digits",
        "what to learn; a name that `python data.py` lists, a folder of images, or a .jsonl file",
    )
    tune: Literal["prefix", "linear", "full"] = opt(
        "prefix", "train a prefix (and, for images, the head), the head alone, or everything"
    )
    share: Literal[SHARE] = opt(  # type: ignore[valid-type]
        "none", "how a prefix key and value share parameters"
    )
    shallow: bool = opt(False, "put the prefix in the first layer only")
    length: int = opt(None, "number of prefix vectors L (default: the task's)")
    lr: float = opt(
        None, "learning rate; images: a step uses lr * batch / 256 (default: the task's)"
    )
    wd: float = opt(
        None, "weight decay of all that is trained but the head's bias (default: the task's)"
    )
    epochs: int = opt(None, "passes over the training examples (default: the task's)")
    batch: int = opt(None, "images or texts per step (default: the task's)")
    optimizer: Literal["auto", "sgd", "adamw"] = opt(
        "auto", "auto is the protocol's: sgd for images, adamw for text"
    )
    seed: int = opt(42, "decides initialisation, order, augmentation and dropout")
    fraction: float = opt(
        1.0, "share of the training examples to use, stratified; every seed uses the same ones"
    )
    final: bool = opt(
        True, "train on the protocol's final split and test once; --no-final: train, then val only"
    )
    beams: int = opt(5, "text: how many beams write the test set; 1 is greedy")
    backbone: str = opt(
        "auto",
        "auto (the task's), tiny, scratch (tiny, random), a timm name, a .npz or .safetensors file; "
        "text: tiny_gpt, scratch_gpt, gpt2, gpt2-medium, gpt2-large, a folder of such a model",
    )
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "where to compute")
    dtype: Literal["auto", "fp32", "bf16"] = opt(
        "auto", "type of the matrix products and of the frozen weights"
    )
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
        raise UsageError(
            "--device is cuda, but PyTorch finds no CUDA device here; use --device cpu"
        )
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
    config = replace(
        config, **{k: v for k, v in values.items() if getattr(config, k) in (None, "auto")}
    )
    for name in ("length", "lr", "epochs", "batch", "beams"):
        if not 0 < getattr(config, name) < math.inf:
            raise UsageError(f"--{name} is {getattr(config, name)}; it must be positive")
    if not 0 < config.fraction <= 1:
        raise UsageError(f"--fraction is {config.fraction}; it must be above 0 and at most 1")
    if not 0 <= config.wd < math.inf:
        raise UsageError(f"--wd is {config.wd}; it must not be negative")
    if (
        not 0 <= config.seed < 2**63 - 1_000_003 * (config.epochs + 1)
    ):  # what PyTorch takes, in every epoch
        raise UsageError(
            f"--seed is {config.seed}; it must not be negative, nor have more than 18 digits"
        )
    if config.tune == "linear" and task.text:
        raise UsageError(
            f"--tune linear trains a classifier's head, and {config.task} is text; use prefix or full"
        )
    size = f"-L{config.length}" if config.tune == "prefix" else ""
    name = f"{method(config)}{size}-lr{config.lr:g}-wd{config.wd:g}-epochs{config.epochs}-seed{config.seed}"
    name += ("" if config.fraction == 1 else f"-fraction{config.fraction:g}") + (
        "" if config.final else "-val"
    )
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


def use_bf16(config: Config, backbone: ViT | GPT) -> bool:
    """On CUDA yes; on a CPU only if it has matrix units (AMX) and the model is wide, else fp32 is faster."""
    if config.dtype != "auto":
        return config.dtype == "bf16"
    return config.device == "cuda" or (
        backbone.dim >= 256 and torch.cpu.get_capabilities().get("amx_bf16", False)
    )


def load_backbone(config: Config, pretrained: bool = True) -> ViT | GPT:
    """The frozen ViT or GPT, on its device and in the type it computes in. UsageError if it cannot be had.

    pretrained: False gives random weights and needs no download; enough to measure how fast it is.
    """
    config = resolve(config)
    torch.manual_seed(config.seed)  # for a backbone from scratch
    backbone = open_backbone(GPT if find(config.task).text else ViT, config.backbone, pretrained)
    backbone.fingerprint = runs.fingerprint(backbone)
    backbone.to(config.device).requires_grad_(False)
    if use_bf16(config, backbone) and config.tune != "full":
        backbone.cast_frozen_weights()
    return backbone


def open_backbone(kind: type[ViT] | type[GPT], name: str, pretrained: bool = True) -> ViT | GPT:
    """A ViT or GPT by its name, on the CPU in fp32. UsageError if it cannot be had."""
    try:
        backbone = kind.load(name, pretrained)
        if strange := [n for n, value in backbone.named_parameters() if not value.isfinite().all()]:
            raise ValueError(f"{strange[0]} holds NaN or infinity")
        return backbone
    except Exception as error:  # whatever a damaged or hostile file leads to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        shipped, example = (
            ("tiny", "ViT-B_16.npz")
            if kind is ViT
            else ("tiny_gpt", "a folder with model.safetensors")
        )
        mend = (
            "git checkout assets"
            if name == shipped
            else f"give one that you have: --backbone {example}"
        )
        raise UsageError(f"the backbone '{name}' cannot be used ({reason}); {mend}") from error


class TunedModel(nn.Module):
    """All that a run trains: by `tune` a prefix, a copy of the backbone, or neither; and for images a linear head."""

    def __init__(self, config: Config, backbone: ViT | GPT, classes: int):
        super().__init__()
        self.prefix: Any = None  # Prefix
        self.backbone: Any = None  # ViT or GPT
        self.head: Any = None  # nn.Linear
        if config.tune == "prefix":
            sizes = (backbone.n_layer, backbone.n_head, backbone.dim, config.length, config.share)
            # Images: a map per layer. Text: one wide map for all layers and no dropout, as Li & Liang have it.
            form: dict = {} if classes else {"hidden": 512, "per_layer": False, "dropout": 0.0}
            self.prefix = Prefix(
                *sizes, shallow=config.shallow, init_scale=backbone.prefix_init_scale, **form
            )
        elif config.tune == "full":
            self.backbone = copy.deepcopy(backbone).requires_grad_(True)
        if classes:
            self.head = nn.Linear(backbone.dim, classes)
            nn.init.kaiming_normal_(self.head.weight, mode="fan_out")
            nn.init.zeros_(self.head.bias)

    def prefix_kv(self, backbone: ViT | GPT, batch: int | None = None) -> Tensor | None:
        return (
            None if self.prefix is None else self.prefix(backbone, batch)
        )  # (depth, 2, [B,] H, L, Dh)

    def classify(self, backbone: ViT, pixels: Tensor, prefix_kv: Tensor | None) -> Tensor:
        """pixels (B, size, size, 3) uint8 -> logits (B, C) in fp32."""
        return self.head((self.backbone or backbone)(normalise(pixels), prefix_kv)).float()

    def predict(
        self, backbone: GPT, tokens: Tensor, at: Tensor, prefix_kv: Tensor | None
    ) -> Tensor:
        """tokens (B, T) -> logits (B, Q, V) in fp32 of the tokens that come after the columns `at` (B, Q)."""
        return (self.backbone or backbone)(tokens, prefix_kv, at).float()


def image_loss(
    model: TunedModel,
    backbone: ViT,
    bf16: bool,
    pixels: Tensor,
    labels: Tensor,
    prefix_kv: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of B images, and how many labels the model got right. torch.compile compiles this."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
        prefix_kv = (
            model.prefix_kv(backbone, len(pixels)) if prefix_kv is None else prefix_kv
        )  # (depth, 2, [B,] H, L, Dh)
        logits = model.classify(backbone, pixels, prefix_kv)  # (B, C)
    return F.cross_entropy(logits, labels), (logits.argmax(-1) == labels).sum()


def text_loss(
    model: TunedModel,
    backbone: GPT,
    bf16: bool,
    tokens: Tensor,
    at: Tensor,
    labels: Tensor,
    prefix_kv: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over the targets of each text, its mean over B texts; and how many targets there were."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
        prefix_kv = (
            model.prefix_kv(backbone, len(tokens)) if prefix_kv is None else prefix_kv
        )  # (depth, 2, H, L, Dh)
        logits = model.predict(backbone, tokens, at, prefix_kv)  # (B, Q, V)
    total = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )  # labels of -100 do not count
    return total / len(tokens), (labels >= 0).sum()


def train_step(
    loss_of: Callable,
    model: TunedModel,
    backbone: ViT | GPT,
    bf16: bool,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, ...],
    clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of training: forward, backward, update. Returns what loss_of returns.

    loss_of: image_loss or text_loss, compiled or not. clip: the largest norm of the gradients.
    """
    loss, correct = loss_of(model, backbone, bf16, *batch)
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach(), correct


def step_function(config: Config, data: Dataset | Text) -> Callable:
    """The loss of this kind of data; compiled for one batch size (images), or once for all lengths (text)."""
    step = text_loss if data.text else image_loss
    return torch.compile(step, dynamic=data.text) if config.compile else step


def batches(
    config: Config, data: Dataset | Text, split: str, **order: Any
) -> Iterator[tuple[Tensor, ...]]:
    """data.batches on the device: copied from pinned memory while the GPU is still busy with the batch before.

    For a compiled step, a last batch of images that is not full is filled up: labels of -100 count nowhere.
    """
    for batch in data.batches(split, config.batch, pin=config.device == "cuda", **order):
        if config.compile and not data.text and (missing := config.batch - len(batch[0])):
            pixels, labels = batch
            batch = (
                F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, missing)),
                F.pad(labels, (0, missing), value=-100),
            )
        yield tuple(tensor.to(config.device, non_blocking=True) for tensor in batch)


@torch.no_grad()
def evaluate(
    config: Config, model: TunedModel, backbone: ViT | GPT, data: Dataset | Text, split: str
) -> float:
    """Images: top-1 accuracy in % on centre crops. Text: mean loss of a target token, in nats. NaN if a loss is NaN.

    There is no dropout, and the prefix is generated once for all batches.
    """
    config = resolve(config)
    step, bf16 = step_function(config, data), use_bf16(config, backbone)
    with torch.autocast(config.device, torch.bfloat16, enabled=bf16):
        prefix_kv = model.eval().prefix_kv(backbone)  # (depth, 2, H, L, Dh)
    loss_sum, correct_sum = torch.zeros(2, device=config.device)
    for batch in tqdm(batches(config, data, split), desc=split, unit="batch", leave=False, delay=2):
        loss, correct = step(model, backbone, bf16, *batch, prefix_kv=prefix_kv)
        loss_sum += loss * len(batch[0])
        correct_sum += correct
    if not loss_sum.isfinite():
        return math.nan
    return (
        loss_sum.item() / correct_sum.item()
        if data.text
        else 100 * correct_sum.item() / data.count(split)
    )


@torch.inference_mode()
def write_texts(config: Config, model: TunedModel, backbone: GPT, data: Text) -> dict[str, float]:
    """Write a text for every source of the test split; all of them go to generated.jsonl, their scores come back."""
    prompts, pairs = zip(*sorted(data.prompts("test"), key=lambda both: len(both[0])), strict=True)
    outputs, bf16 = [], use_bf16(config, backbone)
    with (
        torch.autocast(config.device, torch.bfloat16, enabled=bf16),
        tqdm(total=len(pairs), unit="text", **BAR) as bar,
    ):
        prefix_kv = model.eval().prefix_kv(backbone)  # (depth, 2, H, L, Dh)
        for start in range(0, len(prompts), WRITE):
            some = prompts[start : start + WRITE]
            made = (model.backbone or backbone).generate(
                some, prefix_kv, config.beams, **data.decoding
            )
            outputs += [data.decode(tokens) for tokens in made]
            bar.update(len(made))
    rows = [asdict(pair) | {"output": output} for pair, output in zip(pairs, outputs, strict=True)]
    write(
        Path(config.out) / "generated.jsonl",
        "".join(json.dumps(row) + "\n" for row in rows).encode(),
    )
    rules = config.task if config.task in RULES else "plain"
    scores, missing = score(outputs, pairs, rules)
    for sentence in missing:
        tqdm.write(sentence, file=sys.stderr)
    return scores


def learning_rate(config: Config, step: int, steps: int) -> float:
    """Of step 0 ... steps - 1. Images: up a line for a tenth of them, then down a cosine to 0. Text: down a line."""
    if find(config.task).text:
        return config.lr * (1 - step / steps)
    peak, warmup = config.lr * config.batch / 256, steps / 10
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def make_optimizer(config: Config, model: TunedModel) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW; weight decay on all that is trained, MLP biases too, but the head's bias."""
    groups = [
        {
            "params": [p for name, p in model.named_parameters() if name != "head.bias"],
            "weight_decay": config.wd,
        }
    ]
    if model.head is not None:
        groups.append({"params": [model.head.bias], "weight_decay": 0.0})
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)


def run_epoch(
    config: Config,
    model: TunedModel,
    backbone: ViT | GPT,
    optimizer: torch.optim.Optimizer,
    data: Dataset | Text,
    epoch: int,
    bar: tqdm,
) -> dict:
    """One pass over the training examples -> its row of metrics. The GPU is waited for every 50 steps, not in one."""
    step, split, bf16 = (
        step_function(config, data),
        training_split(config, data),
        use_bf16(config, backbone),
    )
    count = data.count(split, config.fraction)
    steps = math.ceil(count / config.batch)  # of one epoch
    torch.manual_seed(
        config.seed + 1_000_003 * (epoch + 1)
    )  # dropout: an epoch needs no state of those before it
    model.train()
    (loss_sum, correct_sum), seen = torch.zeros(2, device=config.device), 0
    order = {"seed": config.seed, "epoch": epoch, "fraction": config.fraction}
    for i, batch in enumerate(batches(config, data, split, **order)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, epoch * steps + i, config.epochs * steps)
        loss, correct = train_step(
            step, model, backbone, bf16, optimizer, batch, clip=1.0 if data.text else None
        )
        real = (
            len(batch[0]) if data.text else min(config.batch, count - seen)
        )  # of a batch that was filled up
        loss_sum += loss.detach() * real
        correct_sum += correct
        seen += real
        bar.update(real)
        if (i + 1) % 50 == 0 or i + 1 == steps:
            bar.set_postfix(
                loss=f"{loss_sum.item() / (correct_sum.item() if data.text else seen):.3f}",
                refresh=False,
            )
            if not loss_sum.isfinite():
                return {"epoch": epoch + 1, "status": "diverged"}
    if not data.text:
        return {
            "epoch": epoch + 1,
            "loss": loss_sum.item() / count,
            "train": 100 * correct_sum.item() / count,
        }
    val = evaluate(config, model, backbone, data, "val")
    row = {
        "epoch": epoch + 1,
        "loss": loss_sum.item() / correct_sum.item(),
    }  # of one token, in nats, as `val`
    lost, kept = (
        {"status": "diverged"},
        {"val loss": val, "val perplexity": math.exp(min(val, 700))},
    )
    return row | (lost if math.isnan(val) else kept)


def training_split(config: Config, data: Dataset | Text) -> str:
    return data.final if config.final else "train"


@dataclass
class Result:
    """What a run leaves. metrics: its last epoch's row of metrics, and at the end val's or test's with it."""

    status: Literal["running", "done", "diverged"]
    metrics: dict
    history: list[dict]  # one row of metrics per epoch
    model: TunedModel
    out: Path

    @property
    def prefix(self) -> Prefix | None:
        return self.model.prefix

    @property
    def head(self) -> nn.Linear | None:
        return self.model.head


def train(
    config: Config, backbone: ViT | GPT, data: Dataset | Text, stop: int | None = None
) -> Result:
    """Train by the protocol, or go on where an earlier call was cut off. The backbone stays as it was.

    stop: return "running" after that many epochs; a later call goes on. A loss that is not finite ends the run as
    "diverged". UsageError if the folder holds a run with other settings, or files that cannot be read.
    """
    config = resolve(config)
    check(config, backbone, data, training_split(config, data))
    with runs.run_lock(Path(config.out)):
        return fit(config, backbone, data, stop, Path(config.out))


def check(config: Config, backbone: nn.Module, data: Dataset | Text, split: str) -> None:
    """UsageError for a run that this backbone cannot have with these data: before it starts, not when it tests."""
    if data.count(split, config.fraction) < 1:
        raise UsageError(
            f"--fraction {config.fraction:g} leaves no image of {config.task}; take a larger one"
        )
    if data.text:
        room = backbone.context - (config.length if config.tune == "prefix" else 0)
        data.must_fit(room, {split, "val", "test" if config.final else "val"})
        if data.encoding.n_vocab > backbone.vocab:
            raise UsageError(
                f"{config.backbone} knows fewer tokens than {config.task} has; take another --backbone"
            )
        if config.beams > (most := data.encoding.n_vocab // 2):
            raise UsageError(
                f"--beams is {config.beams}; with this vocabulary it can be {most} at most"
            )


def fit(
    config: Config, backbone: ViT | GPT, data: Dataset | Text, stop: int | None, out: Path
) -> Result:
    torch.manual_seed(config.seed)
    model = TunedModel(config, backbone, len(data.classes)).to(config.device)
    optimizer = make_optimizer(config, model)
    facts = {"config": asdict(config), "fingerprint": backbone.fingerprint} | data.metadata
    history = runs.resume(out, facts["config"], model, optimizer)
    if data.listing is not None:  # a split made here, to be repeated
        write(out / "split.json", json.dumps(data.listing, indent=1).encode())
    count = data.count(training_split(config, data), config.fraction)
    stop, name = min(stop or config.epochs, config.epochs), f"{data.task} {method(config)}"
    with tqdm(
        desc=name, total=config.epochs * count, initial=len(history) * count, unit=data.unit, **BAR
    ) as bar:
        while len(history) < stop and "status" not in (history or [{}])[-1]:
            history.append(run_epoch(config, model, backbone, optimizer, data, len(history), bar))
            runs.save(out, facts, model, optimizer, history)
    if len(history) == config.epochs and "status" not in history[-1]:
        history[-1] |= {"status": "done"} | final_metrics(config, model, backbone, data)
        title = (
            f"{config.task}, {method(config)}: {summary(history)}" if config.final else ""
        )  # 40 curves are too many
        runs.save(out, facts, model, optimizer, history, title)
    return Result(history[-1].get("status", "running"), history[-1], history, model, out)


def final_metrics(
    config: Config, model: TunedModel, backbone: ViT | GPT, data: Dataset | Text
) -> dict[str, float | str]:
    """What a finished run is judged by: its accuracy on test (on val, if it is not final), or its texts' scores."""
    if data.text:
        return write_texts(config, model, backbone, data) if config.final else {}
    split = "test" if config.final else "val"
    accuracy = evaluate(config, model, backbone, data, split)
    return {"status": "diverged"} if math.isnan(accuracy) else {split: accuracy}


def summary(history: list[dict]) -> str:
    last = history[-1]
    if last.get("status") == "diverged":
        return f"diverged in epoch {last['epoch']}: the loss is not finite"
    shown = [f"{split} accuracy {last[split]:.2f} %" for split in ("val", "test") if split in last]
    hidden = ("epoch", "loss", "train", "val", "test", "val loss", "status")
    return ", ".join(
        shown + [f"{name} {value:.2f}" for name, value in last.items() if name not in hidden]
    )


def run(config: Config) -> int:
    """One run from the command line; its exit code: 0 done, 3 diverged."""
    config = resolve(config)
    prepare_process()
    backbone = load_backbone(config)
    data = load(config.task, config.data_dir, **backbone.inputs)
    length = f"L {config.length}, " if config.tune == "prefix" else ""
    known, used = (
        find(config.task).settings.get(method(config)),
        (config.length, config.lr, config.wd),
    )
    source = {None: "none is published", used: "the task's own"}.get(known, "yours")
    settings = f"{length}{'' if data.text else 'base '}lr {config.lr:g}, weight decay {config.wd:g} ({source})"
    count = data.count(training_split(config, data), config.fraction)
    amount = f"batch {config.batch}, {config.epochs} epochs of {count} {data.unit}"
    print(f"{config.task}: {method(config)}, {settings}, {amount}, {config.device}")
    result = train(config, backbone, data)
    trained, whole = (
        sum(p.numel() for p in module.parameters()) for module in (result.model, backbone)
    )
    print(
        f"{summary(result.history)}; trained {trained:,} parameters beside a backbone of {whole:,}; {result.out}"
    )
    return 3 if result.status == "diverged" else 0


def parser(description: str) -> argparse.ArgumentParser:
    """The command line of one run, made from Config."""
    made = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    add_options(made, Config)
    made.add_argument(
        "--shared",
        dest="share",
        action="store_const",
        const="deep",
        help="the same as --share deep",
    )
    return made


def main(argv: list[str] | None = None) -> int:
    return exit_code(
        lambda: run(Config(**vars(parser(__doc__.split("\n")[0]).parse_args(argv)))), GOES_ON
    )


if __name__ == "__main__":
    sys.exit(main())
