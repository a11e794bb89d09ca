"""Score written texts: a run's generated.jsonl, or another system's outputs.

    python -m extras.score out/e2e/RUN/generated.jsonl --rules e2e

Each line of the file is {"references": ["...", ...], "output": "..."}. "source" may stand beside
them; "group" gives every group scores of its own. --rules says which task's papers count so:
support/metrics.py lists them.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from support.files import Parser, UsageError, exit_code
from support.metrics import RULES, score


def read(path: Path) -> tuple[list[str], list[SimpleNamespace]]:
    """The outputs, and beside each its references and its group."""
    outputs, pairs = [], []
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read ({error}); name a run's generated.jsonl"
        ) from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = dict(json.loads(line))
            texts = [row["output"], *list.copy(row["references"])]  # TypeError if it is no list
        except (ValueError, TypeError, KeyError):
            texts = []
        if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
            wanted = '{"references": ["...", ...], "output": "..."}'
            raise UsageError(f"{path} line {number}: not {wanted}, but {line[:40]}; mend it")
        outputs.append(texts[0])
        pairs.append(SimpleNamespace(references=texts[1:], group=str(row.get("group", ""))))
    if not outputs:
        raise UsageError(f"{path} has no line to score")
    return outputs, pairs


def work(argv: list[str] | None) -> None:
    parser = Parser(
        prog="python -m extras.score", description="Score written texts.", allow_abbrev=False
    )
    parser.add_argument(
        "file", type=Path, help="a .jsonl file with references and output in each line"
    )
    parser.add_argument(
        "--rules", choices=RULES, default="plain", help="as which task's papers score"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args(argv)
    scores, missing = score(*read(options.file), options.rules)
    print(*missing, sep="\n", end="\n" if missing else "", file=sys.stderr)
    if options.json:
        print(json.dumps(scores))
    else:
        print(*(f"{name:20} {value:8.2f}" for name, value in scores.items()), sep="\n")


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main())
