"""Numbers of a plan as text for people. The name of a field contains its unit."""

from __future__ import annotations

from typing import Any

STEPS = {
    "bytes": ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")),
    "flops": ((1e15, "PFLOP"), (1e12, "TFLOP")),
}


def quantity(name: str, value: Any) -> str:
    """`value` of the plan's field `name` (`memory.peak_bytes`, `seconds.total`) with its unit; plain otherwise."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if not isinstance(value, int | float):
        return str(value)
    if "bytes" in name:
        return _scaled(value, STEPS["bytes"], "B")
    if "flops" in name:
        return _scaled(value, (*STEPS["flops"], (1e9, "GFLOP"), (1e6, "MFLOP")), "FLOP")
    if "seconds" in name:
        return f"{value:.3g} s" if value < 100 else f"{value:,.0f} s"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _scaled(value: float, steps: tuple[tuple[float, str], ...], smallest: str) -> str:
    for size, unit in steps:
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}" if value / size < 1000 else f"{value / size:,.0f} {unit}"
    return f"{value:.0f} {smallest}"


def significant(value: float, digits: int = 4) -> float:
    """`value` rounded to `digits` significant digits, so that an estimate does not change with every detail."""
    rounded = float(f"{value:.{digits - 1}e}")
    return int(rounded) if isinstance(value, int) else rounded
