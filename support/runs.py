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
import multiprocessing
import os
import signal
import socket
import subprocess
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn
from tqdm import tqdm

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


# Many runs: what they found, and who performs them.


def settings(config: Any) -> dict:
    """All that decides a run's outcome."""
    return {name: value for name, value in asdict(config).items() if name not in UNSEEN}


class Results:
    """results.jsonl: a line per finished run, or per stage of a run with --halving.

    Only the main process writes it. A line that cannot be read is a run that is asked again, and
    one that is over has kept its own result. So is a run that failed, when the sweep starts again.
    identity: which backbone and data a config has now; a line that had others is a mistake.
    """

    def __init__(self, path: Path, identity: Callable[[Any], dict]):
        self.path, self.identity = path, identity
        self.lines: dict[str, dict] = {}
        for text in path.read_bytes().splitlines() if path.exists() else ():
            with suppress(ValueError, KeyError, TypeError):
                line = json.loads(text)
                if line["status"] != "failed":
                    self.lines[self.key(line["settings"], line["stop"])] = line

    @staticmethod
    def key(settings: dict, stop: int | None) -> str:
        return json.dumps([settings, stop], sort_keys=True)

    def check(self, config: Any, line: dict) -> None:
        """UsageError if a kept line is of another backbone or of other data."""
        old, new = line.get("identity", {}), self.identity(config)
        if changed := [name for name in new if old.get(name) != new[name]]:
            raise UsageError(
                f"{self.path} holds results of another {' and '.join(changed)} than there is now; "
                "choose another --out or delete that folder"
            )

    def complete(self, configs: list, stop: int | None, runner: Callable, bar: tqdm) -> list[dict]:
        """The lines of these runs, in order. What is missing is performed, and kept at once."""
        keys = [self.key(settings(config), stop) for config in configs]
        missing = []
        for config, key in zip(configs, keys, strict=True):
            if key in self.lines:
                self.check(config, self.lines[key])
                bar.update()
            else:
                missing.append(config)
        for line in runner(missing, stop):
            self.count(line.pop("device"), line.pop("seconds"))
            self.lines[self.key(line["settings"], line["stop"])] = line | {"commit": commit()}
            write(self.path, lines(list(self.lines.values())))
            bar.update()
        return [self.lines[key] for key in keys]

    def count(self, device: str, seconds: float) -> None:
        """Add to seconds.json, which says how long each kind of device has worked."""
        path = self.path.with_name("seconds.json")
        kept = json.loads(path.read_bytes()) if path.exists() else {}
        kept[device] = round(kept.get(device, 0) + seconds, 1)
        write(path, json.dumps(kept).encode())


@cache
def commit() -> str:
    """Which version of this code runs; "+changes" if files were edited since."""

    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True).stdout

    with suppress(OSError):  # git is not installed
        if head := git("rev-parse", "HEAD").strip():
            return head + ("+changes" if git("status", "--porcelain", "-uno").strip() else "")
    return "unknown"


def in_turn(worker: Any, configs: list, stop: int | None) -> Iterator[dict]:
    """Perform the runs one after another in this process."""
    for config in configs:
        yield worker.run(config, stop)


def work(worker_class: type, threads: int, pipe: Connection) -> None:
    """In a process of its own: perform the runs that come through the pipe."""
    # Ctrl-C is the main process's matter; whatever ends that one, this one goes too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent: Any = multiprocessing.parent_process()
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    worker = worker_class(threads)
    while True:
        config, stop = pipe.recv()
        try:
            pipe.send(worker.run(config, stop))
        except Exception as error:  # noqa: BLE001  the main process raises it
            if not isinstance(error, UsageError | OSError):
                traceback.print_exc()
            pipe.send(error)


class Processes:
    """Workers in processes of this machine: one per GPU, or several on the CPU.

    A process starts when there is something for it to do. One that is killed is replaced, and its
    run goes on from its checkpoint.
    """

    def __init__(self, worker_class: type, count: int, threads: int, gpus: int):
        self.arguments = worker_class, threads
        self.gpus = gpus
        self.count = count
        self.workers: dict[int, tuple[Any, Any]] = {}  # number -> its process, and our end

    def worker(self, number: int) -> Any:
        """The pipe to a worker, which is started if there is none."""
        if number not in self.workers or not self.workers[number][0].is_alive():
            # It finds its surroundings in the environment: no progress bars, and a GPU of its own.
            kept = dict(os.environ)
            os.environ["TQDM_DISABLE"] = "1"
            if self.gpus:
                visible = kept.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(self.gpus)))
                os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number % self.gpus]
            context = multiprocessing.get_context("spawn")
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(*self.arguments, theirs))
            process.start()
            theirs.close()
            os.environ.clear()
            os.environ.update(kept)
            self.workers[number] = process, ours
        return self.workers[number][1]

    def spread(self, configs: list, stop: int | None) -> Iterator[dict]:
        """Perform the runs, whichever worker is free; the lines come as they are finished."""
        waiting = [(config, 1) for config in reversed(configs)]
        busy: dict[Any, tuple] = {}  # pipe -> the worker's number, the run, which try it is
        while waiting or busy:
            for number in set(range(self.count)) - {number for number, *_ in busy.values()}:
                if waiting:
                    config, attempt = waiting.pop()
                    pipe = self.worker(number)
                    pipe.send((config, stop))
                    busy[pipe] = number, config, attempt
            for pipe in wait(list(busy)):
                number, config, attempt = busy.pop(pipe)
                try:
                    answer = pipe.recv()
                except (EOFError, OSError):
                    if attempt == 3:
                        raise UsageError(
                            "a worker died three times in one run; has it enough memory? "
                            "fewer --workers or a smaller --batch need less"
                        ) from None
                    self.workers.pop(number)[0].join()
                    waiting.append((config, attempt + 1))
                    continue
                if isinstance(answer, Exception):
                    raise answer
                yield answer

    def end(self) -> None:
        for process, _ in self.workers.values():
            process.kill()
            process.join()


def on_ray(worker: type, address: str, device: str, threads: int, stack: ExitStack) -> Callable:
    """A runner whose workers are actors of a Ray cluster: one per GPU, or per `threads` CPU cores.

    A worker that dies is started again, and its run goes on from its checkpoint. Several machines
    need --out and --data-dir on a disk they share.
    """
    try:
        import ray
        from ray.util import ActorPool
    except ImportError:
        raise UsageError("--ray needs Ray, which is not installed: pip install ray") from None
    # Ray itself would try a wrong address for minutes, and then end the process.
    host, _, port = address.removeprefix("ray://").rpartition(":")
    code = {"working_dir": str(Path(__file__).parent.parent)}
    code["excludes"] = ["/out", "/data", ".git"]  # type: ignore[assignment]
    try:
        if port.isdigit():
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, runtime_env=code, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"no Ray cluster at '{address}' ({reason}); start one there: ray start --head; "
            "or, if it asks for its token, set RAY_AUTH_MODE=token here"
        ) from None
    stack.callback(ray.shutdown)

    # As many workers as the cluster has room for.
    cores = int(ray.cluster_resources().get("CPU", 0))
    count, share = max(1, cores // threads), {"num_cpus": min(threads, cores)}
    if device == "cuda":
        count, share = int(ray.cluster_resources().get("GPU", 0)), {"num_gpus": 1}
    actor = ray.remote(max_restarts=-1, max_task_retries=5, **share)(worker)
    pool = ActorPool([actor.remote(threads) for _ in range(count)])
    print(f"Ray: {count} workers on {device}, {threads} CPU threads each")

    def spread(configs: list, stop: int | None) -> Iterator[dict]:
        try:
            yield from pool.map_unordered(lambda a, config: a.run.remote(config, stop), configs)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # what the worker raised, such as a UsageError
        except ray.exceptions.RayActorError:
            raise UsageError(
                "a worker died six times in one run; has it enough memory? without --ray it says"
            ) from None

    return spread
