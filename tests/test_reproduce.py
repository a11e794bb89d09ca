"""The reproduction kit, rehearsed on a made CUB; docs/reproduce.md against the code's settings."""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sweep
from data import TASKS
from extras import collect
from support import benchmarks, report
from train import Config, parser, resolve
from vit import ViT

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reproduce.md").read_text()
COMMANDS = re.findall(r"python (?:sweep|train)\.py[^`\n]*", PAGE)
FILE = {"commits": list, "versions": dict, "hours": dict, "rows": list, "sha256": str}
ROW = {  # what every row of reproduction.json has, and its type
    **{"task": str, "method": str, "length": int, "fraction": float, "images": int},
    **{"tried": list, "ranked": list, "tested": list},
}
RUN = {  # and every run of a row
    **{"settings": dict, "stop": type(None), "identity": dict, "images": int, "backbone": int},
    **{"status": str, "epochs": int, "trained": int, "test": float, "commit": str},
}


@pytest.fixture
def made_cub(tmp_path) -> Path:
    """CUB's layout and its split files' form with 3 classes, and a ViT-B/16 of one layer."""
    rng, names = np.random.default_rng(0), ("001.Albatross", "002.Auklet", "003.Wren")
    splits: dict[str, dict] = {"train": {}, "val": {}, "test": {}}
    for label, name in enumerate(names, 1):
        for i in range(8):
            image = f"{name}/{name[4:]}_{i:04}.jpg"
            path = tmp_path / "data" / "cub" / "CUB_200_2011" / "images" / image
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (260, 300, 3), np.uint8)).save(path)
            splits["train" if i < 4 else "val" if i < 6 else "test"][image] = label
    made: dict[str, dict] = {"files": {}, "sizes": {"classes": 3}}
    for split, images in splits.items():
        path = tmp_path / "data" / "vpt_splits" / "cub" / f"{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(images))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        made["files"][f"cub/{split}"] = {"sha256": digest}
        made["sizes"][split] = len(images)
    (tmp_path / "splits.json").write_text(json.dumps(made))
    torch.manual_seed(0)
    vit = ViT(n_layer=1)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors", {"vit": json.dumps(vit.sizes)})
    return tmp_path


@pytest.mark.slow
def test_the_kit_ends_in_the_same_file_interrupted_or_not_with_one_worker_or_two(
    made_cub, capsys, monkeypatch
):
    words = f"""--tasks cub --methods deep none-shallow --published --epochs 3 --device cpu
        --seed 42 44 --backbone {made_cub}/vit.safetensors --data-dir {made_cub}/data""".split()

    # Once without a break, in this process.
    for name, row in json.loads((made_cub / "splits.json").read_text())["files"].items():
        monkeypatch.setitem(benchmarks.SPLIT_FILES, name, row)
    assert sweep.main([*words, "--out", str(made_cub / "whole"), "--workers", "1"]) == 0

    # Once with two workers, interrupted at the first checkpoint.
    broken = ["--out", str(made_cub / "broken"), "--workers"]
    command = [sys.executable, ROOT / "tests" / "rehearsal.py", made_cub, *words, *broken, "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    while process.poll() is None and not list((made_cub / "broken").rglob("state.pt")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert "Traceback" not in said

    # It goes on, here with one.
    assert sweep.main([*words, *broken, "1"]) == 0

    # The file: its form, and the same results.
    paths = [made_cub / out / "cub" / "reproduction.json" for out in ("whole", "broken")]
    whole, resumed = (json.loads(path.read_bytes()) for path in paths)
    assert {name: type(value) for name, value in whole.items()} == FILE
    assert {"torch", "timm", "cuda"} <= whole["versions"].keys()
    assert len(whole["commits"]) == 1
    for row in whole["rows"]:
        assert {name: type(value) for name, value in row.items()} == ROW
        assert [run["settings"]["seed"] for run in row["tested"]] == [42, 44]
        for run in row["tested"]:
            assert {name: type(value) for name, value in run.items()} == RUN
            assert set(run["identity"]) == {"backbone", "classes", "train", "val", "test"}
    assert whole["rows"] == resumed["rows"]
    settings = whole["rows"][0]["tested"][0]["settings"]
    assert (settings["length"], settings["lr"], settings["wd"]) == (10, 25, 1e-4)  # the paper's

    # Many files make one table; one that was edited is named and left out.
    whole["rows"][0]["tested"][0]["test"] = 100.0
    paths[0].write_text(json.dumps(whole))
    resumed["commits"] = ["a" * 40, "b" * 40]
    paths[1].write_text(json.dumps(resumed | {"sha256": sweep.workers.seal(resumed)}))
    capsys.readouterr()
    assert collect.main([str(path) for path in paths]) == 0
    said = capsys.readouterr().out
    assert f"{paths[0]} was changed after it was written; it is left out" in said
    assert f"{paths[1]} was not made by one clean commit: aaaa" in said
    assert said.count("| cub |") == 2


def test_what_the_paper_does_not_publish_is_said_with_the_command_that_chooses_it(capsys):
    assert sweep.main(["--tasks", "cifar", "--methods", "deep", "--published"]) == 2
    assert "python sweep.py --tasks cifar --methods deep" in capsys.readouterr().err


ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines()]
PAPER = {tuple(row[:2]): row[2:] for row in ROWS if tuple(row[:2]) in report.PUBLISHED}


def test_the_page_has_every_published_setting_and_figure_as_the_code_has_them():
    assert len(PAPER) == 30
    for (task, method), cells in PAPER.items():
        length, lr, wd, *_ = TASKS[task].settings[method]
        paper = report.PUBLISHED[task, method]
        assert numbers(*cells[:4]) == [length, lr, wd, paper], (task, method)


def test_the_page_has_the_settings_of_every_text_task_and_method_of_the_paper():
    found = {tuple(row[:2]): row[2:7] for row in ROWS if len(row) == 10}
    del found["task", "method"], found["---", "---"]
    assert set(found) == set(product(("e2e", "webnlg", "xsum"), ("none", "deep")))
    for (name, method), cells in found.items():
        task = TASKS[name]
        settings = [*task.settings[method][:2], task.batch, task.epochs]
        passed = task.sizes["train"] * task.epochs
        assert numbers(*cells) == [*settings, passed]


@pytest.fixture
def dry_runs(capsys, monkeypatch) -> tuple[dict, list]:
    """Runs, PFLOP and hours that the page's dry runs print: of every row, and the sums."""
    # The head's share of the operations is 1e-5: count them once for all numbers of classes.
    counted, image_flops = {}, sweep.image_flops

    def once(config, vit, classes):
        key = (config.share, config.shallow, config.length)
        counted[key] = counted.get(key) or image_flops(config, vit, classes)
        return counted[key]

    monkeypatch.setattr(sweep, "image_flops", once)
    names = {report.called(method): method for method in sweep.METHODS}
    printed, totals = {}, []
    for command in (command for command in COMMANDS if "--img-per-s" in command):
        assert sweep.main(shlex.split(command)[2:]) == 0
        *rows, total, _ = capsys.readouterr().out.splitlines()[2:]
        for line in rows:
            task, name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            printed[task, names[name]] = numbers(cells[2], *cells[4:])
        cells = total.strip("|").split("|")
        totals.append(numbers(cells[4], *cells[6:]))
    return printed, totals


def numbers(*cells: str) -> list[float]:
    return [float(cell.replace(",", "")) for cell in cells]


@pytest.mark.slow
def test_the_costs_of_the_page_are_those_that_the_dry_run_prints(dry_runs):
    printed, totals = dry_runs

    # FGVC by task, VTAB-1K by group; the sums, and what they are on other cards.
    for key, cells in PAPER.items():
        assert numbers(*cells[4:6]) == pytest.approx(printed[key][1:], rel=2e-3)
    groups = [row for row in ROWS if row[0] in ("natural", "specialized", "structured")]
    for group, count, method, *cells in groups:
        tasks = [name for name in TASKS if TASKS[name].group == f"VTAB-1K {group}"]
        costs = [sum(column) for column in zip(*(printed[t, method] for t in tasks), strict=True)]
        assert [int(count), len(groups)] == [len(tasks), 9]
        assert numbers(*cells[:3]) == pytest.approx(costs, rel=5e-3)
    sums = re.findall(r"All ([\d,]+) runs together: ([\d,]+) PFLOP, ([\d.]+) hours", PAGE)
    for found, costs in zip(sums, totals, strict=True):
        assert numbers(*found) == pytest.approx(costs, rel=2e-3)
    cards = [row[1:] for row in ROWS if row[0].endswith(("assumed", "aimed at"))]
    assert len(cards) == 3
    for rate, *hours in cards:
        expected = [costs[2] * 900 / numbers(rate)[0] for costs in totals]
        assert numbers(*hours) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_page_is_parsed_to_the_end(command):
    script, *words = shlex.split(command)[1:]
    if script == "sweep.py":
        assert sweep.cells(sweep.parse(words))
    else:
        assert resolve(Config(**vars(parser().parse_args(words))))
    assert len(COMMANDS) > 8
