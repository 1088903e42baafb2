"""What a diffusers class takes of a config file that may say more."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any


def known_to(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that the constructor of the diffusers class `cls` takes."""
    taken = inspect.signature(cls.__init__).parameters
    return {key: value for key, value in values.items() if key in taken}
