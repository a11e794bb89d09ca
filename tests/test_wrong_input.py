"""Every mistake ends in exit code 2 and one sentence with the fix, and nothing is written."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
from support.files import UsageError, exit_code
from train import Config, load_backbone, resolve, train

MODULES = {name: f"extras.{name}" for name in ("sample", "bench", "theory", "score", "collect")}
ROOT = Path(__file__).parent.parent
LONG = "a" * 300
BROKEN = {  # files of texts with one mistake each, in their second line
    "number.jsonl": '{"source": 1, "target": "a"}',
    "empty.jsonl": '{"source": "a", "target": ""}',
    "list.jsonl": "[1]",
    "deep.jsonl": "[" * 10**5,
    "torn.jsonl": '{"source": "a", "tar',
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder full of mistakes, and two good runs: `run` of images, `texts` of texts."""
    place = tmp_path_factory.mktemp("place")
    for folder in ("empty", "dir/a", "images/a", "one/train/a", "one/val", "one/test/a"):
        (place / folder).mkdir(parents=True)
    for name in ("file", "bad.npz", "bad.safetensors", "dir/a/note.txt", "images/a/bad.png"):
        (place / name).write_text("no such thing")
    (place / "latin.jsonl").write_bytes(b"\xe9")
    (place / "loop").symlink_to("loop")
    pairs = [json.dumps({"source": f"s{i}", "target": f"t{i}"}) + "\n" for i in range(20)]
    (place / "pairs.jsonl").write_text("".join(pairs))
    (place / "few.jsonl").write_text("".join(pairs[:5]))
    for name, line in BROKEN.items():
        (place / name).write_text(pairs[0] + line)
    torch.manual_seed(0)
    for name in ("fine.png", "one/train/a/1.png"):
        Image.new("RGB", (40, 40)).save(place / name)
    for i in range(12):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(place / "images" / "a" / f"{i}.png")
    short = {"epochs": 1, "length": 2, "lr": 1e-3, "device": "cpu"}
    for task, backbone, out in (
        ("digits", "scratch", "run"),
        (str(place / "pairs.jsonl"), "scratch_gpt", "texts"),
    ):
        config = resolve(
            Config(**short, task=task, backbone=backbone, final=out == "run", out=str(place / out))
        )
        model = load_backbone(config)
        train(config, model, data.load(task, **model.inputs))
    return place


# A command line: what its sentence names, and the mend that it says.
TRAIN = {
    "--task digitz": ("no task 'digitz'", "did you mean 'digits'?"),
    "--task=": ("no task ''", "tasks: digits, "),
    "--task file": ("no task 'file'", "tasks: digits, "),
    "--task loop": ("no task 'loop'", "tasks: digits, "),
    "--task ../x": ("no task '../x'", "tasks: digits, "),
    "--task nowhere.jsonl": ("no task 'nowhere.jsonl'", "nor a folder or .jsonl file"),
    f"--task {LONG}": ("File name too long", LONG),
    "--task empty --backbone scratch": ("empty holds no images", "a folder of images per class"),
    "--task dir --backbone scratch": ("dir/a holds no images", "a folder of images per class"),
    "--task one --backbone scratch": ("one/test/a holds no images", "a folder of images per class"),
    "--task images --backbone scratch": (
        "images has one class, 'a'",
        "put a folder for each class into it",
    ),
    "--task few.jsonl --backbone scratch_gpt": (
        "few.jsonl has 5 distinct sources",
        "needs at least 10",
    ),
    "--task number.jsonl --backbone scratch_gpt": ("number.jsonl line 2", "mend it"),
    "--task list.jsonl --backbone scratch_gpt": ("list.jsonl line 2", "mend it"),
    "--task deep.jsonl --backbone scratch_gpt": ("deep.jsonl line 2", "mend it"),
    "--task torn.jsonl --backbone scratch_gpt": ("torn.jsonl line 2", "mend it"),
    "--task empty.jsonl --backbone scratch_gpt": (
        "empty.jsonl line 2: no target, or an empty one",
        "write or delete it",
    ),
    "--task latin.jsonl --backbone scratch_gpt": (
        "latin.jsonl line 1: not UTF-8",
        "save the file as UTF-8",
    ),
    "--task pairs.jsonl --tune linear": ("--tune linear", "use prefix or full"),
    "--task pairs.jsonl --backbone tiny": ("no GPT 'tiny'", "possible are tiny_gpt, "),
    "--task pairs.jsonl --backbone empty": (
        "empty/config.json",
        "give one that you have: --backbone",
    ),
    "--task pairs.jsonl --backbone scratch_gpt --length 500": (
        "--length 407 or less",
        "of 12 positions ('s",
    ),
    "--task pairs.jsonl --backbone scratch_gpt --beams 300": (
        "--beams is 300",
        "it can be 128 at most",
    ),
    "--tune all": ("--tune: invalid choice: 'all'", "(choose from 'prefix', 'linear', 'full')"),
    "--share all": (
        "--share: invalid choice: 'all'",
        "(choose from 'none', 'simple', 'linear', 'deep'",
    ),
    "--shared=yes": ("--shared", "see --help"),
    "--len 3": ("unrecognized arguments: --len 3", "see --help"),
    "extra": ("unrecognized arguments: extra", "see --help"),
    "--length 0": ("--length is 0", "it must be positive"),
    "--length 1.5": ("--length: invalid int value: '1.5'", "see --help"),
    "--lr nan": ("--lr is nan", "it must be positive"),
    "--lr 1e400": ("--lr is inf", "it must be positive"),
    "--lr 1,5": ("--lr: invalid float value: '1,5'", "see --help"),
    "--wd -1": ("--wd is -1.0", "it must not be negative"),
    "--wd nan": ("--wd is nan", "it must not be negative"),
    "--epochs 0": ("--epochs is 0", "it must be positive"),
    "--batch -1": ("--batch is -1", "it must be positive"),
    "--beams 0": ("--beams is 0", "it must be positive"),
    "--seed -1": ("--seed is -1", "it must not be negative"),
    "--seed 99999999999999999999": ("--seed is 9999", "nor have more than 18 digits"),
    "--fraction 0": ("--fraction is 0.0", "above 0 and at most 1"),
    "--fraction 1.5": ("--fraction is 1.5", "above 0 and at most 1"),
    "--fraction nan": ("--fraction is nan", "above 0 and at most 1"),
    "--fraction 0.0001": ("--fraction 0.0001 leaves no image of digits", "take a larger one"),
    "--optimizer adam": (
        "--optimizer: invalid choice: 'adam'",
        "(choose from 'auto', 'sgd', 'adamw')",
    ),
    "--backbone nowhere.safetensors": ("nowhere.safetensors", "give one that you have: --backbone"),
    "--backbone bad.safetensors": (
        "bad.safetensors is damaged",
        "give one that you have: --backbone",
    ),
    "--backbone bad.npz": ("bad.npz", "give one that you have: --backbone"),
    "--backbone vit_of_nobody": (
        "Unknown model (vit_of_nobody)",
        "give one that you have: --backbone",
    ),
    "--backbone tiny_gpt": ("'tiny_gpt' cannot be used", "give one that you have: --backbone"),
    "--device cuda": ("--device is cuda", "use --device cpu"),
    "--dtype fp16": ("--dtype: invalid choice: 'fp16'", "(choose from 'auto', 'fp32', 'bf16')"),
    "--data-dir file": ("--data-dir file is a file", "name a folder"),
    "--out file": ("file cannot be used (File exists)", "choose another --out"),
    "--out file/run": ("file/run cannot be used (Not a directory)", "choose another --out"),
    "--out": ("--out: expected one argument", "see --help"),
    "--out run --epochs 2": ("run holds a run with", "choose another --out or delete that folder"),
}
SWEEP = {
    "--tasks digitz": ("no task 'digitz'", "did you mean 'digits'?"),
    "--tasks": ("--tasks needs", "at least one value"),
    "--tasks=": ("no task ''", "tasks: digits, "),
    "--tasks e2e": ("e2e is text", "train it with train.py"),
    "--tasks empty --backbone scratch": ("empty holds no images", "a folder of images per class"),
    "--methods depe": ("no method 'depe'", "methods: none, "),
    "--methods": ("--methods needs", "at least one value"),
    "--start p.pth": ("--start is for train.py", "a sweep takes --tasks and --methods"),
    "--lr": ("--lr needs", "at least one value"),
    "--lr 0": ("--lr is 0.0", "it must be positive"),
    "--wd -1": ("--wd is -1.0", "it must not be negative"),
    "--seed -1": ("--seed is -1", "it must not be negative"),
    "--length x": ("--length: invalid int value: 'x'", "see --help"),
    "--fraction nan": ("--fraction is nan", "above 0 and at most 1"),
    "--fraction 0.0001": ("--fraction 0.0001 leaves no image of digits", "take a larger one"),
    "--img-per-s 0": ("--img-per-s is 0.0", "it must be positive"),
    "--device tpu": ("--device: invalid choice: 'tpu'", "(choose from 'auto', 'cpu', 'cuda')"),
    "--dtype fp8": ("--dtype: invalid choice: 'fp8'", "(choose from 'auto', 'fp32', 'bf16')"),
    "--backbone nowhere.safetensors": ("nowhere.safetensors", "give one that you have: --backbone"),
    "--data-dir file": ("--data-dir file is a file", "name a folder"),
    "--out file": ("file/digits cannot be used", "choose another --out"),
    "--halve": ("unrecognized arguments: --halve", "see --help"),
    "--workers 0": ("--workers is 0", "it must be positive"),
    "--published": ("publishes no settings of none for digits", "python sweep.py --tasks digits"),
    "--ray 127.0.0.1:1": ("no Ray cluster at '127.0.0.1:1'", "ray start --head"),
}
DATA = {
    "digitz": ("no task 'digitz'", "did you mean 'digits'?"),
    "empty": ("empty holds no images", "a folder of images per class"),
    "torn.jsonl": ("torn.jsonl line 2: Unterminated string starting at: column 17", "mend it"),
    "digits --size 0": ("--size is 0", "it must be positive"),
    "digits --size x": ("--size: invalid int value: 'x'", "see --help"),
    "digits extra": ("unrecognized arguments: extra", "see --help"),
    "digits --data-dir file": ("--data-dir file is a file", "name a folder"),
    "--data-dir file": ("--data-dir file is a file", "name a folder"),
}
SAMPLE = {  # and those of test_sample.py
    "": ("the following arguments are required: run", "see --help"),
    "file fine.png": ("file is not the folder of a finished run", "train one with train.py"),
    "run fine.png --device cuda": ("--device is cuda", "use --device cpu"),
    "run --experts --out file": ("file/experts.png cannot be written", "choose another folder"),
    "run --export new.pth": ("has no prompts of VPT-deep to export", "--share simple"),
    "texts --export new.pth": ("has no prompts of VPT-deep to export", "--export FOLDER"),
    "texts --export file": ("file/adapter_model.safetensors cannot be written", "another folder"),
    "texts": ("no source is given", "write it after the run"),
    "texts torn.jsonl": ("torn.jsonl line 2: Unterminated string starting at", "mend it"),
    "texts nowhere.txt": ("nowhere.txt cannot be read", "put a whole copy"),
    f"texts {LONG + LONG}": ("do not fit: the longest needs ", "shorten these texts"),
    "texts source --beams 300": ("--beams is 300", "it can be 1 to 128"),
    "texts source --beams 0": ("--beams is 0", "it can be 1 to 128"),
}
BENCH = {
    "nonsense": ("no row 'nonsense'", "rows: vit, "),
    "--rounds 0": ("--rounds is 0", "it must be positive"),
    "--rounds x": ("--rounds: invalid int value: 'x'", "see --help"),
}
SCORE = {
    "": ("the following arguments are required", "see --help"),
    "nowhere.jsonl": ("nowhere.jsonl", "cannot be read"),
    "torn.jsonl": ("torn.jsonl line", "mend it"),
}
THEORY = {
    "--seed -1": ("--seed is -1", "it must be at least 0"),
    "--reps 1": ("--reps is 1", "it must be at least 2"),
    "--reps 2.5": ("error: ", "--reps: invalid int value: '2.5'"),
    "--iterations 0": ("--iterations is 0", "it must be at least 10"),
    "--out file": ("file cannot be used (File exists)", "choose another --out"),
    "extra": ("error: ", "unrecognized arguments: extra"),
}
COLLECT = {
    "": ("the following arguments are required: files", "see --help"),
    "nowhere.json": ("nowhere.json is no reproduction.json", "sweep.py leaves one"),
    "torn.jsonl": ("torn.jsonl is no reproduction.json", "sweep.py leaves one"),
}
TABLES = {
    "collect": COLLECT,
    "train": TRAIN,
    "sweep": SWEEP,
    "data": DATA,
    "sample": SAMPLE,
    "bench": BENCH,
    "theory": THEORY,
    "score": SCORE,
}
ROWS = [(script, line) for script, table in TABLES.items() for line in table]


def listing(place: Path) -> list[tuple[str, int]]:
    """All files, and when they were changed. A lock that nobody holds is nothing."""
    files = [path for path in place.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return sorted((str(path), path.stat().st_mtime_ns) for path in files)


@pytest.mark.parametrize(
    ("script", "line"), ROWS, ids=[f"{script} {line[:60]}" for script, line in ROWS]
)
def test_a_mistake_is_one_sentence_with_its_mend_and_exit_code_2(
    script, line, place, capsys, monkeypatch
):
    monkeypatch.chdir(place)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    before = listing(place)
    try:
        code = import_module(MODULES.get(script, script)).main(line.split())
    except SystemExit as end:  # from argparse itself, which only extras.theory leaves it to
        code = end.code
    assert code == 2
    *bars, error = (
        capsys.readouterr().err.strip().splitlines()
    )  # a slow machine shows how far it has come
    assert "error: " in error
    assert "Traceback" not in "".join(bars)
    for part in TABLES[script][line]:
        assert part in error
    assert listing(place) == before


def test_the_table_is_long_and_has_every_script():
    assert len(ROWS) >= 100
    scripts = {
        path.stem
        for path in [*ROOT.glob("*.py"), *ROOT.glob("extras/*.py")]
        if 'if __name__ == "__main__"' in path.read_text()
    }
    assert scripts == TABLES.keys()


@pytest.mark.parametrize("script", TABLES)
def test_help_says_what_a_script_does_and_ends_well(script, capsys):
    with pytest.raises(SystemExit) as end:  # argparse prints and exits
        import_module(MODULES.get(script, script)).main(["--help"])
    assert end.value.code in (0, None)
    assert "usage: " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train", "sample", "bench"])
def test_a_mistake_in_a_shell_is_the_same_sentence_and_no_traceback(script, place):
    line = next(line for line in TABLES[script] if line and "file" not in line)
    command = [sys.executable, "-m", MODULES.get(script, script), *line.split()]
    found = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=place, env=found, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    (error,) = ran.stderr.splitlines()
    assert all(part in error for part in ("error: ", *TABLES[script][line]))


def test_no_memory_a_folder_that_may_not_be_read_and_a_bug_are_told_apart(capsys):
    def raises(error: BaseException):
        def work():
            raise error

        return work

    assert (
        exit_code(
            raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore."))
        )
        == 2
    )
    assert (
        exit_code(raises(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")))
        == 2
    )
    assert exit_code(raises(MemoryError())) == 2
    assert exit_code(raises(PermissionError(13, "Permission denied", "data/cub"))) == 2
    assert exit_code(raises(UsageError("mend\nthis"))) == 2
    assert exit_code(raises(KeyboardInterrupt()), "stopped; go on") == 130
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 6
    assert all("a smaller --batch or --length needs less" in error for error in errors[:3])
    assert errors[3:] == [
        "error: [Errno 13] Permission denied: 'data/cub'",
        "error: mend this",
        "stopped; go on",
    ]
    for bug in (RuntimeError("shapes do not fit"), TypeError("x")):
        with pytest.raises(
            type(bug)
        ):  # which is not the user's, and is to be reported with its traceback
            exit_code(raises(bug))
    assert exit_code(lambda: None) == 0
    assert exit_code(lambda: 3) == 3
