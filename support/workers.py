"""Many runs: what they found, and who performs them.

results.jsonl has a line per run. A sweep that was killed goes on from it, and from the checkpoints
of the runs that were under way (support/runs.py). The runs are performed by this process, by
several of this machine, or by the actors of a Ray cluster; the lines are the same.
"""

import hashlib
import json
import multiprocessing
import os
import platform
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import cache, partial
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from tqdm import tqdm

from support.files import UsageError, write
from support.report import Row, verdict
from support.runs import UNSEEN, lines


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


def seal(found: dict) -> str:
    """A digest of what a reproduction says, but for the digest itself."""
    rest = {name: value for name, value in found.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def reproduction(rows: list[Row], folders: Iterable[Path]) -> bytes:
    """reproduction.json: results, settings, digests, and what code and machine made them."""
    seconds: dict[str, float] = {}
    for path in sorted(folder / "seconds.json" for folder in folders):
        for device, value in json.loads(path.read_bytes()).items() if path.exists() else ():
            seconds[device] = seconds.get(device, 0) + value
    packages = ("torch", "torchvision", "timm")
    found: dict = {
        "commits": sorted({line["commit"] for row in rows for line in row.tried + row.tested}),
        "versions": {name: version(name) for name in packages}
        | {"python": platform.python_version(), "cuda": str(torch.version.cuda)},
        "hours": {device: round(value / 3600, 3) for device, value in seconds.items()},
        "rows": [],
    }
    for row in rows:
        found["rows"].append(
            {"task": row.task, "method": row.method, "fraction": row.fraction}
            | {"images": row.images, "settings": row.tested[0]["settings"]}
            | {"identity": row.tested[0]["identity"], "paper": row.published}
            | {"test": {str(r["settings"]["seed"]): r["test"] for r in row.tested if "test" in r}}
            | verdict(row)
        )
    return json.dumps(found | {"sha256": seal(found)}, indent=1).encode()


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


def work(worker_class: type, threads: int, gpu: str, pipe: Connection) -> None:
    """In a process of its own: perform the runs that come through the pipe."""
    # The screen and Ctrl-C are the main process's. Whatever ends that one, this one goes too.
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent: Any = multiprocessing.parent_process()
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    worker = worker_class(threads)
    while True:
        config, stop = pipe.recv()
        try:
            pipe.send(worker.run(config, stop))
        except (UsageError, OSError) as error:
            pipe.send(error)
        except Exception:  # noqa: BLE001  the main process raises it
            pipe.send(RuntimeError(traceback.format_exc()))


class Processes:
    """Workers in processes of this machine: one per GPU, or several on the CPU.

    A process starts when there is something for it to do. One that is killed is replaced, and its
    run goes on from its checkpoint.
    """

    def __init__(self, worker_class: type, count: int, threads: int, gpus: int):
        self.worker_class, self.count, self.threads = worker_class, count, threads
        every = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        self.gpus = every.split(",") if gpus else [""]
        self.workers: dict[int, tuple[Any, Any]] = {}  # number -> its process, our end of its pipe

    def worker(self, number: int) -> Any:
        """The pipe to a worker, which is started if there is none."""
        if number not in self.workers or not self.workers[number][0].is_alive():
            context = multiprocessing.get_context("spawn")
            ours, theirs = context.Pipe()
            gpu = self.gpus[number % len(self.gpus)]
            process = context.Process(
                target=work, args=(self.worker_class, self.threads, gpu, theirs)
            )
            # Ctrl-C is this process's: the new one ignores it from its first instruction on.
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            process.start()
            signal.signal(signal.SIGINT, handler)
            theirs.close()
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
            ready: list[Any] = wait(list(busy))
            for pipe in ready:
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


def runner(
    worker: Any, count: int, threads: int, ray: str, device: str, stack: ExitStack
) -> Callable:
    """Who performs the runs: a function that takes configs and an epoch to stop at.

    worker: of this process. count, threads: processes of this machine, and CPU threads of each.
    ray: the address of a cluster. stack: is given what ends the others.
    """
    if ray:
        return on_ray(type(worker), ray, device, threads, stack)
    if count == 1:
        return partial(in_turn, worker)
    pool = Processes(
        type(worker), count, threads, torch.cuda.device_count() if device == "cuda" else 0
    )
    stack.callback(pool.end)
    return pool.spread


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
