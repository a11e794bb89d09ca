"""Use what was trained, and see what the prefix does.

    python -m extras.sample RUN photo.jpg folder/       the five likeliest classes of every image
    python -m extras.sample RUN photo.jpg --explain     where CLS looks without and with the prefix
    python -m extras.sample RUN [RUN ...] --experts     how alike the prefix's experts are, and
                                                        whether L of them do what one would do
    python -m extras.sample RUN "name : Aromi | food : Thai"    the text for a source, a file of
                                                                sources, or standard input (-)
    python -m extras.sample RUN --export FOLDER         a text run's prefix for Hugging Face peft

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
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torchvision.transforms import Resize
from tqdm import tqdm

import data as tasks
from data import UsageError, write
from extras.adapter import export
from extras.explain import altered, experts_picture, image_picture, text_picture
from gpt import GPT
from support import runs
from support.corpora import Pair, Template, Text, encoding, one_line, read
from support.files import exit_code
from support.images import ENDINGS, crop, image_files, read_image, to_rgb
from support.report import called, png
from support.runs import WRITE
from train import (
    BAR,
    Config,
    Parser,
    TunedModel,
    add_options,
    method,
    open_backbone,
    opt,
    use_bf16,
)
from train import device as device_of
from vit import ViT

TOP = 5  # classes that are printed
QUIET = {"disable": None}  # no bar among the lines of a file or a pipe
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
    export: str = opt("", "text: write the prefix to this folder as an adapter of peft")
    json: bool = opt(False, "print a JSON object per line")
    beams: int = opt(5, "text: number of beams; 1 is greedy")
    backbone: str = opt("", "where the backbone is now, if it is not where the run had it")
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "where to compute")
    out: str = opt("", "folder for pictures (default: the run's)")


@dataclass
class Run:
    """A trained model, ready for use. `load_run` makes it.

    classes: names in the order of the head's outputs; [] for a run on text.
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
        """The probability of every class for each image, the likeliest class first.

        images: one or a list of paths, PIL images and uint8 arrays (height, width[, 3]) from 0 to
        255, of any size. They are resized and cut as the run's own test images were.
        UsageError names the first image that cannot be read, and refuses a run on text.
        """
        self.check_images()
        listed = [images] if isinstance(images, Picture) else list(images)
        pixels = [self.pixels(image, f"image {i}") for i, image in enumerate(listed)]
        size, found = self.config.batch, []
        for start in range(0, len(pixels), size):
            found += self.probabilities(torch.stack(pixels[start : start + size]))
        return found

    def check_images(self) -> None:
        """UsageError if this run takes no images."""
        if not self.classes:
            raise UsageError(f"{self.folder} is a run on text; give it sources, not images")
        if self.metadata["rule"] is None:
            raise UsageError(
                f"{self.config.task} was not made from image files, so none can be read as its were"
            )

    def pixels(self, image: Picture, name: str = "the image") -> Tensor:
        """An image as the model sees it: (size, size, 3) uint8. UsageError if it cannot be read."""
        rule, size = self.metadata["rule"], self.backbone.image_size
        rule = rule if isinstance(rule, int) else tuple(rule)
        try:
            if isinstance(image, str | Path):
                decoded = read_image(image, rule)  # (height, width, 3)
            else:
                opened = image if isinstance(image, Image.Image) else Image.fromarray(image)
                decoded = np.asarray(Resize(rule)(to_rgb(opened)))
        except Exception as error:  # of many kinds, if the image is damaged
            reason = error if isinstance(image, str | Path) else f"{name} is no image ({error})"
            raise UsageError(f"{reason}; give a whole one") from error
        out = np.empty((size, size, 3), np.uint8)
        crop(decoded, size, out, rng=None)
        return torch.from_numpy(out)

    def probabilities(self, pixels: Tensor) -> list[dict[str, float]]:
        """pixels (B, size, size, 3) uint8 -> per image every class, the likeliest first."""
        chances = self.logits(pixels).softmax(-1).sort(descending=True, stable=True)  # (B, C)
        rows = zip(chances.values.tolist(), chances.indices.tolist(), strict=True)
        return [{self.classes[c]: p for p, c in zip(*row, strict=True)} for row in rows]

    @torch.inference_mode()
    def logits(self, pixels: Tensor, prefix_kv: Tensor | None = None) -> Tensor:
        """pixels (B, size, size, 3) uint8 -> (B, C) in fp32, with this prefix or the run's own."""
        prefix_kv = self.prefix_kv if prefix_kv is None else prefix_kv
        with self.autocast():
            return self.model.classify(self.backbone, pixels.to(self.config.device), prefix_kv)

    def generate(self, sources: str | Sequence[str], beams: int = 5) -> list[str]:
        """A text for each source, written by beam search; beams: 1 is greedy.

        UsageError if a source is too long for the backbone, and for a run on images.
        """
        sources = [sources] if isinstance(sources, str) else list(sources)
        return [text for _, _, text in self.write(sources, beams)]

    def write(self, sources: list[str], beams: int) -> Iterator[tuple[list[int], list[int], str]]:
        """Per source: the tokens of its prompt, those that were written, and their text."""
        if self.classes:
            raise UsageError(f"{self.folder} is a run on images; give it images, not sources")
        pairs = [Pair(one_line(source), []) for source in sources]
        template, words = Template(**self.metadata["template"]), encoding(self.backbone.encoding)
        text = Text(self.config.task, words, template, {"test": pairs})
        prompts = [tokens for tokens, _ in text.prompts("test")]

        # What cannot be written is refused before anything is.
        taken = 0 if self.prefix_kv is None else self.prefix_kv.shape[-2]
        longest = max(map(len, prompts)) + taken + text.decoding["max_new"]
        if longest > self.backbone.context:
            raise UsageError(
                f"a source is too long: with its text it may need {longest} of"
                f" {self.backbone.context} positions; shorten it"
            )
        if not 1 <= beams <= (most := self.backbone.vocab // 2):
            raise UsageError(f"--beams is {beams}; with this vocabulary it can be {most} at most")
        for start in tqdm(range(0, len(prompts), WRITE), "texts", unit="batch", **BAR | QUIET):
            some = prompts[start : start + WRITE]
            with self.autocast():
                made = self.backbone.generate(some, self.prefix_kv, beams, **text.decoding)
            for prompt, tokens in zip(some, made, strict=True):
                yield prompt, tokens, text.decode(tokens)


def load_run(folder: str | Path, backbone: str = "", device: str = "auto") -> Run:
    """The finished run that train.py left in `folder`.

    backbone: where the backbone is now, if it is not where the run had it. device: auto, cpu
    or cuda. UsageError if it is no finished run, or its backbone is missing or has other weights.
    """
    folder = Path(folder)
    facts = runs.metadata(folder)
    try:
        config = replace(Config(**facts["config"]), device=device_of(device))
    except TypeError as error:
        raise UsageError(
            f"{folder} was left by another version ({error}); train it anew"
        ) from error

    # The backbone: the run's own copy if it was trained too, else the one that the prefix fits.
    torch.manual_seed(config.seed)  # for a backbone from scratch
    kind, full = GPT if "template" in facts else ViT, config.tune == "full"
    name = str(folder / "backbone.safetensors") if full else backbone or config.backbone
    frozen = open_backbone(kind, name)
    if not full and runs.fingerprint(frozen) != facts["fingerprint"]:
        raise UsageError(
            f"the backbone '{name}' has other weights than the one"
            f" {folder} was trained on; give --backbone"
        )
    frozen.to(config.device).requires_grad_(False)
    if use_bf16(config, frozen) and not full:
        frozen.cast_frozen_weights()

    # Prefix and head. The keys and values are kept beside the parameters that made them.
    model = TunedModel(config, frozen, len(facts["classes"])).to(config.device).eval()
    try:
        runs.load(folder, model)
        with safe_open(folder / "prefix.safetensors", "pt", device=config.device) as file:
            names = set(file.keys())
            prefix_kv = file.get_tensor("prefix_kv") if "prefix_kv" in names else None
    except Exception as error:  # whatever a damaged file leads to
        raise UsageError(
            f"{folder} holds weights that do not fit ({str(error).splitlines()[0]}); train anew"
        ) from error
    run = Run(folder, config, facts, model, model.backbone or frozen, prefix_kv)
    if prefix_kv is None:
        with torch.no_grad(), run.autocast():
            run.prefix_kv = model.prefix_kv(frozen)
    return run


def image_paths(inputs: list[str]) -> list[Path]:
    """The images named, and those in the folders named. UsageError if there are none."""
    found = []
    for path in map(Path, inputs):
        if not path.exists():
            raise UsageError(f"{path} does not exist; name an image or a folder of images")
        inside = [path]
        if path.is_dir():
            inside = [path / name for name in image_files(path)[0]]
        if not inside:
            endings = ", ".join(sorted(ENDINGS))
            raise UsageError(f"{path} holds no image ({endings}); name a folder that does")
        found += inside
    if not found:
        raise UsageError("no image is named; give images or folders of them after the run")
    return found


def readable(run: Run, paths: list[Path]) -> Iterator[tuple[Path, Tensor]]:
    """The images that can be read, with their pixels; what is wrong with the others is printed."""
    run.check_images()
    for path in paths:
        try:
            yield path, run.pixels(path)
        except UsageError as error:
            tqdm.write(f"skipped: {error}", file=sys.stderr)


def predict_all(run: Run, options: Options, inputs: list[str]) -> None:
    """Print a line per image: its likeliest classes."""
    paths, seen, size = image_paths(inputs), 0, run.config.batch
    for start in tqdm(range(0, len(paths), size), "images", unit="batch", **BAR | QUIET):
        kept = list(readable(run, paths[start : start + size]))
        if not kept:
            continue
        seen += len(kept)
        pixels = torch.stack([image for _, image in kept])  # (B, size, size, 3)
        for i, chances in enumerate(run.probabilities(pixels)):
            path, likely = kept[i][0], dict(list(chances.items())[:TOP])
            line = {"image": str(path), "classes": likely}
            text = ", ".join(f"{name} {100 * p:.1f} %" for name, p in likely.items())
            if options.explain:
                one = pixels[i : i + 1].to(run.config.device)
                with run.autocast():
                    figure = image_picture(run.backbone, one, run.prefix_kv, f"{path.name}: {text}")
                line["picture"] = save(run, options, f"explain-{path.stem}", figure)
            show(options, line, f"{path}: {text}")
    if not seen:
        raise UsageError("none of the images could be read; give JPEG or PNG files that are whole")


def sources_in(text: str) -> list[str]:
    """The sources that one input means: itself, a file of them, or - for standard input.

    A .txt file has a source per line, a .jsonl file {"source": ...}; read as training reads them.
    """
    kind, number = Path(text).suffix.lower(), 0
    if text != "-" and kind not in (".txt", ".jsonl"):
        return [one_line(text)]
    found = []
    try:
        content = sys.stdin.read() if text == "-" else read(Path(text))
        lines = content.removeprefix("\ufeff").split("\n")
        for number, line in enumerate(lines, 1):  # noqa: B007  (the error names it)
            if line.strip():
                found.append(one_line(json.loads(line)["source"] if kind == ".jsonl" else line))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f'{text} must hold a source per line, in .jsonl {{"source": ...}}'
            f" (line {number}: {error})"
        ) from error
    return found


def read_sources(inputs: list[str]) -> list[str]:
    """All sources that the inputs mean. UsageError if there is none."""
    found = [source for text in inputs for source in sources_in(text) if source]
    if not found:
        raise UsageError(
            "no source is given; write it after the run, or name a file with one per line"
        )
    return found


def write_all(run: Run, options: Options, inputs: list[str]) -> None:
    """Print a line per source: the text that beam search found."""
    sources = read_sources(inputs)
    words = encoding(run.backbone.encoding)
    for i, (prompt, tokens, text) in enumerate(run.write(sources, options.beams)):
        line = {"source": sources[i], "text": text}
        if options.explain and tokens:
            parts = [words.decode([token]) for token in tokens]
            with run.autocast():
                figure = text_picture(run.backbone, prompt, tokens, parts, run.prefix_kv, text)
            line["picture"] = save(run, options, f"explain-{i}", figure)
        show(options, line, text)


def accuracies(run: Run) -> dict[str, float]:
    """Test accuracy, 0 to 1, with the prefix as trained and altered. UsageError without data."""
    name, folder = run.config.task, run.config.data_dir
    if not tasks.find(name).here(Path(folder)):
        raise UsageError(
            f"the images of {name} are not in {folder}; get them: python data.py {name}"
        )
    data = tasks.load(name, folder, **run.backbone.inputs)
    variants = altered(run.prefix_kv)
    correct = dict.fromkeys(variants, 0)
    for pixels, labels in data.batches("test", run.config.batch):
        for what, prefix_kv in variants.items():
            correct[what] += (run.logits(pixels, prefix_kv).argmax(-1).cpu() == labels).sum().item()
    return {what: count / data.count("test") for what, count in correct.items()}


def compare_experts(options: Options, found: list[Run]) -> None:
    """Draw the experts of all runs; print how accurate the image runs are with altered ones."""
    rows, lines, text = [], [], [f"{len(found)} runs"]
    for run in found:
        if run.prefix_kv is None:
            raise UsageError(f"{run.folder} has no prefix, so it has no experts to compare")
        name, tested = called(method(run.config)), {}
        rows.append((name, run.prefix_kv, untrained(run)))
        try:
            tested = accuracies(run) if run.classes else {}
        except UsageError as error:
            tqdm.write(f"no test accuracies of {run.folder}: {error}", file=sys.stderr)
        lines.append({"run": str(run.folder), "method": name, "test accuracy": tested})
        if tested:
            values = ", ".join(f"{100 * value:.2f} % {what}" for what, value in tested.items())
            text.append(f"{name}, {run.folder}: {values}")
    picture = save(found[0], options, "experts", experts_picture(rows))
    show(options, {"picture": picture, "runs": lines}, "\n".join(text))


@torch.no_grad()
def untrained(run: Run) -> Tensor:
    """The prefix_kv (depth, 2, H, L, Dh) that the run started from, which its seed decides."""
    torch.manual_seed(run.config.seed)
    model = TunedModel(run.config, run.backbone, len(run.classes)).to(run.config.device)
    with run.autocast():
        return model.eval().prefix_kv(run.backbone)


def save(run: Run, options: Options, name: str, figure: Figure) -> str:
    """Write a picture under a name that is not taken yet: NAME.png, NAME-2.png, ..."""
    folder = Path(options.out or run.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out {folder} cannot be a folder ({error.strerror}); name another"
        ) from error
    path, number = folder / f"{name}.png", 1
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}.png"
    write(path, png(figure))
    return str(path)


def show(options: Options, line: dict, text: str) -> None:
    picture = f"; see {line['picture']}" if "picture" in line else ""
    tqdm.write(json.dumps(line) if options.json else text + picture)


def sample(options: Options, names: list[str]) -> None:
    """What the command line asks for. UsageError if it cannot be done."""
    folders = names if options.experts else names[:1]
    found = [load_run(name, options.backbone, options.device) for name in folders]
    run = found[0]
    if options.beams < 1:
        raise UsageError(f"--beams is {options.beams}; it must be positive")
    if options.experts:
        compare_experts(options, found)
    elif options.export:
        if run.classes or run.prefix_kv is None:
            raise UsageError(f"--export needs a prefix for texts, which {run.folder} does not have")
        export(run.prefix_kv, run.backbone, run.config.backbone, Path(options.export))
        print(f"{options.export} holds {called(method(run.config))} of {run.folder} for peft")
    elif options.explain and run.prefix_kv is None:
        raise UsageError(
            f"{run.folder} has no prefix, so there is nothing to explain with and without it"
        )
    elif run.classes:
        predict_all(run, options, names[1:])
    else:
        write_all(run, options, names[1:])


def main(argv: list[str] | None = None) -> int:
    made = Parser(
        description=(__doc__ or "").split("\n")[0],
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    made.add_argument(
        "run", nargs="+", help="the run's folder, then images, folders, sources or files of them"
    )
    add_options(made, Options)

    def work() -> None:
        given = vars(made.parse_args(argv))
        names = given.pop("run")
        sample(Options(**given), names)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
