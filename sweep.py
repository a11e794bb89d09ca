"""The experiment: a grid of settings -> choice on val -> five seeds on test -> a table and a figure.

    python sweep.py                                  does sharing help? No-share against Deep-share on the digits
    python sweep.py --tasks fgvc --methods none-shallow simple-shallow deep-shallow none simple deep
    python sweep.py --tasks paper --dry-run          what that costs, before it is started

The protocol (Jia et al., ECCV 2022; Le et al., ICLR 2025, section 5): train all pairs of 10 learning rates and 4 weight
decays on the train split; take the one with the best val accuracy after its last epoch (ties: the smaller learning
rate, then the smaller weight decay); train it with five seeds on the split the protocol names, and test each once.

All runs pass through one process on one backbone and one decoded data set, or with `--ray` through several
(support/worker.py).
What a run found is one line of OUT/TASK/results.jsonl: a sweep that was killed goes on, a finished one only redraws.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from tqdm import tqdm

from data import TASKS, find, load, title
from prefix import SHARE, Prefix
from support import report, runs
from support.files import GOES_ON, Parser, UsageError, add_options, exit_code, opt, write
from support.runs import in_turn, on_ray
from train import (
    BAR,
    Config,
    TunedModel,
    evaluate,
    image_loss,
    load_backbone,
    make_optimizer,
    method,
    prepare_process,
    resolve,
    train,
    training_split,
    use_bf16,
)
from vit import ViT

METHODS: dict[str, dict] = {share: {"share": share} for share in SHARE}
METHODS |= {f"{share}-shallow": {"share": share, "shallow": True} for share in SHARE}
METHODS |= {"probe": {"tune": "linear"}, "full": {"tune": "full"}}
GROUPS = {
    "fgvc": "FGVC",
    "vtab": "VTAB",
    "paper": "FGVC",
}  # what --tasks takes beside names -> how Task.group begins
LR = (50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05)
WD = (0.01, 0.001, 0.0001, 0.0)
SEEDS = (42, 44, 82, 100, 800)
RAY = {
    "help": "spread the runs over the GPUs, or else CPU cores, of this machine or of the cluster at ADDRESS",
    "kind": {"nargs": "?", "const": "local", "metavar": "ADDRESS"},
}


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
    halving: bool = opt(
        False, "successive halving: train the whole grid a little, go on with the better half, ..."
    )
    dry_run: bool = opt(False, "print what the sweep would cost, and stop")
    img_per_s: float = opt(
        None, "for --dry-run: training images/s of the machine (default: measured on this one)"
    )
    ray: str = field(default="", metadata=RAY)
    compare: bool = opt(
        False,
        "time the first grid as one process and as a process per run, and compare every number",
    )
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
    tasks = []
    for name in names:
        members = [
            task for task in TASKS if name in GROUPS and TASKS[task].group.startswith(GROUPS[name])
        ]
        tasks += members or [name]
    for task in tasks:
        if find(task).text:
            raise UsageError(
                f"a sweep chooses by accuracy, and {task} is text; train it with train.py"
            )
    return list(dict.fromkeys(tasks))


def check(sweep: Sweep) -> None:
    """UsageError for options that no sweep can have; what no run can have, `configure` finds."""
    for name in ("tasks", "methods", "fraction", "lr", "wd"):
        if not getattr(sweep, name):
            raise UsageError(f"--{name} needs at least one value")
    if unknown := [name for name in sweep.methods if name not in METHODS]:
        raise UsageError(f"no method '{unknown[0]}'; methods: {', '.join(METHODS)}")
    if sweep.img_per_s is not None and not 0 < sweep.img_per_s < math.inf:
        raise UsageError(f"--img-per-s is {sweep.img_per_s}; it must be positive")


def cells(sweep: Sweep) -> list[Cell]:
    """All rows of the table, task by task. UsageError for options that cannot be."""
    check(sweep)
    made: dict[Cell, None] = {}  # a dict keeps the order, and each cell once
    for task, fraction, name in product(expand(sweep.tasks), sorted(sweep.fraction), sweep.methods):
        lengths = sweep.length if "tune" not in METHODS[name] else ()
        made |= {Cell(task, name, length, fraction): None for length in lengths or (None,)}
    for cell in made:
        grid(sweep, cell)
        finals(sweep, cell, sweep.lr[0], sweep.wd[0])
    return list(made)


def folder(sweep: Sweep, *tasks: str) -> Path:
    name = "-".join(dict.fromkeys(title(task) for task in tasks))
    return Path(sweep.out).absolute() / (name + ("-halving" if sweep.halving else ""))


def configure(sweep: Sweep, cell: Cell, **values: Any) -> Config:
    """The resolved Config of one run, in a folder of its own: OUT/TASK/runs/SETTINGS."""
    handed_on = {
        f.name: getattr(sweep, f.name)
        for f in fields(Config)
        if f.name in Sweep.__dataclass_fields__
    }
    handed_on |= {
        "task": cell.task,
        "length": cell.length,
        "fraction": cell.fraction,
        "seed": Config.seed,
        "out": "",
    }
    config = resolve(Config(**handed_on | METHODS[cell.method] | values))
    return replace(config, out=str(folder(sweep, cell.task) / "runs" / Path(config.out).name))


def settings(config: Config) -> dict:
    """All that decides a run's outcome."""
    return {name: value for name, value in asdict(config).items() if name not in runs.UNSEEN}


class Worker:
    """Performs runs one after another on one backbone, one decoded data set and one compiled step, which it keeps."""

    def __init__(self, threads: int):
        torch.set_num_threads(threads)  # the order of a sum, and so its last bit, depends on it
        prepare_process()
        self.kept: dict[str, tuple] = {}

    def keep(self, what: str, key: tuple, make: Callable) -> Any:
        """What was made for `key`; for another key it is made anew, and the old one goes."""
        if self.kept.get(what, (None, None))[0] != key:
            self.kept[what] = key, make()
        return self.kept[what][1]

    def run(self, config: Config, stop: int | None = None) -> dict:
        """Perform one run, or its first `stop` epochs: the line of results.jsonl it leaves."""
        key = (config.backbone, config.device, config.dtype, config.tune == "full")
        backbone = self.keep("backbone", key, lambda: load_backbone(config))
        data = self.keep(
            "data",
            (config.task, backbone.image_size),
            lambda: load(config.task, config.data_dir, **backbone.inputs),
        )
        if config.compile:  # steps of other shapes would fill up the compiler's list of variants
            shapes = (*key, config.tune, config.share, config.shallow, config.length, config.batch)
            self.keep("compiled", shapes, torch.compiler.reset)
        result = train(config, backbone, data, stop)
        if (
            stop and result.metrics["epoch"] > stop
        ):  # the line was lost, and the run has gone on since
            with tempfile.TemporaryDirectory() as folder:
                result = train(replace(config, out=folder), backbone, data, stop)
        line = {
            "settings": settings(config),
            "stop": stop,
            "status": result.status,
            "epochs": result.metrics["epoch"],
        }
        if result.status != "diverged":
            split = "test" if config.final else "val"
            short = result.status == "running"
            value = (
                evaluate(config, result.model, backbone, data, split)
                if short
                else result.metrics[split]
            )
            line |= {"status": "diverged"} if math.isnan(value) else {split: value}
        images = data.count(training_split(config, data), config.fraction)
        sizes = [sum(p.numel() for p in module.parameters()) for module in (result.model, backbone)]
        return line | {"images": images, "trained": sizes[0], "backbone": sizes[1]}


class Results:
    """results.jsonl: a line per finished run, or per stage of a run with --halving. Only the main process writes it.

    Each line has a checksum. If it fails, the run is asked again; one that is over has kept its own result.
    """

    def __init__(self, path: Path):
        self.path, self.lines = path, {}
        for text in path.read_bytes().splitlines() if path.exists() else ():
            try:
                line = json.loads(text)
                if line.pop("crc32") != self.checksum(line):
                    raise ValueError("checksum")
                self.lines[self.key(line["settings"], line["stop"])] = line
            except (ValueError, KeyError, TypeError, AttributeError):
                tqdm.write(f"{path}: a line is damaged; its run is done again", file=sys.stderr)

    @staticmethod
    def checksum(line: dict) -> int:
        return zlib.crc32(json.dumps(line).encode())

    @staticmethod
    def key(settings: dict, stop: int | None) -> str:
        return json.dumps([settings, stop], sort_keys=True)

    def complete(
        self, configs: list[Config], stop: int | None, runner: Callable, bar: tqdm
    ) -> list[dict]:
        """The lines of these runs, in order; those that are missing are performed, and each is kept at once."""
        keys = [self.key(settings(config), stop) for config in configs]
        missing = [
            config for config, key in zip(configs, keys, strict=True) if key not in self.lines
        ]
        bar.update(len(configs) - len(missing))
        for line in runner(missing, stop):
            self.lines[self.key(line["settings"], line["stop"])] = line
            kept = [line | {"crc32": self.checksum(line)} for line in self.lines.values()]
            write(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            bar.update()
        return [self.lines[key] for key in keys]


def stages(sweep: Sweep, epochs: int) -> list[tuple[int | None, int]]:
    """How the grid is run: (train up to this epoch, so many go on); None is the end, from where the best one goes on.

    Halving looks after an eighth, a quarter and half of the epochs. The learning rate follows the whole run's schedule.
    """
    size = len(set(sweep.lr)) * len(set(sweep.wd))
    stops = (
        sorted({round(epochs * share) for share in (1 / 8, 1 / 4, 1 / 2)} - {0, epochs})
        if sweep.halving
        else []
    )
    return [(stop, -(-size // 2 ** (i + 1))) for i, stop in enumerate(stops)] + [(None, 1)]


def best(lines: list[dict], count: int) -> list[dict]:
    """The best lines on val, best first; ties to the smaller learning rate, then weight decay. Never a diverged one."""
    alive = [line for line in lines if line["status"] != "diverged"]
    return sorted(
        alive, key=lambda line: (-line["val"], line["settings"]["lr"], line["settings"]["wd"])
    )[:count]


def grid(sweep: Sweep, cell: Cell) -> list[Config]:
    pairs = product(dict.fromkeys(sweep.lr), dict.fromkeys(sweep.wd))
    return [configure(sweep, cell, lr=lr, wd=wd, final=False) for lr, wd in pairs]


def finals(sweep: Sweep, cell: Cell, lr: float, wd: float) -> list[Config]:
    return [configure(sweep, cell, lr=lr, wd=wd, seed=seed) for seed in dict.fromkeys(sweep.seed)]


def study(sweep: Sweep, cell: Cell, results: Results, runner: Callable, bar: tqdm) -> report.Row:
    """Grid, choice and final runs of one cell."""
    candidates, tried = grid(sweep, cell), []
    first = candidates[0]
    bar.set_description(f"{cell.task} {cell.method}", refresh=False)
    for stop, keep in stages(sweep, first.epochs):
        lines = results.complete(candidates, stop, runner, bar)
        tried += lines
        ranked = best(lines, keep)
        candidates = [candidates[lines.index(line)] for line in ranked]
    tested = []
    if candidates:
        (chosen,) = candidates
        tested = results.complete(finals(sweep, cell, chosen.lr, chosen.wd), None, runner, bar)
    length = None if "tune" in METHODS[cell.method] else first.length
    images = (tested or tried)[0]["images"]
    return report.Row(cell.task, cell.method, length, cell.fraction, images, tried, ranked, tested)


def run(sweep: Sweep) -> None:
    """The whole sweep, and its report in OUT/TASK, or OUT/TASKS if there are several."""
    rows, todo = [], cells(sweep)
    if sweep.compare:
        compare(sweep, todo[0])
        return
    if sweep.dry_run:
        show_plan([costs(sweep, cell) for cell in todo], sweep.img_per_s)
        return
    home = folder(sweep, *sweep.tasks)
    with ExitStack() as stack:
        for path in sorted({home} | {folder(sweep, cell.task) for cell in todo}):
            stack.enter_context(runs.run_lock(path))
        device = grid(sweep, todo[0])[0].device
        runner = (
            on_ray(Worker, sweep.ray, device, stack)
            if sweep.ray
            else partial(in_turn, Worker(torch.get_num_threads()))
        )
        total = sum(count for cell in todo for _, count, _ in costs(sweep, cell))
        with tqdm(total=total, unit="run", **BAR) as bar:
            for cell in todo:
                results = Results(folder(sweep, cell.task) / "results.jsonl")
                rows.append(study(sweep, cell, results, runner, bar))
        files = report.save(home, rows)
    print(report.table(rows), "\n".join(f"{path}" for path in files), sep="\n")


def costs(sweep: Sweep, cell: Cell) -> list[tuple[Config, int, int]]:
    """What a cell will train if nothing diverges: (a config, how many such runs, epochs of each)."""
    config, *others = grid(sweep, cell)
    made, before, count = [], 0, 1 + len(others)
    for stop, keep in stages(sweep, config.epochs):
        made.append((config, count, (stop or config.epochs) - before))
        before, count = stop or config.epochs, min(keep, count)
    return [*made, (replace(config, final=True), len(set(sweep.seed)), config.epochs)]


def block_flops(vit: ViT, n: int, length: int) -> tuple[int, int]:
    """(linear, attention) of one image in one block that computes n tokens."""
    tokens, dim = vit.pos_embed.shape[1:]
    linear = 2 * dim * (2 * n * dim + 2 * tokens * dim + 2 * n * vit.sizes["hidden"])
    return linear, 4 * dim * n * (length + tokens)


def generator_flops(config: Config, dim: int) -> float:
    """Making one layer's keys and values, per image: once per batch, or per image where Simple-share drops out on p."""
    simple = config.share == "simple"  # its map is the frozen layer's own
    maps = Prefix(n_layer=1, n_head=1, dim=dim, length=1, share=config.share).map.named_parameters()
    per_vector = (
        dim * 2 * dim if simple else sum(p.numel() for name, p in maps if name.endswith("weight"))
    )
    return 2 * config.length * per_vector / (1 if simple and not config.shallow else config.batch)


def image_flops(config: Config, vit: ViT, classes: int) -> tuple[float, float]:
    """Operations of one image: (in a training step, in evaluation)."""
    tokens, dim = vit.pos_embed.shape[1:]
    depth = 0 if config.tune != "prefix" else 1 if config.shallow else vit.n_layer
    blocks = [
        block_flops(vit, 1 if i == vit.n_layer - 1 else tokens, config.length if i < depth else 0)
        for i in range(vit.n_layer)
    ]
    patches, head = (
        2 * (tokens - 1) * vit.patch_embed.proj.weight[0].numel() * dim,
        2 * dim * classes,
    )
    forward = patches + sum(linear + attention for linear, attention in blocks) + head
    if config.tune == "full":
        return 3 * forward, forward
    if config.tune == "linear":
        return forward + head, forward
    backward = sum(linear + 2 * attention for linear, attention in blocks) + 2 * head
    backward -= (
        6 * tokens * dim**2
    )  # the first block's own queries, keys and values come before any prefix
    made = depth * generator_flops(config, dim)
    return forward + backward + made * (
        2 if config.share == "simple" else 3
    ), forward  # W_k, W_v are frozen


def images(split: str, sizes: dict[str, int]) -> int:
    return sizes["train"] + sizes["val"] if split == "trainval" else sizes[split]


def cost(runs: list[tuple[Config, int, int]], vit: ViT) -> tuple[int, int, float]:
    """Of one cell's runs (a config, how many, epochs of each): (runs, image-steps, operations, evaluation included)."""
    steps, flops, count = (
        0,
        0.0,
        runs[0][1] + runs[-1][1],
    )  # later stages go on with runs of the first
    for config, number, epochs in runs:
        task = find(config.task)
        if not task.sizes:
            raise UsageError(
                f"how many images {config.task} has is not written down; leave it out of --dry-run"
            )
        split, judged = (task.final, "test") if config.final else ("train", "val")
        seen = number * epochs * round(config.fraction * images(split, task.sizes))
        training, evaluation = image_flops(config, vit, task.classes)
        steps += seen
        flops += seen * training + number * images(judged, task.sizes) * evaluation
    return count, steps, flops


def measure(config: Config, vit: ViT, classes: int, seconds: float = 3.0) -> float:
    """Training images per second of this machine, on random pixels, after one step to warm up."""
    model = TunedModel(config, vit, classes).to(config.device)
    optimizer = make_optimizer(replace(config, lr=0.0), model)
    step = torch.compile(image_loss, dynamic=False) if config.compile else image_loss
    pixels = torch.randint(
        256,
        (config.batch, vit.image_size, vit.image_size, 3),
        dtype=torch.uint8,
        device=config.device,
    )
    labels = torch.randint(classes, (config.batch,), device=config.device)

    def run(limit: float) -> float:
        start, count = time.perf_counter(), 0
        while not count or time.perf_counter() - start < limit:
            loss, _ = step(model, vit, use_bf16(config, vit), pixels, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # wait for the GPU
            count += 1
        return count * config.batch / (time.perf_counter() - start)

    run(0)
    return run(seconds)


def show_plan(cells: list[list[tuple[Config, int, int]]], img_per_s: float | None) -> None:
    """Print the plan, a line per cell. The speed is measured in a backbone's first cell; others have as many FLOP/s."""
    vits, speeds, total = {}, {}, [0, 0, 0.0, 0.0]
    print(
        f"{'task':<16}{'method':<16}{'L':>4}{'fraction':>9}{'runs':>6}{'image-steps':>15}{'PFLOP':>12}{'hours':>9}"
    )
    for planned in cells:
        config = planned[0][0]
        key = (config.backbone, config.tune == "full")
        if key not in vits:
            vits[key] = load_backbone(config, pretrained=False)
        training, _ = image_flops(config, vits[key], find(config.task).classes)
        if img_per_s is None and key not in speeds:
            speeds[key] = training * measure(config, vits[key], find(config.task).classes)
        count, steps, flops = cost(planned, vits[key])
        hours = flops / (training * img_per_s if img_per_s else speeds[key]) / 3600
        total = [a + b for a, b in zip(total, (count, steps, flops, hours), strict=True)]
        length = config.length if config.tune == "prefix" else ""
        row = f"{config.task:<16}{method(config):<16}{length:>4}{config.fraction:>9g}{count:>6}{steps:>15,}"
        print(f"{row}{flops / 1e15:>12.4g}{hours:>9.3g}")
    print(f"{'together':<45}{total[0]:>6}{total[1]:>15,}{total[2] / 1e15:>12.4g}{total[3]:>9.3g}")
    source = (
        "as stated"
        if img_per_s
        else f"measured here in {'bf16' if use_bf16(config, vits[key]) else 'fp32'}"
    )
    rate = img_per_s or speeds[key] / training
    print(
        f"hours: on one device, at {rate:,.0f} training images/s in the last line ({source}); evaluation is included"
    )


def words(script: str, options: Any) -> list[str]:
    """The command that gives `script` these options (a dataclass)."""
    command = [sys.executable, str(Path(__file__).with_name(script))]
    for f in fields(options):
        name, value = f.name.replace("_", "-"), getattr(options, f.name)
        if isinstance(value, bool):
            command.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list | tuple):
            command += [f"--{name}", *map(str, value)]
        elif value not in (None, ""):
            command += [f"--{name}", str(value)]
    return command


def compare(sweep: Sweep, cell: Cell) -> float:
    """Time the first grid twice, as one `train.py` per run and as one `sweep.py`: the ratio of the two times.

    UsageError if a number differs.

    Both start from nothing: new processes, empty folders, an empty cache of compiled code (which separate runs share).
    """
    seconds, found = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        one = replace(
            sweep, tasks=[cell.task], methods=[cell.method], seed=[], compare=False, halving=False
        )
        for name in ("separate", "sweep"):
            mine = replace(one, out=f"{temporary}/{name}")
            configs = grid(mine, cell)
            commands = (
                [words("train.py", config) for config in configs]
                if name == "separate"
                else [words("sweep.py", mine)]
            )
            env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{temporary}/{name}-compiled"}
            start = time.perf_counter()
            for command in tqdm(commands, desc=name, unit="process"):
                ended = subprocess.run(command, env=env, capture_output=True, text=True)
                if ended.returncode not in (0, 3):  # 3: diverged
                    raise UsageError(
                        f"{' '.join(command)} failed: {ended.stderr.strip().splitlines()[-1]}"
                    )
            seconds[name] = time.perf_counter() - start
            found[name] = [(Path(config.out) / "metrics.jsonl").read_text() for config in configs]
    differ = sum(a != b for a, b in zip(*found.values(), strict=True))
    print(
        f"{cell.task} {cell.method}, {len(configs)} runs of {configs[0].epochs} epochs, compile {configs[0].compile}: "
        f"{seconds['separate']:.0f} s as separate train.py processes, {seconds['sweep']:.0f} s as one sweep.py, "
        f"{seconds['separate'] / seconds['sweep']:.2f} times as fast; {differ} runs differ in any loss or accuracy"
    )
    if differ:
        raise UsageError(
            "a run must not depend on the process it is in; please report this with the line above"
        )
    return seconds["sweep"] / seconds["separate"]


def parse(argv: list[str] | None) -> Sweep:
    made = Parser(
        description=__doc__.split("\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    add_options(made, Sweep)
    return Sweep(**vars(made.parse_args(argv)))


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse(argv)), GOES_ON)


if __name__ == "__main__":
    sys.exit(main())
