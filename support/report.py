"""What a sweep found, as a table and as figures. Means come with the standard deviation over seeds and the standard
error of the mean, s / sqrt(n): two means that differ by less than two or three standard errors are not told apart.
"""

import io
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure
from torch import nn

from support.files import write

SHARE = ("none", "simple", "linear", "deep")

# Test top-1 in % of the paper, read off the bars of its figure (+-0.1); ViT-B/16, ImageNet-21k.
METHODS = ("none-shallow", "simple-shallow", "deep-shallow", "none", "simple", "deep")
PUBLISHED = {
    "cub": dict(zip(METHODS, (85.1, 86.6, 87.2, 85.9, 88.7, 87.8), strict=True)),
    "nabirds": dict(zip(METHODS, (77.8, 79.3, 81.5, 79.0, 84.3, 84.5), strict=True)),
    "flowers": dict(zip(METHODS, (97.9, 98.4, 98.6, 97.9, 98.8, 98.2), strict=True)),
    "dogs": dict(zip(METHODS, (86.4, 90.8, 91.1, 86.3, 90.6, 91.6), strict=True)),
    "cars": dict(zip(METHODS, (54.7, 55.4, 63.5, 62.4, 82.9, 79.3), strict=True)),
}
USED = ("backbone", "optimizer", "batch", "epochs")  # settings that the report names
COLOURS = dict(zip((*SHARE, "probe", "full"), ("gray", *TABLEAU_COLORS), strict=False))


@dataclass
class Row:
    """One grid, its choice and its final runs, as lines of results.jsonl."""

    task: str
    method: str
    length: int | None  # None: it has no prefix
    fraction: float
    images: int  # that a final run trains on
    tried: list[dict]  # the grid; with halving, a line per stage and run
    ranked: list[dict]  # the chosen run of the grid, or nothing if all diverged
    tested: list[dict]  # one per seed

    @property
    def name(self) -> str:
        return self.method + (f", L {self.length}" if self.length else "")

    @property
    def accuracies(self) -> list[float]:
        """Test top-1 in % of every seed that did not diverge."""
        return [line["test"] for line in self.tested if line["status"] == "done"]

    @property
    def published(self) -> float | None:
        return PUBLISHED.get(self.task, {}).get(self.method) if self.fraction == 1 else None


def standard_error(values: list[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def statistics(values: list[float]) -> tuple[str, str]:
    """("mean +- standard deviation", "standard error"), with a dash for what one value cannot say."""
    if not values:
        return "-", "-"
    if len(values) == 1:
        return f"{values[0]:.2f}", "-"
    return f"{mean(values):.2f} ± {stdev(values):.2f}", f"{standard_error(values):.2f}"


def table(rows: list[Row]) -> str:
    """The results as a Markdown table, a line per row."""
    lines = [
        "| task | images | method | L | tuned % | base lr | weight decay | val % | test % | s.e. | seeds | paper |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        start = f"| {row.task} | {row.images} | {row.method} | {row.length or '-'} |"
        if not row.ranked:
            lines.append(f"{start} - | - | - | - | all diverged | - | 0 | {row.published or '-'} |")
            continue
        (line,) = row.ranked
        lr, wd = line["settings"]["lr"], line["settings"]["wd"]
        spread, error = statistics(row.accuracies)
        tuned = 100 * line["trained"] / line["backbone"]
        lines.append(
            f"{start} {tuned:.2f} | {lr:g} | {wd:g} | {line['val']:.2f} | {spread} | {error} "
            f"| {len(row.accuracies)} | {row.published or '-'} |"
        )
    return "\n".join(lines)


def counterpart(row: Row, rows: list[Row]) -> Row | None:
    """The No-share row to compare a shared one with: of the same placement and, if there are several, length."""
    share, _, placement = row.method.partition("-")
    if share not in SHARE[1:]:
        return None
    name = "none-shallow" if placement else "none"
    same = [r for r in rows if (r.task, r.method, r.fraction) == (row.task, name, row.fraction)]
    return same[0] if len(same) == 1 else next((r for r in same if r.length == row.length), None)


def does_sharing_help(rows: list[Row]) -> list[str]:
    """Shared minus No-share where all else is equal, paired by seed: a sentence per pair."""
    sentences = []
    for row in rows:
        base = counterpart(row, rows)
        theirs = (
            {line["settings"]["seed"]: line["test"] for line in base.tested if "test" in line}
            if base
            else {}
        )
        pairs = [
            (line["test"], theirs.get(line["settings"]["seed"]))
            for line in row.tested
            if "test" in line
        ]
        gains = [ours - none for ours, none in pairs if none is not None]
        if base and gains:
            error = f" ± {standard_error(gains):.2f} (standard error)" if len(gains) > 1 else ""
            names = f"{row.task}, {row.images} images: {row.name} minus {base.name}"
            sentences.append(f"- {names}: {mean(gains):+.2f}{error} points over {len(gains)} seeds")
    return sentences


def diverged(rows: list[Row]) -> list[str]:
    """Runs whose loss was not finite, a line each."""
    listed = []
    for row in rows:
        for line in row.tried + row.tested:
            if line["status"] == "diverged":
                s = line["settings"]
                listed.append(
                    f"- {row.task}, {row.images} images, {row.name}: base lr {s['lr']:g}, weight decay {s['wd']:g}, "
                    f"seed {s['seed']}, {'final run' if s['final'] else 'grid'}, in epoch {line['epochs']}"
                )
    return list(dict.fromkeys(listed))


def effort(rows: list[Row]) -> str:
    """Which search was used, and what it spent: epochs trained of those that the full grid would have taken."""
    spent, full = 0, 0
    for row in rows:
        epochs: dict[tuple, int] = {}
        for line in row.tried:
            run = (line["settings"]["lr"], line["settings"]["wd"])
            epochs[run] = max(epochs.get(run, 0), line["epochs"])
        spent += sum(epochs.values())
        full += sum(row.tried[0]["settings"]["epochs"] for _ in epochs)
    if any(line["stop"] for row in rows for line in row.tried):
        return f"successive halving, {spent} of the full grid's {full} epochs ({100 - 100 * spent / full:.0f} % saved)"
    return f"the full grid, {sum(len(row.tried) for row in rows)} runs, {spent} epochs"


def text(rows: list[Row]) -> str:
    used = {
        key: ", ".join(dict.fromkeys(str(r.tried[0]["settings"][key]) for r in rows))
        for key in USED
    }
    parts = [
        "# Sweep",
        f"Backbone {used['backbone']}, {used['optimizer']}, batch {used['batch']}, {used['epochs']} epochs a run. "
        f"Search: {effort(rows)}; choice on val after the last epoch, ties to the smaller learning rate. "
        "Test: mean ± standard deviation over seeds of the last epoch's top-1; s.e.: standard error of that mean. "
        "TunedModel: trained parameters, head included, in % of the backbone's. Paper: its figure, where it has one.",
        table(rows),
    ]
    if gains := does_sharing_help(rows):
        parts += [
            "Does sharing help? Difference in test accuracy, paired by seed:",
            "\n".join(gains),
        ]
    if lost := diverged(rows):
        parts += [f"Diverged ({len(lost)} runs; never chosen, not in any mean):", "\n".join(lost)]
    return "\n\n".join(parts) + "\n"


def limits(rows: list[Row]) -> tuple[float, float]:
    """An axis of accuracies that shows differences, with room for labels above; the axis label says where it starts."""
    values = [
        v for row in rows for v in [*row.accuracies, *([row.published] if row.published else [])]
    ]
    low, high = min(values), max(values)
    return max(0.0, math.floor(low - 0.4 * (high - low) - 1)), min(
        105.0, math.ceil(high + 0.15 * (high - low) + 1)
    )


def labels(rows: list[Row]) -> list[str]:
    """What a row is called in a figure: its method, with L only if one method was swept over several."""
    swept = len({(row.task, row.method, row.fraction) for row in rows}) < len(rows)
    return [row.name if swept else row.method for row in rows]


def bars(axes: Axes, rows: list[Row], tasks: list[str]) -> None:
    """A group of bars per task, a bar per method, with standard deviations; a black line is the paper's figure."""
    names = labels(rows)
    series = list(dict.fromkeys(names))
    width = 0.8 / len(series)
    for i, name in enumerate(series):
        mine = [row for row, label in zip(rows, names, strict=True) if label == name]
        at = [tasks.index(row.task) + (i - (len(series) - 1) / 2) * width for row in mine]
        means = [mean(row.accuracies) for row in mine]
        spread = [stdev(row.accuracies) if len(row.accuracies) > 1 else 0.0 for row in mine]
        colour, alpha = COLOURS[mine[0].method.removesuffix("-shallow")], 1 - 0.5 * i / len(series)
        drawn = axes.bar(
            at, means, width * 0.92, yerr=spread, capsize=3, label=name, color=colour, alpha=alpha
        )
        axes.bar_label(drawn, [f"{m:.1f}" for m in means], padding=2, fontsize=8)
        known = [(x, row.published) for x, row in zip(at, mine, strict=True) if row.published]
        for x, value in known:
            label = "paper" if (x, name) == (known[0][0], series[0]) else ""
            axes.hlines(value, x - width / 2, x + width / 2, color="black", label=label)
    axes.set_xticks(
        range(len(tasks)), tasks, rotation=30 if len(tasks) > 8 else 0, parse_math=False
    )
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4, frameon=False)


def bar_figure(rows: list[Row]) -> Figure:
    """As in the paper: a group per task, one panel for prefixes in the first layer, one for all layers."""
    most = {
        task: max(row.fraction for row in rows if row.task == task)
        for task in dict.fromkeys(r.task for r in rows)
    }
    rows = [row for row in rows if row.fraction == most[row.task]]
    panels = {"first layer": [row for row in rows if row.method.endswith("-shallow")]}
    panels["all layers"] = [row for row in rows if not row.method.endswith("-shallow")]
    panels = {title: shown for title, shown in panels.items() if shown}
    width = max(5.5, 1 + 0.45 * len(rows) / len(panels))
    figure = Figure(figsize=(width * len(panels), 4), layout="constrained")
    low, high = limits(rows)
    for axes, (title, shown) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        bars(axes, shown, list(most))
        axes.set(title=f"{title} (mean, standard deviation over seeds)", ylim=(low, high))
        axes.set_ylabel("test accuracy, %" + (f" (axis starts at {low:g})" if low else ""))
    return figure


def fraction_figure(rows: list[Row]) -> Figure:
    """Accuracy against the number of training images, a panel per task: the paper's claim about sample efficiency."""
    tasks, names = list(dict.fromkeys(row.task for row in rows)), labels(rows)
    figure = Figure(figsize=(5 * len(tasks), 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for name in dict.fromkeys(names):
            mine = [
                row
                for row, label in zip(rows, names, strict=True)
                if (row.task, label) == (task, name)
            ]
            spread = [stdev(row.accuracies) if len(row.accuracies) > 1 else 0.0 for row in mine]
            counts, means = [row.images for row in mine], [mean(row.accuracies) for row in mine]
            method, style = (
                name.split(",")[0].removesuffix("-shallow"),
                "--" if "-shallow" in name else "-",
            )
            axes.errorbar(
                counts,
                means,
                spread,
                marker="o",
                capsize=3,
                label=name,
                color=COLOURS[method],
                linestyle=style,
            )
        shown = sorted({row.images for row in rows if row.task == task})
        axes.set(xscale="log", xlabel="training images", ylabel="test accuracy, %")
        axes.set_title(task, parse_math=False)
        axes.set_xticks(shown, [str(n) for n in shown])
        axes.set_xticks([], minor=True)
        axes.legend(fontsize=8, loc="lower right")
    return figure


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def save(folder: Path, rows: list[Row]) -> list[Path]:
    """Write report.md, report.png, and fraction.png if several fractions were swept; the paths written."""
    write(folder / "report.md", text(rows).encode())
    drawn: dict[str, Callable] = {"report.png": bar_figure}
    if len({row.fraction for row in rows}) > 1:
        drawn["fraction.png"] = fraction_figure
    tested = [row for row in rows if row.accuracies]
    if not tested:
        return [folder / "report.md"]
    for name, draw in drawn.items():
        write(folder / name, png(draw(tested)))
    return [folder / name for name in ("report.md", *drawn)]


def curve(history: list[dict], title: str) -> bytes:
    """A PNG of the loss over the epochs, with the training accuracy (images) or the loss on val (text)."""
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.add_subplot(xlabel="epoch", ylabel="training loss")
    left.set_title(title, parse_math=False)
    left.plot(epochs, [row["loss"] for row in history], color="tab:blue", label="training loss")
    if "val loss" in history[0]:
        left.plot(
            epochs, [row["val loss"] for row in history], color="tab:orange", label="val loss"
        )
        left.legend()
        left.set_ylabel("loss of a token, nats")
    else:
        right = left.twinx()
        right.set(ylabel="training accuracy, %", ylim=(0, 101))
        right.plot(epochs, [row["train"] for row in history], color="tab:orange")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


# The lines that a run prints.


def first_line(
    config: Any, data: Any, backbone: Any, name: str, whose: str, count: int, dtype: str
) -> str:
    """What a run prints before it starts: data, method, settings and whose they are, machine."""
    sizes = ", ".join(f"{data.count(split):,} {split}" for split in ("train", "val", "test"))
    classes = "" if data.text else f"{len(data.classes)} classes; "
    length = f"L {config.length}, " if config.tune == "prefix" else ""
    base = "" if data.text else "base "
    epochs = "1 epoch" if config.epochs == 1 else f"{config.epochs} epochs"
    normalisation = "" if data.text else f"{backbone.normalisation}; "
    return (
        f"{config.task}: {classes}{sizes} {data.unit}; "
        f"{name}, {length}{base}lr {config.lr:g}, weight decay {config.wd:g} ({whose}), "
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
    if history[-1].get("status") == "diverged":
        return f"{summary(history, data)}; try a smaller --lr; {config.out}"
    sizes = f"trained {size(model):,} parameters"
    if model.backbone is None:
        sizes += f" beside a frozen backbone of {size(backbone):,}"
    else:
        sizes += f", the backbone's {size(backbone):,} among them"

    # The map that made the prefix is not needed any more.
    remain = []
    if model.prefix is not None:
        remain.append(f"{model.prefix_kv(backbone).numel():,} of prefix")
    if model.head is not None:
        remain.append(f"{size(model.head):,} of head")
    if model.backbone is None:
        sizes += f"; {' and '.join(remain)} remain"

    # An input on which to try it.
    example = "assets/digit.png" if config.task == "digits" else "photo.jpg"
    if data.text:
        example = shlex.quote(data.splits["test"][0].source[:200])
    command = f"python -m extras.sample {shlex.quote(config.out)} {example}"
    return f"{summary(history, data)}; {sizes}; {config.out}; next: {command}"


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
