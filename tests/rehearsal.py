"""sweep.py on a made CUB: `python tests/rehearsal.py FOLDER OPTIONS`, with FOLDER/splits.json.

A worker's process imports this file too, and so knows the same splits.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support import benchmarks

made = json.loads(Path(sys.argv[1], "splits.json").read_text())
benchmarks.SPLIT_FILES |= made["files"]
benchmarks.TASKS["cub"] |= made["sizes"]

import sweep  # noqa: E402  (its tasks have the sizes of the splits)

if __name__ == "__main__":
    sys.exit(sweep.main(sys.argv[2:]))
