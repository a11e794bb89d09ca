"""What a run leaves on disk: how it is cut off without harm, goes on, and ends.

    config.json            the settings; a folder takes no run with others
    state.pt               after every epoch: weights, momentum and metrics, all that `resume` needs; gone at the end
    metrics.jsonl          a row per epoch; the last one has a "status" and what the run is judged by
    prefix.safetensors     at the end: prefix and head, with all that `sample.py` must know to use them
    backbone.safetensors   at the end, if the backbone itself was trained
    curve.png              loss, and accuracy or val loss, over the epochs of a final run
    generated.jsonl        of a text task: source, references and output

Every file is written under another name and renamed, so it is whole or absent. A run with a `state.pt` is not over, and
goes on from that file alone: a kill at any moment costs at most the epoch it fell into. Of a run that is over, the
weights are read, which know its metrics. Both have checksums: what a disk has changed is refused or mended, never used.
"""

import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import nn

from support import files, report
from support.files import UsageError, write

UNSEEN = {
    "out",
    "data_dir",
    "device",
    "compile",
}  # settings that may change while a run is under way


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Make a folder and keep other processes out of it. The system lets go if this one is killed."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"another process is at work in {folder}; wait for it, or choose another --out"
        ) from None
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be used ({error.strerror}); choose another --out"
        ) from error
    try:
        yield
    finally:
        (folder / ".lock").unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):
            for path in made:
                path.rmdir()  # if nothing has come into it


def resume(
    out: Path, settings: dict, model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[dict]:
    """Bring model and optimizer to where the run in `out` stands and return its metrics; a new run has none.

    UsageError if the folder holds a run with other settings, or files that do not fit or cannot be read.
    """
    if not any(
        (out / name).exists()
        for name in ("config.json", "state.pt", "metrics.jsonl", "prefix.safetensors")
    ):
        write(out / "config.json", json.dumps(settings, indent=2).encode())
    try:
        old = json.loads((out / "config.json").read_bytes())
        clash = [
            f"{k} {old.get(k)} (not {v})"
            for k, v in settings.items()
            if k not in UNSEEN and old.get(k) != v
        ]
        if clash:
            raise UsageError(
                f"{out} holds a run with {', '.join(clash)}; choose another --out or delete that folder"
            )
        if (out / "state.pt").exists():
            return restore(out / "state.pt", model, optimizer)
        return finished(out, model)
    except UsageError:
        raise
    except Exception as error:  # whatever a damaged file leads to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"{out} cannot be resumed ({reason}); delete that folder to start anew"
        ) from error


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict]:
    """Where an unfinished run stands. PyTorch writes checksums into its archive, but does not look at them."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{path.name} is damaged in {damaged}")
    state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["history"]


def finished(out: Path, model: nn.Module) -> list[dict]:
    """The metrics of a run that is over; its weights go into the model. [] if it has just begun."""
    path = out / "metrics.jsonl"
    if (out / "prefix.safetensors").exists():
        history = load(out, model)["history"]
        if not path.exists() or path.read_bytes() != lines(history):
            write(path, lines(history))  # the weights know it under their checksum
        return history
    rows = [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    if rows and (
        rows[-1].get("status") != "diverged"
        or [row["epoch"] for row in rows] != [*range(1, 1 + len(rows))]
    ):
        raise ValueError(f"{path.name} is of no diverged run, and prefix.safetensors is missing")
    return rows


def load(out: Path, model: nn.Module) -> dict:
    """Fill the model with what a finished run kept, and return its facts. ValueError or RuntimeError if damaged."""
    state, strings = files.read_weights(out / "prefix.safetensors")
    if model.backbone is not None:
        kept, _ = files.read_weights(out / "backbone.safetensors")
        state |= {f"backbone.{name}": value for name, value in kept.items()}
    model.load_state_dict(state)
    return {name: json.loads(text) for name, text in strings.items()}


def lines(history: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in history).encode()


def save(
    out: Path,
    facts: dict,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict],
    title: str = "",
) -> None:
    """While the last row of metrics has no status: state.pt. Then: what a user keeps, and state.pt goes.

    facts: what prefix.safetensors says of itself. title: of a curve, if one is to be drawn.
    """
    status = history[-1].get("status")
    if status is None:
        buffer = io.BytesIO()
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history},
            buffer,
        )
        write(out / "state.pt", buffer.getvalue())
    if status == "done":
        state = {
            name: value
            for name, value in model.state_dict().items()
            if not name.startswith("backbone.")
        }
        known = {name: json.dumps(value) for name, value in (facts | {"history": history}).items()}
        if model.backbone is not None:
            sizes = {
                type(model.backbone).__name__.lower(): json.dumps(model.backbone.sizes)
            }  # `from_file` reads it
            write(out / "backbone.safetensors", files.pack(model.backbone.state_dict(), sizes))
        write(out / "prefix.safetensors", files.pack(state, known))
    if title:
        write(out / "curve.png", report.curve(history, title))
    write(out / "metrics.jsonl", lines(history))
    if status is not None:  # the run is over
        for leftover in (
            out / "state.pt",
            *out.glob(".*.part"),
        ):  # a kill may have left a part of a file
            leftover.unlink(missing_ok=True)


def metadata(out: Path) -> dict:
    """What prefix.safetensors of a finished run says of itself and its data. UsageError if there is none."""
    try:
        known = {
            name: json.loads(text)
            for name, text in files.read_weights(out / "prefix.safetensors")[1].items()
        }
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{out} is not the folder of a finished run ({error}); train one with train.py"
        ) from error
    if not {"config", "fingerprint", "classes", "history"} <= known.keys():
        raise UsageError(
            f"{out} was left by an older version, which kept no settings with the weights; train it anew"
        )
    return known


def fingerprint(backbone: nn.Module) -> str:
    """Which weights these are: a prefix fits no others."""
    return files.weights_digest(backbone.state_dict(), {})[:16]
