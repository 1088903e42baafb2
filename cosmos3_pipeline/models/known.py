"""Leaves out the keys of a config file that a diffusers class does not take."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any


def known_to(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The `values` that the constructor of the diffusers class `cls` takes."""
    taken = inspect.signature(cls.__init__).parameters
    return {key: value for key, value in values.items() if key in taken}
