"""What a run leaves on disk: how it is cut off without harm, goes on, and ends.

    config.json            the settings; a folder takes no run with others
    state.pt               after every epoch: weights, momentum and metrics, all that `resume` needs; gone at the end
    metrics.jsonl          a row per epoch; the last one has a "status" and what the run is judged by
    prefix.safetensors     at the end: prefix and head, with all that `sample.py` must know to use them
    backbone.safetensors   at the end, if the backbone itself was trained
    curve.png              loss, and accuracy or val loss, over the epochs of a final run
    generated.jsonl        of a text task: source, references and output

Every file is written under another name and renamed, so it is whole or absent; `state.pt` is the only one that is read
back in an unfinished run, so a kill at any moment costs at most the epoch it fell into.
"""

import hashlib
import io
import json
import pickle
from pathlib import Path

import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open
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
    out: Path, facts: dict, model: nn.Module, optimizer: torch.optim.Optimizer, history: list[dict], title: str = ""
) -> None:
    """While the last row of metrics has no status: state.pt. Then: what a user keeps, and state.pt goes.

    facts: what prefix.safetensors says of itself. title: of a curve, if one is to be drawn.
    """
    status = history[-1].get("status")
    if status is None:
        buffer = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history}, buffer)
        write(out / "state.pt", buffer.getvalue())
    if status == "done":
        state = {name: value for name, value in model.state_dict().items() if not name.startswith("backbone.")}
        known = {name: json.dumps(value) for name, value in facts.items()}
        write(out / "prefix.safetensors", safetensors.save(state, known))
        if model.backbone is not None:
            sizes = {type(model.backbone).__name__.lower(): json.dumps(model.backbone.sizes)}  # `from_file` reads it
            write(out / "backbone.safetensors", safetensors.save(model.backbone.state_dict(), sizes))
    if title:
        write(out / "curve.png", curve(history, title))
    write(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history).encode())
    if status is not None:  # the run is over
        for leftover in (out / "state.pt", *out.glob(".*.part")):  # a kill may have left a part of a file
            leftover.unlink(missing_ok=True)


def facts(out: Path) -> dict:
    """What prefix.safetensors of a finished run says of itself and its data. UsageError if there is none."""
    try:
        with safe_open(out / "prefix.safetensors", "pt") as file:
            known = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(f"{out} is not the folder of a finished run ({error}); train one with train.py") from error
    if not {"config", "fingerprint", "classes"} <= known.keys():
        raise UsageError(f"{out} was left by an older version, which kept no settings with the weights; train it anew")
    return known


def fingerprint(backbone: nn.Module) -> str:
    """Which weights these are: a prefix fits no others."""
    made = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        made.update(name.encode() + value.float().contiguous().numpy().tobytes())
    return made.hexdigest()[:16]


def curve(history: list[dict], title: str) -> bytes:
    """A PNG of the loss over the epochs, with the training accuracy (images) or the loss on val (text)."""
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.add_subplot(title=title, xlabel="epoch", ylabel="training loss")
    left.plot(epochs, [row["loss"] for row in history], color="tab:blue", label="training loss")
    if "val loss" in history[0]:
        left.plot(epochs, [row["val loss"] for row in history], color="tab:orange", label="val loss")
        left.legend()
        left.set_ylabel("loss of a token, nats")
    else:
        right = left.twinx()
        right.set(ylabel="training accuracy, %", ylim=(0, 101))
        right.plot(epochs, [row["train"] for row in history], color="tab:orange")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
