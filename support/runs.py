"""What surrounds a run: its folder on disk, the process and the backbone it needs, its batches.

    config.json            the settings; a folder takes no run with others
    state.pt               after every epoch: all that `resume` needs; gone at the end
    metrics.jsonl          a row per epoch; the last one has a "status" and the run's result
    prefix.safetensors     at the end: prefix and head, its prefix_kv, what extras.sample must know
    backbone.safetensors   at the end, if the backbone itself was trained
    curve.png              loss, and accuracy or val loss, over the epochs of a final run
    generated.jsonl, .txt  of a text task: source, references, output; and the outputs alone

Every file is whole or absent. A run with a `state.pt` is not over and goes on from that file alone:
a kill costs at most one epoch. Of a run that is over, the weights are read, which know its metrics.
"""

import ctypes
import hashlib
import io
import json
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import get_session
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as pack
from torch import Tensor, nn
from torch.optim import Optimizer

from support.files import UsageError, write

# Of every progress bar: in a log, a line every 30 seconds.
BAR: dict = {"dynamic_ncols": True, "leave": None, "delay": 2}
BAR["mininterval"] = 0.2 if sys.stderr and sys.stderr.isatty() else 30
# Settings that may change during a run; of a --start, what it holds is compared.
UNSEEN = {"out", "data_dir", "device", "compile", "start"}
WRITE = 16  # texts that are written at once
# What a pickled array names, in NumPy 2 and 1. Nothing else in the file of a --start is let in.
NUMPY: list = [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8"))]
for core in ("_core", "core"):
    NUMPY.append((np.zeros(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct"))


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Make a folder and keep other processes out of it. A kill releases the lock, too."""
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
        # Delete the lock while it is held, so that nobody else's goes. Windows refuses to delete
        # an open file; there, release it first. A lock that stays is free and harms nobody.
        try:
            (folder / ".lock").unlink(missing_ok=True)
            lock.release()
        except OSError:
            lock.release()
            with suppress(OSError):
                (folder / ".lock").unlink(missing_ok=True)

        # Folders that this call made and nothing was put into.
        with suppress(OSError):
            for path in made:
                path.rmdir()


def resume(
    out: Path, identity: dict, model: nn.Module, optimizer: Optimizer, listing: Any = None
) -> list[dict]:
    """Bring model and optimizer to where the run in `out` stands; its metrics, [] for a new run.

    identity: settings, fingerprint of the backbone, digests of the data. listing: for split.json.
    UsageError if the folder holds a run with another identity, or files that cannot be read.
    """
    # What a kill has left half written.
    for part in out.glob(".*.part"):
        with suppress(OSError):
            part.unlink()

    # A new run.
    kept = ("config.json", "state.pt", "metrics.jsonl", "prefix.safetensors")
    if not any((out / name).exists() for name in kept):
        if listing is not None:
            write(out / "split.json", json.dumps(listing, indent=1).encode())
        write(out / "config.json", json.dumps(identity, indent=2).encode())
        return []
    try:
        same_run(out, json.loads((out / "config.json").read_bytes()), identity)
        # A run that is not over goes on from its checkpoint.
        if (out / "state.pt").exists():
            state = torch.load(out / "state.pt", map_location="cpu", weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            return state["history"]
        return finished(out, model)
    except UsageError:
        raise
    except Exception as error:  # whatever a damaged file leads to
        raise UsageError(
            f"{out} cannot be resumed ({reason(error)}); delete that folder to start anew"
        ) from error


def same_run(out: Path, old: dict, new: dict) -> None:
    """UsageError that says in what two runs differ. ValueError for a run of an older version."""
    if "config" not in old or not new["config"].keys() - UNSEEN <= old["config"].keys():
        raise ValueError("it was left by an older version")
    known, changed = old["config"], []
    for name, value in new["config"].items():
        # How data and backbone were typed does not count: what they hold is compared.
        if name not in UNSEEN | {"task", "backbone"} and known[name] != value:
            changed.append(f"{name} {known[name]} (not {value})")
    if old["fingerprint"] != new["fingerprint"]:
        changed.append(f"another backbone ({known['backbone']}; its weights differ)")
    if old.get("start") != new.get("start"):
        changed.append(f"another start ({known.get('start') or 'none'}; its prompts differ)")
    parts = [part for part in new["data"] if old["data"].get(part) != new["data"][part]]
    if parts:
        changed.append(f"other data ({known['task']}: {', '.join(parts)} differ)")
    if changed:
        holds = f"{out} holds a run with {', '.join(changed)}"
        raise UsageError(f"{holds}; choose another --out or delete that folder")


def finished(out: Path, model: nn.Module) -> list[dict]:
    """The metrics of a run that is over; its weights go into the model. [] if it has just begun."""
    path = out / "metrics.jsonl"
    if (out / "prefix.safetensors").exists():
        history = load(out, model)["history"]
        # A kill may have come between the two files.
        if not path.exists() or path.read_bytes() != lines(history):
            write(path, lines(history))
        return history
    # A run that diverged has metrics alone.
    rows = [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    if rows and rows[-1].get("status") != "diverged":
        raise ValueError("prefix.safetensors is missing")
    return rows


def save(
    out: Path,
    metadata: dict,
    model: nn.Module,
    optimizer: Optimizer,
    history: list[dict],
    curve: bytes = b"",
    prefix_kv: Tensor | None = None,
) -> None:
    """After an epoch: state.pt. At the end: what a user keeps, and state.pt goes.

    metadata: what prefix.safetensors says of itself. curve: a picture, if there is to be one.
    prefix_kv: what a user needs of the prefix.
    """
    status = history[-1].get("status")
    if status is None:
        buffer = io.BytesIO()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state | {"history": history}, buffer)
        write(out / "state.pt", buffer.getvalue())
    if status == "done":
        # The sizes of a trained backbone are what `--backbone FILE` reads.
        if model.backbone is not None:
            sizes = {type(model.backbone).__name__.lower(): json.dumps(model.backbone.sizes)}
            write(out / "backbone.safetensors", pack(model.backbone.state_dict(), sizes))

        # The rest, and the keys and values (depth, 2, H, L, Dh) that the prefix makes.
        state = model.state_dict()
        state = {name: state[name] for name in state if not name.startswith("backbone.")}
        if prefix_kv is not None:
            state["prefix_kv"] = prefix_kv.contiguous()
        known = metadata | {"history": history}
        strings = {name: json.dumps(value) for name, value in known.items()}
        write(out / "prefix.safetensors", pack(state, strings))
    if curve:
        write(out / "curve.png", curve)
    write(out / "metrics.jsonl", lines(history))

    # The run is over.
    if status is not None:
        with suppress(OSError):
            (out / "state.pt").unlink(missing_ok=True)


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def load(out: Path, model: nn.Module) -> dict:
    """Fill the model with what a finished run kept; its metadata. Any error if that is damaged."""
    state, metadata = read_weights(out / "prefix.safetensors")
    state.pop("prefix_kv", None)  # the model makes it
    if model.backbone is not None:
        kept, _ = read_weights(out / "backbone.safetensors")
        state |= {f"backbone.{name}": value for name, value in kept.items()}
    model.load_state_dict(state)
    return metadata


def metadata(out: Path) -> dict:
    """What prefix.safetensors of a finished run says of itself and its data. UsageError if none."""
    try:
        known = read_weights(out / "prefix.safetensors")[1]
    except Exception as error:  # whatever a damaged file leads to
        raise UsageError(
            f"{out} is not the folder of a finished run ({reason(error)}); train one with train.py"
        ) from error
    if not {"config", "fingerprint", "classes", "history"} <= known.keys():
        raise UsageError(f"{out} was left by an older version; train it anew")
    return known


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a .safetensors file, and what its metadata say."""
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        strings = file.metadata() or {}
    return state, {name: json.loads(text) for name, text in strings.items()}


def fingerprint(backbone: nn.Module) -> str:
    """Which backbone this is, by its weights and normalisation: a prefix fits no other."""
    # Equal weights with other pixels are another backbone; ImageNet's mean and std are the usual.
    pixels = getattr(backbone, "normalisation", "")
    made = hashlib.sha256(b"" if pixels.startswith("ImageNet") else pixels.encode())
    for name, value in sorted(backbone.state_dict().items()):
        made.update(name.encode() + value.float().contiguous().numpy(force=True).tobytes())
    return made.hexdigest()[:16]


def read_prompts(path: str) -> Tensor:
    """The p of a prefix that another program trained: (G, L, width), as in `Prefix`.

    A file of VPT-deep's prompts, or its whole state dict: Simple-share's p, (layers, L, D). A
    folder with a prefix of peft: No-share's p in a GPT, (1, L, layers * 2 * D).
    """
    try:
        if Path(path).is_dir():
            state = load_file(Path(path, "adapter_model.safetensors"))
            return state["prompt_embeddings"].float().unsqueeze(0)

        # VPT keeps the first layer's prompts (1, L, D) and the others' (layers - 1, L, D).
        with torch.serialization.safe_globals(NUMPY):
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("model", state)
        if any("prompt_proj." in name for name in state):
            raise ValueError("its prompts are projected from another width, VPT's PROJECT")
        state = {name.split(".")[-1]: value for name, value in state.items()}
        if "prompt_embeddings" in state:
            return torch.cat([state["prompt_embeddings"], state["deep_prompt_embeddings"]]).float()
        both = np.concatenate([state["shallow_prompt"], state["deep_prompt"]])
        return torch.from_numpy(both).float()
    except Exception as error:  # whatever a damaged or hostile file leads to
        raise UsageError(
            f"--start {path} cannot be used ({type(error).__name__}: {reason(error)}); give VPT-"
            "deep's prompts (those of VPT-shallow are no prefix), or the folder of a peft prefix"
        ) from error


def start_from(path: str, p: Tensor) -> str:
    """Fill p, which a new prefix trains, with the prompts at `path`. Returns their digest."""
    prompts = read_prompts(path)
    if prompts.shape != p.shape:
        theirs, ours = tuple(prompts.shape), tuple(p.shape)
        raise UsageError(f"--start {path} has the shape {theirs}, but this run trains {ours}")
    p.copy_(prompts)
    return hashlib.sha256(prompts.numpy().tobytes()).hexdigest()[:16]


def reason(error: Exception) -> str:
    """An error in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def prepare_process() -> None:
    """TF32 for what stays fp32 on CUDA; on Linux, freed memory is kept, not mapped anew."""
    torch.set_float32_matmul_precision("high")
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)  # glibc has it
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping for a tensor of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing goes back


def device(name: str) -> Any:
    """Where to compute; auto is the GPU if there is one. UsageError for a GPU that there is not."""
    if name == "cpu" or torch.cuda.is_available():
        return "cuda" if name == "auto" else name
    if name == "cuda":
        raise UsageError("--device is cuda, but PyTorch finds no CUDA device; use --device cpu")
    say_idle_gpu()
    return "cpu"


@cache
def say_idle_gpu() -> None:
    """Once per process: there is a driver for a GPU that PyTorch cannot use."""
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        unused = f"an NVIDIA driver is here, but PyTorch {torch.__version__} cannot use CUDA"
        print(f"{unused}; install one that fits it: https://pytorch.org", file=sys.stderr)


def use_bf16(config: Any, backbone: Any) -> bool:
    """auto: on CUDA; on a CPU with matrix units (AMX) and a wide model."""
    if config.dtype != "auto":
        return config.dtype == "bf16"
    known: dict = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.9 has no such function
    amx = known.get("amx_bf16", False)
    return config.device == "cuda" or (amx and backbone.dim >= 256)


def open_backbone(kind: Any, name: str, pretrained: bool = True) -> Any:
    """A ViT or GPT (`kind`) by its name, on the CPU in fp32. UsageError if it cannot be had."""
    shipped = "tiny" if kind.__name__ == "ViT" else "tiny_gpt"
    example = "ViT-B_16.npz" if shipped == "tiny" else "FOLDER, with config.json and weights"
    advice = f"give one that you have: --backbone {example}"
    # Without a network, huggingface_hub would try for half a minute, a line per try.
    offline = constants.HF_HUB_OFFLINE
    local = name in (shipped, "scratch", "scratch_gpt") or Path(name).exists()
    if pretrained and not local:
        constants.HF_HUB_OFFLINE = offline or not hub_answers()
    try:
        backbone = kind.load(name, pretrained)
        for parameter, value in backbone.named_parameters():
            if not value.isfinite().all():
                raise ValueError(f"{parameter} holds NaN or infinity")
        return backbone
    except LocalEntryNotFoundError as error:
        raise UsageError(
            f"the backbone '{name}' is not on this machine, and {constants.ENDPOINT} cannot be "
            f"reached; without a network use --backbone {shipped}, or {advice}"
        ) from error
    except Exception as error:  # whatever a damaged or hostile file leads to
        mend = "git checkout assets" if name == shipped else advice
        raise UsageError(
            f"the backbone '{name}' cannot be used ({reason(error)}); {mend}"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def hub_answers() -> bool:
    """Whether the Hugging Face hub, or the mirror in HF_ENDPOINT, can be reached."""
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # noqa: BLE001  of the HTTP library, which differs among versions
        return False
    return True


def check_settings(config: Any, text: bool) -> None:
    """UsageError for a value that no run can have."""
    for name in ("length", "lr", "epochs", "batch", "beams"):
        if not 0 < getattr(config, name) < math.inf:
            raise UsageError(f"--{name} is {getattr(config, name)}; it must be positive")
    if not 0 < config.fraction <= 1:
        raise UsageError(f"--fraction is {config.fraction}; it must be above 0 and at most 1")
    if not 0 <= config.wd < math.inf:
        raise UsageError(f"--wd is {config.wd}; it must not be negative")
    if not 0 <= config.seed < 2**63 - 1_000_003 * (config.epochs + 1):  # what PyTorch takes
        raise UsageError(
            f"--seed is {config.seed}; it must not be negative, nor have more than 18 digits"
        )
    share = "none" if Path(config.start).is_dir() else "simple"
    if config.start and (config.tune, config.share, config.shallow) != ("prefix", share, False):
        raise UsageError(
            f"--start {config.start} starts a prefix with --share {share} in all layers; "
            "VPT-deep is --share simple, and a prefix of peft --share none"
        )
    if config.tune == "linear" and text:
        raise UsageError(f"--tune linear is for images, not for {config.task}; use prefix or full")


def training_split(config: Any, data: Any) -> str:
    """The split that this run trains on: train, or trainval at the end of VTAB's protocol."""
    return data.final if config.final else "train"


def check_fit(config: Any, backbone: Any, data: Any) -> None:
    """UsageError, before anything starts, for a run that backbone and data do not allow."""
    split = training_split(config, data)
    if data.count(split, config.fraction) < 1:
        raise UsageError(
            f"--fraction {config.fraction:g} leaves no image of {config.task}; take a larger one"
        )
    if not data.text:
        return

    # All that is read or written must fit beside the prefix, and every token must be known.
    length = config.length if config.tune == "prefix" else 0
    splits = {split, "val", "test" if config.final else "val"}
    data.must_fit(backbone.context - length, splits, length)
    tokens = data.encoding.n_vocab
    if tokens > backbone.vocab:
        raise UsageError(
            f"{config.backbone} knows fewer tokens than {config.task} has; take another --backbone"
        )
    if config.beams > tokens // 2:
        raise UsageError(
            f"--beams is {config.beams}; with this vocabulary it can be {tokens // 2} at most"
        )


def batches(config: Any, data: Any, split: str, **order: Any) -> Iterator[tuple[int, tuple]]:
    """(number of examples, data.batches on the device): copied while the GPU is still busy."""
    # For a compiled step, a batch that is not full is filled up, and so are a single text and
    # target: the compiler would make a graph for each. Labels of -100 count nowhere.
    for batch in data.batches(split, config.batch, pin=config.device == "cuda", **order):
        examples = len(batch[0])
        if config.compile and data.text:
            tokens, positions, labels = batch  # (B, T), 2 x (B, Q)
            row, column = int(examples == 1), int(labels.shape[1] == 1)
            tokens = F.pad(tokens, (0, 0, 0, row))
            positions = F.pad(positions, (0, column, 0, row))
            batch = (tokens, positions, F.pad(labels, (0, column, 0, row), value=-100))
        elif config.compile:
            pixels, labels = batch
            missing = config.batch - examples
            pixels = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, missing))  # (B, size, size, 3)
            batch = (pixels, F.pad(labels, (0, missing), value=-100))
        yield examples, tuple(tensor.to(config.device, non_blocking=True) for tensor in batch)


@torch.no_grad()
def final_prefix(config: Any, model: Any, backbone: Any) -> Tensor | None:
    """The prefix_kv (depth, 2, H, L, Dh) that evaluation uses, in its type; None without one."""
    with torch.autocast(config.device, torch.bfloat16, enabled=use_bf16(config, backbone)):
        return model.eval().prefix_kv(backbone)
