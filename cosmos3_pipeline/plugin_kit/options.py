"""The kit's command line options, a pytest plugin that the library's entry point `pytest11` names.

They are not in conftest.py, because pytest reads the options of a conftest.py only if its folder is given as a
path. With `--pyargs` it is given as a module name.
"""

from __future__ import annotations

import pytest

MAX_RANKS = 4


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cosmos3_pipeline.plugin_kit", "conformance of a parallel-VAE strategy")
    group.addoption(
        "--strategy", metavar="PACKAGE:CLASS", help="the strategy under test, as its entry point names it"
    )
    group.addoption(
        "--setting",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="one of its settings, the value in YAML; may be repeated; the others keep their defaults",
    )
    group.addoption(
        "--max-ranks",
        type=int,
        default=MAX_RANKS,
        metavar="N",
        help=f"test at 1 to N ranks, each a process (default: {MAX_RANKS}, at least 2)",
    )
