"""Kills, Ctrl-C, full disks and company cost at most an epoch; results are equal bit for bit.

pytest -m long tests/test_faults.py         real processes, many times
"""

import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from processes import Started
from test_images import many

from data import load
from support import report, runs
from support.files import exit_code
from train import Config, train

ROOT = Path(__file__).parent.parent
SHORT = "--epochs 8 --fraction 0.1 --device cpu"
RUN = shlex.split(f"{SHORT} --length 4 --lr 1 --share deep")
GRID = shlex.split(f"{SHORT} --lr 1 5 --wd 0 0.001 --seed 42 44 --halving --workers 2")


@pytest.fixture
def run(small) -> list[str]:
    """A run of a second."""
    return [*RUN, "--backbone", small]


def outcome(folder: Path) -> dict[str, object]:
    """All that a finished run leaves, bit for bit, but its settings, which name its folder."""
    found: dict[str, object] = {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != "config.json"
    }
    for path in folder.glob("*.safetensors"):  # the strings in a header come in any order
        state, strings = runs.read_weights(path)
        strings.pop("config", None)
        tensors = {name: value.numpy().tobytes() for name, value in state.items()}
        found[path.name] = json.dumps(strings, sort_keys=True), tensors
    return found


def one_sentence(said: str) -> str:
    """The last line, which is all that went to stderr."""
    (error,) = [line for line in said.splitlines() if "rror" in line or "Traceback" in line]
    assert error.startswith("error: "), said
    return error


# Kills.


def killed_until_it_ends(
    script: str, words: list[str], broken: Path, life: float, same: Callable, times: int
) -> None:
    """Kill a command at random moments of its life; whenever it ends, its end is the right one."""
    rng = random.Random(0)
    kills = 0
    while kills < times or broken.exists():
        process = Started(script, *words, "--out", broken)
        if kills < times and process.runs(rng.uniform(0, life)):
            process.stop()
            kills += process.end()[0] == -signal.SIGKILL
            continue
        code, said = process.end()
        assert code == 0, said
        same()
        shutil.rmtree(broken)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "times"),
    [
        pytest.param(["--share", "deep"], 2, id="deep"),
        pytest.param(["--share", "deep"], 25, id="deep, often", marks=pytest.mark.long),
        pytest.param(["--tune", "full", "--lr", "0.1"], 25, id="full", marks=pytest.mark.long),
    ],
)
def test_a_run_killed_at_random_moments_ends_as_an_unbroken_one(method, times, run, tmp_path):
    words, whole, broken = [*run, *method], tmp_path / "whole", tmp_path / "broken"
    assert (
        Started("train", *words, "--out", tmp_path / "first").end()[0] == 0
    )  # the server of processes is warm
    start = time.perf_counter()
    assert Started("train", *words, "--out", whole).end()[0] == 0
    life, expected = time.perf_counter() - start, outcome(whole)

    def same():
        assert outcome(broken) == expected

    killed_until_it_ends("train", words, broken, life, same, times)
    assert (
        outcome(tmp_path / "first") == expected
    )  # the same seed in another process: the same bits
    assert Started("train", *words, "--seed", "7", "--out", whole / "other").end()[0] == 0
    assert outcome(whole / "other") != expected


@pytest.mark.long
def test_a_sweep_killed_at_random_moments_ends_in_the_same_report(small, tmp_path):
    words, whole, broken = [*GRID, "--backbone", small], tmp_path / "whole", tmp_path / "broken"
    assert Started("data").end()[0] == 0  # the server of processes is warm
    start = time.perf_counter()
    assert Started("sweep", *words, "--out", whole).end()[0] == 0
    life, names = time.perf_counter() - start, ("report.md", "report.png")

    def same():
        ended, expected = broken / "digits-halving", whole / "digits-halving"
        assert [(ended / name).read_bytes() for name in names] == [
            (expected / name).read_bytes() for name in names
        ]
        assert lines(ended) == lines(expected)

    killed_until_it_ends("sweep", words, broken, life, same, times=12)
    assert len(lines(whole / "digits-halving")) == 2 * (
        4 + 2 + 1 + 1 + 2
    )  # of two methods: the stages, the seeds


def lines(folder: Path) -> list[str]:
    return sorted((folder / "results.jsonl").read_text().splitlines())


class Dead(BaseException):
    """The process is no more."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        {"share": "deep"},
        pytest.param({"tune": "full", "lr": 0.1}, marks=pytest.mark.long),
        {"lr": 1e30},
    ],
)
def test_a_process_may_die_before_any_of_its_touches_of_the_disk(
    method, frozen, digits16, tmp_path, monkeypatch
):
    quick = {"fraction": 0.05, "epochs": 2, "length": 2, "lr": 1.0, "wd": 0.001, "device": "cpu"}
    config = Config(**quick | method, out=str(tmp_path / "whole"))
    few = replace(digits16, splits=digits16.splits | {"test": digits16.splits["val"]})
    monkeypatch.setattr(report, "curve", lambda *_: b"a picture")  # drawing it takes longer
    train(config, frozen, few)
    touches, last = 0, 10**6

    def mortal(touch):
        def touched(*words, **named):
            nonlocal touches
            touches += 1
            if touches >= last:
                raise Dead  # and from now on at every touch: there is no tidying up after a kill
            return touch(*words, **named)

        return touched

    with monkeypatch.context() as patch:
        for place, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (Path, "open")):
            patch.setattr(place, name, mortal(getattr(place, name)))
        os.mkdir(tmp_path / "count")
        os.mknod(tmp_path / "count" / ".state.pt.1.part")
        train(replace(config, out=str(tmp_path / "count")), frozen, few)
        count = touches
        for last in range(1, count + 1):
            out, touches = tmp_path / str(last), 0
            os.mkdir(out)
            os.mknod(out / ".state.pt.1.part")  # of a process that was killed before
            with pytest.raises(Dead):
                train(replace(config, out=str(out)), frozen, few)
    for last in range(1, count + 1):
        train(replace(config, out=str(tmp_path / str(last))), frozen, few)
        assert outcome(tmp_path / str(last)) == outcome(tmp_path / "whole")
    assert count > 10


GOES_ON = "stopped; the same command goes on from the last finished epoch"


@pytest.mark.slow
def test_ctrl_c_in_a_shell_ends_in_a_sentence_and_130(tmp_path):
    command = [sys.executable, "train.py", *RUN, "--epochs", "10000", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "state.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert (process.communicate()[1].splitlines()[-1], process.returncode) == (GOES_ON, 130)


@pytest.mark.long
@pytest.mark.parametrize("script", ["train", "sweep"])
def test_ctrl_c_at_random_moments_ends_in_a_sentence_and_the_same_command_goes_on(
    script, run, small, tmp_path
):
    words = [*run, "--epochs", "40"] if script == "train" else [*GRID, "--backbone", small]
    rng, stopped = random.Random(0), 0
    for name in ("warm", "whole"):  # the server of processes is warm, so the second tells the time
        start = time.perf_counter()
        assert Started(script, *words, "--out", tmp_path / name).end()[0] == 0
    life, broken = time.perf_counter() - start, tmp_path / "broken"
    lock = broken / ("" if script == "train" else "digits-halving") / ".lock"
    for _ in range(10):
        process = Started(script, *words, "--out", broken)
        while not lock.exists() and process.runs(0.002):
            pass
        if process.runs(rng.uniform(0, life / 20)):  # ten of them are less than a life
            process.stop(signal.SIGINT)
        code, said = process.end()
        stopped += code == 130
        assert code == 0 or (code, said.splitlines()[-1]) == (130, GOES_ON), said
        assert "Traceback" not in said
    assert stopped > 0
    assert Started(script, *words, "--out", broken).end()[0] == 0
    for path in (tmp_path / "whole").rglob("metrics.jsonl"):
        assert path.read_bytes() == (broken / path.relative_to(tmp_path / "whole")).read_bytes()


def test_ctrl_c_that_an_import_turns_into_an_error_of_its_own_still_ends_in_the_sentence(capsys):
    def work() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError(
                "cannot import name 'FigureCanvasAgg'"
            ) from None  # what matplotlib's backend does

    assert exit_code(work, "stopped") == 130
    assert capsys.readouterr().err == "stopped\n"
    with pytest.raises(
        ImportError
    ):  # without Ctrl-C it is a fault of the program, and is shown as one
        exit_code(lambda: import_module("no_such_module"))


@pytest.mark.long
def test_ctrl_c_while_images_are_decoded_ends_in_a_sentence_and_leaves_nothing(tmp_path):
    (tmp_path / "mine").mkdir()
    many(tmp_path / "mine" / "a", 300)
    many(tmp_path / "mine" / "b", 3)
    process = Started("data", tmp_path / "mine", "--data-dir", tmp_path / "data")
    while not list(tmp_path.rglob("*.part")) and process.runs(0.002):
        pass
    process.stop(signal.SIGINT)  # the terminal sends it to the decoding workers too
    assert process.end() == (130, "stopped; the same command goes on where it was\n")
    assert not [path for path in tmp_path.rglob("*.pixels*") if path.suffix != ".lock"]
    assert Started("data", tmp_path / "mine", "--data-dir", tmp_path / "data").end()[0] == 0


# Full disks: no file may be larger than so many bytes.


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_checkpoint_or_a_line_of_metrics_costs_nothing_but_time(
    run, tmp_path
):
    out, words = (
        tmp_path / "run",
        [*run, "--lr", "1e30"],
    )  # diverges, so that its first file is its metrics
    code, said = Started("train", *words, "--out", out, most=10).end()
    assert (code, list(out.parent.iterdir())) == (2, [])
    assert "config.json cannot be written (File too large); make room" in one_sentence(said)
    out.mkdir()
    shutil.copy(config_of(words, tmp_path), out / "config.json")
    code, said = Started("train", *words, "--out", out, most=10).end()
    assert (code, [path.name for path in out.iterdir()]) == (2, ["config.json"])
    assert "metrics.jsonl cannot be written (File too large); make room" in one_sentence(said)
    assert (
        Started("train", *words, "--out", out).end()[0] == 3
    )  # there is room again: it diverges, as it should
    shutil.rmtree(out)
    code, said = Started("train", *run, "--out", out, most=5000).end()
    assert (code, [path.name for path in out.iterdir()]) == (2, ["config.json"])
    assert "state.pt cannot be written (File too large); make room" in one_sentence(said)
    for folder in (out, tmp_path / "whole"):
        assert Started("train", *run, "--out", folder).end()[0] == 0
    assert outcome(out) == outcome(tmp_path / "whole")


def config_of(words: list[str], tmp_path: Path) -> Path:
    assert Started("train", *words, "--out", tmp_path / "elsewhere").end()[0] == 3
    return tmp_path / "elsewhere" / "config.json"


@pytest.mark.long
def test_a_disk_that_is_full_for_the_cache_or_the_results_costs_nothing_but_time(small, tmp_path):
    (tmp_path / "mine").mkdir()
    for name in "ab":
        many(tmp_path / "mine" / name, 10)
    words = [tmp_path / "mine", "--data-dir", tmp_path / "data"]
    code, said = Started("data", *words, most=50_000).end()
    assert code == 2
    assert "cannot be written (File too large); give a folder on a disk with room" in one_sentence(
        said
    )
    assert not [
        path for path in (tmp_path / "data").rglob("*") if path.is_file() and path.suffix != ".lock"
    ]
    assert Started("data", *words).end()[0] == 0
    words = [
        *GRID,
        "--no-halving",
        "--backbone",
        small,
        "--out",
        tmp_path / "out",
        "--methods",
        "probe",
    ]
    assert Started("sweep", *words).end()[0] == 0
    results = tmp_path / "out" / "digits" / "results.jsonl"
    expected = sorted(results.read_bytes().splitlines())  # two workers finish in any order
    results.unlink()
    code, said = Started("sweep", *words, most=100).end()
    assert code == 2
    assert "results.jsonl cannot be written (File too large); make room" in one_sentence(said)
    assert Started("sweep", *words).end()[0] == 0
    assert sorted(results.read_bytes().splitlines()) == expected  # nothing finished was lost


# Company.


@pytest.mark.slow
def test_a_second_process_on_a_folder_is_refused_and_a_copy_of_it_goes_on(run, tmp_path):
    words = [*run, "--epochs", "30"]
    first = Started("train", *words, "--out", tmp_path / "run")
    while not (tmp_path / "run" / "state.pt").exists() and first.runs(0.01):
        pass
    first.stop(signal.SIGSTOP)  # so that it does not end before the second has come
    code, said = Started("train", *words, "--out", tmp_path / "run").end()
    assert code == 2, said
    assert f"another process is at work in {tmp_path / 'run'}; wait for it" in one_sentence(said)
    first.stop(signal.SIGCONT)
    subprocess.run(
        ["cp", "-r", tmp_path / "run", tmp_path / "copy"], capture_output=True
    )  # while it is written to
    assert first.end()[0] == 0
    assert Started("train", *words, "--out", tmp_path / "copy").end()[0] == 0
    assert outcome(tmp_path / "copy") == outcome(tmp_path / "run")
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.long
def test_a_second_sweep_on_a_folder_is_refused_while_the_first_is_at_work(small, tmp_path):
    words = [*GRID, "--backbone", small, "--out", tmp_path, "--methods", "probe"]
    first = Started("sweep", *words, "--epochs", "10000")
    while not (tmp_path / "digits-halving" / "runs").exists() and first.runs(0.01):
        pass
    code, said = Started("sweep", *words).end()
    assert code == 2
    assert "another process is at work" in one_sentence(said)
    first.stop()
    assert first.end()[0] == -signal.SIGKILL
    assert Started("sweep", *words).end()[0] == 0  # a killed sweep leaves no lock


@pytest.mark.long
def test_of_two_processes_on_one_cache_the_second_takes_over_when_the_first_is_killed(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in "ab":
        many(tmp_path / "mine" / name, 500)
    words = [tmp_path / "mine", "--data-dir", tmp_path / "data"]
    first = Started("data", *words)
    while not list(tmp_path.rglob("*.part")) and first.runs(0.002):
        pass
    first.stop(signal.SIGSTOP)  # so that it does not end before the second has come
    second = Started("data", *words)
    assert second.runs(0.5)
    first.stop()
    assert first.end()[0] == -signal.SIGKILL
    code, said = second.end()
    assert code == 0
    assert "another process is making" in said
    assert load(str(tmp_path / "mine"), tmp_path / "data", 224).count("train") == 800


def test_where_an_open_file_cannot_be_deleted_a_run_ends_well(
    frozen, digits16, tmp_path, monkeypatch
):
    """As on Windows: unlink of a file that this process has open fails."""
    unlink = os.unlink

    def windows(path, *words, **named):
        held = set()
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                held.add(os.readlink(f"/proc/self/fd/{number}"))
        if os.path.abspath(path) in held:
            raise PermissionError(13, "The process cannot access the file", str(path))
        return unlink(path, *words, **named)

    monkeypatch.setattr(os, "unlink", windows)
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: windows(path))
    for last in ("first", "again"):
        with (tmp_path / "open").open("w"), pytest.raises(PermissionError):
            (tmp_path / "open").unlink()
        quick = {"fraction": 0.05, "epochs": 2, "length": 2, "lr": 1.0, "wd": 0.001}
        config = Config(**quick, device="cpu", out=str(tmp_path / "run"))
        assert train(config, frozen, digits16).status == "done", last
        assert not (tmp_path / "run" / ".lock").exists()

    # A clean-up step never turns success into failure.
    def never(path, *words, **named):
        raise PermissionError(13, "The process cannot access the file", str(path))

    monkeypatch.setattr(os, "unlink", never)
    monkeypatch.setattr(Path, "unlink", never)
    config = replace(config, out=str(tmp_path / "kept"))
    assert train(config, frozen, digits16).status == "done"
    assert train(config, frozen, digits16).status == "done"
