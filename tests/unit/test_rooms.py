"""The rooms of the library: a file imports only from its own room or from those before it."""

from __future__ import annotations

import ast
from pathlib import Path

LIBRARY = Path(__file__).parents[2] / "cosmos3_pipeline"
ROOMS = (
    *(
        "errors",
        "stopping",
        "distributed",
        "fused",
        "vae",
        "config",
        "denoise",
        "checkpoint",
        "planning",
        "models",
        "stages",
    ),
    *("rehearsal", "jobs", "trackers", "review", "report", "plugin_kit"),
)
HEAVY = {"torch", "diffusers", "transformers", "safetensors", "av", "numpy"}
# The modules of the VAE that plan without torch.
LIGHT = (
    *(
        "account",
        "assignment",
        "builder",
        "clock",
        "costs",
        "line_cuts",
        "line_times",
        "lowering",
        "measured",
        "ops",
        "planning",
    ),
    *("plugins", "program", "rates", "search", "strategy"),
)
# The other files of the library's own folder, such as cli.py, use every room.
FILES = sorted(p for p in LIBRARY.rglob("*.py") if p.parent != LIBRARY or p.stem in ROOMS)


def imported(file: Path, *, top_level: bool) -> set[str]:
    """The modules that `file` imports: all of them, or those that importing the file imports."""
    tree = ast.parse(file.read_text())
    nodes = tree.body if top_level else list(ast.walk(tree))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_imports_point_to_earlier_rooms() -> None:
    for file in FILES:
        room = file.relative_to(LIBRARY).parts[0].removesuffix(".py")
        assert room in ROOMS
        for name in imported(file, top_level=False):
            if name.startswith("cosmos3_pipeline."):
                other = name.split(".")[1]
                assert ROOMS.index(other) <= ROOMS.index(room), f"{file} imports {name}"
            assert not name.startswith("cosmos3_plugins") or room == "plugin_kit", f"{file} imports {name}"


def test_what_the_command_line_needs_imports_nothing_heavy() -> None:
    for file in FILES:
        relative = file.relative_to(LIBRARY).as_posix()
        light = relative.startswith(("config/", "checkpoint/", "planning/")) or file.name == "__init__.py"
        light |= relative in {f"vae/{name}.py" for name in LIGHT}
        light |= relative in ("denoise/cost.py", "denoise/checks.py", "denoise/guidance.py")
        if light:
            assert {name.split(".")[0] for name in imported(file, top_level=True)} & HEAVY == set(), file


def test_only_config_and_the_command_line_know_hydra_and_omegaconf() -> None:
    """Below them there are typed dataclasses.

    A tracker is a callback of Hydra. The kit asks OmegaConf whether it can hold a plugin's settings.
    """
    knowing = [
        LIBRARY / "config",
        LIBRARY / "trackers",
        LIBRARY / "cli.py",
        LIBRARY / "plugin_kit" / "test_plan.py",
    ]
    knowing += (LIBRARY.parent / "examples").glob("*/*/make.py")  # a program of its own
    for root in (LIBRARY, LIBRARY.parent / "plugins", LIBRARY.parent / "examples"):
        for file in root.rglob("*.py"):
            names = {name.split(".")[0] for name in imported(file, top_level=False)}
            known = any(file.is_relative_to(path) for path in knowing)
            assert known or not names & {"hydra", "omegaconf"}, file
