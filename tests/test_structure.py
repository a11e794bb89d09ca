"""The house keeps its shape: who may import what, how big a file may be, how deep the calls go.

Imports are read with ast, wherever in a file they stand; nothing is imported for it.
"""

import ast
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.nn.functional as F

import train

ROOT = Path(__file__).parent.parent
TOP = ["prefix", "vit", "gpt", "data", "train", "sweep"]  # in the order in which one reads them
EXTRAS = ["sample", "theory", "bench"]
MAY_IMPORT = {
    "prefix.py": set(),
    "vit.py": set(),
    "gpt.py": {"vit"},
    "data.py": {"support"},
    "train.py": {"prefix", "vit", "gpt", "data", "support"},
    "sweep.py": {"prefix", "vit", "gpt", "data", "train", "support"},
    "support": {"support"},
    "extras": {*TOP, "support", "extras"},
    "extras/theory.py": set(),
}
FILES = [
    path for folder in (".", "support", "extras", "tests") for path in ROOT.glob(f"{folder}/*.py")
]


def imports(path: Path) -> set[str]:
    """The repository's own packages and modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    assert not [name for name in names if name.startswith(".")], f"{path} has a relative import"
    return {name.split(".")[0] for name in names} & {*TOP, "support", "extras"}


def rule_of(path: Path) -> set[str]:
    name = path.relative_to(ROOT).as_posix()
    return MAY_IMPORT.get(name, MAY_IMPORT.get(name.split("/")[0]))


def test_the_top_level_is_the_six_files():
    assert {path.stem for path in ROOT.glob("*.py")} == set(TOP)
    assert {path.name for path in ROOT.glob("extras/*.py")} >= {f"{name}.py" for name in EXTRAS}


@pytest.mark.parametrize(
    "name",
    [
        name
        for path in sorted(FILES)
        if (name := path.relative_to(ROOT).as_posix()).split("/")[0] != "tests"
    ],
)
def test_no_arrow_runs_up(name):
    assert imports(ROOT / name) <= rule_of(ROOT / name)


def test_the_reading_of_imports_sees_those_inside_functions(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "import os, train\ndef f():\n    from support.files import write\n    import extras.x\n"
    )
    assert imports(path) == {"train", "support", "extras"}


def test_support_has_at_most_nine_modules():
    assert len([path for path in ROOT.glob("support/*.py") if path.name != "__init__.py"]) <= 9


def test_no_line_is_over_100_columns():
    wide = [
        f"{path.name}:{number}"
        for path in FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 100
    ]
    assert not wide


def test_no_module_is_over_450_lines():
    lines = {path.name: len(path.read_text().splitlines()) for path in FILES}
    assert not {name: n for name, n in lines.items() if n > 450}


def own_frames() -> list[str]:
    """The repository's functions on the stack, from `main` down; this file's are left out."""
    names, frame = [], sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if Path(code.co_filename).parent in (ROOT, ROOT / "support"):
            names.append(f"{Path(code.co_filename).name}: {code.co_name}")
        frame = frame.f_back
    return names[::-1]


def test_from_main_to_the_attention_kernel_it_is_at_most_11_functions(tmp_path, monkeypatch):
    stacks, kernel = [], F.scaled_dot_product_attention

    def spy(*args, **kwargs):
        stacks.append(own_frames())
        return kernel(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    small = ["--epochs", "1", "--fraction", "0.02", "--device", "cpu", "--dtype", "fp32"]
    assert train.main(["--task", "digits", "--shared", *small, "--out", str(tmp_path)]) == 0
    assert {stack[0] for stack in stacks} == {"train.py: main"}
    assert all("vit.py: forward" in stack for stack in stacks)
    deepest = max(stacks, key=len)
    assert len(deepest) <= 11, "\n".join(deepest)


@pytest.mark.slow
def test_the_idea_and_the_backbone_work_alone_in_an_empty_folder(tmp_path):
    for name in ("prefix.py", "vit.py"):
        shutil.copy(ROOT / name, tmp_path)
    program = """
import torch
from prefix import Prefix
from vit import ViT
vit = ViT.load("vit_tiny_patch16_224", pretrained=False)
prefix = Prefix(vit.n_layer, vit.n_head, vit.dim, length=5, share="simple")
print(tuple(vit(torch.zeros(2, 3, 224, 224), prefix(vit)).shape))
"""
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.stdout == "(2, 192)\n", ran.stderr


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("digits.npz", "32980f963ad83e40fbe1f298c64c55e7add5e0abbff4c3a6cf829a1b25cb6752"),
        (
            "tiny_gpt.safetensors",
            "2a852f0f3fce9f120cdab930a64487148a2ea4e68122eb81e1b8928ddc7223bc",
        ),
        (
            "tiny_vit.safetensors",
            "111359c3fd7ba8eb0ef40f34282aae9e596c1be6f02f63a8bfb60563be5e606a",
        ),
    ],
)
def test_the_shipped_files_are_whole(name, expected):
    assert hashlib.sha256((ROOT / "assets" / name).read_bytes()).hexdigest() == expected
