"""The reproduction kit, rehearsed on a made CUB; docs/reproduce.md against the code's settings."""

import hashlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sweep
from data import TASKS
from extras import collect
from support import report
from train import Config, parser, resolve
from vit import ViT

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reproduce.md").read_text()
COMMANDS = re.findall(r"python (?:sweep|train)\.py[^`\n]*", PAGE)
ROW = {  # what every row of reproduction.json has, and its type
    **{"task": str, "method": str, "fraction": float, "images": int, "settings": dict},
    **{"identity": dict, "test": dict, "paper": float, "difference": float},
    **{"standard_error": float, "agrees": bool},
}
FILE = {"commits": list, "versions": dict, "hours": dict, "rows": list, "sha256": str}


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
def test_the_kit_ends_in_the_same_file_interrupted_or_not_with_one_worker_or_two(made_cub, capsys):
    words = f"""--tasks cub --methods deep none-shallow --published --epochs 6 --device cpu
        --seed 42 44 --backbone {made_cub}/vit.safetensors --data-dir {made_cub}/data"""

    def start(out: str, workers: str) -> subprocess.Popen:
        command = [sys.executable, ROOT / "tests" / "rehearsal.py", made_cub, *words.split()]
        command += ["--out", made_cub / out, "--workers", workers]
        return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def end(process: subprocess.Popen) -> int:
        _, said = process.communicate(timeout=300)
        assert process.returncode in (0, 130), said
        return process.returncode

    # Once without a break; once with two workers, interrupted at the first checkpoint and resumed.
    assert end(start("whole", "1")) == 0
    broken = start("broken", "2")
    while broken.poll() is None and not list((made_cub / "broken").rglob("state.pt")):
        time.sleep(0.02)
    broken.send_signal(signal.SIGINT)
    assert end(broken) == 130
    assert end(start("broken", "2")) == 0

    # The file: its form, and the same results.
    paths = [made_cub / out / "cub" / "reproduction.json" for out in ("whole", "broken")]
    whole, resumed = (json.loads(path.read_bytes()) for path in paths)
    assert {name: type(value) for name, value in whole.items()} == FILE
    for row in whole["rows"]:
        assert {name: type(value) for name, value in row.items()} == ROW
        assert set(row["identity"]) == {"backbone", "classes", "train", "val", "test"}
    assert whole["rows"] == resumed["rows"]
    assert [row["paper"] for row in whole["rows"]] == [87.8, 85.1]
    settings = whole["rows"][0]["settings"]
    assert (settings["length"], settings["lr"], settings["wd"]) == (10, 25, 1e-4)  # the paper's

    # Many files make one table; one that was edited is named and left out.
    whole["rows"][0]["test"]["42"] = 100.0
    paths[0].write_text(json.dumps(whole))
    resumed["commits"] = ["a" * 40, "b" * 40]
    paths[1].write_text(json.dumps(resumed | {"sha256": sweep.workers.seal(resumed)}))
    assert collect.main([str(path) for path in paths]) == 0
    said = capsys.readouterr().out
    assert f"{paths[0]} was changed after it was written; it is left out" in said
    assert f"{paths[1]} was not made by one clean commit: aaaa" in said
    assert said.count("| cub |") == 2


def test_what_the_paper_does_not_publish_is_said_with_the_command_that_chooses_it(capsys):
    assert sweep.main(["--tasks", "cifar", "--methods", "deep", "--published"]) == 2
    assert "python sweep.py --tasks cifar --methods deep" in capsys.readouterr().err


def test_the_page_has_every_published_setting_and_figure_as_the_code_has_them():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines()]
    found = {tuple(row[:2]): row[2:6] for row in rows if row[0] in report.PUBLISHED}
    assert len(found) == 30
    for (task, method), cells in found.items():
        length, lr, wd, *_ = TASKS[task].settings[method]
        paper = report.PUBLISHED[task][report.METHODS.index(method)]
        assert [float(cell) for cell in cells] == [length, lr, wd, paper], (task, method)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_page_is_parsed_to_the_end(command):
    script, *words = shlex.split(command)[1:]
    if script == "sweep.py":
        assert sweep.cells(sweep.parse(words))
    else:
        assert resolve(Config(**vars(parser("").parse_args(words))))
    assert len(COMMANDS) > 8
