"""README.md says nothing that is not so: its files exist, its commands parse, its reading order is complete."""

import re
import shlex
from pathlib import Path

import pytest

from options import Config, parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line.strip() for line in re.findall(r"^(?:.*&& |\s*)(python train\.py .*)$", README, re.MULTILINE)]


def test_every_file_that_the_readme_names_exists():
    named = re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"-r (\S+\.txt)", README)
    assert len(named) > 5
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_module_stands_in_the_reading_order():
    assert not [path.name for path in ROOT.glob("*.py") if f"[{path.name}]({path.name})" not in README]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_training_command_of_the_readme_parses(command):
    words = shlex.split(command, comments=True)[2:]
    assert isinstance(Config(**vars(parser("").parse_args(words))), Config)


def test_the_readme_has_its_two_first_commands():
    assert "pip install -r requirements.txt && python train.py --task digits --shared" in README
    assert "&& pytest" in README
    assert len(COMMANDS) >= 2
