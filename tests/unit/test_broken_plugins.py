"""A plugin that cannot be used is reported with what its author needs, and stops no other."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from cosmos3_pipeline.review import plugins as command
from cosmos3_pipeline.vae import plugins
from cosmos3_pipeline.vae.plugins import ENTRY_POINT_GROUP, discover

GOOD = "cosmos3_plugins.replicated:Replicated"


@pytest.fixture
def undiscovered() -> Iterator[None]:
    """Discover plugins anew in the test, and again after it."""
    discover.cache_clear()
    yield
    discover.cache_clear()


@pytest.mark.usefixtures("undiscovered")
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("\n\nimport torch_is_missing\n", "No module named 'torch_is_missing' ({file}, line 3)"),
        ("def f():\n    raise OSError('gone')\nf()\nclass Mine: pass\n", "OSError: gone ({file}, line 2)"),
        (
            "import importlib\nimportlib.import_module('torch_is_missing')\n",
            "No module named 'torch_is_missing' ({file}, line 2)",
        ),
        ("class Mine\n", "SyntaxError: expected ':' (theirs.py, line 1)"),
        ("", "module 'theirs' has no attribute 'Mine'"),
        ("class Mine: pass\n", "theirs:Mine is not a Strategy that is a dataclass of its settings"),
    ],
)
def test_the_line_that_raised_is_named(
    code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "theirs.py"
    file.write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    points = [EntryPoint(name, value, ENTRY_POINT_GROUP) for name, value in (("a", "theirs:Mine"), ("b", GOOD))]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)
    found = discover()
    assert list(found.strategies) == ["b"]
    assert found.broken["a"].endswith(said.format(file=file)), found.broken["a"]


@pytest.mark.usefixtures("undiscovered")
@pytest.mark.parametrize("broken", [False, True])
def test_the_command_lists_what_is_found(
    broken: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"replicated": GOOD} | ({"theirs": "no_such_module:Mine"} if broken else {})
    points = [EntryPoint(name, value, ENTRY_POINT_GROUP) for name, value in values.items()]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)
    assert command.main([]) == (command.BROKEN if broken else 0)
    said = capsys.readouterr().out
    assert "replicated" in said and "bitwise" in said
    assert ("theirs is installed but broken: " in said and "no_such_module" in said) == broken
