"""README.md says nothing that is not so: its files exist, its reading order is complete, its commands run.

Every command of a code block is run. Long ones are shortened by options that come after its own; what needs a network
or a cluster is parsed to the end, so its options are right, and not run.
"""

import json
import re
import shlex
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support import runs as run_folder
from train import Config, parser, resolve

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()]
COMMANDS = sorted(
    {found[0].strip() for line in LINES if (found := re.findall(r"python \w+\.py[^#&]*", line))}
)
SHORT = {
    "train": "--epochs 1 --fraction 0.02 --beams 1",
    "sweep": "--epochs 1 --lr 1 --wd 0 --seed 1 2",
    "theory": "--reps 2 --iterations 10",
    "bench": "memory --rounds 1",
    "data": "",
    "sample": "",
}
ELSEWHERE = ("cub", "e2e", "fashion_mnist")  # tasks whose data are not here


def test_every_file_that_the_readme_names_exists_and_no_figure_is_heavy():
    named = re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"-r (\S+\.txt)", README)
    assert len(named) > 20
    assert not [name for name in named if not (ROOT / name).exists()]
    figures = [ROOT / name for name in named if name.endswith(".png")]
    assert len(figures) >= 3
    assert not [figure for figure in figures if figure.stat().st_size > 300_000]


def test_every_module_stands_in_the_reading_order():
    modules = [
        path.relative_to(ROOT) for path in (*ROOT.glob("*.py"), *ROOT.glob("support/[a-z]*.py"))
    ]
    assert len(modules) > 20
    assert not [path for path in modules if f"[{path.name}]({path})" not in README]


def test_every_function_of_the_table_of_equations_is_where_it_says():
    rows = [
        line
        for line in README.splitlines()
        if line.startswith("|") and "](" in line and "`" in line
    ]
    found = 0
    for row in rows:
        for names, file in re.findall(r"((?:`[\w.]+`(?:, | and )?)+) (?:in|of) \[([\w/.]+)\]", row):
            for name in re.findall(r"`([\w.]+)`", names):
                found += 1
                last = name.split(".")[-1]
                assert re.search(
                    rf"\b(def|class) {last}\b|self\.{last}\b", (ROOT / file).read_text()
                ), (name, file)
    assert found > 15


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with what the commands name: photos, pairs of texts, and finished runs."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for i in range(12):
        path = folder / "photos" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    shutil.copytree(folder / "photos" / "class0", folder / "folder")
    shutil.copy(path, folder / "photo.png")
    rows = [{"source": f"name : {name}", "target": f"This is {name}."} for name in "abcdefghijkl"]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_runs(command, world, monkeypatch):
    monkeypatch.chdir(world)
    script, *words = shlex.split(command)[1:]
    name = script.removesuffix(".py")
    if set(words) & set(ELSEWHERE) or "10.0.0.1:6379" in words:
        assert parses(name, words)
        return
    if name == "sample":
        words = [runs(word) for word in words]
    shortened = [*words, *SHORT[name].split()]
    if "photos/" in words:
        shortened += ["--backbone", "tiny", "--fraction", "1"]
    if "pairs.jsonl" in words:
        shortened += ["--backbone", "tiny_gpt"]
    if name == "sweep" and "--fraction" not in words and "--dry-run" not in words:
        shortened += ["--fraction", "0.1"]
    assert import_module(name).main(shortened) == 0


def runs(word: str) -> str:
    """The README's name of a run; the first time, the run is made."""
    if not re.search(r"RUN\d?$", word):
        return word
    if not (Path(word) / "prefix.safetensors").exists():
        task, share = Path(word).parent.name, "none" if word.endswith("2") else "deep"
        given = ["--task", task, "--share", share, "--out", word]
        assert import_module("train").main([*given, *SHORT["train"].split()]) == 0
    assert run_folder.metadata(Path(word))
    return word


def parses(name: str, words: list[str]) -> bool:
    if name == "train":
        return isinstance(resolve(Config(**vars(parser("").parse_args(words)))), Config)
    if name == "sweep":
        sweep = import_module("sweep")
        return bool(sweep.cells(sweep.parse(words)))
    return name == "data" and words[0] in import_module("data").TASKS


def test_the_readme_has_its_two_first_commands_and_one_of_every_script():
    assert "pip install -r requirements.txt && python train.py --task digits --shared" in README
    assert "&& pytest" in README
    assert {command.split()[1] for command in COMMANDS} == {f"{name}.py" for name in SHORT}
