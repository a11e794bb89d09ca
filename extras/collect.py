"""One table of many reproduction.json, the files that sweep.py leaves beside its reports.

    python -m extras.collect docs/reproductions/*.json

A file that was edited after it was written is named and left out. One whose results come from
several commits, or from a tree with changes, is named below the table.
"""

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import mean

from support import report, workers
from support.files import Parser, UsageError, exit_code

HEAD = ("task", "method", "test %", "seeds", "paper", "difference", "agrees", "device", "commit")


def rows_of(found: dict) -> Iterator[list]:
    """The lines of the table that one file makes."""
    device, commit = ", ".join(found["hours"]), found["commits"][0][:7]
    for kept in found["rows"]:
        row = report.Row(**kept)
        values, says = row.accuracies, report.verdict(row)
        test = f"{mean(values):.2f} ± {report.deviation(values):.2f}"
        compared = [row.published, f"{says['difference']:+.2f}", says["agrees"]] if says else []
        line = [row.task, report.called(row.method), test, len(values), *compared]
        yield [*line, *[None] * (7 - len(line)), device, commit]


def collect(paths: list[str]) -> str:
    """The table, and below it what is wrong with a file."""
    made, notes = [], []
    for path in paths:
        try:
            found = json.loads(Path(path).read_bytes())
            if found["sha256"] != workers.seal(found):
                notes.append(f"{path} was changed after it was written; it is left out")
                continue
            made += [[*line, path] for line in rows_of(found)]
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise UsageError(
                f"{path} is no reproduction.json ({error}); sweep.py leaves one beside its report"
            ) from error
        commits = found["commits"]
        if len(commits) > 1 or commits[0] == "unknown" or commits[0].endswith("+changes"):
            notes.append(f"{path} was not made by one clean commit: {', '.join(commits)}")
    return "\n".join([report.markdown([*HEAD, "file"], made), *notes])


def run(argv: list[str] | None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="+", help="reproduction.json files")
    print(collect(parser.parse_args(argv).files))


def main(argv: list[str] | None = None) -> int:
    return exit_code(partial(run, argv))


if __name__ == "__main__":
    sys.exit(main())
