"""The border to the user: a mistake ends in one sentence that says the mend, and in an exit code; never in a traceback.

Exit codes: 0 done, 2 what the user can mend, 3 a run diverged, 130 stopped with Ctrl-C.
"""

import argparse
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

GOES_ON = "stopped; the same command goes on from the last finished epoch"


class UsageError(Exception):
    """Something the user can mend. The command line prints it as one sentence and exits with code 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def exit_code(work: Callable[[], int | None], stopped: str = "stopped") -> int:
    """Do the work of a command. Ctrl-C prints `stopped`."""
    pressed = False

    def interrupt(signum: int, frame: object) -> NoReturn:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    # An import or a library may turn KeyboardInterrupt into an error of its own: remember that the user pressed Ctrl-C.
    at_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    listens = at_default and threading.current_thread() is threading.main_thread()
    if listens:
        signal.signal(signal.SIGINT, interrupt)
    try:
        return work() or 0
    except BaseException as error:  # noqa: BLE001  `explain` raises again what is no mistake
        if pressed or isinstance(error, KeyboardInterrupt):
            print(stopped, file=sys.stderr)
            return 130
        reason = explain(error)
    finally:
        if listens:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    print("error:", " ".join(reason.split()), file=sys.stderr)
    return 2


def explain(error: BaseException) -> str:
    """What to tell the user. Raises the error again if it is no mistake of theirs."""
    if isinstance(error, UsageError | OSError):
        return str(error)
    # PyTorch has no class of its own for a CPU's memory
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error)):
        return f"out of memory ({str(error).split(chr(10))[0]}); a smaller --batch or --length needs less"
    raise error
