"""The border to the user: a mistake ends in one sentence that says the mend, and in an exit code; never in a traceback.

Exit codes: 0 done, 2 what the user can mend, 3 a run diverged, 130 stopped with Ctrl-C.
"""

import argparse
import sys
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
    try:
        return work() or 0
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
    except (UsageError, OSError) as error:
        reason = str(error)
    except (MemoryError, RuntimeError) as error:  # PyTorch has no class of its own for a CPU's memory
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        reason = f"out of memory ({str(error).split(chr(10))[0]}); a smaller --batch or --length needs less"
    print("error:", " ".join(reason.split()), file=sys.stderr)
    return 2
