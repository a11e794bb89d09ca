"""sweep.py and support/report.py: choice, seeds, splits, halving, workers, what a plan foresees."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from shlex import split

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data as data_module
import sweep as sweep_module
from data import TASKS, Dataset
from support import report
from sweep import METHODS, Worker, best, expand, main, parse, stages
from train import Config, TunedModel, image_loss, method, resolve, train
from vit import ViT

ROOT = Path(__file__).parent.parent
GRID = split("--lr 1 5 --wd 0 0.001 --seed 42 44 --epochs 2 --fraction 0.1")


@pytest.fixture
def words(small, tmp_path) -> list[str]:
    return [*GRID, "--backbone", small, "--out", str(tmp_path), "--device", "cpu", "--workers", "1"]


@pytest.fixture
def performed(monkeypatch) -> list[tuple[str, str]]:
    """Everything that passes through Dataset.batches: (split, "train" or "evaluate")."""
    seen, batches = [], Dataset.batches

    def recorded(self, split, batch, seed=None, **rest):
        seen.append((split, "evaluate" if seed is None else "train"))
        return batches(self, split, batch, seed=seed, **rest)

    monkeypatch.setattr(Dataset, "batches", recorded)
    return seen


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def numbers(folder: Path) -> list[str]:
    """All lines of a sweep without regard to their order."""
    return sorted(json.dumps(line, sort_keys=True) for line in lines(folder))


def line(val: float, lr: float, wd: float = 0.0, status: str = "done") -> dict:
    return {"status": status, "settings": {"lr": lr, "wd": wd}} | (
        {} if status == "diverged" else {"val": val}
    )


def test_the_best_val_accuracy_is_chosen_and_of_equals_the_smallest_settings():
    tried = [
        line(90, 5),
        line(91, 25),
        line(91, 1, 0.01),
        line(91, 1, 0.001),
        line(0, 0.1, status="diverged"),
    ]
    assert best(tried, 1) == [tried[3]]
    assert best(tried, 9) == [tried[3], tried[2], tried[1], tried[0]]  # the diverged run is nowhere
    assert best([tried[4]], 1) == []


def test_the_default_is_the_papers_grid_and_its_five_seeds():
    sweep = parse([])
    assert len(sweep_module.grid(sweep, sweep_module.cells(sweep)[0])) == 40
    assert sweep.lr == (50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1, 0.05)
    assert sweep.wd == (0.01, 0.001, 0.0001, 0)
    assert sweep.seed == (42, 44, 82, 100, 800)
    assert [method(cell) for cell in sweep_module.cells(sweep)] == ["none", "deep"]


def test_a_grid_trains_on_train_and_sees_val_once_a_run_and_a_final_run_sees_test_once(
    words, performed, tmp_path
):
    assert main([*words, "--methods", "deep"]) == 0
    one_grid = [("train", "train")] * 2 + [("val", "evaluate")]
    one_final = [("trainval", "train")] * 2 + [("test", "evaluate")]  # the digits' protocol: VTAB's
    assert performed == one_grid * 4 + one_final * 2
    found = lines(tmp_path / "digits")
    tried, tested = found[:4], found[4:]
    top = max(tried, key=lambda r: (r["val"], -r["settings"]["lr"], -r["settings"]["wd"]))
    assert {r["settings"]["seed"] for r in tried} == {42}
    assert [r["settings"]["seed"] for r in tested] == [42, 44]
    for r in tested:
        assert {k: r["settings"][k] for k in ("lr", "wd")} == {
            k: top["settings"][k] for k in ("lr", "wd")
        }
    assert len({r["test"] for r in tested}) == 2  # the seed does something


def test_a_finished_sweep_recomputes_nothing_and_draws_the_same_report(words, performed, tmp_path):
    words += ["--methods", "none-shallow", "probe"]
    assert main(words) == 0
    files = {
        p: p.read_bytes()
        for p in (tmp_path / "digits").iterdir()
        if p.suffix in (".md", ".png", ".jsonl")
    }
    assert len(files) == 4
    performed.clear()
    assert main(words) == 0
    assert performed == []
    assert files == {p: p.read_bytes() for p in files}
    assert main([*words, "--seed", "82"]) == 0
    assert [use for use in performed if use[1] == "evaluate"] == [
        ("test", "evaluate")
    ] * 2  # one more seed, two methods


def test_a_torn_line_of_results_is_done_again_and_gives_the_same_report(words, tmp_path):
    words = [*words, "--methods", "probe", "--epochs", "8", "--halving"]
    assert main(words) == 0
    folder = tmp_path / "digits-halving"
    content, report = (folder / "results.jsonl").read_bytes(), (folder / "report.md").read_bytes()
    # Also in a line of a stage after which the run has gone on.
    for end in (1, len(content) // 3, len(content) - 5):
        (folder / "results.jsonl").write_bytes(content[:end])
        assert main(words) == 0
        assert sorted((folder / "results.jsonl").read_bytes().splitlines()) == sorted(
            content.splitlines()
        )
        assert (folder / "report.md").read_bytes() == report


def test_a_diverged_run_is_listed_and_never_chosen_and_does_not_stop_the_sweep(words, tmp_path):
    assert main([*words, "--methods", "none", "--lr", "1e30", "1"]) == 0
    text = (tmp_path / "digits" / "report.md").read_text()
    assert [r["status"] for r in lines(tmp_path / "digits")] == ["diverged"] * 2 + ["done"] * 4
    assert "Diverged (2 runs" in text
    assert "base lr 1e+30, weight decay 0.001, seed 42, grid, in epoch 1" in text
    assert "| 1 | 0" in text  # chosen: base lr 1
    assert main([*words, "--methods", "none", "--lr", "1e30"]) == 0
    assert "| all diverged |" in (tmp_path / "digits" / "report.md").read_text()


def test_the_table_has_mean_standard_deviation_and_error_over_seeds_and_the_published_figure(
    words, tmp_path
):
    assert main([*words, "--methods", "deep", "--seed", "1", "2", "3"]) == 0
    tested = [r["test"] for r in lines(tmp_path / "digits") if "test" in r]
    spread = statistics.stdev(tested)
    row = f"| {statistics.mean(tested):.2f} ± {spread:.2f} | {spread / 3**0.5:.2f} | 3 | - |"
    assert row in (tmp_path / "digits" / "report.md").read_text()
    kept = {"settings": {"lr": 25.0, "wd": 1e-4}, "trained": 1, "backbone": 10, "val": 50.0}
    tested = [{"status": "done", "test": 60.0, "settings": {"seed": 42}}]
    cub = report.Row("cub", "deep-shallow", 100, 1.0, 5394, [], [kept], tested)
    assert report.table([cub]).endswith(
        "| 10.00 | 25 | 0.0001 | 50.00 | 60.00 | - | 1 | 87.2 | -27.20 | no |"
    )
    assert report.table([replace(cub, fraction=0.5)]).endswith("| - |")  # the paper used all images


def test_every_method_and_length_can_be_swept(words, tmp_path):
    words += split("--epochs 1 --lr 0.5 --wd 0 --fraction 0.05 --seed 1")
    assert main([*words, "--methods", *METHODS, "--length", "2"]) == 0
    found = lines(tmp_path / "digits")
    assert len(found) == 18 * 2  # 16 prefixes, probe and full: a grid of one run, and a final run
    assert {r["status"] for r in found} == {"done"}
    text = (tmp_path / "digits" / "report.md").read_text()
    assert text.count("| digits |") == 18
    # 5 % of train and val, on which the final runs train
    assert "| digits | 50 | linear probe | - |" in text
    assert "Deep-share, L 2 minus No-share, L 2" in text
    assert main([*words, "--methods", "none", "deep", "--length", "2", "3"]) == 0
    assert len(lines(tmp_path / "digits")) == (18 + 2) * 2
    text = (tmp_path / "digits" / "report.md").read_text()
    assert text.count("| digits |") == 4
    assert "Deep-share, L 3 minus No-share, L 3" in text


def test_fractions_of_the_training_images_make_a_figure_of_their_own(words, tmp_path):
    words += split("--methods none --epochs 1 --lr 0.5 --wd 0 --seed 42")
    assert main(words) == 0
    assert not (tmp_path / "digits" / "fraction.png").exists()
    assert main([*words, "--fraction", "0.05", "0.1"]) == 0
    assert (tmp_path / "digits" / "fraction.png").read_bytes().startswith(b"\x89PNG")
    rows = (tmp_path / "digits" / "report.md").read_text().splitlines()
    assert [row.split(" | ")[1] for row in rows if row.startswith("| digits")] == ["50", "100"]


def test_halving_drops_the_worse_half_at_each_stage_and_survivors_end_as_in_the_full_grid(
    words, performed, tmp_path
):
    words = [*words, "--methods", "deep", "--epochs", "8"]
    assert stages(parse(words), 8) == [(None, 1)]
    assert stages(parse([*words, "--halving"]), 8) == [(1, 2), (2, 1), (4, 1), (None, 1)]
    assert main(words) == 0
    performed.clear()
    assert main([*words, "--halving"]) == 0
    assert (
        performed.count(("train", "train")) == 4 * 1 + 2 * 1 + 1 * 2 + 1 * 4
    )  # nothing is trained twice
    full = {json.dumps(r["settings"]): r for r in lines(tmp_path / "digits")}
    (winner,) = [r for r in lines(tmp_path / "digits-halving") if "val" in r and r["stop"] is None]
    assert (
        full[json.dumps(winner["settings"])] == winner
    )  # bit for bit, although it was stopped three times
    text = (tmp_path / "digits-halving" / "report.md").read_text()
    assert "a grid of 4 runs, 12 of its 32 epochs" in text
    assert "4 runs, 32 of its 32 epochs" in (tmp_path / "digits" / "report.md").read_text()


@pytest.mark.parametrize("name", METHODS)
def test_the_planned_operations_of_a_step_are_those_of_a_real_one(name):
    vit = ViT(image=64, patch=8, dim=64, n_layer=4, n_head=4)  # 65 tokens
    config = resolve(Config(**METHODS[name], length=20, device="cpu"))
    model = TunedModel(config, vit.requires_grad_(False), classes=10)
    pixels = torch.randint(256, (64, 64, 64, 3), dtype=torch.uint8)
    labels = torch.randint(10, (64,))
    # The written-out attention: the CPU's fused kernel has products that are not counted.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss, _ = image_loss(model, vit, False, pixels, labels)
        loss.backward()
    training, evaluation = sweep_module.image_flops(config, vit, classes=10)
    assert training == pytest.approx(counter.get_total_flops() / 64, rel=1e-6)
    if config.tune != "linear":  # backward is not free
        assert evaluation < 0.6 * training


def test_the_plan_of_a_paper_like_task_is_within_15_percent_of_what_its_runs_are_counted_to_need(
    monkeypatch, words, small, capsys
):
    digits = TASKS["digits"]
    task = replace(
        digits,
        group="FGVC",
        final="train",
        backbone=small,
        epochs=2,
        settings={"deep": data_module.Settings(6, 1.0, 0.0)},
    )
    for module in (data_module, sweep_module):
        monkeypatch.setattr(module, "TASKS", {"digits": digits, "birds": task})
    words = split("--tasks paper --methods deep --lr 1 --wd 0 --seed 1 2") + words[-6:]
    assert main([*words, "--dry-run", "--img-per-s", "1000"]) == 0
    (row,) = [
        line.strip("| ").split(" | ")
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| birds")
    ]
    assert row[:6] == ["birds", "Deep-share", "6", "1.0", "3", f"{(1 + 2) * 2 * 800:,}"]
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        assert main(words) == 0
    assert float(row[6]) * 1e15 == pytest.approx(counter.get_total_flops(), rel=0.15)
    assert float(row[7]) == pytest.approx(
        3 * 2 * 800 / 1000 / 3600, rel=0.5
    )  # and evaluation on top


def test_a_dry_run_measures_this_machine_and_writes_nothing(words, tmp_path, capsys):
    assert main([*words, "--dry-run"]) == 0
    assert "measured here" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_groups_expand_to_the_tasks_that_belong_to_them_and_every_task_comes_once():
    fgvc = ["cub", "nabirds", "flowers", "dogs", "cars"]
    assert expand(["fgvc"]) == expand(["paper"]) == fgvc
    assert expand(["cars", "paper", "digits", "digits"]) == ["cars", *fgvc[:4], "digits"]
    assert len(expand(["vtab"])) == 19
    assert not set(expand(["vtab"])) & set(fgvc)


def test_without_ray_the_option_is_refused_in_one_sentence(words, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)  # `import ray` raises ImportError
    assert main([*words, "--ray", "10.0.0.1:6379"]) == 2
    assert "pip install ray" in capsys.readouterr().err


def descendants(pid: int) -> list[tuple[int, str]]:
    """(pid, command line) of all processes below pid."""
    parents, found = {}, [pid]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    names = {child: Path(f"/proc/{child}/cmdline") for child in found[1:]}
    return [(child, path.read_bytes().decode()) for child, path in names.items() if path.exists()]


@pytest.mark.long
@pytest.mark.parametrize("how", [["--workers", "2"], ["--ray", "local"]], ids=["workers", "ray"])
def test_several_workers_find_the_same_lines_and_one_that_is_killed_is_replaced(
    how, words, tmp_path
):
    if "--ray" in how:
        pytest.importorskip("ray")
    words += ["--epochs", "40", "--methods", "deep"]
    assert main([*words, "--out", str(tmp_path / "alone")]) == 0
    command = [sys.executable, "sweep.py", *words, *how, "--out", str(tmp_path / "many")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    killed = None
    while killed is None and process.poll() is None:
        workers = [
            pid
            for pid, name in descendants(process.pid)
            if name.startswith("ray::Worker.run") or "spawn_main" in name
        ]
        if workers and list((tmp_path / "many" / "digits" / "runs").glob("*/state.pt")):
            killed = workers[0]
            os.kill(killed, signal.SIGKILL)
        time.sleep(0.05)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert killed is not None
    many, alone = tmp_path / "many" / "digits", tmp_path / "alone" / "digits"
    assert numbers(many) == numbers(alone)
    assert (many / "report.md").read_bytes() == (alone / "report.md").read_bytes()


def test_a_run_without_memory_is_marked_failed_and_is_done_again_at_the_next_start(
    words, tmp_path, monkeypatch
):
    words += ["--methods", "probe", "--seed", "42"]

    def too_large(config, *rest):
        if config.lr == 5 and config.wd == 0 and not config.final:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return train(config, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "train", too_large)
        assert main(words) == 0
    assert [r["status"] for r in lines(tmp_path / "digits")].count("failed") == 1
    assert "Failed for want of memory (1 run" in (tmp_path / "digits" / "report.md").read_text()
    assert main(words) == 0
    assert {r["status"] for r in lines(tmp_path / "digits")} == {"done"}


def test_a_line_of_another_backbone_is_named_and_never_reported(words, small, tmp_path, capsys):
    words += [
        "--methods",
        "probe",
        "--seed",
        "42",
        "--backbone",
        str(tmp_path / "mine.safetensors"),
    ]
    shutil.copy(small, tmp_path / "mine.safetensors")
    assert main(words) == 0
    vit = ViT.load(small)
    vit.norm.weight.data += 1
    save_file(vit.state_dict(), tmp_path / "mine.safetensors", {"vit": json.dumps(vit.sizes)})
    assert main(words) == 2
    assert "holds results of another backbone than there is now" in capsys.readouterr().err


def test_a_random_backbone_is_its_seeds_own(tmp_path):
    worker, found = Worker(1), []
    for seed in (42, 44, 42):
        config = resolve(Config(backbone="scratch", seed=seed, device="cpu", out=str(tmp_path)))
        found.append(worker.identity(config)["backbone"])
    assert found[0] == found[2] != found[1]


def test_two_tasks_that_would_share_a_folder_are_refused_before_anything_starts(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name / "birds").mkdir(parents=True)
    assert main(["--tasks", "a/birds", "b/birds", "--backbone", "scratch"]) == 2
    assert "two of a/birds, b/birds would share a folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
