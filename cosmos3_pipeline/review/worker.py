"""Runs inside one revision of the project: composes and plans cases with that revision's own code.

A script, started by `revisions.py` with the revision's tree first on the import path. It reads a request from
standard input and writes an answer to standard output, both JSON, and leans on little of the revision:
`cosmos3_pipeline.compose(overrides)`, and `cosmos3_pipeline.plan.plan_of(cfg)` where there is one. Tracing is
done by the caller's own `provenance.py`, given by its path.

    request  {"conf": folder, "hidden": [path], "cases": {name: overrides}, "options": bool}
          or {"conf": folder, "hidden": [path], "trace": [[overrides, keys], ...], "provenance": file}
    answer   {"cases": {name: {"overrides": [...], "config": flat, "plan": summary or null}, or "problems": [...]}}
          or {"trace": [{key: [place, root key]}, ...]}
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from collections.abc import Iterator
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
    cases: dict[str, list[str]] = {"default": []}
    if request["options"]:
        cases |= {option: [option] for option in _options(request["conf"])}
    cases |= request["cases"]
    return {"cases": {name: {"overrides": o, **run_case(o)} for name, o in cases.items()}}


def _options(conf: str) -> Iterator[str]:
    """`group=option` for every option of every group, experiments first."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.object_type import ObjectType

    from cosmos3_pipeline.config.plugins import register

    register()
    with hydra.initialize_config_dir(conf, version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()

        def groups(parent: str) -> Iterator[str]:
            for name in loader.list_groups(parent):
                group = f"{parent}/{name}" if parent else name
                if not group.startswith(("hydra", "_")):
                    yield group
                    yield from groups(group)

        for group in sorted(groups(""), key=lambda g: (g != "experiment", g)):
            for option in loader.get_group_options(group, ObjectType.CONFIG):
                if not option.startswith("_"):
                    yield f"{group}={option}"


def run_case(overrides: list[str]) -> dict[str, Any]:
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


def flat(cfg: Any) -> dict[str, Any]:
    """Dotted keys and resolved plain values; lists stay whole, `hydra.*` is left out."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return dict(sorted(_leaves({k: v for k, v in plain.items() if k != "hydra"}, "")))


def _leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and (node or not key):
        for name, inner in node.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, node


def _trace(request: dict[str, Any]) -> dict[str, Any]:
    from cosmos3_pipeline.config.plugins import register

    register()
    spec = importlib.util.spec_from_file_location("_provenance", request["provenance"])
    assert spec is not None and spec.loader is not None
    provenance = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = provenance  # dataclasses look their module up
    spec.loader.exec_module(provenance)
    answers = []
    for overrides, keys in request["trace"]:
        traced = provenance.trace(overrides, Path(request["conf"]))
        chains = {key: traced.chain(key) for key in keys}
        answers.append({key: [c[-1].winner.source, c[-1].key] for key, c in chains.items() if c})
    return {"trace": answers}


if __name__ == "__main__":
    main()
