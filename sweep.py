"""The experiment: a grid of settings -> choice on val -> five seeds on test -> table and figure.

    python sweep.py                            does sharing help? No-share or Deep-share, on digits
    python sweep.py --tasks fgvc --methods none-shallow simple-shallow deep-shallow none simple deep
    python sweep.py --tasks paper --dry-run    what that costs, before it is started
    python sweep.py --tasks cub --methods deep --published     the paper's settings, five seeds

The protocol (Jia et al., ECCV 2022; Le et al., ICLR 2025, section 5):
    grid    train all pairs of 10 learning rates and 4 weight decays on the train split
    choice  take the pair with the best val accuracy after the last epoch; ties go to the smaller
            learning rate, then to the smaller weight decay
    seeds   train it with five seeds on the split the protocol names, and test each run once

A process keeps one backbone and one decoded data set, and all runs pass through it; on several
GPUs or cores, several processes do (support/workers.py). What a run found is one line of
OUT/TASK/results.jsonl: a sweep that was killed goes on, a finished one only draws its report again
(support/report.py).
"""

import argparse
import copy
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from torch.compiler import reset as reset_compiler
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import TASKS, Dataset, find, load, title
from prefix import SHARE
from support import report, runs, workers
from support.files import GOES_ON, Parser, UsageError, add_options, exit_code, opt, write
from train import (
    BAR,
    Config,
    TunedModel,
    evaluate,
    image_loss,
    load_backbone,
    make_optimizer,
    prepare_process,
    resolve,
    train,
    train_step,
    use_bf16,
)
from vit import ViT

METHODS: dict[str, dict] = {share: {"share": share} for share in SHARE}
METHODS |= {f"{share}-shallow": {"share": share, "shallow": True} for share in SHARE}
METHODS |= {"probe": {"tune": "linear"}, "full": {"tune": "full"}}
# What --tasks takes beside names, and how the Task.group of its members begins.
GROUPS = {"fgvc": "FGVC", "vtab": "VTAB", "paper": "FGVC"}
LR = (50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05)
WD = (0.01, 0.001, 0.0001, 0.0)
SEEDS = (42, 44, 82, 100, 800)
# Options of a sweep that every run gets as they are.
HANDED_ON = ("epochs", "batch", "backbone", "device", "dtype", "compile", "data_dir")


def of_a_run(name: str) -> Any:
    """An option that is handed on to every run: as `train.py` has it."""
    f = Config.__dataclass_fields__[name]
    choices = {"kind": {"choices": get_args(f.type)}} if get_origin(f.type) is Literal else {}
    return field(default=f.default, metadata={"help": f.metadata["help"]} | choices)


@dataclass(frozen=True)
class Sweep:
    """Every option of a sweep, its default and its help."""

    tasks: list[str] = opt(
        ("digits",), "names that `python data.py` lists, or the groups fgvc, vtab, paper (= fgvc)"
    )
    methods: list[str] = opt(("none", "deep"), f"some of {', '.join(METHODS)}")
    length: list[int] = opt((), "prefix lengths L (default: the task's for the method)")
    fraction: list[float] = opt(
        (1.0,), "shares of the training images; several make a figure of their own"
    )
    lr: list[float] = opt(LR, "base learning rates of the grid")
    wd: list[float] = opt(WD, "weight decays of the grid")
    seed: list[int] = opt(SEEDS, "seeds of the final runs; none: stop after the choice")
    published: bool = opt(
        False, "no grid: the settings that the paper published, and the verdict beside its figures"
    )
    halving: bool = opt(
        False, "successive halving: train the whole grid a little, go on with the better half, ..."
    )
    dry_run: bool = opt(False, "print what the sweep would cost, and stop")
    img_per_s: float = opt(
        None, "for --dry-run: training images/s of the machine (default: measured on this one)"
    )
    workers: int = opt(
        None,
        "processes that share the runs (default: one per GPU; on a CPU one per core for a small "
        "backbone, else 1)",
    )
    ray: str = opt("", "spread the runs over the GPUs, or CPU cores, of the Ray cluster at RAY")
    out: str = opt("out/sweep", "folder of the results")
    epochs: int = of_a_run("epochs")
    batch: int = of_a_run("batch")
    backbone: str = of_a_run("backbone")
    device: str = of_a_run("device")
    dtype: str = of_a_run("dtype")
    compile: bool = of_a_run("compile")
    data_dir: str = of_a_run("data_dir")


@dataclass(frozen=True)
class Cell:
    """One row of the table: a grid, a choice, and the final runs."""

    task: str
    method: str
    length: int | None  # None: the task's, or no prefix
    fraction: float


def expand(names: Iterable[str]) -> list[str]:
    """Tasks from names and groups, each once. UsageError for a name that is neither."""
    tasks: list[str] = []
    for name in names:
        if name in GROUPS:
            tasks += [task for task in TASKS if TASKS[task].group.startswith(GROUPS[name])]
        else:
            tasks.append(name)
    for task in tasks:
        if find(task).text:
            raise UsageError(
                f"a sweep chooses by accuracy, and {task} is text; train it with train.py"
            )
    return list(dict.fromkeys(tasks))


def check(sweep: Sweep) -> None:
    """UsageError for options that no sweep can have; what no run can have, `resolve` finds."""
    for name in ("tasks", "methods", "fraction", "lr", "wd"):
        if not getattr(sweep, name):
            raise UsageError(f"--{name} needs at least one value")
    if unknown := [name for name in sweep.methods if name not in METHODS]:
        raise UsageError(f"no method '{unknown[0]}'; methods: {', '.join(METHODS)}")
    if sweep.img_per_s is not None and not 0 < sweep.img_per_s < math.inf:
        raise UsageError(f"--img-per-s is {sweep.img_per_s}; it must be positive")
    if sweep.workers is not None and sweep.workers < 1:
        raise UsageError(f"--workers is {sweep.workers}; it must be positive")


def cells(sweep: Sweep) -> list[Cell]:
    """All rows of the table, task by task. UsageError for options that cannot be."""
    check(sweep)
    made: list[Cell] = []
    for task, fraction, name in product(expand(sweep.tasks), sorted(sweep.fraction), sweep.methods):
        has_prefix = "tune" not in METHODS[name]
        lengths = sweep.length if has_prefix and sweep.length else [None]
        made += [Cell(task, name, length, fraction) for length in lengths]
    # A task's folder is called as the last part of its path.
    titles: dict[str, str] = {}
    for cell in made:
        if titles.setdefault(title(cell.task), cell.task) != cell.task:
            raise UsageError(
                f"{titles[title(cell.task)]} and {cell.task} would share a folder of results; "
                "sweep one of them with another --out"
            )
    # Every run is resolved once, so that a mistake is found before anything starts.
    for cell in made:
        known = cell.task in report.PUBLISHED and cell.method in report.METHODS
        if sweep.published and not known:
            raise UsageError(
                f"the paper publishes no settings of {cell.method} for {cell.task}; choose them on "
                f"val: python sweep.py --tasks {cell.task} --methods {cell.method}"
            )
        grid(sweep, cell)
        finals(sweep, cell, sweep.lr[0], sweep.wd[0])
    return list(dict.fromkeys(made))


def folder(sweep: Sweep, *tasks: str) -> Path:
    name = "-".join(dict.fromkeys(title(task) for task in tasks))
    return Path(sweep.out).absolute() / (name + ("-halving" if sweep.halving else ""))


def configure(sweep: Sweep, cell: Cell, **values: Any) -> Config:
    """The resolved Config of one run, in a folder of its own: OUT/TASK/runs/SETTINGS."""
    values |= {name: getattr(sweep, name) for name in HANDED_ON} | METHODS[cell.method]
    values |= {"task": cell.task, "length": cell.length, "fraction": cell.fraction}
    # One grid, so one batch and one optimizer, for every method.
    values |= {"batch": sweep.batch or find(cell.task).batch, "optimizer": "sgd"}
    config = resolve(Config(**values))
    return replace(config, out=str(folder(sweep, cell.task) / "runs" / Path(config.out).name))


def grid(sweep: Sweep, cell: Cell) -> list[Config]:
    pairs = product(dict.fromkeys(sweep.lr), dict.fromkeys(sweep.wd))
    return [configure(sweep, cell, lr=lr, wd=wd, final=False) for lr, wd in pairs]


def finals(sweep: Sweep, cell: Cell, lr: float | None, wd: float | None) -> list[Config]:
    return [configure(sweep, cell, lr=lr, wd=wd, seed=seed) for seed in dict.fromkeys(sweep.seed)]


class Worker:
    """Performs runs one after another on a backbone, a data set and a compiled step that it keeps.

    threads: of the CPU; the order of a sum, and so its last bit, may depend on it.
    """

    def __init__(self, threads: int):
        torch.set_num_threads(threads)
        prepare_process()
        self.kept: dict[str, tuple] = {}

    def keep(self, what: str, key: tuple, make: Callable) -> Any:
        """What was made for `key`; for another key it is made anew, and the old one goes."""
        if self.kept.get(what, (None, None))[0] != key:
            self.kept[what] = key, make()
        return self.kept[what][1]

    def needs(self, config: Config) -> tuple[ViT, Dataset]:
        """Backbone and data of a run; mostly they are there from the one before."""
        key: tuple = (config.backbone, config.device, config.dtype, config.tune == "full")
        if config.backbone == "scratch":
            key += (config.seed,)
        backbone = self.keep("backbone", key, lambda: load_backbone(config))
        data = self.keep(
            "data",
            (config.task, config.data_dir, *backbone.inputs.values()),
            lambda: load(config.task, config.data_dir, **backbone.inputs),
        )
        # The compiler keeps a few shapes at once; those of another kind of run are in the way.
        if config.compile:
            key += (config.tune, config.share, config.shallow, config.length, config.batch)
            key += (len(data.classes),)
            self.keep("compiled", key, reset_compiler)
        return backbone, data

    def identity(self, config: Config) -> dict[str, str]:
        """What decides a run's outcome beside its settings, in digests."""
        backbone, data = self.needs(config)
        return {"backbone": backbone.fingerprint} | data.identity

    def run(self, config: Config, stop: int | None = None) -> dict:
        """Perform one run, or its first `stop` epochs: the line of results.jsonl it leaves."""
        start = time.perf_counter()
        backbone, data = self.needs(config)
        line = {
            "settings": workers.settings(config),
            "stop": stop,
            "identity": self.identity(config),
            "images": data.count(runs.training_split(config, data), config.fraction),
            "backbone": sum(p.numel() for p in backbone.parameters()),
        }
        try:
            line |= self.perform(config, stop, backbone, data)
        except (MemoryError, RuntimeError) as error:
            # PyTorch has an error class of its own for a GPU's memory, but none for a CPU's.
            no_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
            if not no_memory and "DefaultCPUAllocator" not in str(error):
                raise
            line |= {"status": "failed", "epochs": 0}
        on_gpu = config.device == "cuda"
        device = torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU"
        return line | {"device": device, "seconds": time.perf_counter() - start}

    def perform(self, config: Config, stop: int | None, backbone: ViT, data: Dataset) -> dict:
        """Train, and say how it ended and what it is judged by."""
        # If the line of this stage was lost, the run has gone on since: do the stage again.
        result = train(config, backbone, data, stop)
        if stop and result.metrics["epoch"] > stop:
            with tempfile.TemporaryDirectory() as elsewhere:
                result = train(replace(config, out=elsewhere), backbone, data, stop)

        # A run that is over was judged by `train`; one that is under way is judged on val here.
        split = "test" if config.final else "val"
        found = {"status": result.status, "epochs": result.metrics["epoch"]}
        found["trained"] = sum(p.numel() for p in result.model.parameters())
        if result.status == "done":
            found[split] = result.metrics[split]
        elif result.status == "running":
            accuracy = evaluate(config, result.model, backbone, data, split)
            found |= {"status": "diverged"} if math.isnan(accuracy) else {split: accuracy}
        return found


def stages(sweep: Sweep, epochs: int) -> list[tuple[int | None, int]]:
    """How the grid is run: (train up to this epoch, so many go on); None is the end.

    Halving looks after an eighth, a quarter and half of the epochs. The learning rate follows the
    whole run's schedule.
    """
    size = len(set(sweep.lr)) * len(set(sweep.wd))
    stops: list[int] = []
    if sweep.halving:
        stops = sorted({round(epochs * share) for share in (1 / 8, 1 / 4, 1 / 2)} - {0, epochs})
    return [(stop, math.ceil(size / 2 ** (i + 1))) for i, stop in enumerate(stops)] + [(None, 1)]


def best(lines: list[dict], count: int) -> list[dict]:
    """The best lines on val, best first; ties to the smaller learning rate, then weight decay."""

    def order(line: dict) -> tuple[float, float, float]:
        return -line["val"], line["settings"]["lr"], line["settings"]["wd"]

    return sorted((line for line in lines if "val" in line), key=order)[:count]


def study(
    sweep: Sweep, cell: Cell, results: workers.Results, runner: Callable, bar: tqdm
) -> report.Row:
    """Grid, choice and final runs of one cell."""
    # The grid, trained on train and judged on val. With --halving only the better half goes on.
    candidates = grid(sweep, cell)
    length = candidates[0].length if candidates[0].tune == "prefix" else None
    tried, ranked = [], []
    for stop, keep in [] if sweep.published else stages(sweep, candidates[0].epochs):
        lines = results.complete(candidates, stop, runner, bar)
        tried += lines
        ranked = best(lines, keep)
        candidates = [candidates[lines.index(line)] for line in ranked]

    # The choice, trained with every seed and tested once each. There is none if all diverged.
    todo: list[Config] = []
    if sweep.published:
        todo = finals(sweep, cell, None, None)
    elif candidates:
        todo = finals(sweep, cell, candidates[0].lr, candidates[0].wd)
    tested = results.complete(todo, None, runner, bar)
    images = (tested or tried)[0]["images"]
    return report.Row(cell.task, cell.method, length, cell.fraction, images, tried, ranked, tested)


def run(sweep: Sweep) -> None:
    """The whole sweep, and its report in OUT/TASK, or OUT/TASKS if there are several."""
    todo = cells(sweep)
    if sweep.dry_run:
        plan(sweep, todo)
        return
    home = folder(sweep, *sweep.tasks)
    folders = {folder(sweep, cell.task) for cell in todo}
    with ExitStack() as stack:
        # No other process may work in these folders.
        for path in sorted({home} | folders):
            stack.enter_context(runs.run_lock(path))

        # Who performs the runs: this process, several of this machine, or a cluster's.
        total = sum(planned.count for cell in todo for planned in costs(sweep, cell))
        first = grid(sweep, todo[0])[0]
        count, threads = workers.how_many(sweep.workers, first, total)
        here = Worker(threads)
        runner = workers.runner(here, count, threads, sweep.ray, first.device, stack)

        def identity(config: Config) -> dict[str, str]:
            if sweep.ray or count > 1:  # the GPUs are the workers'
                config = replace(config, device="cpu", compile=False)
            return here.identity(config)

        # One cell after another; then the report.
        rows = []
        with tqdm(total=total, unit="run", **BAR) as bar:
            for cell in todo:
                bar.set_description(f"{cell.task} {cell.method}", refresh=False)
                results = workers.Results(folder(sweep, cell.task) / "results.jsonl", identity)
                rows.append(study(sweep, cell, results, runner, bar))
        files = report.save(home, rows)
        if tested := [row for row in rows if row.accuracies]:
            files.append(home / "reproduction.json")
            write(files[-1], workers.reproduction(tested, folders))
    print(report.table(rows), *files, sep="\n")


# What a run costs.


@dataclass(frozen=True)
class Runs:
    """Runs that cost the same."""

    config: Config
    count: int
    epochs: int  # of each


def costs(sweep: Sweep, cell: Cell) -> list[Runs]:
    """What a cell will train if nothing diverges: the stages of the grid, then the final runs."""
    config, *others = grid(sweep, cell)
    made, before, count = [], 0, 1 + len(others)
    for stop, keep in [] if sweep.published else stages(sweep, config.epochs):
        made.append(Runs(config, count, (stop or config.epochs) - before))
        before, count = stop or config.epochs, min(keep, count)
    return [*made, Runs(replace(config, final=True), len(set(sweep.seed)), config.epochs)]


def image_flops(config: Config, vit: ViT, classes: int) -> tuple[float, float]:
    """Operations of one image: (in a training step, in evaluation).

    PyTorch counts them in a step on its meta device, where tensors have shapes and no content.
    """
    vit = copy.deepcopy(vit).to("meta", torch.float32)
    with torch.device("meta"):
        model = TunedModel(config, vit, classes)
        images = torch.empty(config.batch, 3, vit.image_size, vit.image_size)
    network = model.backbone or vit

    # Forward and backward, with a prefix of its own for every image if there is dropout.
    with FlopCounterMode(display=False) as training:
        features = network(images, model.prefix_kv(vit, config.batch))  # (B, D)
        model.head(features).sum().backward()

    # In evaluation the prefix is made once for all batches.
    prefix_kv = model.eval().prefix_kv(vit)  # (depth, 2, H, L, Dh)
    with FlopCounterMode(display=False) as evaluation:
        model.head(network(images, prefix_kv))
    return training.get_total_flops() / config.batch, evaluation.get_total_flops() / config.batch


def cost(planned: list[Runs], vit: ViT) -> tuple[int, int, float]:
    """Of one cell: (runs, images that pass in training, operations, evaluation included)."""
    task = find(planned[0].config.task)
    if not task.sizes:
        raise UsageError(
            f"how many images {planned[0].config.task} has is not written down; "
            "leave it out of --dry-run"
        )
    sizes = task.sizes | {"trainval": task.sizes["train"] + task.sizes["val"]}
    seen, flops = 0, 0.0
    for some in planned:
        config = some.config
        split, judged = (task.final, "test") if config.final else ("train", "val")
        training, evaluation = image_flops(config, vit, task.classes)
        images = some.count * some.epochs * round(config.fraction * sizes[split])
        seen += images
        flops += images * training + some.count * sizes[judged] * evaluation
    # Later stages go on with runs of the first; the last are the final runs.
    count = planned[-1].count + (planned[0].count if len(planned) > 1 else 0)
    return count, seen, flops


def measure(config: Config, vit: ViT, classes: int, seconds: float = 3.0) -> float:
    """Training images per second of this machine, on random pixels, after one step to warm up."""
    model = TunedModel(config, vit, classes).to(config.device)
    optimizer = make_optimizer(config, model)  # its learning rate is 0
    loss_of = torch.compile(image_loss, dynamic=False) if config.compile else image_loss
    size = (config.batch, vit.image_size, vit.image_size, 3)
    pixels = torch.randint(256, size, dtype=torch.uint8, device=config.device)
    labels = torch.randint(classes, (config.batch,), device=config.device)

    def rate(limit: float) -> float:
        start, steps = time.perf_counter(), 0
        while not steps or time.perf_counter() - start < limit:
            bf16 = use_bf16(config, vit)
            loss, _ = train_step(loss_of, model, vit, bf16, optimizer, (pixels, labels))
            loss.item()  # wait for the GPU
            steps += 1
        return steps * config.batch / (time.perf_counter() - start)

    rate(0)
    return rate(seconds)


def plan(sweep: Sweep, todo: list[Cell]) -> None:
    """Print what the sweep would cost. The speed is measured once for a backbone; all have it."""
    vits: dict[tuple, ViT] = {}
    speeds: dict[tuple, float] = {}  # operations per second
    rows = []
    for cell in todo:
        planned = costs(sweep, cell)
        config, classes = planned[0].config, find(cell.task).classes
        key = (config.backbone, config.tune == "full")
        if key not in vits:
            vits[key] = load_backbone(config, pretrained=False)
        training, _ = image_flops(config, vits[key], classes)
        if sweep.img_per_s:
            speeds[key] = training * sweep.img_per_s
        elif key not in speeds:
            speeds[key] = training * measure(config, vits[key], classes)
        count, seen, flops = cost(planned, vits[key])
        length = config.length if config.tune == "prefix" else None
        start = [cell.task, report.called(cell.method), length, cell.fraction]
        rows.append([*start, count, seen, flops, flops / speeds[key] / 3600])
    kind = "bf16" if use_bf16(config, vits[key]) else "fp32"
    source = "as stated" if sweep.img_per_s else f"measured here in {kind}"
    speed = f"{speeds[key] / training:,.0f} training images/s in the last line ({source})"
    print(report.plan(rows, speed))


def parse(argv: list[str] | None) -> Sweep:
    made = Parser(
        description=(__doc__ or "").split("\n")[0],
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add_options(made, Sweep)
    return Sweep(**vars(made.parse_args(argv)))


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse(argv)), GOES_ON)


if __name__ == "__main__":
    sys.exit(main())
