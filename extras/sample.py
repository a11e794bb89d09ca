"""Using what was trained, and seeing what the prefix does.

    python sample.py RUN photo.jpg folder/          the five likeliest classes of every image
    python sample.py RUN photo.jpg --explain        where CLS looks without and with the prefix, and the gate's share
    python sample.py RUN [RUN ...] --experts        how alike the prefix's experts are, keys and values, and their rank
    python sample.py RUN "name : Aromi | food : Thai"       the text for a source, or for each line of a file

RUN is a folder that train.py left. It knows its task, classes, backbone and settings; the data set is not needed.
What the pictures show: support/explain.py.
"""

import argparse
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

from data import UsageError, write
from extras.explain import experts_picture, image_picture, text_picture
from gpt import GPT
from support import runs
from support.corpora import Pair, Template, Text, encoding
from support.files import exit_code
from support.images import crop, read_image
from support.report import png
from support.runs import WRITE
from train import (
    BAR,
    Config,
    Parser,
    TunedModel,
    add_options,
    device,
    method,
    open_backbone,
    opt,
    use_bf16,
)
from vit import ViT

TOP, BATCH = 5, 64
QUIET = {"disable": None}  # no bar among the lines of a file or a pipe


@dataclass(frozen=True)
class Options:
    """Every option, its default and its help."""

    explain: bool = opt(
        False,
        "draw a picture per image or text: attention without and with the prefix, and the gate",
    )
    experts: bool = opt(
        False, "draw how alike the experts of one or several runs are; needs no input"
    )
    json: bool = opt(False, "print a JSON object per line")
    beams: int = opt(5, "text: number of beams; 1 is greedy")
    backbone: str = opt("", "where the backbone is now, if it is not where the run had it")
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "where to compute")
    out: str = opt("", "folder for pictures (default: the run's)")


@dataclass
class Run:
    """A trained model, ready for use. metadata: what its file says of its data (classes and resizing, or the template)."""

    folder: Path
    config: Config
    metadata: dict
    model: TunedModel
    backbone: ViT | GPT
    prefix_kv: Tensor | None  # (depth, 2, H, L, Dh)

    @property
    def tuned(self) -> ViT | GPT:
        """The backbone that computes: the run's own if it was trained too."""
        return self.model.backbone or self.backbone

    def autocast(self) -> torch.autocast:
        bf16 = use_bf16(self.config, self.backbone)
        return torch.autocast(self.config.device, torch.bfloat16, enabled=bf16)


def open_run(folder: Path, options: Options) -> Run:
    """What `train.py` left in `folder`. UsageError if it is no finished run, or its backbone is missing or another."""
    facts = runs.metadata(folder)
    try:
        config = replace(Config(**facts["config"]), device=device(options.device))
    except TypeError as error:
        raise UsageError(
            f"{folder} was left by another version ({error}); train it anew"
        ) from error
    torch.manual_seed(config.seed)  # for a backbone from scratch
    kind, full = GPT if "template" in facts else ViT, config.tune == "full"
    name = str(folder / "backbone.safetensors") if full else options.backbone or config.backbone
    backbone = open_backbone(kind, name)
    if not full and runs.fingerprint(backbone) != facts["fingerprint"]:
        raise UsageError(
            f"the backbone '{name}' has other weights than the one {folder} was trained on; give --backbone"
        )
    backbone.to(config.device).requires_grad_(False)
    if use_bf16(config, backbone) and not full:
        backbone.cast_frozen_weights()
    model = TunedModel(config, backbone, len(facts["classes"])).to(config.device).eval()
    try:
        runs.load(folder, model)
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"{folder} holds weights that do not fit ({str(error).splitlines()[0]}); train anew"
        ) from error
    run = Run(folder, config, facts, model, backbone, None)
    with torch.inference_mode(), run.autocast():
        run.prefix_kv = None if model.prefix is None else model.prefix_kv(backbone).detach()
    return run


def image_paths(inputs: list[str]) -> list[Path]:
    """The images named, and those in the folders named. UsageError for what is neither, and for an empty folder."""
    found = []
    for path in map(Path, inputs):
        inside = (
            sorted(p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
            if path.is_dir()
            else [path]
        )
        if not inside:
            raise UsageError(
                f"{path} holds no image ({', '.join(IMG_EXTENSIONS)}); name a folder that does"
            )
        if not path.exists():
            raise UsageError(f"{path} does not exist; name an image or a folder of images")
        found += inside
    if not found:
        raise UsageError("no image is named; give images or folders of them after the run")
    return found


def read_images(run: Run, paths: list[Path]) -> Iterator[tuple[list[Path], Tensor]]:
    """Batches of pixels (B, size, size, 3) uint8, cut as the task's test images are; what is no image is named."""
    rule, size = run.metadata["rule"], run.backbone.image_size
    if rule is None:
        raise UsageError(
            f"{run.config.task} was not made from image files, so none can be read as its images were"
        )
    resize = rule if isinstance(rule, int) else tuple(rule)
    for start in tqdm(range(0, len(paths), BATCH), "images", unit="batch", **BAR | QUIET):
        kept, pixels = [], []
        for i in range(start, min(start + BATCH, len(paths))):
            try:
                image = read_image(paths[i], resize)
            except ValueError as error:
                tqdm.write(f"skipped: {error}", file=sys.stderr)
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
        return run.model.classify(run.backbone, pixels, run.prefix_kv).softmax(-1)


def classify_all(run: Run, options: Options, inputs: list[str]) -> None:
    """A line per image: its likeliest classes with their probabilities."""
    classes, seen = run.metadata["classes"], 0
    for paths, pixels in read_images(run, image_paths(inputs)):
        chances, top = classify(run, pixels).topk(min(TOP, len(classes)))  # 2 x (B, TOP)
        for i, path in enumerate(paths):
            named = [
                (classes[c], p) for c, p in zip(top[i].tolist(), chances[i].tolist(), strict=True)
            ]
            line = {"image": str(path), "classes": dict(named)}
            said = ", ".join(f"{name} {100 * p:.1f} %" for name, p in named)
            if options.explain:
                with run.autocast():
                    figure = image_picture(
                        run.tuned, pixels[i : i + 1], run.prefix_kv, f"{path.name}: {said}"
                    )
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
            found += [
                json.loads(line)["source"] if path.suffix == ".jsonl" else line for line in lines
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f'{path} must hold a source per line, in .jsonl {{"source": ...}} ({error})'
            ) from error
    if not found:
        raise UsageError(
            "no source is given; write it after the run, or name a file with one per line"
        )
    return found


def write_all(run: Run, options: Options, inputs: list[str]) -> None:
    """A line per source: the text that beam search found."""
    pairs = [Pair(source, []) for source in sources(inputs)]
    template, words = Template(**run.metadata["template"]), encoding(run.backbone.encoding)
    data = Text(run.config.task, words, template, {"test": pairs})
    prompts = [tokens for tokens, _ in data.prompts("test")]
    longest = (
        max(map(len, prompts))
        + (run.config.length if run.model.prefix else 0)
        + data.decoding["max_new"]
    )
    if longest > run.tuned.context:
        raise UsageError(
            f"a source is too long: with its text it may need {longest} of {run.tuned.context} positions"
        )
    if options.beams > (most := run.tuned.vocab // 2):
        raise UsageError(
            f"--beams is {options.beams}; with this vocabulary it can be {most} at most"
        )
    for start in tqdm(range(0, len(prompts), WRITE), "texts", unit="batch", **BAR | QUIET):
        some = prompts[start : start + WRITE]
        with run.autocast():
            made = run.tuned.generate(some, run.prefix_kv, options.beams, **data.decoding)
        for i, tokens in enumerate(made):
            line = {"source": pairs[start + i].source, "text": data.decode(tokens)}
            if options.explain and tokens:
                said = [words.decode([token]) for token in tokens]
                with run.autocast():
                    figure = text_picture(
                        run.tuned, some[i], said, tokens, run.prefix_kv, line["text"]
                    )
                line["picture"] = save(run, options, f"explain-{start + i}.png", figure)
            show(options, line, line["text"])


def save(run: Run, options: Options, name: str, figure: Figure) -> str:
    folder = Path(options.out or run.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out {folder} cannot be a folder ({error.strerror}); name another"
        ) from error
    write(folder / name, png(figure))
    return str(folder / name)


def show(options: Options, line: dict, text: str) -> None:
    picture = f"; see {line['picture']}" if "picture" in line else ""
    tqdm.write(json.dumps(line) if options.json else text + picture)


def sample(options: Options, names: list[str]) -> None:
    """What the command line asks for. UsageError if it cannot be done."""
    if options.beams < 1:
        raise UsageError(f"--beams is {options.beams}; it must be positive")
    if options.experts:
        runs = [open_run(Path(name), options) for name in names]
        if flat := [run for run in runs if run.prefix_kv is None]:
            raise UsageError(f"{flat[0].folder} has no prefix, so it has no experts to compare")
        figure = experts_picture([(method(run.config), run.prefix_kv) for run in runs])
        show(
            options, {"picture": save(runs[0], options, "experts.png", figure)}, f"{len(runs)} runs"
        )
        return
    run = open_run(Path(names[0]), options)
    if options.explain and run.prefix_kv is None:
        raise UsageError(
            f"{run.folder} has no prefix, so there is nothing to explain with and without it"
        )
    (write_all if "template" in run.metadata else classify_all)(run, options, names[1:])


def main(argv: list[str] | None = None) -> int:
    made = Parser(
        description=__doc__.split("\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    made.add_argument(
        "run", nargs="+", help="the run's folder, then images, folders, sources or files of them"
    )
    add_options(made, Options)

    def work() -> None:
        given = vars(made.parse_args(argv))
        sample(Options(**{k: v for k, v in given.items() if k != "run"}), given["run"])

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
