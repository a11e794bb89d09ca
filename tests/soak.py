"""Ten minutes of a sweep's runs in one process: memory, open files and threads must not grow.

    python tests/soak.py [--minutes 10]

Prints a line a minute, and the slopes after the first fifth. Exit code 1 if memory grows over
1 MB a minute, or files or threads grow. It reads /proc, so it needs Linux.
"""

import argparse
import sys
import tempfile
import time
from itertools import count, product
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import sweep
from sweep import Worker

NAMES = ("MB of memory", "open files", "threads")


def usage() -> tuple[float, int, int]:
    """Resident memory in MB, open files and threads of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return (
        int(status["VmRSS"].split()[0]) / 1024,
        len(list(Path("/proc/self/fd").iterdir())),
        int(status["Threads"]),
    )


def say(values, form: str) -> str:
    return ", ".join(f"{value:{form}} {name}" for value, name in zip(values, NAMES, strict=True))


def soak(minutes: float, out: str) -> bool:
    """Whether nothing grew while runs of every method of sweep.py went on for so long."""
    todo = sweep.Sweep(methods=list(sweep.METHODS), out=out)
    worker, start, rows, printed = Worker(torch.get_num_threads()), time.perf_counter(), [], 0
    plan = list(
        product(todo.lr, todo.wd, sweep.cells(todo))
    )  # a run of every method, then another setting
    for i in count():
        (lr, wd, cell), seed = plan[i % len(plan)], i // len(plan)
        worker.run(sweep.one_run(todo, cell, lr=lr, wd=wd, seed=seed, final=False))
        rows.append(((time.perf_counter() - start) / 60, *usage()))
        if rows[-1][0] >= printed:
            print(f"minute {printed}, run {len(rows)}: {say(rows[-1][1:], '.0f')}", flush=True)
            printed += 1
        if rows[-1][0] >= minutes:
            break
    times, *columns = np.array([row for row in rows if row[0] > minutes / 5]).T
    slopes = [np.polyfit(times, column, 1)[0] for column in columns]
    print(f"{len(rows)} runs; growth a minute: {say(slopes, '+.3f')}")
    return slopes[0] < 1 and columns[1][-1] <= columns[1][0] and columns[2][-1] <= columns[2][0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    with tempfile.TemporaryDirectory() as out:
        return 0 if soak(parser.parse_args().minutes, out) else 1


if __name__ == "__main__":
    sys.exit(main())
