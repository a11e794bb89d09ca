"""Using what was trained, and seeing what the prefix does.

    python sample.py RUN photo.jpg folder/          the five likeliest classes of every image
    python sample.py RUN photo.jpg --explain        where CLS looks without and with the prefix, and the gate's share
    python sample.py RUN [RUN ...] --experts        how alike the prefix's experts are, keys and values, and their rank
    python sample.py RUN "name : Aromi | food : Thai"       the text for a source, or for each line of a file

RUN is a folder that train.py left. It knows its task, classes, backbone and settings; the data set is not needed.

One softmax gates L prefix experts and N tokens, so what a query gathers divides into two shares that sum to 1:
    share of the prefix = sum_l g_l,  share of the tokens = sum_j g_j,  g = softmax of [q . p_k[l], q . k_j] / sqrt(Dh)
`--explain` draws the first for every layer and head, and where the second goes. The gates come from the model's own
attention (`gates`), not from a copy of it.

Shapes: B images or texts, N tokens, H heads, L prefix length, depth = layers with a prefix.
Sources: Le et al., ICLR 2025; Abnar & Zuidema, ACL 2020 (rollout); Roy & Vetterli, EUSIPCO 2007 (effective rank).
"""

import argparse
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

import checkpoint
from data import UsageError, normalise, write
from gpt import GPT
from options import Config, Parser, add_options, method, opt
from pixels import Files, crop
from text import Pair, Template, Text, encoding
from train import BAR, WRITE, Tuned, open_backbone, use_bf16
from vit import ViT

TOP, BATCH = 5, 64
QUIET = {"disable": None}  # no bar among the lines of a file or a pipe


@dataclass(frozen=True)
class Options:
    """Every option, its default and its help."""

    explain: bool = opt(False, "draw a picture per image or text: attention without and with the prefix, and the gate")
    experts: bool = opt(False, "draw how alike the experts of one or several runs are; needs no input")
    json: bool = opt(False, "print a JSON object per line")
    beams: int = opt(5, "text: number of beams; 1 is greedy")
    backbone: str = opt("", "where the backbone is now, if it is not where the run had it")
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "where to compute")
    out: str = opt("", "folder for pictures (default: the run's)")


@dataclass
class Run:
    """A trained model, ready for use. facts: what its file says of its data (classes and resizing, or the template)."""

    folder: Path
    config: Config
    facts: dict
    model: Tuned
    backbone: ViT | GPT
    experts: Tensor | None  # (depth, 2, H, L, Dh)

    def autocast(self) -> torch.autocast:
        bf16 = use_bf16(self.config, self.backbone)
        return torch.autocast(self.config.device, torch.bfloat16, enabled=bf16)


def open_run(folder: Path, options: Options) -> Run:
    """What `train.py` left in `folder`. UsageError if it is no finished run, or its backbone is missing or another."""
    facts = checkpoint.facts(folder)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    config = replace(Config(**facts["config"]), device=device)
    kind, full = GPT if "template" in facts else ViT, config.tune == "full"
    name = str(folder / "backbone.safetensors") if full else options.backbone or config.backbone
    backbone = open_backbone(kind, name)
    if not full and checkpoint.fingerprint(backbone) != facts["fingerprint"]:
        raise UsageError(
            f"the backbone '{name}' has other weights than the one {folder} was trained on; give --backbone"
        )
    backbone.to(device).requires_grad_(False)
    if use_bf16(config, backbone) and not full:
        backbone.hold_in_bf16()
    model = Tuned(config, backbone, len(facts["classes"])).to(device).eval()
    try:
        checkpoint.load(folder, model)
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"{folder} holds weights that do not fit ({str(error).splitlines()[0]}); train anew"
        ) from error
    run = Run(folder, config, facts, model, backbone, None)
    with torch.inference_mode(), run.autocast():
        run.experts = None if model.prefix is None else model.experts(backbone).detach()
    return run


def image_paths(inputs: list[str]) -> list[Path]:
    """The images named, and those in the folders named. UsageError for what is neither, and for an empty folder."""
    found = []
    for path in map(Path, inputs):
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS) if path.is_dir() else [path]
        if not inside:
            raise UsageError(f"{path} holds no image ({', '.join(IMG_EXTENSIONS)}); name a folder that does")
        if not path.exists():
            raise UsageError(f"{path} does not exist; name an image or a folder of images")
        found += inside
    if not found:
        raise UsageError("no image is named; give images or folders of them after the run")
    return found


def read_images(run: Run, paths: list[Path]) -> Iterator[tuple[list[Path], Tensor]]:
    """Batches of pixels (B, size, size, 3) uint8, cut as the task's test images are; what is no image is named."""
    rule, size = run.facts["rule"], run.backbone.image
    if rule is None:
        raise UsageError(f"{run.config.task} was not made from image files, so none can be read as its images were")
    files = Files([str(path) for path in paths], rule if isinstance(rule, int) else tuple(rule))
    for start in tqdm(range(0, len(paths), BATCH), "images", unit="batch", **BAR | QUIET):
        kept, pixels = [], []
        for i in range(start, min(start + BATCH, len(paths))):
            image = files[i]
            if isinstance(image, str):
                tqdm.write(f"skipped: {image}", file=sys.stderr)
                continue
            crop(image, size, out := np.empty((size, size, 3), np.uint8), rng=None)
            pixels.append(torch.from_numpy(out))
            kept.append(paths[i])
        if kept:
            yield kept, torch.stack(pixels).to(run.config.device)


@torch.inference_mode()
def classify(run: Run, pixels: Tensor) -> Tensor:
    """pixels (B, size, size, 3) uint8 -> probabilities (B, C)."""
    with run.autocast():
        return run.model.classify(run.backbone, pixels, run.experts).softmax(-1)


@torch.inference_mode()
def gates_of(run: Run, inputs: Tensor, experts: Tensor | None) -> list[Tensor]:
    """The attention weights (B, H, Nq, L + N) of every layer, for normalised images or for tokens."""
    gates = []
    with run.autocast():
        run.backbone(inputs, experts, gates=gates)
    return [gate.float() for gate in gates]


def prefix_share(gates: list[Tensor], tokens: int) -> Tensor:
    """How much every query takes from the prefix, per layer and head: gates (B, H, Nq, L + N) -> (layers, B, H, 1)."""
    return torch.stack([gate[:, :, -1:, :-tokens].sum(-1) for gate in gates])


def last_layer(gates: list[Tensor], tokens: int) -> Tensor:
    """Where CLS looks among the tokens in the last layer, mean over heads: (B, N), sums to 1."""
    looks = gates[-1][:, :, 0, -tokens:].mean(1)  # (B, N)
    return looks / looks.sum(-1, keepdim=True)


def rollout(gates: list[Tensor], tokens: int) -> Tensor:
    """How much of each token has reached CLS, if half of a token stays and half moves by attention: (B, N)."""
    eye = torch.eye(tokens, device=gates[0].device)
    flow = eye
    for gate in gates:
        looks = gate[..., -tokens:].mean(1)  # (B, N, N), the last layer (B, 1, N): without the prefix's columns
        looks = looks / looks.sum(-1, keepdim=True)
        flow = (looks + eye[: looks.shape[1]]) / 2 @ flow  # (B, N, N)
    return flow[:, 0]


def image_picture(run: Run, pixels: Tensor, title: str) -> Figure:
    """One image (1, size, size, 3): the image, CLS's attention without, with, and the difference, and the gate."""
    backbone, images = run.model.backbone or run.backbone, normalise(pixels)
    tokens, side = backbone.pos_embed.shape[1], round((backbone.pos_embed.shape[1] - 1) ** 0.5)
    without, with_ = gates_of(run, images, None), gates_of(run, images, run.experts)
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 4)
    axes[0, 0].imshow(pixels[0].numpy(force=True))
    axes[0, 0].set_title("the image, as the model sees it")
    for row, (name, look) in zip(axes, {"last layer": last_layer, "rollout": rollout}.items(), strict=True):
        maps = [
            look(gates, tokens)[0, 1:].view(side, side).numpy(force=True) for gates in (without, with_)
        ]  # CLS itself is left out
        most = max(m.max() for m in maps)
        for cell, drawn, label in zip(row[1:], maps, ("without prefix", "with prefix"), strict=False):
            heat = cell.imshow(drawn, vmin=0, vmax=most, cmap="viridis")
            cell.set_title(f"{name}, {label}")
        figure.colorbar(heat, ax=row[2], shrink=0.8)
        change = maps[1] - maps[0]
        far = max(abs(change).max(), 1e-9)
        heat = row[3].imshow(change, vmin=-far, vmax=far, cmap="RdBu_r")
        row[3].set_title(f"{name}, difference")
        figure.colorbar(heat, ax=row[3], shrink=0.8)
    for cell in [axes[0, 0], *axes[:, 1:].flat]:
        cell.axis("off")
    share = prefix_share(with_, tokens)[:, 0, :, 0]  # (layers, H)
    gate_map(figure, axes[1, 0], share, "head", "share of CLS's attention\nthat goes to the prefix")
    axes[1, 0].set_xticks(range(share.shape[1]), range(1, share.shape[1] + 1))
    return figure


def gate_map(figure: Figure, axes, share: Tensor, across: str, title: str) -> None:
    """A heat map of shares from 0 to 1, a row per layer, the first layer on top."""
    heat = axes.imshow(share.numpy(force=True), vmin=0, vmax=1, cmap="magma", aspect="auto")
    axes.set(title=title, ylabel="layer", xlabel=across)
    axes.set_yticks(range(len(share)), range(1, len(share) + 1))
    figure.colorbar(heat, ax=axes)


def classify_all(run: Run, options: Options, inputs: list[str]) -> None:
    """A line per image: its likeliest classes with their probabilities."""
    classes, seen = run.facts["classes"], 0
    for paths, pixels in read_images(run, image_paths(inputs)):
        chances, top = classify(run, pixels).topk(min(TOP, len(classes)))  # 2 x (B, TOP)
        for i, path in enumerate(paths):
            named = [(classes[c], p) for c, p in zip(top[i].tolist(), chances[i].tolist(), strict=True)]
            line = {"image": str(path), "classes": dict(named)}
            said = ", ".join(f"{name} {100 * p:.1f} %" for name, p in named)
            if options.explain:
                figure = image_picture(run, pixels[i : i + 1], f"{path.name}: {said}")
                line["picture"] = save(run, options, f"explain-{path.stem}.png", figure)
            show(options, line, f"{path}: {said}")
        seen += len(paths)
    if not seen:
        raise UsageError("none of the images could be read; give JPEG or PNG files that are whole")


def sources(inputs: list[str]) -> list[str]:
    """Every argument is a source, or a file of them: a line each, or a {"source": ...} per line of a .jsonl file."""
    found = []
    for text in inputs:
        path = Path(text)
        if path.suffix not in (".txt", ".jsonl"):
            found.append(text)
            continue
        try:
            lines = [line for line in path.read_text().splitlines() if line.strip()]
            found += [json.loads(line)["source"] if path.suffix == ".jsonl" else line for line in lines]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f'{path} must hold a source per line, in .jsonl {{"source": ...}} ({error})') from error
    if not found:
        raise UsageError("no source is given; write it after the run, or name a file with one per line")
    return found


def write_all(run: Run, options: Options, inputs: list[str]) -> None:
    """A line per source: the text that beam search found."""
    pairs = [Pair(source, []) for source in sources(inputs)]
    template, words = Template(**run.facts["template"]), encoding(run.backbone.reads)
    data = Text(run.config.task, words, template, {"test": pairs})
    prompts = [tokens for tokens, _ in data.prompts("test")]
    backbone = run.model.backbone or run.backbone
    longest = max(map(len, prompts)) + (run.config.length if run.model.prefix else 0) + data.decoding["max_new"]
    if longest > backbone.context:
        raise UsageError(f"a source is too long: with its text it may need {longest} of {backbone.context} positions")
    for start in tqdm(range(0, len(prompts), WRITE), "texts", unit="batch", **BAR | QUIET):
        some = prompts[start : start + WRITE]
        with run.autocast():
            made = backbone.generate(some, run.experts, options.beams, **data.decoding)
        for i, tokens in enumerate(made):
            line = {"source": pairs[start + i].source, "text": data.decode(tokens)}
            if options.explain and tokens:
                figure = text_picture(run, some[i], tokens, words, line["text"])
                line["picture"] = save(run, options, f"explain-{start + i}.png", figure)
            show(options, line, line["text"])


def text_picture(run: Run, prompt: list[int], made: list[int], words, title: str) -> Figure:
    """The gate over the tokens that were written: how much each took from the prefix, per layer, mean over heads."""
    tokens = torch.tensor([prompt + made[:-1]], device=run.config.device)  # (1, T): what was read to write the last one
    gates = gates_of(run, tokens, run.experts)
    count = tokens.shape[1]
    share = torch.stack([gate[0, :, -len(made) :, :-count].sum(-1).mean(0) for gate in gates])  # (layers, made)
    figure = Figure(figsize=(max(6, 0.22 * len(made)), 4), layout="constrained")
    axes = figure.subplots()
    gate_map(figure, axes, share, "token that was written", "share of attention that goes to the prefix")
    axes.set_xticks(range(len(made)), [words.decode([t]) for t in made], rotation=90, fontsize=8)
    figure.suptitle(title if len(title) < 90 else title[:87] + "...", fontsize=9)
    return figure


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of all pairs: (n, D), (m, D) -> (n, m)."""
    return torch.nn.functional.normalize(a, dim=-1) @ torch.nn.functional.normalize(b, dim=-1).mT


def effective_rank(vectors: Tensor) -> float:
    """exp(entropy of the singular values' shares) of L vectors (L, D): L if all point elsewhere, 1 if they are one."""
    shares = torch.linalg.svdvals(vectors)
    shares = shares / shares.sum()
    return torch.exp(-(shares * shares.clamp(min=1e-12).log()).sum()).item()


def experts_picture(runs: list[Run]) -> Figure:
    """A row per run: keys x keys, values x values, keys x values over all layers' experts, and each layer's rank."""
    figure = Figure(figsize=(15, 3.8 * len(runs)), layout="constrained")
    for axes, run in zip(figure.subplots(len(runs), 4, squeeze=False), runs, strict=True):
        keys, values = run.experts.float().transpose(2, 3).flatten(3).cpu().unbind(1)  # 2 x (depth, L, D)
        depth, length, _ = keys.shape
        pairs = {"keys, keys": (keys, keys), "values, values": (values, values), "keys, values": (keys, values)}
        for cell, (name, both) in zip(axes, pairs.items(), strict=False):
            alike = cosines(*(part.flatten(0, 1) for part in both))  # (depth * L, depth * L)
            heat = cell.imshow(alike.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
            middle = [length * (i + 0.5) - 0.5 for i in range(depth)]
            cell.set_xticks(middle, range(1, depth + 1))
            cell.set_yticks(middle, range(1, depth + 1))
            cell.set(title=f"{method(run.config)}: cosine of {name}", xlabel="layer", ylabel="layer")
            figure.colorbar(heat, ax=cell, shrink=0.8)
        for name, part in (("keys", keys), ("values", values)):
            axes[3].plot(range(1, depth + 1), [effective_rank(layer) for layer in part], marker="o", label=name)
        axes[3].set(title=f"effective rank of {length} experts", xlabel="layer", ylim=(0.9, length + 0.5))
        axes[3].legend()
    return figure


def save(run: Run, options: Options, name: str, figure: Figure) -> str:
    folder = Path(options.out or run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    write(folder / name, buffer.getvalue())
    return str(folder / name)


def show(options: Options, line: dict, text: str) -> None:
    picture = f"; see {line['picture']}" if "picture" in line else ""
    tqdm.write(json.dumps(line) if options.json else text + picture)


def sample(options: Options, names: list[str]) -> None:
    """What the command line asks for. UsageError if it cannot be done."""
    if options.experts:
        runs = [open_run(Path(name), options) for name in names]
        if flat := [run for run in runs if run.experts is None]:
            raise UsageError(f"{flat[0].folder} has no prefix, so it has no experts to compare")
        show(options, {"picture": (path := save(runs[0], options, "experts.png", experts_picture(runs)))}, path)
        return
    run = open_run(Path(names[0]), options)
    if options.explain and run.experts is None:
        raise UsageError(f"{run.folder} has no prefix, so there is nothing to explain with and without it")
    (write_all if "template" in run.facts else classify_all)(run, options, names[1:])


def main(argv: list[str] | None = None) -> int:
    made = Parser(description=__doc__.split("\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS)
    made.add_argument("run", nargs="+", help="the run's folder, then images, folders, sources or files of them")
    add_options(made, Options)
    try:
        given = vars(made.parse_args(argv))
        sample(Options(**{k: v for k, v in given.items() if k != "run"}), given["run"])
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
