"""`cosmos3 report`: write the page of a sweep or of a run again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cosmos3_pipeline.config.arguments import Arguments
from cosmos3_pipeline.report import run_page, sweep_page

USAGE = 3

DESCRIPTION = """\
Write index.html for the folder of a sweep (with a sweep.json) or of a run (with a metrics.json).

  cosmos3 report multirun/2026-12-01/10-00-00.000000
  cosmos3 report outputs/2026-12-01/10-00-00.000000

Exit code: 0 written, 3 there is neither.
"""


def main(arguments: Sequence[str]) -> int:
    """Run `cosmos3 report` with `arguments` and return the exit code."""
    parser = Arguments("cosmos3 report", DESCRIPTION, usage=USAGE)
    parser.add_argument("folder", type=Path)
    folder = parser.parse(arguments).folder.absolute()
    if (folder / "sweep.json").is_file():
        print(sweep_page(folder))
    elif (folder / "metrics.json").is_file():
        print(run_page(folder, []))
    else:
        print(f"{folder} has no sweep.json and no metrics.json", file=sys.stderr)
        return USAGE
    return 0
