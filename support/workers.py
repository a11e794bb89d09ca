"""Many runs: what they found, and who performs them.

results.jsonl has a line per run. A sweep that was killed goes on from it, and from the checkpoints
of the runs that were under way (support/runs.py). The runs are performed by this process, by
several of this machine, or by the actors of a Ray cluster; the lines are the same.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from tqdm import tqdm

from support.files import UsageError, write
from support.report import Row
from support.runs import UNSEEN, lines

# What was found.


def settings(config: Any) -> dict:
    """All that decides a run's outcome."""
    return {name: value for name, value in asdict(config).items() if name not in UNSEEN}


class Results:
    """results.jsonl: a line per finished run, or per stage of a run with --halving.

    Only the main process writes it. A line that cannot be read is a run that is asked again, and
    one that is over has kept its own result. So is a run that failed, when the sweep starts again.
    identity: which backbone and data a config has now; a line that had others is a mistake.
    runner: takes configs and an epoch to stop at, performs the runs and yields their lines.
    """

    def __init__(self, path: Path, identity: Callable, runner: Callable, bar: tqdm):
        self.path, self.identity, self.runner, self.bar = path, identity, runner, bar
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

    def complete(self, configs: list, stop: int | None) -> list[dict]:
        """The lines of these runs, in order. What is missing is performed, and kept at once."""
        # What is there already?
        wanted = {self.key(settings(config), stop): config for config in configs}
        for key in wanted.keys() & self.lines.keys():
            self.check(wanted[key], self.lines[key])
            self.bar.update()

        # The rest is done, in whatever order it is finished.
        for line in self.runner([wanted[key] for key in wanted if key not in self.lines], stop):
            self.count(line.pop("device"), line.pop("seconds"))
            self.lines[self.key(line["settings"], stop)] = line | {"commit": commit()}
            write(self.path, lines(list(self.lines.values())))
            self.bar.update()
        return [self.lines[key] for key in wanted]

    def count(self, device: str, seconds: float) -> None:
        """Add to seconds.json, which says how long each kind of device has worked."""
        total = worked(self.path.parent) + Counter({device: seconds})
        write(self.path.with_name("seconds.json"), json.dumps(total).encode())


def worked(folder: Path) -> Counter:
    """Seconds that each kind of device has worked for a folder of results."""
    path = folder / "seconds.json"
    return Counter(json.loads(path.read_bytes()) if path.exists() else {})


@cache
def commit() -> str:
    """Which version of this code runs; "+changes" if files were edited since."""
    words = ("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes")
    with suppress(OSError):  # git is not installed
        here = Path(__file__).parent
        ran = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)
        return ran.stdout.strip() or "unknown"
    return "unknown"


def seal(found: dict) -> str:
    """A digest of what a reproduction says, but for the digest itself."""
    rest = {name: value for name, value in found.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def reproduction(rows: list[Row], folders: Iterable[Path]) -> bytes:
    """reproduction.json: the lines of all runs, and what code and machine made them."""
    total = sum((worked(folder) for folder in folders), Counter())
    found = {
        "commits": sorted({line["commit"] for row in rows for line in row.tried + row.tested}),
        "versions": {
            "torch": torch.__version__,
            "timm": version("timm"),
            "cuda": torch.version.cuda,
        },
        "hours": {device: seconds / 3600 for device, seconds in total.items()},
        "rows": [asdict(row) for row in rows],
    }
    return json.dumps(found | {"sha256": seal(found)}, indent=1).encode()


# Who performs the runs. A runner takes configs and an epoch to stop at, and yields their lines.

WORKER: Any = None  # in a process of a pool: what performs its runs


def start_worker(worker_class: type, threads: int, gpus: Any) -> None:
    """In a new process: make the worker, which keeps its backbone and its data."""
    global WORKER
    # The screen and Ctrl-C are the main process's. Whatever ends that one, this one goes too.
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent: Any = multiprocessing.parent_process()
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()

    # A GPU of its own, if there are any.
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()
    WORKER = worker_class(threads)


def work(config: Any, stop: int | None) -> dict:
    """In a process of a pool: perform one run."""
    return WORKER.run(config, stop)


class Processes:
    """Workers in processes of this machine: one per GPU, or several on the CPU.

    If one of them is killed, all start again, and their runs go on from their checkpoints.
    """

    def __init__(self, worker_class: type, count: int, threads: int):
        self.worker_class, self.count, self.threads = worker_class, count, threads
        self.pool: ProcessPoolExecutor | None = None

    def start(self) -> ProcessPoolExecutor:
        """A pool whose processes have started. Each takes the number of a GPU, if there are any."""
        numbers = ",".join(str(i) for i in range(torch.cuda.device_count()))
        names = (os.environ.get("CUDA_VISIBLE_DEVICES") or numbers).split(",")
        context = multiprocessing.get_context("spawn")
        gpus = context.SimpleQueue()
        words = (self.worker_class, self.threads, gpus)
        pool = ProcessPoolExecutor(self.count, context, start_worker, words)

        # A process starts when it is asked something, and ignores Ctrl-C from then on.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for i in range(self.count):
            gpus.put(names[i % len(names)])
            pool.submit(os.getpid)
        signal.signal(signal.SIGINT, handler)
        return pool

    def run(self, configs: list, stop: int | None) -> Iterator[dict]:
        """Perform the runs, whichever worker is free; the lines come as they are finished."""
        todo = list(configs)
        for _ in range(3):
            self.pool = self.pool or self.start()
            try:
                runs = {self.pool.submit(work, config, stop): config for config in todo}
                for future in as_completed(runs):
                    yield future.result()
                    todo.remove(runs[future])
                return
            except BrokenProcessPool:
                self.end()
        raise UsageError(
            "a worker died three times; has it enough memory? fewer --workers or a smaller "
            "--batch need less"
        )

    def end(self) -> None:
        """Kill the processes, whatever they are doing."""
        for process in multiprocessing.active_children():
            process.kill()
        if self.pool:
            self.pool.shutdown()
        self.pool = None


def on_ray(worker_class: type, address: str, device: str, threads: int) -> Callable:
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
    folder = str(Path(__file__).parent.parent)
    code = {"working_dir": folder, "excludes": ["/out", "/data", ".git"]}
    try:
        if port.isdigit():
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, runtime_env=code, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError, OverflowError) as error:
        raise UsageError(
            f"no Ray cluster at '{address}' ({error}); start one there: ray start --head; "
            "or, if it asks for its token, set RAY_AUTH_MODE=token here"
        ) from None

    # As many workers as the cluster has room for.
    room = ray.cluster_resources()
    kind, each = ("GPU", 1) if device == "cuda" else ("CPU", min(threads, int(room["CPU"])))
    share = {f"num_{kind.lower()}s": each}
    actor = ray.remote(max_restarts=-1, max_task_retries=5, **share)(worker_class)
    pool = ActorPool([actor.remote(threads) for _ in range(int(room[kind]) // each)])

    def run(configs: list, stop: int | None) -> Iterator[dict]:
        try:
            yield from pool.map_unordered(lambda a, config: a.run.remote(config, stop), configs)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # what the worker raised, such as a UsageError
        except ray.exceptions.RayActorError as error:
            raise UsageError(f"a worker died six times in one run ({error})") from None

    return run


def how_many(asked: int | None, config: Any, most: int) -> tuple[int, int]:
    """How many processes are to work, and with how many CPU threads each.

    A small backbone gains nothing from threads: it has one, whatever the number of processes. A
    large one has all cores; with other threads, a sum may have another last bit.
    """
    cores = torch.get_num_threads()  # those that PyTorch would use
    path = Path(config.backbone)
    small = config.backbone in ("tiny", "scratch")
    small |= path.is_file() and path.stat().st_size < 20_000_000
    count = cores if small else 1
    if config.device == "cuda":
        count = torch.cuda.device_count()
    count = asked or min(count, most)
    return count, 1 if small else max(1, cores // count)
