"""`cosmos3 diff`: two revisions, two saved configs, or two lists of overrides."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from cosmos3_pipeline.config.arguments import Arguments
from cosmos3_pipeline.review import files, render
from cosmos3_pipeline.review.compare import Side, compare
from cosmos3_pipeline.review.report import Report
from cosmos3_pipeline.review.revisions import ReviewError, checked_out, touched

USAGE = 3  # exit code of a comparison that could not be made
FORMATS = {"text": render.as_text, "markdown": render.as_markdown, "json": render.as_json}

DESCRIPTION = """\
What a change of the configuration does to every run: layout, memory, speed, bytes sent, exactness, pixels.

  cosmos3 diff                                     the last commit and the working tree
  cosmos3 diff main                                main and the working tree
  cosmos3 diff main my-branch                      two revisions (also main..my-branch)
  cosmos3 diff outputs/a outputs/b                 two runs: their configs, and what they measured
  cosmos3 diff -- vae=replicated -- vae=parallel_decode        two lists of overrides

Exit code: 0 same, 1 differs, 2 a case stopped composing or planning, 3 the comparison could not be made.
"""


def main(arguments: Sequence[str]) -> int:
    """Run `cosmos3 diff` with `arguments`, print the report and return the exit code."""
    options, *lists = _split(arguments)
    parser = Arguments("cosmos3 diff", DESCRIPTION, usage=USAGE)
    parser.add_argument("base", nargs="?", help="a revision or a saved config.yaml (default: HEAD)")
    parser.add_argument("head", nargs="?", help="the other one (default: the working tree)")
    parser.add_argument("--conf", default="conf", help="the folder of the project's configs (default: conf)")
    parser.add_argument("--config-name", default="config", help="its primary config (default: config)")
    parser.add_argument("--format", choices=FORMATS, default="text")
    parser.add_argument(
        "--fail-on",
        choices=("plan", "invalid", "exactness"),
        help="exit with 1 only when a plan changes, never, or when a stage becomes less exact; 2 stays",
    )
    asked = parser.parse(options)
    try:
        report = _report(asked.base, asked.head, lists, asked.conf, asked.config_name)
    except ReviewError as error:
        print(f"cosmos3 diff: {error}", file=sys.stderr)
        return USAGE
    print(FORMATS[asked.format](report), end="" if asked.format == "markdown" else "\n")
    return report.exit_code(asked.fail_on)


def _split(arguments: Sequence[str]) -> list[list[str]]:
    """The arguments before the first `--`, and the lists that each `--` begins."""
    parts: list[list[str]] = [[]]
    for argument in arguments:
        if argument == "--":
            parts.append([])
        else:
            parts[-1].append(argument)
    return parts


def _report(base: str | None, head: str | None, lists: list[list[str]], conf: str, name: str) -> Report:
    saved = [path for path in map(saved_config, (base, head)) if path is not None]
    if not (lists or saved):
        return diff_revisions(base, head, Path.cwd(), conf, name)
    # This process composes here. A revision is composed by a process of its own, so Hydra is not imported above.
    from cosmos3_pipeline.review.runs import measured, side_of_file, side_of_overrides

    if lists:
        if len(lists) != 2 or base is not None:
            raise ReviewError("two lists of overrides are compared: cosmos3 diff -- OVERRIDES -- OVERRIDES")
        return compare(*(side_of_overrides(overrides) for overrides in lists))
    if len(saved) != 2:
        raise ReviewError("a run is compared with another one: cosmos3 diff RUN RUN, or two config.yaml")
    return replace(compare(*map(side_of_file, saved)), measured=measured(*(file.parent for file in saved)))


def saved_config(words: str | None) -> Path | None:
    """The config.yaml that `words` name: the file itself, or in a run's folder. None if they are a revision."""
    if words is None:
        return None
    path = Path(words)
    if path.suffix in (".yaml", ".yml"):
        return path
    return path / "config.yaml" if (path / "config.yaml").is_file() else None


def diff_revisions(
    base: str | None, head: str | None, repository: Path, conf: str = "conf", name: str = "config"
) -> Report:
    """Compare two revisions of the project around `repository`; `head` None is the working tree.

    Its configs are in the folder `conf`, with the primary one called `name`. `base` may be a range, `A..B`, or
    `A...B` from where B left A. Raises ReviewError.
    """
    if base is not None and head is None and ".." in base:
        base, head = _range(base, repository)
    with ExitStack() as stack:
        trees = [stack.enter_context(checked_out(r, repository, conf, name)) for r in (base or "HEAD", head)]
        changed = touched(*trees)
        if changed == [] and trees[0].cases() == trees[1].cases():
            return Report(trees[0].label, trees[1].label, compared=None)
        untouched, trace_base = 0, trees[0].trace
        if changed is not None and trees[1].knows_sources():
            surveys, untouched = trees[1].survey_both(trees[0], changed)
            trace_base = partial(trees[0].trace, by=trees[1])  # so that one process is started, not two
        else:
            with ThreadPoolExecutor(len(trees)) as pool:  # each waits for a process of its own
                surveys = list(pool.map(lambda tree: tree.survey(), trees))
        old, new = (tree.contents for tree in trees)
        told = files.compared(old, new, trees[1].conf, Path(conf).as_posix(), name)
        broken = [n for n, c in surveys[1].items() if "problems" in c and "config" in surveys[0].get(n, {})]
        surveys[1] = trees[1].located(surveys[1], broken)
        base_side = Side(trees[0].label, surveys[0], trace_base)
        head_side = Side(trees[1].label, surveys[1], trees[1].trace)
        return compare(base_side, head_side, untouched=untouched, files=told)


def _range(words: str, repository: Path) -> tuple[str, str]:
    from cosmos3_pipeline.review.revisions import git

    base, _, head = words.partition("..")
    if not head.startswith("."):
        return base or "HEAD", head or "HEAD"
    head = head[1:] or "HEAD"
    return git(repository, "merge-base", base or "HEAD", head).decode().strip(), head
