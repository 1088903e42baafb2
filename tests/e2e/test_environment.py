"""`launch.py` and `python -m cosmos3_pipeline` under a Python without the packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cosmos3_pipeline.errors import REFUSED

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("typed", [["launch.py", "task.prompt=a kite"], ["-m", "cosmos3_pipeline", "plugins"]])
def test_a_python_without_the_packages_is_answered(typed: list[str]) -> None:
    # -S leaves out site-packages; -I would also leave out the checkout.
    bare = [sys.executable, "-S"]
    done = subprocess.run([*bare, *typed], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == REFUSED
    assert "Traceback" not in done.stderr
    what, why, works = done.stderr.splitlines()
    assert "hydra" in what and sys.executable in why
    assert ".venv/bin/python" in works or "make run" in works
