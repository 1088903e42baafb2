"""Revisions of the project as folders, and what each one's own code says about a list of cases."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from cosmos3_pipeline import config
from cosmos3_pipeline.review import worker

WORKING_TREE = "working tree"
CASES_FILE = Path("tests/golden/cases.yaml")
TOOLS = Path(config.__file__).resolve().parent  # modules that work on the configs of any revision


class ReviewError(ValueError):
    """A comparison that cannot be made: no repository, no such revision, a tree whose code does not start."""


@dataclass(frozen=True)
class Tree:
    """The files of one revision. `plugins` is a folder that declares the revision's own entry points."""

    label: str
    root: Path
    plugins: Path

    @property
    def conf(self) -> Path:
        return self.root / "conf"

    def cases(self) -> dict[str, list[str]]:
        """The revision's checked-in case list: name -> overrides."""
        file = self.root / CASES_FILE
        return read_cases(file) if file.is_file() else {}

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Have the revision's code answer `request` (see `worker.py`). Raises ReviewError when it cannot start."""
        python_path = os.pathsep.join(str(p) for p in (self.plugins, self.root, self.root / "plugins"))
        own = Path(worker.__file__).resolve().parents[2]
        hidden = [] if own == self.root else [str(own), str(own / "plugins")]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HYDRA_")}
        done = subprocess.run(
            [sys.executable, "-P", str(Path(worker.__file__).resolve())],
            input=json.dumps({"conf": str(self.conf), "hidden": hidden, "tools": str(TOOLS), **request}),
            env={**environment, "PYTHONPATH": python_path, "PYTHONDONTWRITEBYTECODE": "1"},
            cwd=self.root,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ReviewError(f"the code of {self.label} does not start: {last.replace(str(self.root), '.')}")
        answer = json.loads(done.stdout.replace(str(self.root), "."))
        assert isinstance(answer, dict)
        return answer

    def survey(self) -> dict[str, Any]:
        """Every case of the revision: what it composes to and plans, or the problems that refuse it."""
        answer = self.ask({"cases": self.cases(), "options": True})["cases"]
        assert isinstance(answer, dict)
        return answer

    def trace(self, wanted: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[dict[str, tuple[str, str]]]:
        """For each (overrides, keys): where each key's value was written, and the key that was written there."""
        if not wanted:
            return []
        answers = self.ask({"trace": [[list(o), list(k)] for o, k in wanted]})["trace"]
        return [{key: (place, root) for key, (place, root) in answer.items()} for answer in answers]


def read_cases(file: Path) -> dict[str, list[str]]:
    """A case list: a YAML mapping from a name to a list of overrides."""
    content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    if not (isinstance(content, dict) and all(isinstance(overrides, list) for overrides in content.values())):
        raise ReviewError(f"{CASES_FILE} is not a mapping from names to lists of overrides")
    return {str(name): [str(o) for o in overrides] for name, overrides in content.items()}


@contextmanager
def checked_out(revision: str | None, repository: Path) -> Iterator[Tree]:
    """The tree of `revision`, extracted to a temporary folder; None is the working tree as it stands.

    `repository` is any folder inside the project's git repository. Neither its index nor its worktrees change.
    """
    project = project_root(repository)
    with TemporaryDirectory(prefix="cosmos3_review_") as temporary:
        root = project
        if revision is not None:
            root = Path(temporary) / "tree"
            commit = git(project, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
            _extract(project, commit.decode().strip(), root)
        if not (root / "conf").is_dir():
            raise ReviewError(f"{revision or WORKING_TREE} has no folder conf/ with a composition in it")
        plugins = Path(temporary) / "entry_points"
        _declare_entry_points(root, plugins)
        yield Tree(revision or WORKING_TREE, root, plugins)


def git(repository: Path, *arguments: str) -> bytes:
    """What a git command prints. Raises ReviewError when it fails."""
    try:
        done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True)
    except FileNotFoundError as error:
        raise ReviewError("git is not installed; only files and override lists can be compared") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        asked = arguments[-1].removesuffix("^{commit}")
        raise ReviewError(said[-1] if said else f"git knows no revision {asked}")
    return done.stdout


def project_root(folder: Path) -> Path:
    """The nearest folder, from `folder` up to the top of its git repository, that has `conf/config.yaml`."""
    top = Path(git(folder, "rev-parse", "--show-toplevel").decode().strip()).resolve()
    here = folder.resolve()
    while not (here / "conf" / "config.yaml").is_file():
        if here in (top, here.parent):
            raise ReviewError("there is no conf/config.yaml here or above, so there is nothing to compose")
        here = here.parent
    return here


def _extract(project: Path, commit: str, target: Path) -> None:
    prefix = git(project, "rev-parse", "--show-prefix").decode().strip()
    archive = git(project, "archive", "--format=tar", f"{commit}:{prefix}" if prefix else commit)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(target, filter="data")


def _declare_entry_points(root: Path, folder: Path) -> None:
    """Write the entry points of the tree's own pyproject.toml as if that revision were the installed one."""
    folder.mkdir()
    declared = root / "pyproject.toml"
    if not declared.is_file():
        return
    project = tomllib.loads(declared.read_text(encoding="utf-8")).get("project", {})
    name, version = project.get("name", "cosmos3-pipeline"), project.get("version", "0")
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, points in project.get("entry-points", {}).items():
        lines += [f"[{group}]", *(f"{point} = {target}" for point, target in points.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))
