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

from matplotlib.axes import Axes
from matplotlib.colors import TABLEAU_COLORS
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
COLOURS = dict(zip(NAMES, ("gray", *TABLEAU_COLORS), strict=False))

# Test top-1 in % of the paper, read off the bars of its figure (+-0.1); ViT-B/16, ImageNet-21k.
METHODS = ("none-shallow", "simple-shallow", "deep-shallow", "none", "simple", "deep")
PUBLISHED = {
    "cub": (85.1, 86.6, 87.2, 85.9, 88.7, 87.8),
    "nabirds": (77.8, 79.3, 81.5, 79.0, 84.3, 84.5),
    "flowers": (97.9, 98.4, 98.6, 97.9, 98.8, 98.2),
    "dogs": (86.4, 90.8, 91.1, 86.3, 90.6, 91.6),
    "cars": (54.7, 55.4, 63.5, 62.4, 82.9, 79.3),
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
    def share(self) -> str:
        """The method without its placement."""
        return self.method.removesuffix("-shallow")

    @property
    def name(self) -> str:
        return called(self.method) + (f", L {self.length}" if self.length else "")

    @property
    def accuracies(self) -> list[float]:
        """Test top-1 in % of every seed that did not diverge."""
        return [line["test"] for line in self.tested if "test" in line]

    @property
    def chosen(self) -> dict | None:
        """The chosen run of the grid; without a grid, the first final run."""
        without_grid = [] if self.tried else self.tested
        return next(iter(self.ranked or without_grid), None)

    @property
    def published(self) -> float | None:
        if self.fraction < 1 or self.task not in PUBLISHED or self.method not in METHODS:
            return None
        return PUBLISHED[self.task][METHODS.index(self.method)]


def deviation(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def standard_error(values: list[float]) -> float:
    return deviation(values) / math.sqrt(len(values))


def unique(values: Iterable) -> list:
    return list(dict.fromkeys(values))


# The table, and what stands around it.


def markdown(head: Iterable[str], rows: Iterable[Iterable]) -> str:
    """A Markdown table."""
    lines = [list(head), *(["-" if cell is None else str(cell) for cell in row] for row in rows)]
    made = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([made[0], "|---" * len(lines[0]) + "|", *made[1:]])


def table(rows: list[Row]) -> str:
    """The results as a Markdown table, a line per row."""
    head = ["task", "images", "method", "L", "tuned %", "base lr", "weight decay", "val %"]
    head += ["test %", "s.e.", "seeds", "paper"]
    compared = any(verdict(row) for row in rows)
    head += ["difference", "agrees"] if compared else []
    made = []
    for row in rows:
        # The chosen run: what it trains, its settings and its val accuracy.
        cells = [row.task, row.images, called(row.method), row.length]
        if row.chosen:
            cells.append(f"{100 * row.chosen.get('trained', 0) / row.chosen['backbone']:.2f}")
            cells += [f"{row.chosen['settings'][name]:g}" for name in ("lr", "wd")]
            cells.append(f"{row.chosen['val']:.2f}" if "val" in row.chosen else None)
        else:
            cells += [None] * 4

        # The final runs: mean, standard deviation and standard error.
        found, error = row.accuracies, None
        test = f"{mean(found):.2f}" if found else None
        if len(found) > 1:
            few = " (two seeds)" if len(found) == 2 else ""
            test = f"{test} ± {stdev(found):.2f}{few}"
            error = f"{standard_error(found):.2f}"
        elif not row.chosen:
            test = "all diverged"
        cells += [test, error, len(found), row.published]
        if compared:
            says = verdict(row)
            agrees = "yes" if says.get("agrees") else "no"
            cells += [f"{says['difference']:+.2f}", agrees] if says else [None, None]
        made.append(cells)
    return markdown(head, made)


def does_sharing_help(rows: list[Row]) -> list[str]:
    """Shared minus No-share where all else is equal, paired by seed: a sentence per pair.

    If it was run, also a map from one vector minus the same map from two.
    """
    sentences = []
    for row, base in product(rows, rows):
        # Of the same placement, and of the same length if both have several.
        pairs = [row.share + "-separate"] + ["none"] * (row.share not in ("none", "probe", "full"))
        several = len({r.length for r in rows if r.method == base.method}) > 1
        same = (base.task, base.fraction) == (row.task, row.fraction)
        same &= base.method in [row.method.replace(row.share, share) for share in pairs]
        if not same or (several and row.length != base.length):
            continue
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
            if line["status"] == status:
                s = line["settings"]
                run = "final run" if s["final"] else "grid"
                listed.append(
                    f"- {row.task}, {row.images} images, {row.name}: base lr {s['lr']:g}, weight "
                    f"decay {s['wd']:g}, seed {s['seed']}, {run}, in epoch {line['epochs']}"
                )
    return unique(listed)


def effort(rows: list[Row]) -> str:
    """Which search was used, and its epochs of those that the full grid would have taken."""
    if not any(row.tried for row in rows):
        return "none, the paper's published settings"
    spent, full = 0, 0
    for row in rows:
        epochs: dict[tuple, int] = {}
        for line in row.tried:
            run = (line["settings"]["lr"], line["settings"]["wd"])
            epochs[run] = max(epochs.get(run, 0), line["epochs"])
        spent += sum(epochs.values())
        full += sum(line["settings"]["epochs"] for line in row.tried[: len(epochs)])
    if any(line["stop"] for row in rows for line in row.tried):
        saved = 100 - 100 * spent / full
        return f"successive halving, {spent} of the full grid's {full} epochs ({saved:.0f} % saved)"
    return f"the full grid, {sum(len(row.tried) for row in rows)} runs, {spent} epochs"


def text(rows: list[Row]) -> str:
    """report.md."""
    used = [
        f"{key} "
        + ", ".join(unique(str((row.tried + row.tested)[0]["settings"][key]) for row in rows))
        for key in ("backbone", "optimizer", "batch", "epochs")
    ]
    parts = [
        "# Sweep",
        f"Of a run: {'; '.join(used)}. Search: {effort(rows)}; choice on val after the last "
        "epoch, ties to the smaller learning rate. Test: mean ± standard deviation over seeds of "
        "the last epoch's top-1; s.e.: standard error of that mean. Tuned: trained parameters, "
        "head included, in % of the backbone's. Paper: its figure, where it has one.",
        table(rows),
    ]
    if gains := does_sharing_help(rows):
        parts += ["Does sharing help? Difference in test accuracy, paired by seed:"]
        parts += ["\n".join(gains)]
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


def labels(rows: list[Row]) -> list[str]:
    """What a row is called in a figure: with L only if a method was swept over several."""
    swept = len({(row.task, row.method, row.fraction) for row in rows}) < len(rows)
    return [row.name if swept else called(row.method) for row in rows]


def seeds(rows: list[Row]) -> str:
    """How many seeds the means of a figure have."""
    counts = sorted({len(row.accuracies) for row in rows})
    span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"mean and standard deviation over {span} seed{'s' * (counts[-1] > 1)}"


def bars(axes: Axes, rows: list[Row], tasks: list[str]) -> None:
    """A group of bars per task, a bar per method; a black line is the paper's figure."""
    names = labels(rows)
    series = unique(names)
    width = 0.8 / len(series)
    for i, name in enumerate(series):
        mine = [row for row, label in zip(rows, names, strict=True) if label == name]
        x = [tasks.index(row.task) + (i - (len(series) - 1) / 2) * width for row in mine]
        means = [mean(row.accuracies) for row in mine]
        drawn = axes.bar(
            x,
            means,
            width * 0.92,
            yerr=[deviation(row.accuracies) for row in mine],
            capsize=3,
            label=name,
            color=COLOURS[mine[0].share],
            alpha=1 - 0.5 * i / len(series),
        )
        axes.bar_label(drawn, [f"{m:.1f}" for m in means], padding=2, fontsize=8)
        for at, row in zip(x, mine, strict=True):
            if row.published:
                axes.hlines(row.published, at - width / 2, at + width / 2, color="black")
    if any(row.published for row in rows):
        axes.plot([], [], color="black", label="the paper")
    axes.set_xticks(range(len(tasks)), tasks, rotation=30 * (len(tasks) > 8), parse_math=False)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4, frameon=False)


def bar_figure(rows: list[Row]) -> Figure:
    """As in the paper: a group per task, a panel for the first layer and one for all layers."""
    # Of several fractions of the training images, the largest.
    most = {
        task: max(r.fraction for r in rows if r.task == task) for task in (r.task for r in rows)
    }
    rows = [row for row in rows if row.fraction == most[row.task]]
    panels = {
        "first layer": [row for row in rows if row.share != row.method],
        "all layers": [row for row in rows if row.share == row.method],
    }
    panels = {where: shown for where, shown in panels.items() if shown}

    # An axis that shows differences, with room for labels above.
    values = [value for row in rows for value in row.accuracies]
    values += [row.published for row in rows if row.published]
    span = max(values) - min(values)
    low = max(0, math.floor(min(values) - 0.4 * span - 1))
    high = min(105, math.ceil(max(values) + 0.15 * span + 1))

    width = max(5.5, 1 + 0.45 * len(rows) / len(panels))
    figure = Figure(figsize=(width * len(panels), 4), layout="constrained")
    every = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (where, shown) in zip(every, panels.items(), strict=True):
        bars(axes, shown, list(most))
        axes.set(title=f"{where} ({seeds(shown)})", ylim=(low, high))
        axes.set_ylabel("test accuracy, %" + (f" (axis starts at {low})" if low else ""))
    return figure


def fraction_figure(rows: list[Row]) -> Figure:
    """Accuracy against the number of training images, a panel per task: sample efficiency."""
    tasks, names = unique(row.task for row in rows), labels(rows)
    figure = Figure(figsize=(5 * len(tasks), 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        here = [(row, name) for row, name in zip(rows, names, strict=True) if row.task == task]
        for label in unique(name for _, name in here):
            mine = [row for row, name in here if name == label]
            axes.errorbar(
                [row.images for row in mine],
                [mean(row.accuracies) for row in mine],
                [deviation(row.accuracies) for row in mine],
                marker="o",
                capsize=3,
                label=label,
                color=COLOURS[mine[0].share],
                linestyle="-" if mine[0].share == mine[0].method else "--",
            )
        shown = sorted({row.images for row, _ in here})
        axes.set(xscale="log", xlabel="training images", ylabel="test accuracy, %")
        axes.set_title(f"{task} ({seeds([row for row, _ in here])})", parse_math=False, fontsize=10)
        axes.set_xticks(shown, [str(n) for n in shown])
        axes.set_xticks([], minor=True)
        axes.legend(fontsize=8, loc="lower right")
    return figure


def grid_figure(rows: list[Row]) -> Figure:
    """Val accuracy over learning rate and weight decay, a panel per grid. The choice is framed."""
    columns = min(3, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(6.5 * columns, 2.8 * lines), layout="constrained")
    every = figure.subplots(lines, columns, squeeze=False).flat
    for axes in every[len(rows) :]:
        axes.axis("off")
    for axes, row in zip(every, rows, strict=False):
        # With --halving, what was seen last of a pair. A run that diverged has no accuracy.
        seen = {(line["settings"]["lr"], line["settings"]["wd"]): line for line in row.tried}
        rates, decays = (sorted({pair[i] for pair in seen}) for i in (0, 1))
        values = [[seen[lr, wd].get("val", math.nan) for lr in rates] for wd in decays]
        axes.imshow(values, aspect="auto", cmap="viridis")
        for (lr, wd), line in seen.items():
            x, y = rates.index(lr), decays.index(wd)
            says = f"{line['val']:.1f}" if "val" in line else line["status"]
            box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1}
            axes.text(x, y, says, ha="center", va="center", fontsize=7, bbox=box)
            if row.ranked and line is row.ranked[0]:
                frame = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, color="red", lw=3)
                axes.add_patch(frame)
        axes.set_xticks(range(len(rates)), [f"{lr:g}" for lr in rates])
        axes.set_yticks(range(len(decays)), [f"{wd:g}" for wd in decays])
        axes.set(xlabel="base learning rate", ylabel="weight decay")
        title = f"{row.task}, {row.name}, {row.images} images: val accuracy, %"
        axes.set_title(title, fontsize=9, parse_math=False)
    return figure


def curve(history: list[dict], title: str) -> bytes:
    """A PNG of the loss over the epochs, with the training accuracy or the loss on val (text)."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.add_subplot(xlabel="epoch")
    left.set_title(title, parse_math=False)
    epochs = [row["epoch"] for row in history]
    drawn = left.plot(epochs, [row["loss"] for row in history], "tab:blue", label="training loss")
    if "val loss" in history[0]:
        losses = [row["val loss"] for row in history]
        drawn += left.plot(epochs, losses, "tab:orange", label="val loss")
        left.set_ylabel("loss of a token, nats")
    else:
        # Two axes: each has the colour of its line.
        right = left.twinx()
        accuracies = [row["train"] for row in history]
        drawn += right.plot(epochs, accuracies, "tab:orange", label="training accuracy")
        right.set(ylim=(0, 101))
        right.set_ylabel("training accuracy, %", color="tab:orange")
        right.tick_params(axis="y", colors="tab:orange")
        left.set_ylabel("training loss", color="tab:blue")
        left.tick_params(axis="y", colors="tab:blue")
    left.legend(handles=drawn, loc="center right")
    return png(figure)


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def save(folder: Path, rows: list[Row]) -> list[Path]:
    """Write the report and its figures; the paths written."""
    files: dict[str, bytes] = {"report.md": text(rows).encode()}
    tested = [row for row in rows if row.accuracies]
    searched = [row for row in rows if row.tried]
    if searched:
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
        [*start, runs, f"{images:,}", f"{flops / 1e15:.4g}", f"{hours:.3g}"]
        for *start, runs, images, flops, hours in [*rows, ["together", None, None, None, *sums]]
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
    whose = "yours" if own else "the task's default"
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
