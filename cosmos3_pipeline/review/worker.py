"""Runs inside one revision of the project: composes and plans cases with that revision's own code.

A script, started by `revisions.py` with the revision's tree first on the import path. It reads a request from
standard input and writes an answer to standard output, both JSON, and leans on little of the revision:
`cosmos3_pipeline.compose(overrides)`, and `cosmos3_pipeline.plan.plan_of(cfg)` where there is one. What has to do
with Hydra is done by the caller's own modules in the folder `tools`, which is its `config/`.

    request  {"conf": folder, "hidden": [path], "tools": folder, "cases": {name: overrides}, "options": bool}
          or {"conf": folder, "hidden": [path], "tools": folder, "trace": [[overrides, keys], ...]}
    answer   {"cases": {name: {"overrides": [...], "config": flat, "plan": summary or null}, or "problems": [...]}}
          or {"trace": [{key: [place, root key]}, ...]}
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer the one request on standard input."""
    request = json.load(sys.stdin)
    # An editable installation puts the caller's own tree on the path as well.
    sys.path[:] = [p for p in sys.path if p not in request["hidden"]]
    # Whatever the revision's code prints must not end up inside the answer.
    answer_to, sys.stdout = sys.stdout, sys.stderr
    answer = _trace(request) if "trace" in request else _survey(request)
    json.dump(answer, answer_to)


def _survey(request: dict[str, Any]) -> dict[str, Any]:
    from cosmos3_pipeline.config.plugins import register

    register()
    options, flat = _tool(request, "options").options, _tool(request, "plain").flat
    cases: dict[str, list[str]] = {"default": []}
    if request["options"]:
        cases |= {option: [option] for option in options(request["conf"])}
    cases |= request["cases"]
    return {"cases": {name: {"overrides": o, **_case(o, flat)} for name, o in cases.items()}}


def _tool(request: dict[str, Any], name: str) -> Any:
    """The caller's own module `name`, whatever the revision has under that name."""
    spec = importlib.util.spec_from_file_location(f"_{name}", Path(request["tools"]) / f"{name}.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tool  # dataclasses look their module up
    spec.loader.exec_module(tool)
    return tool


def _case(overrides: list[str], flat: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Compose and plan one list of overrides; what refuses it becomes the answer."""
    from cosmos3_pipeline import compose

    try:
        cfg = compose(overrides)
        return {"config": flat(cfg), "plan": _plan(cfg)}
    # The code of another revision may raise anything: that it does is the answer for this case.
    except Exception as error:
        problems = getattr(error, "problems", None) or [getattr(error, "problem", None)]
        return {"problems": [_words(problem, error) for problem in problems]}


def _words(problem: Any, error: Exception) -> dict[str, str]:
    if problem is None:
        first, *rest = f"{type(error).__name__}: {error}".splitlines()
        told = [" ".join(line.split()) for line in rest if line.strip()]
        return {"what": first, "why": "; ".join([*told, *_raised_in(error)]), "works": ""}
    return {part: str(getattr(problem, part, "")) for part in ("what", "why", "works")}


def _raised_in(error: Exception) -> list[str]:
    """The last line of the revision's own code that the error came through, if it did."""
    import cosmos3_pipeline

    root = Path(cosmos3_pipeline.__file__).parents[1]
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        path = Path(frame.filename)
        own = any(path.is_relative_to(root / part) for part in ("cosmos3_pipeline", "plugins"))
        if own and path.resolve() != Path(__file__).resolve():
            verb = "raised" if frame is frames[-1] else "came up"
            return [f"{verb} in {path.relative_to(root)}, line {frame.lineno}, in {frame.name}()"]
    return []


def _plan(cfg: Any) -> dict[str, Any] | None:
    from cosmos3_pipeline import plan

    plan_of = getattr(plan, "plan_of", None)
    return None if plan_of is None else dict(plan_of(cfg)["summary"])


def _trace(request: dict[str, Any]) -> dict[str, Any]:
    from cosmos3_pipeline.config.plugins import register

    register()
    provenance = _tool(request, "provenance")
    answers = []
    for overrides, keys in request["trace"]:
        traced = provenance.trace(overrides, Path(request["conf"]))
        chains = {key: traced.chain(key) for key in keys}
        answers.append({key: [c[-1].winner.source, c[-1].key] for key, c in chains.items() if c})
    return {"trace": answers}


if __name__ == "__main__":
    main()
