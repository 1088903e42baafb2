"""A few cases of the campaign of faults; `make faults` runs hundreds."""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faults
import pytest


class Chosen(random.Random):
    """Chooses what it was told where that is among the choices."""

    def __init__(self, *told: Any) -> None:
        super().__init__(0)
        self._told = told

    def choice(self, seq: Sequence[Any]) -> Any:
        return next((one for one in self._told if one in seq), seq[0])


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("signal to the launcher", ("one process", "in its work", signal.SIGTERM)),
        ("launcher killed", ("2 ranks", "in its work")),
    ],
)
def test_a_run_ends_well(kind: str, told: tuple[Any, ...], tmp_path: Path) -> None:
    place = faults.Place(tmp_path)
    try:
        found = faults.KINDS[kind](Chosen(*told), place)
    finally:
        place.end()
    assert not found.wrong, found
