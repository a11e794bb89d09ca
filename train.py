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

import copy
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import Dataset, Text, UsageError, find, load, normalise, write
from gpt import GPT
from prefix import Prefix
from support import checkpoint
from support.metrics import RULES, score
from support.options import Config, check, method, parser, prepare_process, resolve
from support.usage import GOES_ON, exit_code
from vit import ViT

BAR = {"mininterval": 0.2 if sys.stderr.isatty() else 30, "dynamic_ncols": True, "leave": None, "delay": 2}
WRITE = 16  # texts that are written at once


def use_bf16(config: Config, backbone: ViT | GPT) -> bool:
    """On CUDA yes; on a CPU only if it has matrix units (AMX) and the model is wide, else fp32 is faster."""
    if config.dtype != "auto":
        return config.dtype == "bf16"
    return config.device == "cuda" or (backbone.dim >= 256 and torch.cpu.get_capabilities().get("amx_bf16", False))


def load_backbone(config: Config, pretrained: bool = True) -> ViT | GPT:
    """The frozen ViT or GPT, on its device and in the type it computes in. UsageError if it cannot be had.

    pretrained: False gives random weights and needs no download; enough to measure how fast it is.
    """
    config = resolve(config)
    torch.manual_seed(config.seed)  # for a backbone from scratch
    backbone = open_backbone(GPT if find(config.task).text else ViT, config.backbone, pretrained)
    backbone.fingerprint = checkpoint.fingerprint(backbone)
    backbone.to(config.device).requires_grad_(False)
    if use_bf16(config, backbone) and config.tune != "full":
        backbone.hold_in_bf16()
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
        shipped, example = ("tiny", "ViT-B_16.npz") if kind is ViT else ("tiny_gpt", "a folder with model.safetensors")
        mend = "git checkout assets" if name == shipped else f"give one that you have: --backbone {example}"
        raise UsageError(f"the backbone '{name}' cannot be used ({reason}); {mend}") from error


class Tuned(nn.Module):
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
            self.prefix = Prefix(*sizes, shallow=config.shallow, init_scale=backbone.prompt_scale, **form)
        elif config.tune == "full":
            self.backbone = copy.deepcopy(backbone).requires_grad_(True)
        if classes:
            self.head = nn.Linear(backbone.dim, classes)
            nn.init.kaiming_normal_(self.head.weight, mode="fan_out")
            nn.init.zeros_(self.head.bias)

    def experts(self, backbone: ViT | GPT, batch: int | None = None) -> Tensor | None:
        return None if self.prefix is None else self.prefix(backbone, batch)  # (depth, 2, [B,] H, L, Dh)

    def classify(self, backbone: ViT, pixels: Tensor, experts: Tensor | None) -> Tensor:
        """pixels (B, size, size, 3) uint8 -> logits (B, C) in fp32."""
        return self.head((self.backbone or backbone)(normalise(pixels), experts)).float()

    def predict(self, backbone: GPT, tokens: Tensor, at: Tensor, experts: Tensor | None) -> Tensor:
        """tokens (B, T) -> logits (B, Q, V) in fp32 of the tokens that come after the columns `at` (B, Q)."""
        return (self.backbone or backbone)(tokens, experts, at).float()


def image_loss(
    model: Tuned, backbone: ViT, bf16: bool, pixels: Tensor, labels: Tensor, experts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of B images, and how many labels the model got right. torch.compile compiles this."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
        experts = model.experts(backbone, len(pixels)) if experts is None else experts  # (depth, 2, [B,] H, L, Dh)
        logits = model.classify(backbone, pixels, experts)  # (B, C)
    return F.cross_entropy(logits, labels), (logits.argmax(-1) == labels).sum()


def text_loss(
    model: Tuned, backbone: GPT, bf16: bool, tokens: Tensor, at: Tensor, labels: Tensor, experts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over the targets of each text, its mean over B texts; and how many targets there were."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
        experts = model.experts(backbone, len(tokens)) if experts is None else experts  # (depth, 2, H, L, Dh)
        logits = model.predict(backbone, tokens, at, experts)  # (B, Q, V)
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")  # labels of -100 do not count
    return total / len(tokens), (labels >= 0).sum()


def step_function(config: Config, data: Dataset | Text) -> Callable:
    """The loss of this kind of data; compiled for one batch size (images), or once for all lengths (text)."""
    step = text_loss if data.text else image_loss
    return torch.compile(step, dynamic=data.text) if config.compile else step


def batches(config: Config, data: Dataset | Text, split: str, **order: Any) -> Iterator[tuple[Tensor, ...]]:
    """data.batches on the device: copied from pinned memory while the GPU is still busy with the batch before.

    For a compiled step, a last batch of images that is not full is filled up: labels of -100 count nowhere.
    """
    for batch in data.batches(split, config.batch, pin=config.device == "cuda", **order):
        if config.compile and not data.text and (missing := config.batch - len(batch[0])):
            pixels, labels = batch
            batch = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, missing)), F.pad(labels, (0, missing), value=-100)
        yield tuple(tensor.to(config.device, non_blocking=True) for tensor in batch)


@torch.no_grad()
def evaluate(config: Config, model: Tuned, backbone: ViT | GPT, data: Dataset | Text, split: str) -> float:
    """Images: top-1 accuracy in % on centre crops. Text: mean loss of a target token, in nats. NaN if a loss is NaN.

    There is no dropout, and the prefix is generated once for all batches.
    """
    config = resolve(config)
    step, bf16 = step_function(config, data), use_bf16(config, backbone)
    with torch.autocast(config.device, torch.bfloat16, enabled=bf16):
        experts = model.eval().experts(backbone)  # (depth, 2, H, L, Dh)
    loss_sum, tally_sum = torch.zeros(2, device=config.device)
    for batch in tqdm(batches(config, data, split), desc=split, unit="batch", leave=False, delay=2):
        loss, tally = step(model, backbone, bf16, *batch, experts=experts)
        loss_sum += loss * len(batch[0])
        tally_sum += tally
    if not loss_sum.isfinite():
        return math.nan
    return loss_sum.item() / tally_sum.item() if data.text else 100 * tally_sum.item() / data.count(split)


@torch.inference_mode()
def write_texts(config: Config, model: Tuned, backbone: GPT, data: Text) -> dict[str, float]:
    """Write a text for every source of the test split; all of them go to generated.jsonl, their scores come back."""
    prompts, pairs = zip(*sorted(data.prompts("test"), key=lambda both: len(both[0])), strict=True)
    outputs, bf16 = [], use_bf16(config, backbone)
    with torch.autocast(config.device, torch.bfloat16, enabled=bf16), tqdm(total=len(pairs), unit="text", **BAR) as bar:
        experts = model.eval().experts(backbone)  # (depth, 2, H, L, Dh)
        for start in range(0, len(prompts), WRITE):
            some = prompts[start : start + WRITE]
            made = (model.backbone or backbone).generate(some, experts, config.beams, **data.decoding)
            outputs += [data.decode(tokens) for tokens in made]
            bar.update(len(made))
    rows = [asdict(pair) | {"output": output} for pair, output in zip(pairs, outputs, strict=True)]
    write(Path(config.out) / "generated.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
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


def make_optimizer(config: Config, model: Tuned) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW; weight decay on all that is trained, MLP biases too, but the head's bias."""
    groups = [{"params": [p for name, p in model.named_parameters() if name != "head.bias"], "weight_decay": config.wd}]
    if model.head is not None:
        groups.append({"params": [model.head.bias], "weight_decay": 0.0})
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)


def run_epoch(
    config: Config,
    model: Tuned,
    backbone: ViT | GPT,
    optimizer: torch.optim.Optimizer,
    data: Dataset | Text,
    epoch: int,
    bar: tqdm,
) -> dict:
    """One pass over the training examples -> its row of metrics. The GPU is waited for every 50 steps, not in one."""
    step, split, bf16 = step_function(config, data), training_split(config, data), use_bf16(config, backbone)
    count = data.count(split, config.fraction)
    steps = math.ceil(count / config.batch)  # of one epoch
    torch.manual_seed(config.seed + 1_000_003 * (epoch + 1))  # dropout: an epoch needs no state of those before it
    model.train()
    (loss_sum, tally_sum), seen = torch.zeros(2, device=config.device), 0
    order = {"seed": config.seed, "epoch": epoch, "fraction": config.fraction}
    for i, batch in enumerate(batches(config, data, split, **order)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, epoch * steps + i, config.epochs * steps)
        loss, tally = step(model, backbone, bf16, *batch)
        loss.backward()
        if data.text:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        real = len(batch[0]) if data.text else min(config.batch, count - seen)  # of a batch that was filled up
        loss_sum += loss.detach() * real
        tally_sum += tally
        seen += real
        bar.update(real)
        if (i + 1) % 50 == 0 or i + 1 == steps:
            bar.set_postfix(loss=f"{loss_sum.item() / (tally_sum.item() if data.text else seen):.3f}", refresh=False)
            if not loss_sum.isfinite():
                return {"epoch": epoch + 1, "status": "diverged"}
    if not data.text:
        return {"epoch": epoch + 1, "loss": loss_sum.item() / count, "train": 100 * tally_sum.item() / count}
    val = evaluate(config, model, backbone, data, "val")
    row = {"epoch": epoch + 1, "loss": loss_sum.item() / tally_sum.item()}  # of one token, in nats, as `val`
    lost, kept = {"status": "diverged"}, {"val loss": val, "val perplexity": math.exp(min(val, 700))}
    return row | (lost if math.isnan(val) else kept)


def training_split(config: Config, data: Dataset | Text) -> str:
    return data.final if config.final else "train"


@dataclass
class Result:
    """What a run leaves. metrics: its last epoch's row of metrics, and at the end val's or test's with it."""

    status: Literal["running", "done", "diverged"]
    metrics: dict
    history: list[dict]  # one row of metrics per epoch
    model: Tuned
    out: Path

    @property
    def prefix(self) -> Prefix | None:
        return self.model.prefix

    @property
    def head(self) -> nn.Linear | None:
        return self.model.head


def train(config: Config, backbone: ViT | GPT, data: Dataset | Text, stop: int | None = None) -> Result:
    """Train by the protocol, or go on where an earlier call was cut off. The backbone stays as it was.

    stop: return "running" after that many epochs; a later call goes on. A loss that is not finite ends the run as
    "diverged". UsageError if the folder holds a run with other settings, or files that cannot be read.
    """
    config = resolve(config)
    check(config, backbone, data, training_split(config, data))
    with checkpoint.alone(Path(config.out)):
        return go_on(config, backbone, data, stop, Path(config.out))


def go_on(config: Config, backbone: ViT | GPT, data: Dataset | Text, stop: int | None, out: Path) -> Result:
    torch.manual_seed(config.seed)
    model = Tuned(config, backbone, len(data.classes)).to(config.device)
    optimizer = make_optimizer(config, model)
    facts = {"config": asdict(config), "fingerprint": backbone.fingerprint} | data.facts
    history = checkpoint.resume(out, facts["config"], model, optimizer)
    if data.listing is not None:  # a split made here, to be repeated
        write(out / "split.json", json.dumps(data.listing, indent=1).encode())
    count = data.count(training_split(config, data), config.fraction)
    stop, name = min(stop or config.epochs, config.epochs), f"{data.task} {method(config)}"
    with tqdm(desc=name, total=config.epochs * count, initial=len(history) * count, unit=data.unit, **BAR) as bar:
        while len(history) < stop and "status" not in (history or [{}])[-1]:
            history.append(run_epoch(config, model, backbone, optimizer, data, len(history), bar))
            checkpoint.save(out, facts, model, optimizer, history)
    if len(history) == config.epochs and "status" not in history[-1]:
        history[-1] |= {"status": "done"} | judge(config, model, backbone, data)
        title = f"{config.task}, {method(config)}: {summary(history)}" if config.final else ""  # 40 curves are too many
        checkpoint.save(out, facts, model, optimizer, history, title)
    return Result(history[-1].get("status", "running"), history[-1], history, model, out)


def judge(config: Config, model: Tuned, backbone: ViT | GPT, data: Dataset | Text) -> dict[str, float | str]:
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
    return ", ".join(shown + [f"{name} {value:.2f}" for name, value in last.items() if name not in hidden])


def run(config: Config) -> int:
    """One run from the command line; its exit code: 0 done, 3 diverged."""
    config = resolve(config)
    prepare_process()
    backbone = load_backbone(config)
    data = load(config.task, config.data_dir, backbone.reads)
    length = f"L {config.length}, " if config.tune == "prefix" else ""
    known, used = find(config.task).settings.get(method(config)), (config.length, config.lr, config.wd)
    source = {None: "none is published", used: "the task's own"}.get(known, "yours")
    settings = f"{length}{'' if data.text else 'base '}lr {config.lr:g}, weight decay {config.wd:g} ({source})"
    count = data.count(training_split(config, data), config.fraction)
    amount = f"batch {config.batch}, {config.epochs} epochs of {count} {data.unit}"
    print(f"{config.task}: {method(config)}, {settings}, {amount}, {config.device}")
    result = train(config, backbone, data)
    trained, whole = (sum(p.numel() for p in module.parameters()) for module in (result.model, backbone))
    print(f"{summary(result.history)}; trained {trained:,} parameters beside a backbone of {whole:,}; {result.out}")
    return 3 if result.status == "diverged" else 0


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(Config(**vars(parser(__doc__.split("\n")[0]).parse_args(argv)))), GOES_ON)


if __name__ == "__main__":
    sys.exit(main())
