"""The README and docs/ say nothing that is not so: files, links, commands, code, equations.

Every command of the README is run. Long ones are shortened by options that come after their own;
what needs a network is only parsed. So are the commands of docs/: a program knows its options.
"""

import contextlib
import importlib
import io
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sweep
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Pages that the README links to and that are being written; whoever adds one takes its name away.
NOT_YET: set[str] = set()
# Tasks whose data are not here.
NOT_HERE = ("cub", "e2e", "webnlg", "xsum", "fashion_mnist", "nabirds", "flowers", "dogs", "cars")
SHORT = {
    "train": "--epochs 1 --fraction 0.02 --beams 1",
    "sweep": "--epochs 1 --lr 1 --wd 0 --seed 1 2",
    "extras.theory": "--reps 2 --iterations 10",
    "extras.bench": "data --rounds 1",
}


def blocks(page: Path, language: str = "") -> list[str]:
    """The fenced blocks of a page in one language; "" holds commands, or what they print."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language or (name, language) == ("bash", "")]


def commands(page: Path) -> list[str]:
    """What starts a program of this repository, in its blocks and within its sentences."""
    lines = [line for block in blocks(page) for line in block.splitlines()]
    lines += re.findall(r"`(python [^`\n]+)`", page.read_text())
    start = re.compile(r"(?:pip install [^&]*&& )?(python (?:-m extras\.|\w+\.py)[^#]*)(?:#.*)?")
    found = [start.fullmatch(line) for line in lines]
    return list(dict.fromkeys(match[1].strip() for match in found if match))


def program(command: str) -> tuple[str, list[str]]:
    """The module that a command runs, and its options."""
    words = shlex.split(command)[1:]
    if words[0] == "-m":
        return words[1], words[2:]
    return words[0].removesuffix(".py"), words[1:]


def test_the_readme_is_read_in_five_minutes():
    assert len(README.split()) <= 1800


def test_the_readme_begins_with_a_figure_and_the_two_commands_that_ci_runs():
    first, second = [line for line in README.splitlines() if line.startswith("pip install")]
    assert first == "pip install -r requirements.txt && python train.py --task digits --shared"
    assert second == "pip install -r requirements.txt -r requirements-dev.txt && pytest -n auto"
    assert README.index("assets/digits.png") < README.index(first) < README.index("## The idea")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page):
    text = page.read_text()
    targets = [page.parent / path for path in re.findall(r"\]\((?!http)([^)#]+)", text)]
    targets += [ROOT / path for path in re.findall(r"-r (\S+\.txt)", text)]
    targets += [
        ROOT / path for path in re.findall(r"`((?:assets|support|extras|tests)/[\w./]+)`", text)
    ]
    missing = [path.resolve() for path in targets if not path.exists()]
    assert {path.relative_to(ROOT).as_posix() for path in missing} <= NOT_YET
    assert all(
        path.stat().st_size < 300_000 for path in targets if path.suffix == ".png" and path.exists()
    )


def test_the_readme_leads_to_every_file_of_the_top_level_and_every_page():
    paths = [*ROOT.glob("*.py"), *ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md"]
    names = {path.relative_to(ROOT).as_posix() for path in paths} | NOT_YET
    assert not [
        name for name in names if name.endswith((".py", ".md")) and f"]({name})" not in README
    ]


def test_every_function_of_the_table_of_equations_is_where_it_says():
    table = (ROOT / "docs" / "design.md").read_text().split("\n## ")[1]
    found = re.findall(r"((?:`[\w.]+`(?:, | and )?)+) (?:in|of) \[([\w/.]+)\]", table)
    names = [(name, file) for some, file in found for name in re.findall(r"`([\w.]+)`", some)]
    assert len(names) > 15
    for name, file in names:
        *_, last = name.split(".")
        pattern = rf"\b(def|class) {last}\b|self\.{last}\b"
        assert re.search(pattern, (ROOT / file).read_text()), f"{name} is not in {file}"


def test_the_readme_has_a_command_of_every_program():
    programs = {program(command)[0] for command in commands(ROOT / "README.md")}
    assert programs >= {"train", "sweep", "data", "extras.sample", "extras.theory", "extras.bench"}


def test_the_digit_of_the_readme_is_a_test_image():
    with Image.open(ROOT / "assets" / "digit.png") as digit:
        test = data.load("digits", image_size=32).splits["test"]
        assert (np.asarray(digit) == test.image(0)).all()
        assert not (np.asarray(digit) == test.image(1)).all()


def test_the_citation_names_the_paper():
    text = (ROOT / "CITATION.cff").read_text()
    assert "Statistical Benefits of Reparameterization among Prompts" in text
    assert "arxiv.org/abs/2410.02200" in text


@pytest.fixture
def torch_as_it_was() -> Iterator[None]:
    """A page may change how tensors are printed and turn gradients off; no later test sees it."""
    with torch.enable_grad():
        yield
    torch.set_printoptions(profile="default")


def test_the_walk_through_one_layer_prints_what_it_says(torch_as_it_was):
    text = (ROOT / "docs" / "walkthrough.md").read_text()
    steps = re.findall(r"^```python\n(.*?)^```\n```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(steps) >= 5
    names: dict = {}
    for code, expected in steps:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        assert printed.getvalue() == expected


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with what the commands name: photos, pairs of texts, and the assets."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for i in range(12):
        path = folder / "photos" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    shutil.copy(path, folder / "photo.jpg")
    shutil.copytree(ROOT / "assets", folder / "assets")
    rows = [{"source": f"name : {name}", "target": f"This is {name}."} for name in "abcdefghijkl"]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("page", "command"),
    [
        pytest.param(page, command, id=f"{page.name}: {command}")
        for page in PAGES
        for command in commands(page)
    ],
)
def test_every_command_of_every_page_has_options_that_its_program_knows(
    page, command, world, monkeypatch, capsys
):
    monkeypatch.chdir(world)
    name, words = program(command)
    if name == "train":
        train.resolve(train.Config(**vars(train.parser().parse_args(words))))
    elif name == "sweep":
        assert sweep.cells(sweep.parse(words))
    else:
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / name.replace(".", "/")) + ".py", run_name="__main__")
        known = re.findall(r"--[\w-]+", capsys.readouterr().out)
        assert {word for word in words if word.startswith("--")} <= set(known)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [line for line in commands(ROOT / "README.md") if not set(shlex.split(line)) & set(NOT_HERE)],
)
def test_every_command_of_the_readme_runs(command, world, monkeypatch):
    monkeypatch.chdir(world)
    name, words = program(command)
    words += SHORT.get(name, "").split() if "--dry-run" not in words else []
    if "photos/" in words:
        words += ["--backbone", "tiny", "--fraction", "1"]
    if "pairs.jsonl" in words:
        words += ["--backbone", "tiny_gpt", "--fraction", "1"]
    if name == "sweep" and "--dry-run" not in words:
        words += ["--fraction", "0.1"]
    if name == "extras.sample":
        words[0] = finished_run(words[0])
    assert importlib.import_module(name).main(words) == 0


def finished_run(name: str) -> str:
    """out/TASK/RUN of a page, which is trained the first time it is asked for."""
    task = {"photos": "photos/"}.get(Path(name).parent.name, Path(name).parent.name)
    if not Path(name).exists():
        words = f"--task {task} --share deep --backbone tiny --epochs 1 --out {name}"
        assert train.main(words.split()) == 0
    return name


def in_form(text: str) -> str:
    """What a run prints with its numbers and folder left out."""
    return re.sub(r"\d[\d.,]*", "0", re.sub(r"\S*/\S+", "FOLDER", text))


@pytest.mark.slow
def test_a_run_prints_its_two_lines_in_the_form_that_the_readme_shows(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    words = "--task digits --shared --device cpu --epochs 2 --out out/form"
    assert train.main(words.split()) == 0
    printed = capsys.readouterr().out
    assert in_form(printed) == in_form(blocks(ROOT / "README.md")[1])


@pytest.mark.slow
def test_the_python_of_the_readme_trains_and_predicts(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    (code,) = blocks(ROOT / "README.md", "python")
    exec(code.replace('share="deep"', 'share="deep", epochs=1'), {})
    (chances,) = eval(capsys.readouterr().out)
    assert len(chances) == 10
    assert sum(chances.values()) == pytest.approx(1, abs=1e-4)
