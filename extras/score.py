"""Score written texts: a run's generated.jsonl, or another system's outputs.

    python -m extras.score out/e2e/RUN/generated.jsonl --rules e2e

Each line of the file is {"references": ["...", ...], "output": "..."}. "source" may stand beside
them; "group" gives every group scores of its own. --rules says which task's papers count so:
support/metrics.py lists them.
"""

import json
import sys
from functools import partial

from support.files import Parser, UsageError, exit_code
from support.language import Pair, lines, parsed
from support.metrics import RULES, score


def read(path: str) -> tuple[list[str], list[Pair]]:
    """The outputs, and beside each its references and its group. UsageError for another file."""
    outputs, pairs = [], []
    for place, line in lines(path):
        row = parsed(place, line)
        references = row.get("references")
        texts = [row.get("output"), *references] if isinstance(references, list) else []
        if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
            wanted = '{"references": ["...", ...], "output": "..."}'
            raise UsageError(f"{place}: not {wanted}, but {line[:40]}; mend it")
        outputs.append(texts[0])
        pairs.append(Pair("", texts[1:], str(row.get("group", ""))))
    if not outputs:
        raise UsageError(f"{path} has no line to score")
    return outputs, pairs


def run(argv: list[str] | None) -> None:
    parser = Parser("Score written texts.")
    parser.add_argument("file", help="a .jsonl file with references and output in each line")
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
    return exit_code(partial(run, argv))


if __name__ == "__main__":
    sys.exit(main())
