"""Weights in a file that knows its own checksum, and a model that is filled from one.

A .safetensors file holds tensors and a table of strings, and reading it runs no code. But nothing in it notices a bit
that the disk has turned: the weights would be used as they are, and give a wrong number without a word. So `pack` adds
a string "sha256" over all tensors and all other strings, and `read` compares. Files of others have none, and are taken
as they are. A file that comes without one, such as an asset made elsewhere, is given one by
    python -c "import sys; from support import weights; weights.seal(sys.argv[1])" FILE
"""

import hashlib
import json
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import Tensor, nn

from support.download import write

State = dict[str, Tensor]
Model = TypeVar("Model", bound=nn.Module)


def digest(state: State, strings: dict[str, str]) -> str:
    """sha256 of all strings, and of all tensors in fp32, with their names."""
    made = hashlib.sha256(json.dumps(sorted(strings.items())).encode() if strings else b"")
    for name, value in sorted(state.items()):
        made.update(name.encode() + value.float().contiguous().numpy(force=True).tobytes())
    return made.hexdigest()


def pack(state: State, strings: dict[str, str]) -> bytes:
    return safetensors.save(state, strings | {"sha256": digest(state, strings)})


def seal(path: str | Path) -> None:
    """Give a file its checksum."""
    write(Path(path), pack(*read(path)))


def read(path: str | Path) -> tuple[State, dict[str, str]]:
    """The tensors and strings of a .safetensors file. ValueError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            strings = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    expected = strings.pop("sha256", None)
    if expected and expected != digest(state, strings):
        raise ValueError(f"{path} is damaged (its checksum is another)")
    return state, strings


def fill(kind: type[Model], sizes: dict, state: State, path: str | Path) -> Model:
    """A model of these sizes with these weights, in fp32. ValueError, which names `path`, if they do not fit."""
    other = f"{path} holds another model than a {kind.__name__} of the sizes {sizes}"
    if sizes.get("n_layer", 0) > len(state):  # a lie that would take forever to build
        raise ValueError(f"{other} (it has {len(state)} tensors)")
    with torch.device("meta"):  # nothing is drawn that is overwritten at once, and a lie about a size takes no memory
        model = kind(**sizes)
    expected = model.state_dict()
    for name in sorted(expected.keys() | state):
        if name not in expected or name not in state or state[name].shape != expected[name].shape:
            reason = "is missing" if name not in state else "has another shape" if name in expected else "is unknown"
            raise ValueError(f"{other} ({name} {reason})")
    copies = {name: value.to(torch.float32, copy=True) for name, value in state.items()}  # not the mapped file itself
    model.load_state_dict(copies, assign=True)
    return model.eval()
