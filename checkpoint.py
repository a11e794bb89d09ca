"""What a run leaves on disk: how it is cut off without harm, goes on, and ends.

    config.json            the settings; a folder takes no run with others
    state.pt               after every epoch: weights, momentum and metrics, all that `resume` needs; gone at the end
    metrics.jsonl          a row per epoch; the last one has a "status" and the accuracy on val or test
    prefix.safetensors     prefix and head, at the end (backbone.safetensors too, if the backbone was trained)
    curve.png              loss and training accuracy over the epochs, of a final run

Every file is written under another name and renamed, so it is whole or absent; `state.pt` is the only one that is read
back in an unfinished run, so a kill at any moment costs at most the epoch it fell into.
"""

import io
import json
import pickle
from pathlib import Path

import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import nn

from data import UsageError, write

UNSEEN = {"out", "data_dir", "device", "compile"}  # settings that may change while a run is under way


def resume(out: Path, settings: dict, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict]:
    """Bring model and optimizer to where the run in `out` stands and return its metrics; a new run has none.

    UsageError if the folder holds a run with other settings, or files that do not fit or cannot be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "config.json").exists():
        write(out / "config.json", json.dumps(settings, indent=2).encode())
    try:
        old = json.loads((out / "config.json").read_text())
        clash = [f"{k} {old.get(k)} (not {v})" for k, v in settings.items() if k not in UNSEEN and old.get(k) != v]
        if clash:
            raise UsageError(f"{out} holds a run with {', '.join(clash)}; choose another --out or delete that folder")
        if history := finished(out):
            if history[-1]["status"] == "done":
                load(out, model)
            return history
        if not (out / "state.pt").exists():
            return []
        state = torch.load(out / "state.pt", map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return state["history"]
    except (ValueError, RuntimeError, KeyError, EOFError, FileNotFoundError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{out} cannot be resumed ({reason}); delete that folder to start anew") from error


def finished(out: Path) -> list[dict]:
    """The metrics of the run in `out` if it is over (done or diverged), else []."""
    path = out / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return rows if rows and "status" in rows[-1] else []


def load(out: Path, model: nn.Module) -> None:
    """Fill the model with what a finished run kept. ValueError or RuntimeError if it is damaged or of another shape."""
    try:
        state = safetensors.load_file(out / "prefix.safetensors")
        if model.backbone is not None:
            kept = safetensors.load_file(out / "backbone.safetensors")
            state |= {f"backbone.{name}": value for name, value in kept.items()}
    except SafetensorError as error:
        raise ValueError(f"its weights are damaged: {error}") from error
    model.load_state_dict(state)


def save(
    out: Path, settings: dict, model: nn.Module, optimizer: torch.optim.Optimizer, history: list[dict], title: str
) -> None:
    """After an epoch that is not the last: state.pt. After the last: what a user keeps, and state.pt goes."""
    metrics = "".join(json.dumps(row) + "\n" for row in history).encode()
    status = history[-1].get("status")
    if status is None:
        buffer = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history}, buffer)
        write(out / "state.pt", buffer.getvalue())
    if status == "done":
        state = {name: value for name, value in model.state_dict().items() if not name.startswith("backbone.")}
        write(out / "prefix.safetensors", safetensors.save(state, {"config": json.dumps(settings)}))
        if model.backbone is not None:
            sizes = {"vit": json.dumps(model.backbone.sizes)}  # `ViT.from_file` reads it
            write(out / "backbone.safetensors", safetensors.save(model.backbone.state_dict(), sizes))
    if status is not None and settings["final"]:  # a grid has many runs, and nobody looks at 40 curves
        write(out / "curve.png", curve(history, title))
    write(out / "metrics.jsonl", metrics)  # with a status in the last row, the run is over
    if status is not None:
        for leftover in (out / "state.pt", *out.glob(".*.part")):  # a kill may have left a part of a file
            leftover.unlink(missing_ok=True)


def curve(history: list[dict], title: str) -> bytes:
    """A PNG of loss and training accuracy over the epochs."""
    rows = [row for row in history if "loss" in row]
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.add_subplot(title=title, xlabel="epoch", ylabel="training loss")
    left.plot(epochs, [row["loss"] for row in rows], color="tab:blue")
    right = left.twinx()
    right.set(ylabel="training accuracy, %", ylim=(0, 101))
    right.plot(epochs, [row["train"] for row in rows], color="tab:orange")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
