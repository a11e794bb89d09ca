"""The experiment: a grid of settings -> choice on val -> five seeds on test -> table and figure.

    python sweep.py                            does sharing help? No-share or Deep-share, on digits
    python sweep.py --tasks fgvc --methods none-shallow simple-shallow deep-shallow none simple deep
    python sweep.py --tasks paper --dry-run    what that costs, before it is started
    python sweep.py --tasks cub --methods deep --published     the paper's settings, five seeds

The protocol (Jia et al., ECCV 2022; Le et al., ICLR 2025, section 5):
    grid    train all pairs of 10 learning rates and 4 weight decays on the train split
    choice  take the best val accuracy after the last epoch; ties: smaller rate, smaller decay
    seeds   train it with five seeds on the split the protocol names, and test each run once

All runs pass through one backbone and one decoded data set; on several GPUs or cores, in several
processes (support/workers.py). What a run found is a line of OUT/TASK/results.jsonl: a sweep that
was killed goes on, a finished one only draws its report again (support/report.py).
"""

import argparse
import copy
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch.compiler import reset as reset_compiler
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import TASKS, Dataset, find, load, title
from prefix import SHARE
from support import report, runs, workers
from support.files import GOES_ON, Parser, UsageError, add_options, exit_code, no_memory, opt, write
from train import (
    Config,
    TunedModel,
    evaluate,
    image_loss,
    load_backbone,
    make_optimizer,
    method,
    parser,
    resolve,
    train,
    train_step,
)
from vit import ViT

# A method is what a run trains: a prefix that is shared in some way, the head alone, or everything.
METHODS: dict[str, dict] = {share: {"share": share} for share in SHARE}
METHODS |= {f"{share}-shallow": {"share": share, "shallow": True} for share in SHARE}
METHODS |= {"probe": {"tune": "linear"}, "full": {"tune": "full"}}
# What --tasks takes beside names, and how the Task.group of its members begins.
GROUPS = {"fgvc": "FGVC", "vtab": "VTAB", "paper": "FGVC"}
# The protocol's grid and seeds.
LR = (50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05)
WD = (0.01, 0.001, 0.0001, 0.0)
SEEDS = (42, 44, 82, 100, 800)


@dataclass(frozen=True)
class Sweep:
    """Every option of a sweep, its default and its help."""

    # What is compared.
    tasks: list[str] = opt(("digits",), "names of `python data.py`, or fgvc, vtab, paper (= fgvc)")
    methods: list[str] = opt(("none", "deep"), f"some of {', '.join(METHODS)}")
    length: list[int] = opt((), "prefix lengths L (default: the task's for the method)")
    fraction: list[float] = opt((1.0,), "shares of the training images; several make a figure")
    # How settings are chosen.
    lr: list[float] = opt(LR, "base learning rates of the grid")
    wd: list[float] = opt(WD, "weight decays of the grid")
    seed: list[int] = opt(SEEDS, "seeds of the final runs; none: stop after the choice")
    published: bool = opt(False, "no grid: the paper's published settings, and a verdict")
    halving: bool = opt(False, "train the whole grid a little, go on with the better half, ...")
    # What it costs.
    dry_run: bool = opt(False, "print what the sweep would cost, and stop")
    img_per_s: float = opt(None, "training images/s for --dry-run (default: measured here)")
    # Who performs the runs, and where the results go.
    workers: int = opt(None, "processes (default: one per GPU, or per core for a small backbone)")
    ray: str = opt("", "spread the runs over the GPUs, or CPU cores, of the Ray cluster at RAY")
    out: str = opt("out/sweep", "folder of the results")
    # Options of train.py that every run gets.
    common: dict = field(default_factory=dict)


def expand(names: Iterable[str]) -> list[str]:
    """Tasks from names and groups, each once. UsageError for a name that is neither."""
    tasks: list[str] = []
    for name in names:
        if name in GROUPS:
            tasks += [task for task in TASKS if TASKS[task].group.startswith(GROUPS[name])]
        else:
            tasks.append(name)
    tasks = list(dict.fromkeys(tasks))

    # Texts have no accuracy, and a folder of results is called as the last part of a path.
    for task in tasks:
        if find(task).text:
            raise UsageError(f"a sweep chooses by accuracy; {task} is text, train it with train.py")
    if len({title(task) for task in tasks}) < len(tasks):
        raise UsageError(f"two of {', '.join(tasks)} would share a folder; give one another --out")
    return tasks


def cells(sweep: Sweep) -> list[Config]:
    """A row of the table each: what its runs have in common. UsageError for what cannot be."""
    for option in ("tasks", "methods", "fraction", "lr", "wd"):
        if not getattr(sweep, option):
            raise UsageError(f"--{option} needs at least one value")

    # Task by task. Only a prefix has a length; None is the task's.
    made: list[Config] = []
    for task, fraction, name in product(expand(sweep.tasks), sorted(sweep.fraction), sweep.methods):
        if name not in METHODS:
            raise UsageError(f"no method '{name}'; methods: {', '.join(METHODS)}")
        lengths: Any = sweep.length if sweep.length and "share" in METHODS[name] else [None]
        # One grid, so one batch and one optimizer, for every method.
        row: dict = {"batch": find(task).batch, "optimizer": "sgd"} | sweep.common
        row |= {"task": task, "fraction": fraction, **METHODS[name]}
        made += [Config(**row, length=length) for length in lengths]

    # Every run is resolved once, so that a mistake is found before anything starts.
    for cell in made:
        name = method(cell)
        if sweep.published and (cell.task, name) not in report.PUBLISHED:
            raise UsageError(
                f"the paper publishes no settings of {name} for {cell.task}; choose them on "
                f"val: python sweep.py --tasks {cell.task} --methods {name}"
            )
        planned(sweep, cell)
    return list(dict.fromkeys(made))


def folder(sweep: Sweep, *tasks: str) -> Path:
    """Where the results of these tasks are kept."""
    name = "-".join(dict.fromkeys(title(task) for task in tasks))
    return Path(sweep.out).absolute() / (name + ("-halving" if sweep.halving else ""))


def one_run(sweep: Sweep, cell: Config, **values: Any) -> Config:
    """The resolved Config of one run, in a folder of its own: OUT/TASK/runs/SETTINGS."""
    config = resolve(replace(cell, **values))
    return replace(config, out=str(folder(sweep, cell.task) / "runs" / Path(config.out).name))


def grid(sweep: Sweep, cell: Config) -> list[Config]:
    """The runs of a cell from which the settings are chosen."""
    pairs = product(dict.fromkeys(sweep.lr), dict.fromkeys(sweep.wd))
    return [one_run(sweep, cell, lr=lr, wd=wd, final=False) for lr, wd in pairs]


def finals(sweep: Sweep, cell: Config, lr: float | None, wd: float | None) -> list[Config]:
    """A run per seed with these settings; None: the task's."""
    return [one_run(sweep, cell, lr=lr, wd=wd, seed=seed) for seed in dict.fromkeys(sweep.seed)]


def stages(sweep: Sweep, epochs: int) -> list[tuple[int | None, int]]:
    """How the grid is run: (train up to this epoch, so many go on); None is the end.

    Halving looks after an eighth, a quarter and half of the epochs. The learning rate follows the
    whole run's schedule. With published settings there is no grid.
    """
    if sweep.published:
        return []
    size = len(set(sweep.lr)) * len(set(sweep.wd))
    # An epoch that is the first or the last of a short run is no stage.
    stops: list[int] = []
    if sweep.halving:
        stops = sorted({round(epochs * share) for share in (1 / 8, 1 / 4, 1 / 2)} - {0, epochs})
    return [(stop, math.ceil(size / 2 ** (i + 1))) for i, stop in enumerate(stops)] + [(None, 1)]


def planned(sweep: Sweep, cell: Config) -> list[tuple[list[Config], int]]:
    """What a cell will train if nothing diverges: (runs, epochs of each); last the final runs."""
    # A stage goes on where the one before it stopped.
    some = grid(sweep, cell)
    made, before, epochs = [], 0, some[0].epochs
    for stop, keep in stages(sweep, epochs):
        made.append((some, (stop or epochs) - before))
        some, before = some[:keep], stop or epochs
    return [*made, (finals(sweep, cell, sweep.lr[0], sweep.wd[0]), epochs)]


def backbone_of(config: Config) -> Config:
    """What the backbone of a run depends on, and nothing else. A random one is its seed's."""
    kept = {name: getattr(config, name) for name in ("backbone", "device", "dtype", "tune")}
    return Config(**kept, seed=config.seed if config.backbone == "scratch" else 0)


class Worker:
    """Performs runs one after another on a backbone, a data set and a compiled step that it keeps.

    threads: of the CPU; the order of a sum, and so its last bit, may depend on it.
    """

    def __init__(self, threads: int):
        torch.set_num_threads(threads)
        runs.prepare_process()
        # Each is called again only for other arguments than the last time.
        last = lru_cache(maxsize=1)
        self.backbone: Callable = last(load_backbone)
        self.data: Callable = last(load)
        self.reset = last(lambda *kind: reset_compiler())

    def needs(self, config: Config) -> tuple[ViT, Dataset]:
        """Backbone and data of a run; mostly they are there from the one before."""
        backbone = self.backbone(backbone_of(config))
        data = self.data(config.task, config.data_dir, **backbone.inputs)

        # The compiler keeps a few shapes at once; those of another kind of run are in the way.
        if config.compile:
            self.reset(backbone, replace(config, lr=0.0, wd=0.0, seed=0, final=True, out=""))
        return backbone, data

    def identity(self, config: Config) -> dict[str, str]:
        """What decides a run's outcome beside its settings, in digests; found on the CPU."""
        backbone, data = self.needs(replace(config, device="cpu", compile=False))
        return {"backbone": backbone.fingerprint} | data.identity

    def run(self, config: Config, stop: int | None = None) -> dict:
        """Perform one run, or its first `stop` epochs: the line of results.jsonl it leaves."""
        start = time.perf_counter()
        backbone, data = self.needs(config)
        line: dict = {
            "settings": workers.settings(config),
            "stop": stop,
            "identity": {"backbone": backbone.fingerprint} | data.identity,
            "images": data.count(runs.training_split(config, data), config.fraction),
            "backbone": sum(p.numel() for p in backbone.parameters()),
        }

        # A run that needs too much memory is marked, and the others go on.
        try:
            line |= self.perform(config, stop, backbone, data)
        except (MemoryError, RuntimeError) as error:
            if not no_memory(error):
                raise
            line |= {"status": "failed", "epochs": 0}

        # What it took is not the same every time; it is not kept with the results.
        device = torch.cuda.get_device_name() if config.device == "cuda" else platform.processor()
        return line | {"device": device or "CPU", "seconds": time.perf_counter() - start}

    def perform(self, config: Config, stop: int | None, backbone: ViT, data: Dataset) -> dict:
        """Train, and say how it ended and what it is judged by."""
        # If the line of this stage was lost, the run has gone on since: do the stage again.
        result = train(config, backbone, data, stop)
        if stop and result.metrics["epoch"] > stop:
            with tempfile.TemporaryDirectory() as elsewhere:
                result = train(replace(config, out=elsewhere), backbone, data, stop)

        # A run that is over was judged by `train`; one that is under way is judged on val here.
        status, split = result.status, "test" if config.final else "val"
        accuracy = result.metrics.get(split)
        if status == "running":
            accuracy = evaluate(config, result.model, backbone, data, split)
            status = "diverged" if math.isnan(accuracy) else status
        found = {"status": status, "epochs": result.metrics["epoch"]}
        found["trained"] = sum(p.numel() for p in result.model.parameters())
        return found if status == "diverged" else found | {split: accuracy}

    def run_all(self, configs: list[Config], stop: int | None) -> Iterator[dict]:
        """Perform runs one after another."""
        for config in configs:
            yield self.run(config, stop)


def best(lines: list[dict], count: int) -> list[dict]:
    """The best lines on val, best first; ties to the smaller learning rate, then weight decay."""
    judged = [line for line in lines if "val" in line]
    judged.sort(key=lambda x: (-x["val"], x["settings"]["lr"], x["settings"]["wd"]))
    return judged[:count]


def study(sweep: Sweep, cell: Config, results: workers.Results) -> report.Row:
    """Grid, choice and final runs of one cell."""
    # The grid, trained on train and judged on val. With --halving only the better half goes on.
    candidates = grid(sweep, cell)
    tried, ranked = [], []
    for stop, keep in stages(sweep, candidates[0].epochs):
        lines = results.complete(candidates, stop)
        tried += lines
        ranked = best(lines, keep)
        candidates = [candidates[lines.index(line)] for line in ranked]

    # The choice, trained with every seed and tested once each. There is none if all diverged.
    todo: list[Config] = []
    if sweep.published:
        todo = finals(sweep, cell, None, None)
    elif candidates:
        todo = finals(sweep, cell, candidates[0].lr, candidates[0].wd)
    tested = results.complete(todo, None)
    first = (tested or tried)[0]
    length = first["settings"]["length"] if cell.tune == "prefix" else None
    row = (title(cell.task), method(cell), length, cell.fraction, first["images"])
    return report.Row(*row, tried, ranked, tested)


def run(sweep: Sweep) -> None:
    """The whole sweep, and its report in OUT/TASK, or OUT/TASKS if there are several."""
    todo = cells(sweep)
    if sweep.dry_run:
        return plan(sweep, todo)

    # A folder per task, which keeps its lines, and one for the report.
    home = folder(sweep, *sweep.tasks)
    folders = {folder(sweep, cell.task) for cell in todo}
    with ExitStack() as stack:
        # No other process may work in these folders.
        for path in sorted({home} | folders):
            stack.enter_context(runs.run_lock(path))

        # Who performs the runs: a cluster, several processes of this machine, or this one.
        total = sum(len(some) for cell in todo for some, _ in planned(sweep, cell))
        first = grid(sweep, todo[0])[0]
        count, threads = workers.how_many(sweep.workers, first, total)
        here = Worker(threads)
        runner: Callable = here.run_all
        if sweep.ray:
            runner = workers.on_ray(Worker, sweep.ray, first.device, threads)
        elif count > 1:
            processes = workers.Processes(Worker, count, threads)
            stack.callback(processes.end)
            runner = processes.run

        # One cell after another; then the report.
        rows = []
        with tqdm(total=total, unit="run", **runs.BAR) as bar:
            every: dict[Path, workers.Results] = {}
            for path in folders:
                kept = path / "results.jsonl"
                every[path] = workers.Results(kept, here.identity, runner, bar)
            for cell in todo:
                bar.set_description(f"{cell.task} {method(cell)}", refresh=False)
                rows.append(study(sweep, cell, every[folder(sweep, cell.task)]))
        files = report.save(home, rows)
        if tested := [row for row in rows if row.accuracies]:
            files.append(home / "reproduction.json")
            write(files[-1], workers.reproduction(tested, folders))
    print(report.table(rows), *files, sep="\n")


# What a run costs.


def image_flops(config: Config, vit: ViT, classes: int) -> tuple[float, float]:
    """Operations of one image: (in a training step, in evaluation)."""
    # PyTorch counts them on its meta device, where tensors have shapes and no content.
    vit = copy.deepcopy(vit).to("meta", torch.float32)
    with torch.device("meta"):
        model = TunedModel(config, vit, classes)
        images = torch.empty(config.batch, 3, vit.image_size, vit.image_size)
    network = model.backbone or vit

    # Forward and backward, with a prefix of its own for every image if there is dropout.
    with FlopCounterMode(display=False) as counter:
        logits = model.head(network(images, model.prefix_kv(vit, config.batch)))  # (B, C)
        evaluation = counter.get_total_flops()
        logits.sum().backward()
    return counter.get_total_flops() / config.batch, evaluation / config.batch


def measure(config: Config, vit: ViT, classes: int, seconds: float = 3.0) -> float:
    """Training images per second of this machine, on random pixels."""
    # What a run has, and a batch of noise.
    model = TunedModel(config, vit, classes).to(config.device)
    optimizer = make_optimizer(config, model)  # of learning rate 0
    loss_of = torch.compile(image_loss, dynamic=False) if config.compile else image_loss
    with torch.device(config.device):
        pixels = torch.randint(256, (config.batch, vit.image_size, vit.image_size, 3)).byte()
        labels = torch.randint(classes, (config.batch,))
    step = partial(train_step, loss_of, model, vit, runs.use_bf16(config, vit), optimizer)

    # The first step, which compiles, does not count.
    times: list[float] = []
    while sum(times[1:]) < seconds:
        start = time.perf_counter()
        step((pixels, labels))[0].item()  # which waits for the GPU
        times.append(time.perf_counter() - start)
    return config.batch / mean(times[1:])


def plan(sweep: Sweep, todo: list[Config]) -> None:
    """Print what the sweep would cost."""
    open_backbone = cache(partial(load_backbone, pretrained=False))  # with random weights
    speeds: dict[ViT, float] = {}  # operations per second
    rows = []
    for cell in todo:
        task, config = find(cell.task), grid(sweep, cell)[0]
        if not task.sizes:
            raise UsageError(f"the size of {cell.task} is not known; leave it out of --dry-run")

        # The speed of a backbone in its first row is that in the others too.
        vit = open_backbone(backbone_of(config))
        training, evaluation = image_flops(config, vit, task.classes)
        if vit not in speeds:
            rate = sweep.img_per_s or measure(config, vit, task.classes)
            speeds[vit] = rate * training

        # What passes in training, and what it and the evaluation at the end take.
        sizes = task.sizes | {"trainval": task.sizes["train"] + task.sizes["val"]}
        folders, seen, flops = set(), 0, 0.0
        for configs, epochs in planned(sweep, cell):
            for some in configs:
                split, judged = (task.final, "test") if some.final else ("train", "val")
                images = epochs * round(some.fraction * sizes[split])
                seen += images
                flops += images * training + sizes[judged] * evaluation
                folders.add(some.out)  # later stages go on with runs of the first
        length = config.length if config.tune == "prefix" else None
        start = [cell.task, report.called(method(cell)), length, cell.fraction]
        rows.append([*start, len(folders), seen, flops, flops / speeds[vit] / 3600])

    # The table, and what its hours were computed from.
    source = "as stated" if sweep.img_per_s else "measured here"
    print(report.plan(rows, f"{rate:,.0f} training images/s in a backbone's first row ({source})"))


def parse(argv: list[str] | None) -> Sweep:
    more = "The other options of train.py, such as --epochs or --device, are every run's."
    made = Parser(__doc__, epilog=more, argument_default=argparse.SUPPRESS)
    add_options(made, Sweep)
    own, others = made.parse_known_args(argv)
    sweep = Sweep(**vars(own), common=vars(parser().parse_args(others)))

    # What no sweep can have; what no run can have, `resolve` finds.
    for name in {"task", "tune", "share", "shallow", "start", "final"} & sweep.common.keys():
        raise UsageError(f"--{name} is for train.py; a sweep takes --tasks and --methods")
    for name, value in (("img-per-s", sweep.img_per_s), ("workers", sweep.workers)):
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name} is {value}; it must be positive")
    return sweep


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse(argv)), GOES_ON)


if __name__ == "__main__":
    sys.exit(main())
