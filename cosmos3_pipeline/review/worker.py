"""A script that runs inside one revision of the project: it composes and plans cases with the revision's code.

`revisions.py` starts this script with the revision's tree first on the import path. It reads requests from
standard input and writes answers to standard output, one JSON text per line. It needs only two functions of the
revision: `cosmos3_pipeline.compose(overrides)`, and `plan_of(cfg)` of the package that plans, if there is one. The
work with Hydra is done by the caller's modules in the folder `tools`, which is the caller's `config/`.

    request  {"conf": folder, "name": primary config, "hidden": [path], "tools": folder,
              "cases": {name: overrides}, "options": bool}, and "located": whether problems name their origin
          or the same with "others": {"conf", "cases"} of another revision with the same code, and "touched":
              [config], the configs that differ: only cases whose composition differs are planned
          or {"conf": folder, "name": primary config, "hidden": [path], "tools": folder,
              "trace": [[overrides, keys]]}
    answer   {"cases": {name: {"overrides": [...], "config": flat, "plan": summary or null}, or "problems": [...]}}
          or {"sides": [the same cases of both], "untouched": number of cases}
          or {"trace": [{key: [place, root key]}, ...]}
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml


def main() -> None:
    """Answer the requests on standard input, one per line."""
    gc.disable()  # saves a fifth of a review's time; its few hundred plans take little memory
    # Prints of the revision's code must not mix with the answers.
    answer_to, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        # An editable installation puts the caller's own tree on the path as well.
        sys.path[:] = [p for p in sys.path if p not in request["hidden"]]
        answers = _trace if "trace" in request else _both if "others" in request else _survey
        with _mistakes_told(located=request.get("located", False)):
            answer = answers(request)
        print(json.dumps(answer), file=answer_to, flush=True)


def _survey(request: dict[str, Any]) -> dict[str, Any]:
    from cosmos3_pipeline.config.plugins import register

    register()
    flat, compose = _tool(request, "plain").flat, _composing(request)
    return {"cases": {name: {"overrides": o, **_case(o, flat, compose)} for name, o in _cases(request).items()}}


def _cases(request: dict[str, Any]) -> dict[str, list[str]]:
    """The overrides of every case of a revision."""
    cases: dict[str, list[str]] = {"default": [], **request["cases"]}
    if request["options"]:
        found = list(_tool(request, "options").options(request["conf"], request["name"]))
        real = _real_models(Path(request["conf"]))
        cases |= {option: [option, *_beside(option, found, real)] for option in found}
    return cases


def _both(request: dict[str, Any]) -> dict[str, Any]:
    """Compose the cases of two revisions that `touched` can change, and plan the cases that differ."""
    from cosmos3_pipeline.config.plugins import register
    from cosmos3_pipeline.config.source import Source

    register()
    closure, plain = _tool(request, "closure"), _tool(request, "plain")
    requests = [request, {**request, **request["others"]}]
    sides = [_cases(one) for one in requests]
    sources = [Source(one["conf"], one["name"]) for one in requests]
    known = [closure.contents_around(Path(one["conf"]), one["name"]) for one in requests]
    composers = [_composer(source, files) for source, files in zip(sources, known, strict=True)]
    touched, untouched = set(request["touched"]), 0
    answers: list[dict[str, Any]] = [{}, {}]
    for name in {**sides[0], **sides[1]}:
        asked = [side.get(name) for side in sides]
        if None not in asked and not any(
            closure.files_of(overrides, files, request["name"]) & touched
            for overrides, files in zip(asked, known, strict=True)
        ):
            untouched += 1
            continue
        made = [_composed(overrides, compose) for overrides, compose in zip(asked, composers, strict=True)]
        values = [_values(one, plain) for one in made]
        if values[0] is not None and values[0] == values[1]:
            untouched += 1
            continue
        for answer, overrides, one in zip(answers, asked, made, strict=True):
            if overrides is not None:
                answer[name] = {"overrides": overrides, **_case(one, plain.flat, _checked)}
    return {"sides": answers, "untouched": untouched}


Composer = Callable[[list[str]], Any]


def _composer(source: Any, known: Any) -> Composer:
    """A function that composes overrides over the configs of `source`. `known` has the content of its files."""
    from cosmos3_pipeline.config.compose import compose

    try:
        from cosmos3_pipeline.config.shortcut import NotPlain, Shortcut
    except ImportError:  # an older revision
        return lambda overrides: compose(overrides, source)
    shortcut = Shortcut(source, known)

    def composed(overrides: list[str]) -> Any:
        try:
            return shortcut.compose(overrides)
        except NotPlain:
            return compose(overrides, source)

    return composed


def _composed(overrides: list[str] | None, compose: Composer) -> Any:
    """The composition of `overrides`, or the error that it raised; None without overrides."""
    try:
        return None if overrides is None else compose(overrides)
    except Exception as error:  # the code of another revision may raise anything
        return error


def _values(made: Any, plain: Any) -> dict[str, Any] | None:
    """The values of a composition, references followed; None if it has errors, which a check will report."""
    try:
        found = plain.flat(plain.without_hydra(made.cfg) if hasattr(made, "cfg") else made.typed())
    except Exception:  # the code of another revision may raise anything
        return None
    assert isinstance(found, dict)
    return found


def _checked(made: Any) -> Any:
    from cosmos3_pipeline.planning.checks import check_composition

    if isinstance(made, Exception):
        raise made
    try:
        return check_composition(made).config
    except Exception as error:
        if type(error).__name__ != "NotPlain":
            raise
    from cosmos3_pipeline.config.compose import compose

    return check_composition(compose(made.overrides, made.source)).config


def _composing(request: dict[str, Any]) -> Composer:
    """A function that composes and checks overrides: the revision's `compose`, or a faster equivalent."""
    import cosmos3_pipeline

    conf = Path(request["conf"])
    own = request["name"] == "config" and Path(cosmos3_pipeline.__file__).parents[1] == conf.parent
    if own and importlib.util.find_spec("cosmos3_pipeline.config.shortcut") is None:
        return cosmos3_pipeline.compose
    from cosmos3_pipeline.config.source import Source

    known = _tool(request, "closure").contents_around(conf, request["name"])
    compose = _composer(Source(str(conf), request["name"]), known)
    return lambda overrides: _checked(compose(overrides))


def _real_models(conf: Path) -> set[str]:
    """The options of `model` with published weights, which are too large for a laptop."""
    found = set()
    for file in (conf / "model").glob("*.yaml"):
        said = yaml.safe_load(file.read_text(encoding="utf-8"))
        if isinstance(said, dict) and said.get("repo"):
            found.add(file.stem)
    return found


def _beside(option: str, options: list[str], real: set[str]) -> list[str]:
    """Further overrides for planning `option`. Alone it could be a 16B model on a laptop, or a toy on 8 GPUs."""
    group, _, name = option.partition("=")
    if group == "model" and name in real:
        others = [other for other in options if other.startswith("topology=h")]
        return ["topology=h200_x4"] if "topology=h200_x4" in others else others[:1]
    if group == "weights" and "topology=h200_x4" in options:  # placement matters for large models
        return [*["model=nano"] * ("nano" in real), "topology=h200_x4"]
    if group == "topology" and not name.startswith("cpu") and "nano" in real:
        return ["model=nano"]
    return []


@contextmanager
def _mistakes_told(*, located: bool) -> Iterator[None]:
    """Look up the file or override behind a mistake once for all cases that have it, or never if not `located`.

    The look-up is slow: Hydra needs a quarter of a second for it.
    """
    try:
        from cosmos3_pipeline.config.shortcut import read_each_file_once
        from cosmos3_pipeline.planning import checks
    except ImportError:  # an older revision
        yield
        return
    read_each_file_once()
    locate, known = checks.located, dict[str, Any]()

    def located_once(problems: Any, composition: Any) -> Any:
        what = repr([problem.what for problem in problems])
        if what not in known:
            known[what] = locate(problems, composition)
        return known[what]

    checks.located = located_once if located else lambda problems, composition: problems
    try:
        yield
    finally:
        checks.located = locate


def _tool(request: dict[str, Any], name: str) -> Any:
    """The caller's module `name`, even if the revision has a module of that name."""
    spec = importlib.util.spec_from_file_location(f"_{name}", Path(request["tools"]) / f"{name}.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tool  # dataclasses look their module up
    spec.loader.exec_module(tool)
    return tool


def _case(asked: Any, flat: Callable[[Any], dict[str, Any]], checked: Callable[[Any], Any]) -> dict[str, Any]:
    """The answer for one case: its config and plan after `checked`, or the problems that refuse it."""
    try:
        cfg = checked(asked)
        return {"config": flat(cfg), "plan": _plan(cfg)}
    # The code of another revision may raise anything, and the error is the answer for this case.
    except Exception as error:
        problems = getattr(error, "problems", None) or [getattr(error, "problem", None)]
        return {"problems": [_words(problem, error) for problem in problems]}


def _words(problem: Any, error: Exception) -> dict[str, str]:
    if problem is None:
        first, *rest = f"{type(error).__name__}: {error}".splitlines()
        told = [" ".join(line.split()) for line in rest if line.strip()]
        return {"what": first, "why": "; ".join([*told, *_raised_in(error)]), "works": ""}
    said = {part: str(getattr(problem, part, "")) for part in ("what", "why", "works")}
    return {**said, "set": "; ".join(getattr(problem, "set_by", ()))}


def _raised_in(error: Exception) -> list[str]:
    """The last line of the revision's own code in the error's traceback, if there is one."""
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
    for room in ("planning", "plan"):  # the name today, and the name in older revisions
        try:
            plan_of = getattr(importlib.import_module(f"cosmos3_pipeline.{room}"), "plan_of", None)
        except ModuleNotFoundError:
            continue
        return None if plan_of is None else dict(plan_of(cfg)["summary"])
    return None


def _trace(request: dict[str, Any]) -> dict[str, Any]:
    from cosmos3_pipeline.config.plugins import register

    register()
    conf, name = Path(request["conf"]), request["name"]
    provenance, known = _tool(request, "provenance"), _tool(request, "closure").contents_around(conf, name)
    answers = []
    for overrides, keys in request["trace"]:
        cfg = _merged(overrides, conf, name, known)
        traced = provenance.trace(overrides, conf, config_name=name, cfg=cfg)
        chains = {key: traced.chain(key) for key in keys}
        answers.append({key: [c[-1].winner.source, c[-1].key] for key, c in chains.items() if c})
    return {"trace": answers}


def _merged(overrides: list[str], conf: Path, name: str, known: Any) -> Any:
    """The composed config of `overrides` if the shortcut can compose it; else None."""
    try:
        from cosmos3_pipeline.config.shortcut import NotPlain, Shortcut
        from cosmos3_pipeline.config.source import Source
    except ImportError:  # an older revision
        return None
    try:
        return Shortcut(Source(str(conf), name), known).compose(overrides).merged()
    except NotPlain:
        return None


if __name__ == "__main__":
    main()
