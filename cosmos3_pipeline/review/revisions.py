"""Revisions of the project as folders. Each composes and plans a list of cases with its own code."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from cosmos3_pipeline import config, stopping
from cosmos3_pipeline.config.closure import Contents, contents, search_path
from cosmos3_pipeline.review import worker

WORKING_TREE = "working tree"
CASES_FILE = Path("tests/golden/cases.yaml")
TOOLS = Path(config.__file__).resolve().parent  # its modules work on the configs of any revision


class ReviewError(ValueError):
    """A comparison that cannot be made: no repository, no such revision, a tree whose code does not start."""


@dataclass(frozen=True)
class Tree:
    """The files of one revision. `plugins` is a folder that declares the revision's own entry points.

    The primary config is `name` in the folder `conf`. If the project only uses this library and does not contain
    it, the library that runs now is used.
    """

    label: str
    root: Path
    plugins: Path
    conf: Path
    name: str
    # The process of the revision's code, started by the first request, and the file with its error messages.
    running: list[tuple[subprocess.Popen[str], list[str]]]
    errors: Path

    @cached_property
    def contents(self) -> Contents:
        """The content of every config of the revision."""
        return contents(self.conf)

    def cases(self) -> dict[str, list[str]]:
        """The revision's checked-in case list: name -> overrides."""
        file = self.root / CASES_FILE
        return read_cases(file) if file.is_file() else {}

    def _start(self) -> tuple[subprocess.Popen[str], list[str]]:
        """The process of the revision's code, and the folders from which it must not import."""
        own = Path(worker.__file__).resolve().parents[2]
        # An installed wheel's folder has all other packages too, so it stays. The first folder on the path wins.
        checkout = (own / "pyproject.toml").is_file()
        other_code = checkout and own != self.root and (self.root / "cosmos3_pipeline").is_dir()
        hidden = [str(own), str(own / "plugins")] if other_code else []
        paths = [self.plugins, self.root, self.root / "plugins", *([] if other_code else [own])]
        python_path = os.pathsep.join(map(str, paths))
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HYDRA_")}
        if self.label != WORKING_TREE:  # the folder is temporary, so compiled code in it would be of no use
            environment["PYTHONDONTWRITEBYTECODE"] = "1"
        process = subprocess.Popen(
            [sys.executable, "-P", str(Path(worker.__file__).resolve())],
            env={**environment, "PYTHONPATH": python_path},
            cwd=self.root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors.open("w"),
            text=True,
        )
        return process, hidden

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Have the revision's code answer `request` (see `worker.py`). Raises ReviewError if it cannot start."""
        if not self.running:
            self.running.append(self._start())
        process, hidden = self.running[0]
        assert process.stdin is not None and process.stdout is not None
        own = {"conf": str(self.conf), "root": str(self.root), "name": self.name}
        asked = {**own, "hidden": hidden, "tools": str(TOOLS), **request}
        try:
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            process.wait()
            last = (self.errors.read_text().strip().splitlines() or ["no message"])[-1]
            raise ReviewError(f"the code of {self.label} does not start: {last.replace(str(self.root), '.')}")
        answer = json.loads(line.replace(str(self.root), "."))
        assert isinstance(answer, dict)
        return answer

    def knows_sources(self) -> bool:
        """Whether the revision's code can compose configs of other folders; older revisions cannot."""
        own = self.root / "cosmos3_pipeline"
        return not own.is_dir() or (own / "config" / "source.py").is_file()

    def stop(self) -> None:
        """End the process of the revision's code, if it runs."""
        for process, _ in self.running:
            process.terminate()
            process.communicate()
        self.running.clear()

    def survey(self) -> dict[str, Any]:
        """Every case of the revision: its config and plan, or the problems that refuse it."""
        answer = self.ask({"cases": self.cases(), "options": True})["cases"]
        assert isinstance(answer, dict)
        return answer

    def located(self, survey: Mapping[str, Any], broken: Collection[str]) -> dict[str, Any]:
        """`survey`, where problems of the cases `broken` name the file or override with the wrong value."""
        firsts: dict[str, str] = {}  # problems -> the first case that has them
        for name in broken:
            firsts.setdefault(repr(survey[name]["problems"]), name)
        unknown = {why: name for why, name in firsts.items() if not re.search(r"\.yaml:\d", why)}
        if not unknown:
            return dict(survey)
        cases = {name: survey[name]["overrides"] for name in unknown.values()}
        again = self.ask({"cases": cases, "options": False, "located": True})["cases"]
        found = {why: again[name].get("problems") for why, name in unknown.items()}
        return {
            name: {**case, "problems": found.get(repr(case["problems"])) or case["problems"]}
            if name in broken
            else case
            for name, case in survey.items()
        }

    def survey_both(self, base: Tree, touched: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
        """The surveys of `base`, whose code is the same, and of this tree; and the number of untouched cases.

        The surveys contain only cases that the configs `touched` change. All other cases are untouched.
        """
        others = {"conf": str(self.conf), "cases": self.cases()}
        request = {"conf": str(base.conf), "cases": base.cases(), "options": True, "others": others}
        answer = self.ask({**request, "touched": touched})
        return answer["sides"], answer["untouched"]

    def code(self) -> str:
        """A digest of the code and the entry points, which together with the configs decide every case."""
        digest = hashlib.sha256()
        for top in sorted(path for path in self.root.iterdir() if path.name in _packages(self.root)):
            for file in sorted(top.rglob("*.py")):
                digest.update(file.relative_to(self.root).as_posix().encode() + file.read_bytes())
        points = self.plugins.rglob("entry_points.txt")
        return digest.hexdigest() + "".join(file.read_text() for file in points)

    def trace(
        self, wanted: Sequence[tuple[Sequence[str], Sequence[str]]], by: Tree | None = None
    ) -> list[dict[str, tuple[str, str]]]:
        """For each (overrides, keys): where each key's value was written, and the key that was written there.

        `by` is another tree with the same code, whose process is asked instead.
        """
        if not wanted:
            return []
        asked = {"conf": str(self.conf), "root": str(self.root), "trace": [[list(o), list(k)] for o, k in wanted]}
        answers = (by or self).ask(asked)["trace"]
        return [{key: (place, root) for key, (place, root) in answer.items()} for answer in answers]


def touched(base: Tree, head: Tree) -> list[str] | None:
    """The configs that differ in `head`.

    None if any case may be touched: the code differs, or a folder of the project in the search path. Each revision
    then composes in its own process, which finds its own folder.
    """
    old, new = base.contents, head.contents
    further = [_searched(base, old), _searched(head, new)]
    if base.code() != head.code() or further[0] != further[1]:
        return None
    return sorted(name for name in {*old, *new} if old.get(name) != new.get(name))


def _searched(tree: Tree, known: Contents) -> list[Contents]:
    """The contents of the folders of `tree` itself in the search path of its primary config."""
    found = []
    for place in search_path(known, tree.name):
        scheme, _, name = place.partition("://")
        folder = tree.root / (name.replace(".", "/") if scheme == "pkg" else name or place)
        found.append(contents(folder) if folder.is_dir() and folder.is_relative_to(tree.root) else {})
    return found


def read_cases(file: Path) -> dict[str, list[str]]:
    """A case list: a YAML mapping from a name to a list of overrides."""
    content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    if not (isinstance(content, dict) and all(isinstance(overrides, list) for overrides in content.values())):
        raise ReviewError(f"{CASES_FILE} is not a mapping from names to lists of overrides")
    return {str(name): [str(o) for o in overrides] for name, overrides in content.items()}


def _packages(root: Path) -> set[str]:
    """The top folders of a project whose code decides compositions and plans."""
    own = {"cosmos3_pipeline", "plugins", "conf"}
    others = {file.parent.name for file in root.glob("*/__init__.py")}
    return own if (root / "cosmos3_pipeline").is_dir() else others


@contextmanager
def checked_out(
    revision: str | None, repository: Path, conf: str = "conf", name: str = "config"
) -> Iterator[Tree]:
    """The tree of `revision`, extracted to a temporary folder. None is the working tree itself.

    `repository` is any folder inside the project's git repository. Neither its index nor its worktrees change.
    `conf` is the folder of the project's configs, and `name` the primary config.
    """
    project = project_root(repository, conf, name)
    with (
        TemporaryDirectory(prefix="cosmos3_review_") as temporary,
        stopping.leftover(Path(temporary)),
    ):
        root = project
        if revision is not None:
            root = Path(temporary) / "tree"
            commit = git(project, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
            _extract(project, commit.decode().strip(), root)
        if not (root / conf).is_dir():
            raise ReviewError(f"{revision or WORKING_TREE} has no folder {conf}/ with a composition in it")
        plugins = Path(temporary) / "entry_points"
        _declare_entry_points(root, plugins)
        errors = Path(temporary) / "errors.txt"
        tree = Tree(revision or WORKING_TREE, root, plugins, root / conf, name, [], errors)
        try:
            yield tree
        finally:
            tree.stop()


def git(repository: Path, *arguments: str) -> bytes:
    """The output of a git command. Raises ReviewError if it fails."""
    try:
        done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True)
    except FileNotFoundError as error:
        raise ReviewError("git is not installed; only files and override lists can be compared") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        asked = arguments[-1].removesuffix("^{commit}")
        raise ReviewError(said[-1] if said else f"git knows no revision {asked}")
    return done.stdout


def project_root(folder: Path, conf: str, name: str) -> Path:
    """The nearest folder, from `folder` up to the top of its git repository, that has the primary config."""
    top = Path(git(folder, "rev-parse", "--show-toplevel").decode().strip()).resolve()
    here = folder.resolve()
    while not (here / conf / f"{name}.yaml").is_file():
        if here in (top, here.parent):
            raise ReviewError(
                f"there is no {conf}/{name}.yaml here or above, so there is nothing to compose; "
                "--conf FOLDER and --config-name NAME say where a project has its primary config"
            )
        here = here.parent
    return here


def _extract(project: Path, commit: str, target: Path) -> None:
    prefix = git(project, "rev-parse", "--show-prefix").decode().strip()
    archive = git(project, "archive", "--format=tar", f"{commit}:{prefix}" if prefix else commit)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(target, filter="data")


def _declare_entry_points(root: Path, folder: Path) -> None:
    """Write the entry points of the tree's pyproject.toml, as if this revision were installed."""
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
