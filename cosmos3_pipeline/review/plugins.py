"""`cosmos3 plugins`: the installed strategies, and why some of them cannot be used."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from cosmos3_pipeline.config.arguments import Arguments
from cosmos3_pipeline.vae.plugins import ENTRY_POINT_GROUP, discover

BROKEN = 1  # exit code when a plugin cannot be used
USAGE = 3

DESCRIPTION = f"""\
The strategies of installed packages, entry points of the group {ENTRY_POINT_GROUP}, and what they are built from.

Exit code: 0 all can be used, 1 at least one is broken.
"""


def main(arguments: Sequence[str]) -> int:
    """Run `cosmos3 plugins` with `arguments` and return the exit code."""
    parser = Arguments("cosmos3 plugins", DESCRIPTION, usage=USAGE)
    parser.parse(arguments)
    found, console = discover(), Console(markup=False)
    table = Table(title=f"{len(found.strategies)} strategies", title_justify="left")
    for column in ("name", "directions", "exactness", "class"):
        table.add_column(column, overflow="fold")
    for name, cls in found.strategies.items():
        table.add_row(name, ", ".join(sorted(cls.directions)), cls.exactness.value, found.target(name))
    console.print(table)
    for name, why in found.broken.items():
        console.print(f"{name} is installed but broken: {why}", highlight=False, soft_wrap=True)
    return BROKEN if found.broken else 0
