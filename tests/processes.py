"""Real processes that start at once, forked from one that has imported everything."""

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
from importlib import import_module
from pathlib import Path

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["processes", "train", "sweep", "data"])


def work(script: str, words: list[str], says, most: int) -> None:
    """`python SCRIPT WORDS`: what it prints goes into a pipe; no file larger than `most` bytes."""
    os.setpgrp()  # as a shell does, so that a signal reaches its children too
    for descriptor in (1, 2):
        os.dup2(says.fileno(), descriptor)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    sys.exit(import_module(script).main(words))


class Started:
    """`python SCRIPT WORDS` as a process of its own, which may be stopped at any moment."""

    def __init__(self, script: str, *words: str | Path, most: int = resource.RLIM_INFINITY):
        self.hears, says = forks.Pipe(duplex=False)
        self.process = forks.Process(
            target=work, args=(script, [str(word) for word in words], says, most)
        )
        self.process.start()
        says.close()

    def runs(self, seconds: float = 0) -> bool:
        """Whether it still runs after so many seconds."""
        self.process.join(seconds)
        return self.process.exitcode is None

    def stop(self, kind: int = signal.SIGKILL) -> None:
        """Send a signal to the process and to its children."""
        with contextlib.suppress(
            ProcessLookupError
        ):  # it has ended, or has not yet a group of its own
            return os.killpg(self.process.pid, kind)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, kind)

    def end(self) -> tuple[int, str]:
        """Wait for its end: exit code, and what it printed."""
        self.process.join()
        said = b""
        while block := os.read(self.hears.fileno(), 1 << 16):
            said += block
        return self.process.exitcode, said.decode()
