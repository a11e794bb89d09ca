"""How runs are performed: one after another by a worker that keeps what they share, or by many workers on Ray.

A run is small and the backbone never changes. So a `Worker` keeps one backbone, one decoded data set and one compiled
step, and all runs pass through it. A *runner* takes runs and yields the line that each leaves in results.jsonl, in any
order; the numbers are the same bit for bit whichever runner it is, and whichever worker a run meets.
"""

import math
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from data import UsageError, load
from support import checkpoint
from support.options import Config, prepare_process
from train import evaluate, load_backbone, train, training_split


def settings(config: Config) -> dict:
    """All that decides a run's outcome."""
    return {name: value for name, value in asdict(config).items() if name not in checkpoint.UNSEEN}


class Worker:
    """Performs runs one after another on one backbone, one decoded data set and one compiled step, which it keeps."""

    def __init__(self, threads: int):
        torch.set_num_threads(threads)  # the order of a sum, and so its last bit, depends on it
        prepare_process()
        self.kept: dict[str, tuple] = {}

    def keep(self, what: str, key: tuple, make: Callable) -> Any:
        """What was made for `key`; for another key it is made anew, and the old one goes."""
        if self.kept.get(what, (None, None))[0] != key:
            self.kept[what] = key, make()
        return self.kept[what][1]

    def run(self, config: Config, stop: int | None = None) -> dict:
        """Perform one run, or its first `stop` epochs: the line of results.jsonl it leaves."""
        key = (config.backbone, config.device, config.dtype, config.tune == "full")
        backbone = self.keep("backbone", key, lambda: load_backbone(config))
        data = self.keep(
            "data", (config.task, backbone.image), lambda: load(config.task, config.data_dir, backbone.image)
        )
        if config.compile:  # steps of other shapes would fill up the compiler's list of variants
            shapes = (*key, config.tune, config.share, config.shallow, config.length, config.batch)
            self.keep("compiled", shapes, torch.compiler.reset)
        result = train(config, backbone, data, stop)
        if stop and result.metrics["epoch"] > stop:  # the line was lost, and the run has gone on since
            with tempfile.TemporaryDirectory() as folder:
                result = train(replace(config, out=folder), backbone, data, stop)
        line = {"settings": settings(config), "stop": stop, "status": result.status, "epochs": result.metrics["epoch"]}
        if result.status != "diverged":
            split = "test" if config.final else "val"
            short = result.status == "running"
            value = evaluate(config, result.model, backbone, data, split) if short else result.metrics[split]
            line |= {"status": "diverged"} if math.isnan(value) else {split: value}
        images = data.count(training_split(config, data), config.fraction)
        sizes = [sum(p.numel() for p in module.parameters()) for module in (result.model, backbone)]
        return line | {"images": images, "trained": sizes[0], "backbone": sizes[1]}


def in_turn(worker: Worker, configs: list[Config], stop: int | None) -> Iterator[dict]:
    for config in configs:
        yield worker.run(config, stop)


def on_ray(address: str, device: str, stack: ExitStack) -> Callable:
    """A runner whose workers are Ray actors: one per GPU, or one per as many CPU cores as this process has threads.

    Sums made by the same number of threads have the same last bit. A worker that dies is started again, and its run
    goes on from its checkpoint. Several machines need --out and --data-dir on a disk they share.
    """
    try:
        import ray
        from ray.util import ActorPool
    except ImportError:
        raise UsageError("--ray needs Ray, which is not installed: pip install ray") from None
    here, code = (
        address == "local",
        {"working_dir": str(Path(__file__).parent.parent), "excludes": ["/out", "/data", ".git"]},
    )
    options = {"runtime_env": None if here else code, "log_to_driver": False, "logging_level": "ERROR"}
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():  # Ray itself would try for minutes, and then end the process
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(None if here else address, **options)
    except (OSError, RuntimeError, ValueError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        mend = "start one there: ray start --head; or, if it asks for its token, set RAY_AUTH_MODE=token here"
        raise UsageError(f"no Ray cluster at '{address}' ({reason}); {mend}") from None
    stack.callback(ray.shutdown)
    threads, cores, gpus = torch.get_num_threads(), *(int(ray.cluster_resources().get(k, 0)) for k in ("CPU", "GPU"))
    count, share = max(1, cores // threads), {"num_cpus": min(threads, cores)}
    if device == "cuda":
        count, share = gpus, {"num_gpus": 1}
    actor = ray.remote(max_restarts=-1, max_task_retries=5, **share)(Worker)
    pool = ActorPool([actor.remote(threads) for _ in range(count)])
    print(f"Ray: {count} workers on {device}, {threads} CPU threads each (OMP_NUM_THREADS sets how many)")

    def spread(configs: list[Config], stop: int | None) -> Iterator[dict]:
        try:
            yield from pool.map_unordered(lambda worker, config: worker.run.remote(config, stop), configs)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # what the worker raised, such as a UsageError
        except ray.exceptions.RayActorError:
            raise UsageError(
                "a worker died six times in one run; has it enough memory? without --ray it says"
            ) from None

    return spread
