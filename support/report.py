"""What a sweep found, and what one would cost, as tables and figures; and the curve of a run.

Means come with the standard deviation over seeds and the standard error of the mean, s / sqrt(n).
Two means that differ by less than two or three standard errors are not told apart.
"""

import io
import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from support import runs
from support.files import write

# What methods are called in tables and figures; the first three as in the paper.
NAMES = {
    "none": "No-share",
    "simple": "Simple-share",
    "linear": "Linear-share",
    "deep": "Deep-share",
    "probe": "linear probe",
    "full": "full fine-tuning",
    "identity": "one vector, no map",
    "simple-separate": "frozen map, two vectors",
    "linear-separate": "linear map, two vectors",
    "deep-separate": "deep map, two vectors",
}

# Test top-1 in % of the paper, read off the bars of its figure (+-0.1); ViT-B/16, ImageNet-21k.
FGVC = """
task     none-shallow  simple-shallow  deep-shallow  none  simple  deep
cub              85.1            86.6          87.2  85.9    88.7  87.8
nabirds          77.8            79.3          81.5  79.0    84.3  84.5
flowers          97.9            98.4          98.6  97.9    98.8  98.2
dogs             86.4            90.8          91.1  86.3    90.6  91.6
cars             54.7            55.4          63.5  62.4    82.9  79.3
"""
(_, *METHODS), *LINES = [line.split() for line in FGVC.strip().splitlines()]
PUBLISHED = {
    (task, method): float(value)
    for task, *values in LINES
    for method, value in zip(METHODS, values, strict=True)
}


def called(method: str) -> str:
    """What people call a method of sweep.py."""
    share = method.removesuffix("-shallow")
    return NAMES[share] + (", first layer" if share != method else "")


@dataclass
class Row:
    """One grid, its choice and its final runs, as lines of results.jsonl."""

    task: str
    method: str
    length: int | None  # None: it has no prefix
    fraction: float
    images: int  # that a final run trains on
    tried: list[dict]  # the grid; with halving, a line per stage and run
    ranked: list[dict]  # the chosen run of the grid; none if all diverged, or there is no grid
    tested: list[dict]  # one per seed

    @property
    def name(self) -> str:
        return called(self.method) + (f", L {self.length}" if self.length else "")

    @property
    def accuracies(self) -> list[float]:
        """Test top-1 in % of every seed that did not diverge."""
        return [line["test"] for line in self.tested if "test" in line]

    @property
    def published(self) -> float | None:
        """The paper's figure, if it has one. It is of all training images."""
        return PUBLISHED.get((self.task, self.method)) if self.fraction == 1 else None


def deviation(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def standard_error(values: list[float]) -> float:
    return deviation(values) / math.sqrt(len(values))


def unique(values: Iterable) -> list:
    return list(dict.fromkeys(values))


# The table, and what stands around it.


def markdown(head: Iterable[str], rows: Iterable[Iterable]) -> str:
    """A Markdown table; None is a dash."""
    first, *others = [
        "| " + " | ".join("-" if cell is None else str(cell) for cell in row) + " |"
        for row in [head, *rows]
    ]
    return "\n".join([first, "|---" * len(list(head)) + "|", *others])


def table(rows: list[Row]) -> str:
    """The results as a Markdown table, a line per row."""
    head = ["task", "images", "method", "L", "tuned %", "base lr", "weight decay", "val %"]
    head += ["test %", "s.e.", "seeds", "paper"]
    compared = any(verdict(row) for row in rows)
    head += ["difference", "agrees"] if compared else []
    made = []
    for row in rows:
        # The chosen run, or without a grid the first final run: its size and settings.
        cells: list = [row.task, row.images, called(row.method), row.length]
        chosen = next(iter(row.ranked or row.tested), None)
        if chosen:
            cells.append(f"{100 * chosen.get('trained', 0) / chosen['backbone']:.2f}")
            cells += [f"{chosen['settings'][name]:g}" for name in ("lr", "wd")]
            cells.append(f"{chosen['val']:.2f}" if "val" in chosen else None)
        else:
            cells += [None] * 4

        # The final runs: mean, standard deviation and standard error.
        found, error = row.accuracies, None
        test = f"{mean(found):.2f}" if found else None
        if len(found) > 1:
            few = " (two seeds)" if len(found) == 2 else ""
            test = f"{test} ± {stdev(found):.2f}{few}"
            error = f"{standard_error(found):.2f}"
        elif not chosen:
            failed = any(line["status"] == "failed" for line in row.tried + row.tested)
            test = "none finished" if failed else "all diverged"
        cells += [test, error, len(found), row.published]

        # The comparison with the paper.
        if says := verdict(row):
            cells += [f"{says['difference']:+.2f}", "yes" if says["agrees"] else "no"]
        elif compared:
            cells += [None, None]
        made.append(cells)
    return markdown(head, made)


def does_sharing_help(rows: list[Row]) -> list[str]:
    """Shared minus No-share where all else is equal, paired by seed: a sentence per pair.

    If it was run, also a map from one vector minus the same map from two.
    """
    sentences = []
    for row, base in product(rows, rows):
        # All else is equal: task, training images, placement and length.
        share = row.method.removesuffix("-shallow")
        bases = [row.method.replace(share, other) for other in ("none", share + "-separate")]
        same = (row.task, row.images, row.length) == (base.task, base.images, base.length)
        if base is row or base.method not in bases or not same:
            continue

        # Pairs of runs with the same seed.
        ours, theirs = (
            {line["settings"]["seed"]: line["test"] for line in r.tested if "test" in line}
            for r in (row, base)
        )
        gains = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        if gains:
            error = f" ± {standard_error(gains):.2f} (standard error)" if len(gains) > 1 else ""
            sentences.append(
                f"- {row.task}, {row.images} images: {row.name} minus {base.name}: "
                f"{mean(gains):+.2f}{error} points over {len(gains)} seeds"
            )
    return sentences


def verdict(row: Row) -> dict:
    """How a row compares with the paper's figure; {} if it has none."""
    if row.published is None or not row.accuracies:
        return {}
    difference, error = mean(row.accuracies) - row.published, standard_error(row.accuracies)
    agrees = len(row.accuracies) > 1 and abs(difference) <= min(2 * error, 0.5)
    return {"difference": difference, "standard_error": error, "agrees": agrees}


def lost(rows: list[Row], status: str) -> list[str]:
    """Runs that diverged (their loss was not finite) or failed, a line each."""
    listed = []
    for row in rows:
        for line in row.tried + row.tested:
            s = line["settings"]
            if line["status"] == status:
                listed.append(
                    f"- {row.task}, {row.images} images, {row.name}: base lr {s['lr']:g}, "
                    f"weight decay {s['wd']:g}, seed {s['seed']}, "
                    f"{'final run' if s['final'] else 'grid'}, in epoch {line['epochs']}"
                )
    return unique(listed)


def text(rows: list[Row]) -> str:
    """report.md."""
    # The settings that all runs share, and how much of the grid was trained (with --halving, less).
    lines = [line for row in rows for line in row.tried + row.tested]
    used = [
        f"{name} {', '.join(unique(str(line['settings'][name]) for line in lines))}"
        for name in ("backbone", "optimizer", "batch", "epochs")
    ]
    search = "none, the paper's published settings"
    last = {str(line["settings"]): line for row in rows for line in row.tried}.values()
    if last:
        trained = sum(line["epochs"] for line in last)
        full = sum(line["settings"]["epochs"] for line in last)
        search = f"a grid of {len(last)} runs, {trained} of its {full} epochs"
    parts = [
        "# Sweep",
        f"Of a run: {'; '.join(used)}. Search: {search}; choice on val after the last "
        "epoch, ties to the smaller learning rate. Test: mean ± standard deviation over seeds of "
        "the last epoch's top-1; s.e.: standard error of that mean. Tuned: trained parameters, "
        "head included, in % of the backbone's. Paper: its figure, where it has one.",
        table(rows),
    ]

    # What follows from the table, and what is not in it.
    if gains := does_sharing_help(rows):
        head = "Does sharing help? Difference in test accuracy, paired by seed:"
        parts += [head, "\n".join(gains)]
    for status, why in (("diverged", "Diverged"), ("failed", "Failed for want of memory")):
        if some := lost(rows, status):
            count = f"{len(some)} run{'s' * (len(some) > 1)}"
            parts += [f"{why} ({count}; never chosen, not in any mean):", "\n".join(some)]
    if any(verdict(row) for row in rows):
        parts.append(
            "A row agrees with the paper if it is within 2 s.e. and 0.5 points of its figure. Its "
            "bars were read to ±0.1; their own spread is unknown. Where the official code "
            "differs from this one: docs/differences.md."
        )
    return "\n\n".join(parts) + "\n"


# The figures.


def means_of(rows: list[Row]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every row."""
    found = [row.accuracies for row in rows]
    return [mean(values) for values in found], [deviation(values) for values in found]


def over_seeds(rows: list[Row]) -> str:
    """How many seeds the means of a panel have."""
    counts = sorted({len(row.accuracies) for row in rows})
    return f"mean and standard deviation; seeds: {' or '.join(map(str, counts))}"


def bar_figure(rows: list[Row]) -> Figure:
    """A group of bars per task, a bar per method, of the largest fraction; red is the paper's."""
    most = max(row.fraction for row in rows)
    rows = [row for row in rows if row.fraction == most]
    tasks = unique(row.task for row in rows)

    # A name has L only if a method was swept over several.
    swept = len({(row.task, row.method) for row in rows}) < len(rows)
    names = [row.name if swept else called(row.method) for row in rows]
    series = unique(names)
    width = 0.8 / len(series)
    figure = Figure(figsize=(4 + 0.4 * len(rows), 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, name in enumerate(series):
        # Where the bars stand: in the group of their task, at the place of their method.
        mine = [row for row, its_name in zip(rows, names, strict=True) if its_name == name]
        x = [tasks.index(row.task) + (i + 0.5) * width - 0.4 for row in mine]
        means, errors = means_of(mine)
        bar = {"yerr": errors, "capsize": 3, "label": name, "color": colormaps["tab20"](i)}
        axes.bar_label(axes.bar(x, means, 0.9 * width, **bar), fmt="%.1f", padding=2, fontsize=8)
        for at, row in zip(x, mine, strict=True):
            if row.published:
                axes.hlines(row.published, at - width / 2, at + width / 2, color="red")

    # The axis shows differences, so it does not start at 0.
    low = max(0, math.floor(min(min(row.accuracies) for row in rows)) - 5)
    red = "; red: the paper" if any(row.published for row in rows) else ""
    axes.set(ylim=(low, None), ylabel=f"test accuracy, % (axis from {low}{red})")
    axes.set_xticks(range(len(tasks)), tasks, parse_math=False)
    axes.set_title(over_seeds(rows), fontsize=10)
    figure.legend(fontsize=8, loc="outside right upper")
    return figure


def fraction_figure(rows: list[Row]) -> Figure:
    """Accuracy against the number of training images, a panel per task: sample efficiency."""
    tasks = unique(row.task for row in rows)
    figure = Figure(figsize=(6 * len(tasks), 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        here = [row for row in rows if row.task == task]
        for name in unique(row.name for row in here):
            mine = [row for row in here if row.name == name]
            images = [row.images for row in mine]
            axes.errorbar(images, *means_of(mine), marker="o", capsize=3, label=name)
        axes.set_title(f"{task}: {over_seeds(here)}", fontsize=10, parse_math=False)
        axes.set(xscale="log", xlabel="training images", ylabel="test accuracy, %")
        axes.set_xticks(images, images)
        axes.set_xticks([], minor=True)
        axes.legend(fontsize=8, loc="lower right")
    return figure


def grid_figure(rows: list[Row]) -> Figure:
    """Val accuracy over learning rate and weight decay, a panel per grid. The choice is framed."""
    columns = min(3, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(6.5 * columns, 2.8 * lines), layout="constrained")
    for i, row in enumerate(rows, 1):
        # With --halving, what was seen last of a pair. A run that diverged has no accuracy.
        seen = {(line["settings"]["lr"], line["settings"]["wd"]): line for line in row.tried}
        rates, decays = (sorted(set(values)) for values in zip(*seen, strict=True))
        values = [[seen[lr, wd].get("val", math.nan) for lr in rates] for wd in decays]
        axes = figure.add_subplot(lines, columns, i)
        axes.imshow(values, aspect="auto", cmap="YlGn", alpha=0.6)

        # A number in every cell, and a frame around the chosen one.
        for (lr, wd), line in seen.items():
            x, y = rates.index(lr), decays.index(wd)
            says = f"{line['val']:.1f}" if "val" in line else line["status"]
            axes.text(x, y, says, ha="center", va="center", fontsize=7)
            if line in row.ranked:
                frame = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, color="red", lw=3)
                axes.add_patch(frame)
        axes.set_xticks(range(len(rates)), rates)
        axes.set_yticks(range(len(decays)), decays)
        axes.set(xlabel="base learning rate", ylabel="weight decay")
        title = f"{row.task}, {row.name}, {row.images} images: val accuracy, %"
        axes.set_title(title, fontsize=9, parse_math=False)
    return figure


def curve(history: list[dict], title: str) -> bytes:
    """A PNG of the loss over the epochs, and of the training accuracy or the loss on val (text)."""
    panels = {"loss": "training loss", "train": "training accuracy, %"}
    if "val loss" in history[0]:
        panels = {"loss": "training loss of a token, nats", "val loss": "val loss of a token, nats"}
    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    for axes, (name, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        axes.plot([row["epoch"] for row in history], [row[name] for row in history])
        axes.set(xlabel="epoch", ylabel=label)
    return png(figure)


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def save(folder: Path, rows: list[Row]) -> list[Path]:
    """Write the report and its figures; the paths written."""
    files = {"report.md": text(rows).encode()}
    tested = [row for row in rows if row.accuracies]
    if searched := [row for row in rows if row.tried]:
        files["grid.png"] = png(grid_figure(searched))
    if tested:
        files["report.png"] = png(bar_figure(tested))
    if len({row.fraction for row in tested}) > 1:
        files["fraction.png"] = png(fraction_figure(tested))
    for name, content in files.items():
        write(folder / name, content)
    return [folder / name for name in files]


def plan(rows: list[list], speed: str) -> str:
    """What a sweep would cost, as a table with sums. speed: what the hours were computed from."""
    head = ["task", "method", "L", "fraction", "runs", "image-steps", "PFLOP", "hours"]
    sums = [sum(column) for column in zip(*(row[4:] for row in rows), strict=True)]
    made = [
        [*start, count, f"{images:,}", f"{flops / 1e15:.4g}", f"{hours:.3g}"]
        for *start, count, images, flops, hours in [*rows, ["together", None, None, None, *sums]]
    ]
    return f"{markdown(head, made)}\nhours: on one device, at {speed}; evaluation is included"


# The lines that a run prints.


def first_line(config: Any, data: Any, backbone: Any, method: str, usual: Any) -> str:
    """What a run prints before it starts: data, method, settings and whose they are, machine.

    usual: the settings that the task has for the method.
    """
    sizes = ", ".join(f"{data.count(split):,} {split}" for split in ("train", "val", "test"))
    length = f"L {config.length}, " if config.tune == "prefix" else ""
    classes, base, normalisation = "", "", ""
    if not data.text:
        classes, base = f"{len(data.classes)} classes; ", "base "
        normalisation = f"{backbone.normalisation}; "
    own = (config.length, config.lr, config.wd) != (usual.length, usual.lr, usual.wd)
    whose = "yours" if own else usual.whose
    epochs = "1 epoch" if config.epochs == 1 else f"{config.epochs} epochs"
    count = data.count(runs.training_split(config, data), config.fraction)
    dtype = "bf16" if runs.use_bf16(config, backbone) else "fp32"
    return (
        f"{config.task}: {classes}{sizes} {data.unit}; "
        f"{called(method)}, {length}{base}lr {config.lr:g}, weight decay {config.wd:g} ({whose}), "
        f"batch {config.batch}, {epochs} of {count:,} {data.unit}; "
        f"{normalisation}{config.device}, {dtype}"
    )


def summary(history: list[dict], data: Any) -> str:
    """What a run came to, and on how many images or texts."""
    last = history[-1]
    if last.get("status") == "diverged":
        return f"diverged in epoch {last['epoch']}: the loss is not finite"
    for split in ("val", "test"):
        if split in last:
            return f"{split} accuracy {last[split]:.2f} % of {data.count(split):,} {data.unit}"
    hidden = ("epoch", "loss", "val loss", "status")
    scores = [f"{name} {value:.2f}" for name, value in last.items() if name not in hidden]
    return f"{', '.join(scores)}; {len(data.splits['test']):,} test sources"


def last_line(history: list[dict], config: Any, model: Any, backbone: Any, data: Any) -> str:
    """What a run prints at its end: result, what was trained and remains, the next command."""
    said = summary(history, data)
    if history[-1].get("status") == "diverged":
        return f"{said}; try a smaller --lr; {config.out}"

    # The map that made the prefix is not needed any more.
    trained, known = (sum(p.numel() for p in module.parameters()) for module in (model, backbone))
    remain = []
    if model.prefix is not None:
        remain.append(f"{model.prefix_kv(backbone).numel():,} of prefix")
    if model.head is not None:
        remain.append(f"{sum(p.numel() for p in model.head.parameters()):,} of head")
    sizes = f" beside a frozen backbone of {known:,}; {' and '.join(remain)} remain"
    if model.backbone is not None:
        sizes = f", the backbone's {known:,} among them"

    # An input on which to try it.
    example = "assets/digit.png" if config.task == "digits" else "photo.jpg"
    if data.text:
        example = shlex.quote(data.splits["test"][0].source[:200])
    command = f"python -m extras.sample {shlex.quote(config.out)} {example}"
    return f"{said}; trained {trained:,} parameters{sizes}; {config.out}; next: {command}"
