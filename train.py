"""The protocol: train one prefix (and, for images, a linear head) on one frozen backbone.

    python train.py --task digits --shared          Deep-share; leave --shared out for No-share
    python train.py --task e2e --shared             the same prefix in GPT-2: table to text

Images: SGD with momentum 0.9 on the mean cross-entropy; the learning rate is lr * batch / 256,
with a linear warm-up over the first tenth of the steps and cosine decay to 0. Text: AdamW on the
cross-entropy summed over a text's target tokens, gradients clipped to norm 1, linear decay to 0.
Only the prefix and the head are trained. Read `Config`, then `fit`, which is the whole run.
Shapes: B examples, D width, C classes; T tokens, Q targets of a text, V vocabulary.
Sources: Jia et al., ECCV 2022 (VPT); Li & Liang, ACL 2021; Le et al., ICLR 2025, section 5.
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import Dataset, Settings, Text, find, load, title
from gpt import GPT
from prefix import SHARE, Prefix
from support import report, runs
from support.files import GOES_ON, Parser, add_options, exit_code, opt
from support.metrics import write_texts
from support.runs import BAR, batches, device, open_backbone, prepare_process, use_bf16
from vit import ViT

Backbone = ViT | GPT
Data = Dataset | Text


@dataclass(frozen=True)
class Config:
    """Every option of a run, in the type it has after `resolve`, which fills in None and "auto"."""

    task: str = opt("digits", "a name that `python data.py` lists, a folder of images or a .jsonl")
    tune: Literal["prefix", "linear", "full"] = opt("prefix", "a prefix, the head alone, or all")
    share: Literal[SHARE] = opt("none", "what key and value share")  # type: ignore[valid-type]
    shallow: bool = opt(False, "put the prefix in the first layer only")
    length: int = opt(None, "number of prefix vectors L (default: the task's)")
    lr: float = opt(None, "learning rate; images: times batch / 256 (default: the task's)")
    wd: float = opt(None, "weight decay, but for the head's bias (default: the task's)")
    epochs: int = opt(None, "passes over the training examples (default: the task's)")
    batch: int = opt(None, "images or texts per step (default: the task's)")
    optimizer: Literal["auto", "sgd", "adamw"] = opt("auto", "images: mostly sgd; text: adamw")
    seed: int = opt(42, "decides initialisation, order, augmentation and dropout")
    fraction: float = opt(1.0, "share of the training examples, stratified, the same for all seeds")
    final: bool = opt(True, "test once at the end; --no-final: look at val, and do not train on it")
    beams: int = opt(5, "text: how many beams write the test set; 1 is greedy")
    backbone: str = opt(
        "auto",
        "auto (the task's), tiny, scratch (tiny, random), a timm name, a .npz or .safetensors; "
        "text: tiny_gpt, scratch_gpt, gpt2, gpt2-medium, gpt2-large, a folder of such a model",
    )
    start: str = opt("", "a trained prefix to go on from: a file of VPT-deep, a folder of peft")
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "where to compute")
    dtype: Literal["auto", "fp32", "bf16"] = opt("auto", "of products and of the frozen weights")
    compile: bool = opt(None, "torch.compile the step (default: on CUDA)")
    data_dir: str = opt("data", "where data sets are kept")
    out: str = opt("", "folder of the run (default: out/TASK/SETTINGS)")


def train_step(
    loss_of: Callable,
    model: "TunedModel",
    backbone: Backbone,
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


def fit(config: Config, backbone: Backbone, data: Data, stop: int | None) -> "Result":
    """The whole run, from the optimizer to the last checkpoint. `train` has checked everything."""
    # What is trained starts from the seed: a prefix and a head, a head alone, or everything.
    torch.manual_seed(config.seed)
    model = TunedModel(config, backbone, len(data.classes)).to(config.device)
    optimizer = make_optimizer(config, model)

    # Images and texts differ in what a batch and its loss are, and in nothing else.
    loss_of = loss_function(config, data)
    bf16 = use_bf16(config, backbone)
    clip = 1.0 if data.text else None

    # The schedule counts the steps of all epochs.
    split = runs.training_split(config, data)
    count = data.count(split, config.fraction)
    epoch_steps = math.ceil(count / config.batch)
    steps = config.epochs * epoch_steps

    # What decides the outcome: settings, backbone, data, and the prompts of a --start.
    identity = {"config": asdict(config), "fingerprint": backbone.fingerprint}
    identity["data"] = data.identity
    if config.start:
        identity["start"] = runs.start_from(config.start, model.prefix.p.data)

    # A folder that already holds this run says where to go on.
    out = Path(config.out)
    metadata = identity | data.metadata
    history = runs.resume(out, identity, model, optimizer, data.listing)
    status = history[-1].get("status", "running") if history else "running"

    # The progress of the whole run, its earlier epochs included.
    name = report.called(method(config))
    total, done = config.epochs * count, len(history) * count
    bar = tqdm(desc=f"{data.task} {name}", total=total, initial=done, unit=data.unit, **BAR)
    if config.compile and status == "running":
        bar.set_postfix_str("compiling the step, once")  # shown at once: it may take a minute

    while len(history) < min(stop or config.epochs, config.epochs) and status == "running":
        # Dropout depends on seed and epoch alone: an epoch needs no state of those before it.
        epoch = len(history)
        torch.manual_seed(config.seed + 1_000_003 * (epoch + 1))
        model.train()
        loss_sum, correct_sum = torch.zeros(2, device=config.device)
        seen = 0
        order = {"seed": config.seed, "epoch": epoch, "fraction": config.fraction}
        for i, (examples, batch) in enumerate(batches(config, data, split, **order)):
            # The learning rate of this step.
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, epoch * epoch_steps + i, steps)

            # Forward (under autocast for bf16), loss, backward, update.
            loss, correct = train_step(loss_of, model, backbone, bf16, optimizer, batch, clip)

            # Add up on the device. `examples` leaves out what a batch was filled up with.
            loss_sum += loss * examples
            correct_sum += correct
            seen += examples
            bar.update(examples)

            # Losses are read every 50 steps, so a step never waits for the GPU.
            if (i + 1) % 50 == 0 or i + 1 == epoch_steps:
                mean = loss_sum.item() / (correct_sum.item() if data.text else seen)
                bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
                if not math.isfinite(mean):
                    break

        # The epoch's metrics. For texts, `correct` counts target tokens, and val is looked at too.
        row: dict[str, Any] = {"epoch": epoch + 1, "loss": mean}
        if not data.text:
            row["train"] = 100 * correct_sum.item() / count
        elif math.isfinite(mean):
            val = evaluate(config, model, backbone, data, "val")
            row |= {"val loss": val, "val perplexity": math.exp(min(val, 700))}
        # A loss that is not finite ends the run.
        if not all(math.isfinite(value) for value in row.values()):
            status = "diverged"
            row = {"epoch": epoch + 1, "status": status}

        # The checkpoint: after a kill, the same command goes on from here.
        history.append(row)
        runs.save(out, metadata, model, optimizer, history)
    bar.close()

    # After the last epoch: test once (a run of a grid: val).
    if len(history) == config.epochs and status == "running":
        status, metrics = "done", {}
        if data.text and config.final:
            metrics = write_texts(config, model, backbone, data)
        elif not data.text:
            judged = "test" if config.final else "val"
            metrics = {judged: evaluate(config, model, backbone, data, judged)}
            if math.isnan(metrics[judged]):
                status, metrics = "diverged", {}
        history[-1] |= {"status": status, **metrics}

        # Keep what a user needs: the weights, the prefix that they make, and a curve.
        prefix_kv = runs.final_prefix(config, model, backbone)  # (depth, 2, H, L, Dh)
        heading = f"{config.task}, {name}: {report.summary(history, data)}"
        curve = report.curve(history, heading) if config.final else b""
        runs.save(out, metadata, model, optimizer, history, curve, prefix_kv)
    return Result(status, history[-1], history, model, out)  # type: ignore[arg-type]


class Result(NamedTuple):
    """What a run leaves. metrics: the last row of history, which has a row per epoch."""

    status: Literal["running", "done", "diverged"]
    metrics: dict
    history: list[dict]
    model: "TunedModel"
    out: Path


def train(config: Config, backbone: Backbone, data: Data, stop: int | None = None) -> Result:
    """Train by the protocol, or go on where an earlier call was cut off. The backbone stays as is.

    stop: return "running" after so many epochs. UsageError if the folder holds something else.
    """
    # Mistakes are found before anything starts; a folder belongs to one process.
    config = resolve(config)
    runs.check_fit(config, backbone, data)
    with runs.run_lock(Path(config.out)):
        return fit(config, backbone, data, stop)


class TunedModel(nn.Module):
    """All that is trained: a prefix, a copy of the backbone, or neither; for images also a head."""

    def __init__(self, config: Config, backbone: Backbone, classes: int):
        super().__init__()
        self.prefix: Any = None  # Prefix
        self.backbone: Any = None  # ViT or GPT
        self.head: Any = None  # nn.Linear
        # Images: a map per layer. Text: one wide map for all layers, no dropout (Li & Liang).
        if config.tune == "prefix":
            sizes = (backbone.n_layer, backbone.n_head, backbone.dim, config.length, config.share)
            form: dict = {"shallow": config.shallow, "init_scale": backbone.prefix_init_scale}
            if not classes:
                form |= {"hidden": 512, "per_layer": False, "dropout": 0.0}
            self.prefix = Prefix(*sizes, **form)
        # Full fine-tuning trains a copy: other runs use this backbone too.
        elif config.tune == "full":
            self.backbone = copy.deepcopy(backbone).requires_grad_(True)
        # A GPT has its own head, the token table.
        if classes:
            self.head = nn.Linear(backbone.dim, classes)
            nn.init.kaiming_normal_(self.head.weight, mode="fan_out")
            nn.init.zeros_(self.head.bias)

    def prefix_kv(self, backbone: Backbone, batch: int | None = None) -> Tensor | None:
        """(depth, 2, [B,] H, L, Dh), or None if no prefix is trained."""
        return None if self.prefix is None else self.prefix(backbone, batch)

    def classify(self, backbone: ViT, pixels: Tensor, prefix_kv: Tensor | None) -> Tensor:
        """pixels (B, size, size, 3) uint8 -> logits (B, C) in fp32."""
        vit = self.backbone or backbone
        return self.logits(vit(vit.normalise(pixels), prefix_kv))  # (B, C)

    def logits(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, C), in fp32 even under autocast: bf16 makes ties between classes."""
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.float())


def image_loss(
    model: TunedModel, backbone: ViT, bf16: bool, *batch: Tensor, prefix_kv: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of B images, and how many the model got right. This is compiled."""
    pixels, labels = batch  # (B, size, size, 3) uint8, (B,)
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
        # In training the prefix is made anew: with dropout, one for every image.
        if prefix_kv is None:
            prefix_kv = model.prefix_kv(backbone, len(pixels))  # (depth, 2, [B,] H, L, Dh)
        vit = model.backbone or backbone
        logits = model.logits(vit(vit.normalise(pixels), prefix_kv))  # (B, C)
    return F.cross_entropy(logits, labels), (logits.argmax(-1) == labels).sum()


def text_loss(
    model: TunedModel, backbone: GPT, bf16: bool, *batch: Tensor, prefix_kv: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over a text's targets, mean over B texts; and the number of targets."""
    tokens, target_positions, labels = batch  # (B, T), 2 x (B, Q)
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
        if prefix_kv is None:
            prefix_kv = model.prefix_kv(backbone, len(tokens))  # (depth, 2, H, L, Dh)
        gpt = model.backbone or backbone
        logits = gpt(tokens, prefix_kv, target_positions).float()  # (B, Q, V)
    # Labels of -100 do not count. A text has targets; a row that only fills up has none.
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / (labels[:, 0] >= 0).sum(), (labels >= 0).sum()


def loss_function(config: Config, data: Data) -> Callable:
    """The loss for these data; compiled for one batch size (images) or for all lengths (text)."""
    loss_of = text_loss if data.text else image_loss
    return torch.compile(loss_of, dynamic=data.text) if config.compile else loss_of


def make_optimizer(config: Config, model: TunedModel) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW; weight decay on all (MLP biases too) but the head's bias."""
    # Two groups, which differ in their weight decay.
    decayed = [p for name, p in model.named_parameters() if name != "head.bias"]
    groups = [{"params": decayed, "weight_decay": config.wd}]
    if model.head is not None:
        groups.append({"params": [model.head.bias], "weight_decay": 0.0})
    # The learning rate is set before every step.
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)


def learning_rate(config: Config, step: int, steps: int) -> float:
    """The learning rate of a step, counted over all epochs; `steps` is how many there are."""
    # Text: a line down to 0.
    if find(config.task).text:
        return config.lr * (1 - step / steps)
    # Images: a line up to the peak, which grows with the batch.
    peak = config.lr * config.batch / 256
    warmup = steps * default_settings(config).warmup / 100
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    # Then half a period of a cosine down to 0.
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@torch.no_grad()
def evaluate(
    config: Config,
    model: TunedModel,
    backbone: Backbone,
    data: Data,
    split: str,
    prefix_kv: Tensor | None = None,
) -> float:
    """Images: top-1 accuracy in % on centre crops. Text: mean loss of a target token, in nats.

    NaN if a loss is. There is no dropout. prefix_kv: instead of the model's own.
    """
    # The prefix is made once, for all batches.
    loss_of = loss_function(config, data)
    bf16 = use_bf16(config, backbone)
    if prefix_kv is None:
        prefix_kv = runs.final_prefix(config, model, backbone)  # (depth, 2, H, L, Dh)

    # Add up over the batches. For texts, `correct` is the number of target tokens.
    count = data.count(split)
    loss_sum, correct_sum = torch.zeros(2, device=config.device)
    bar = tqdm(desc=split, total=count, unit=data.unit, **BAR | {"leave": False})
    for examples, batch in batches(config, data, split):
        loss, correct = loss_of(model, backbone, bf16, *batch, prefix_kv=prefix_kv)
        loss_sum += loss * examples
        correct_sum += correct
        bar.update(examples)
    bar.close()
    if not loss_sum.isfinite():
        return math.nan
    return loss_sum.item() / correct_sum.item() if data.text else 100 * correct_sum.item() / count


def default_settings(config: Config) -> Settings:
    """What the task has for a method."""
    task = find(config.task)
    # Your texts on the small GPT have what was found good for it on another task.
    if task.group == "your texts" and config.backbone == "tiny_gpt":
        task = find("restaurants")
    usual = task.settings.get(method(config), task.usual)
    # What is published is meant for the paper's backbone.
    other = config.backbone not in ("auto", task.backbone)
    return usual._replace(whose=task.usual.whose) if other else usual


def method(config: Config) -> str:
    """The name under which settings and tables know a run: none, deep-shallow, ..., probe, full."""
    if config.tune == "prefix":
        return config.share + ("-shallow" if config.shallow else "")
    return "probe" if config.tune == "linear" else "full"


def resolve(config: Config) -> Config:
    """Fill in every None and "auto" but dtype. UsageError for a value that no run can have."""
    # What the task has for this method, and what this machine has.
    task = find(config.task)
    where = device(config.device)
    usual = default_settings(config)

    # Prompts that are there already have a length.
    length = usual.length
    if config.start and config.length is None:
        length = runs.read_prompts(config.start).shape[1]
    # AdamW for texts, SGD for images, unless the task says otherwise.
    defaults: dict[str, Any] = {"length": length, "lr": usual.lr, "wd": usual.wd}
    defaults |= {"optimizer": usual.optimizer or ("adamw" if task.text else "sgd")}
    defaults |= {"epochs": task.epochs, "batch": usual.batch or task.batch}
    defaults |= {"backbone": task.backbone, "device": where, "compile": where == "cuda"}
    for name, value in defaults.items():
        if getattr(config, name) in (None, "auto"):
            config = replace(config, **{name: value})
    runs.check_settings(config, task.text)

    # The folder's name says in what the runs of a task differ.
    name = method(config) + (f"-L{config.length}" if config.tune == "prefix" else "")
    name += f"-lr{config.lr:g}-wd{config.wd:g}-epochs{config.epochs}-seed{config.seed}"
    name += f"-fraction{config.fraction:g}" if config.fraction != 1 else ""
    name += f"-from-{Path(config.start).stem}" if config.start else ""
    name += "" if config.final else "-val"
    return replace(config, out=config.out or str(Path("out", title(config.task), name)))


def load_backbone(config: Config, pretrained: bool = True) -> Backbone:
    """The frozen ViT or GPT, on its device, in the type it computes in. UsageError if none.

    pretrained: False gives random weights without a download, enough to measure its speed.
    """
    config = resolve(config)
    # The seed decides a backbone from scratch.
    torch.manual_seed(config.seed)
    backbone = open_backbone(GPT if find(config.task).text else ViT, config.backbone, pretrained)
    backbone.fingerprint = runs.fingerprint(backbone)
    # What is frozen needs no fp32 copy; what is trained does.
    backbone.to(config.device).requires_grad_(False)
    if use_bf16(config, backbone) and config.tune != "full":
        backbone.cast_frozen_weights()
    return backbone


def parser() -> argparse.ArgumentParser:
    """The command line of one run, made from Config."""
    made = Parser(__doc__, argument_default=argparse.SUPPRESS)
    add_options(made, Config)
    shared: dict = {"action": "store_const", "const": "deep", "help": "the same as --share deep"}
    made.add_argument("--shared", dest="share", **shared)
    return made


def run(argv: list[str] | None) -> int:
    """One run from the command line; its exit code: 0 done, 3 diverged."""
    # Settings: yours, and the task's for the rest.
    config = resolve(Config(**vars(parser().parse_args(argv))))
    prepare_process()
    # The backbone decides what the data look like: the size of images, the tokens of texts.
    backbone = load_backbone(config)
    data = load(config.task, config.data_dir, **backbone.inputs)
    print(report.first_line(config, data, backbone, method(config), default_settings(config)))
    # Train, or go on, or find that the run is over.
    result = train(config, backbone, data)
    print(report.last_line(result.history, config, result.model, backbone, data))
    return 3 if result.status == "diverged" else 0


def main(argv: list[str] | None = None) -> int:
    return exit_code(partial(run, argv), GOES_ON)


if __name__ == "__main__":
    sys.exit(main())
