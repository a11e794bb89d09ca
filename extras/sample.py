"""Use what was trained, and see what the prefix does.

    python -m extras.sample RUN photo.jpg folder/       the five likeliest classes of every image
    python -m extras.sample RUN photo.jpg --explain     where CLS looks without and with the prefix
    python -m extras.sample RUN [RUN ...] --experts     how alike the prefix's experts are, and
                                                        whether L of them do what one would do
    python -m extras.sample RUN "name : Aromi | food : Thai"    the text for a source, a file of
                                                                sources, or standard input (-)
    python -m extras.sample RUN --export FOLDER         a text run's prefix for Hugging Face peft
    python -m extras.sample RUN --export FILE.pth       Simple-share on images: prompts for VPT

RUN is a folder that train.py left. It knows its classes, backbone and settings, so the data set is
not needed (--experts measures accuracies if it is there). The same from Python:

    from extras.sample import load_run
    run = load_run("out/digits/...")
    run.predict(["photo.jpg"])          # [{"7": 0.98, "1": 0.01, ...}]

What the pictures show: extras/explain.py.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.transforms import Resize
from tqdm import tqdm

import data as tasks
from extras.adapter import export_peft, export_vpt
from extras.explain import altered, experts_picture, image_picture, text_picture
from gpt import GPT
from support import runs
from support.files import Parser, UsageError, add_options, exit_code, opt, write
from support.images import (
    ENDINGS,
    cores,
    crop,
    image_files,
    prefetch,
    read_image,
    to_rgb,
)
from support.language import Pair, Template, Text, encoding, one_line, read_sources
from support.report import called, png
from support.runs import WRITE, open_backbone, use_bf16
from train import Config, TunedModel, evaluate, method
from vit import ViT

TOP = 5  # classes that are printed
TEXT_FILES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
Picture = str | Path | Image.Image | np.ndarray


@dataclass(frozen=True)
class Options:
    """Every option, its default and its help."""

    explain: bool = opt(
        False, "draw a picture per image or text: attention without and with the prefix"
    )
    experts: bool = opt(
        False,
        "draw how alike the experts of one or several runs are, and test them; needs no input",
    )
    export: str = opt(
        "", "text: folder for an adapter of peft; Simple-share on images: a .pth file for VPT"
    )
    json: bool = opt(False, "print a JSON object per line")
    beams: int = opt(5, "text: number of beams; 1 is greedy")
    backbone: str = opt("", "where the backbone is now, if it is not where the run had it")
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "where to compute")
    out: str = opt("", "folder for pictures (default: the run's)")


@dataclass
class Run:
    """A trained model, ready for use. `load_run` makes it.

    Shapes: B images, C classes, L prefix length, H heads, Dh width of a head, depth = number of
    layers with a prefix, size = side of the square that the backbone sees, in pixels.

    classes: C names in the order of the head's outputs; [] for a run on text.
    backbone: the frozen ViT or GPT, or the run's own if it was trained too.
    prefix_kv: (depth, 2, H, L, Dh), [:, 0] keys and [:, 1] values; None without a prefix.
    metadata: what prefix.safetensors says of its data.
    """

    folder: Path
    config: Config
    metadata: dict
    model: TunedModel
    backbone: ViT | GPT
    prefix_kv: Tensor | None

    @property
    def classes(self) -> list[str]:
        return self.metadata["classes"]

    def autocast(self) -> torch.autocast:
        bf16 = use_bf16(self.config, self.backbone)
        return torch.autocast(self.config.device, torch.bfloat16, enabled=bf16)

    def predict(self, images: Picture | Sequence[Picture]) -> list[dict[str, float]]:
        """The probability, 0 to 1, of every class for each image, the likeliest class first.

        images: one or a list of paths, PIL images and uint8 arrays (height, width[, 3]) from 0 to
            255, of any size. They are resized and cut as the run's own test images were.
        UsageError names the first image that cannot be read, and refuses a run on text.
        """
        listed = [images] if isinstance(images, Picture) else images
        return self.probabilities([self.pixels(x, f"image {i}") for i, x in enumerate(listed)])

    def pixels(self, image: Picture, name: str = "the image") -> Tensor:
        """An image as the model sees it: (size, size, 3) uint8. UsageError if it cannot be read.

        name: how the error calls an image that has no path.
        """
        rule = self.metadata.get("rule")
        if rule is None:
            kind = "images that were no files" if self.classes else "text"
            raise UsageError(f"{self.folder} is a run on {kind}; it cannot read images")

        # Decode it, and resize it as the run's test images were.
        try:
            if isinstance(image, str | Path):
                decoded = read_image(image, rule)  # (height, width, 3)
            else:
                opened = image if isinstance(image, Image.Image) else Image.fromarray(image)
                decoded = np.asarray(Resize(rule)(to_rgb(opened)))
        except Exception as error:  # of many kinds, if the image is damaged
            reason = error if isinstance(image, str | Path) else f"{name} is no image ({error})"
            raise UsageError(f"{reason}; give a whole one") from error

        # Its middle.
        size = self.backbone.image_size
        out = np.empty((size, size, 3), np.uint8)
        crop(decoded, size, out, rng=None)
        return torch.from_numpy(out)

    def probabilities(self, pixels: list[Tensor]) -> list[dict[str, float]]:
        """Images (size, size, 3) uint8 -> for each every class, the likeliest first."""
        found = []
        for start in range(0, len(pixels), self.config.batch):
            batch = torch.stack(pixels[start : start + self.config.batch])  # (B, size, size, 3)
            for chances in self.logits(batch).softmax(-1).tolist():  # B x (C,)
                named = zip(self.classes, chances, strict=True)
                found.append(dict(sorted(named, key=lambda pair: -pair[1])))
        return found

    @torch.inference_mode()
    def logits(self, pixels: Tensor) -> Tensor:
        """pixels (B, size, size, 3) uint8 -> (B, C) in fp32, on the run's device."""
        pixels = pixels.to(self.config.device)
        with self.autocast():
            return self.model.classify(self.backbone, pixels, self.prefix_kv)

    def generate(self, sources: str | Sequence[str], beams: int = 5) -> list[str]:
        """A text for each source, written by beam search; beams: 1 is greedy.

        UsageError if a source is too long for the backbone, for a number of beams that cannot be,
        and for a run on images.
        """
        sources = [sources] if isinstance(sources, str) else list(sources)
        return [text for _, _, text in self.write(sources, beams)]

    def write(self, sources: list[str], beams: int) -> Iterator[tuple[list[int], list[int], str]]:
        """Per source: the tokens of its prompt, those that were written, and their text."""
        if self.classes:
            raise UsageError(f"{self.folder} is a run on images; give it images, not sources")

        # The prompts. They need no references.
        pairs = [Pair(one_line(source), []) for source in sources]
        template = Template(**self.metadata["template"])
        text = Text(self.config.task, self.backbone.encoding, template, {"test": pairs})
        prompts = text.prompts("test")

        # What cannot be written is refused before anything is.
        taken = 0 if self.prefix_kv is None else self.prefix_kv.shape[-2]  # L
        text.must_fit(self.backbone.context - taken, ["test"], taken)
        most = self.backbone.vocab // 2
        if not 1 <= beams <= most:
            raise UsageError(f"--beams is {beams}; with this vocabulary it can be 1 to {most}")

        # Write a batch at a time.
        for start in tqdm(range(0, len(prompts), WRITE), "texts", leave=False, disable=None):
            some = prompts[start : start + WRITE]
            with self.autocast():
                made = self.backbone.generate(some, self.prefix_kv, beams, **text.decoding)
            for prompt, tokens in zip(some, made, strict=True):
                yield prompt, tokens, text.decode(tokens)


def load_run(folder: str | Path, backbone: str = "", device: str = "auto") -> Run:
    """The finished run that train.py left in `folder`.

    backbone: where the backbone is now, if it is not where the run had it.
    device: auto (the GPU if there is one), cpu or cuda.
    UsageError if it is no finished run, or its backbone is missing or has other weights.
    """
    # Its settings, and what it must know of its data.
    folder = Path(folder)
    facts = runs.metadata(folder)
    try:
        config = replace(Config(**facts["config"]), device=runs.device(device))
    except TypeError as error:
        raise UsageError(
            f"{folder} was left by another version ({error}); train it anew"
        ) from error

    # The backbone: the run's own copy if it was trained too, else the one that the prefix fits.
    torch.manual_seed(config.seed)  # for a backbone from scratch
    full = config.tune == "full"
    name = str(folder / "backbone.safetensors") if full else backbone or config.backbone
    frozen = open_backbone(GPT if "template" in facts else ViT, name)
    if not full and runs.fingerprint(frozen) != facts["fingerprint"]:
        raise UsageError(
            f"the backbone '{name}' has other weights than the one"
            f" {folder} was trained on; give --backbone"
        )
    frozen.to(config.device).requires_grad_(False)
    if use_bf16(config, frozen) and not full:
        frozen.cast_frozen_weights()

    # Prefix and head. Runs of older versions kept no keys and values, so these are made again.
    model = TunedModel(config, frozen, len(facts["classes"])).to(config.device).eval()
    try:
        runs.load(folder, model)
        baked = runs.read_weights(folder / "prefix.safetensors")[0].get("prefix_kv")
    except Exception as error:  # whatever a damaged file leads to
        raise UsageError(
            f"{folder} holds weights that do not fit ({runs.reason(error)}); train anew"
        ) from error
    own = model.backbone or frozen
    prefix_kv = runs.final_prefix(config, model, own) if baked is None else baked.to(config.device)
    return Run(folder, config, facts, model, own, prefix_kv)


def image_paths(inputs: list[str]) -> list[Path]:
    """The images named, and those in the folders named. UsageError if there are none."""
    found: list[Path] = []
    for path in map(Path, inputs):
        found += [path / name for name in image_files(path)[0]] if path.is_dir() else [path]
    if not found:
        endings = ", ".join(sorted(ENDINGS))
        raise UsageError(f"no image ({endings}) is named; give images or folders after the run")
    return found


def readable(run: Run, paths: list[Path]) -> Iterator[tuple[Path, Tensor]]:
    """Every image (size, size, 3) and its path. What cannot be read is named and left out."""
    decoded = zip(paths, prefetch(run.pixels, paths, cores()), strict=True)
    for path, future in tqdm(decoded, "images", len(paths), leave=False, disable=None):
        try:
            yield path, future.result()
        except UsageError as error:
            tqdm.write(f"skipped: {error}", file=sys.stderr)


def predict_all(run: Run, options: Options, inputs: list[str]) -> None:
    """Print a line per image: its likeliest classes."""
    images, seen = readable(run, image_paths(inputs)), 0
    while batch := list(islice(images, run.config.batch)):
        seen += len(batch)
        found = run.probabilities([pixels for _, pixels in batch])
        for (path, pixels), chances in zip(batch, found, strict=True):
            # The likeliest classes.
            likely = dict(list(chances.items())[:TOP])
            text = ", ".join(f"{name} {100 * p:.1f} %" for name, p in likely.items())

            # Where CLS looks.
            figure = None
            if options.explain:
                one = pixels[None].to(run.config.device)  # (1, size, size, 3)
                with run.autocast():
                    figure = image_picture(run.backbone, one, run.prefix_kv, f"{path.name}: {text}")
            line = {"image": str(path), "classes": likely}
            show(run, options, line, f"{path}: {text}", f"explain-{path.stem}", figure)
    if not seen:
        raise UsageError("none of the images could be read; give JPEG or PNG files that are whole")


def write_all(run: Run, options: Options, inputs: list[str]) -> None:
    """Print a line per source: the text that beam search found.

    inputs: sources, files of them as training reads them, or - for standard input.
    """
    # All sources.
    sources: list[str] = []
    for text in inputs:
        file = text == "-" or text.lower().endswith(TEXT_FILES)
        sources += read_sources(text) if file else [one_line(text)]
    if not any(sources):
        raise UsageError(
            "no source is given; write it after the run, or name a file with one per line"
        )

    # Write the texts, and draw what share of attention the prefix had.
    words = encoding(run.backbone.encoding)
    for i, (prompt, tokens, text) in enumerate(run.write(sources, options.beams)):
        figure = None
        if options.explain and tokens:
            parts = [words.decode([token]) for token in tokens]
            with run.autocast():
                figure = text_picture(run.backbone, prompt, tokens, parts, run.prefix_kv)
        line = {"source": sources[i], "text": text}
        show(run, options, line, text, f"explain-{i}", figure)


def accuracies(run: Run) -> dict[str, float]:
    """Test accuracy in % with the prefix as trained and altered. UsageError without data."""
    name, folder = run.config.task, run.config.data_dir
    if not tasks.find(name).here(Path(folder)):
        raise UsageError(
            f"the images of {name} are not in {folder}; get them: python data.py {name}"
        )

    # Each prefix is judged as training judges its own.
    data = tasks.load(name, folder, **run.backbone.inputs)
    config = replace(run.config, compile=False)
    return {
        what: evaluate(config, run.model, run.backbone, data, "test", prefix_kv)
        for what, prefix_kv in altered(run.prefix_kv).items()
    }


def compare_experts(options: Options, found: list[Run]) -> None:
    """Draw the experts of all runs; print how accurate the image runs are with altered ones."""
    rows = []
    for run in found:
        # Its experts, before and after training.
        name, tested = called(method(run.config)), {}
        rows.append((name, run.prefix_kv, untrained(run)))

        # Its accuracies, if the test images are here.
        try:
            tested = accuracies(run) if run.classes else {}
        except UsageError as error:
            tqdm.write(f"no test accuracies of {run.folder}: {error}", file=sys.stderr)
        line = {"run": str(run.folder), "method": name, "test accuracy": tested}
        values = ", ".join(f"{value:.2f} % {what}" for what, value in tested.items())
        show(run, options, line, f"{name}, {run.folder}: {values or 'not tested'}")
    show(found[0], options, {}, f"{len(found)} runs", "experts", experts_picture(rows))


def untrained(run: Run) -> Tensor:
    """The prefix_kv (depth, 2, H, L, Dh) that the run's seed gives before any training."""
    torch.manual_seed(run.config.seed)
    model = TunedModel(run.config, run.backbone, len(run.classes)).to(run.config.device)
    return runs.final_prefix(run.config, model, run.backbone)


def export(run: Run, target: Path) -> None:
    """Write the prefix for VPT or for peft. UsageError if it has no such form."""
    if run.classes or target.suffix == ".pth":
        if not run.classes or method(run.config) != "simple":
            raise UsageError(
                f"{run.folder} has no prompts of VPT-deep to export, as only an image run with"
                " --share simple in all layers has; a text run takes --export FOLDER"
            )
        if target.suffix != ".pth":
            target /= f"prompt_ep{run.config.epochs}.pth"  # as VPT calls it
        export_vpt(run.model.prefix.p, target)
    else:
        export_peft(run.prefix_kv, run.backbone, run.config.backbone, target)
    print(f"{target} holds {called(method(run.config))} of {run.folder}")


def show(
    run: Run, options: Options, line: dict, text: str, name: str = "", figure: Figure | None = None
) -> None:
    """Print a line. A picture gets a name that is not taken yet: NAME.png, NAME-2.png, ..."""
    if figure is not None:
        folder, number = Path(options.out or run.folder), 1
        path = folder / f"{name}.png"
        while path.exists():
            number += 1
            path = folder / f"{name}-{number}.png"
        write(path, png(figure))
        line["picture"] = str(path)
        text += f"; see {path}"
    tqdm.write(json.dumps(line) if options.json else text)


def sample(argv: list[str] | None) -> None:
    """What the command line asks for. UsageError if it cannot be done."""
    # The command line.
    parser = Parser(__doc__, argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "run", nargs="+", help="the run's folder, then images, folders, sources or files of them"
    )
    add_options(parser, Options)
    given = vars(parser.parse_args(argv))
    first, *inputs = given.pop("run")
    options = Options(**given)

    # Load the run, or all that are compared.
    names = [first, *inputs] if options.experts else [first]
    found = [load_run(name, options.backbone, options.device) for name in names]
    for run in found:
        if run.prefix_kv is None and (options.explain or options.experts or options.export):
            raise UsageError(f"{run.folder} has no prefix to explain, compare or export")

    # Do one thing with it.
    run = found[0]
    if options.experts:
        compare_experts(options, found)
    elif options.export:
        export(run, Path(options.export))
    elif run.classes:
        predict_all(run, options, inputs)
    else:
        write_all(run, options, inputs)


def main(argv: list[str] | None = None) -> int:
    return exit_code(partial(sample, argv))


if __name__ == "__main__":
    sys.exit(main())
