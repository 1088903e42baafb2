"""A script that runs inside one revision of the project: it composes and plans cases with the revision's code.

`revisions.py` starts this script with the revision's tree first on the import path. It reads requests from
standard input and writes answers to standard output, one JSON text per line. It needs only two functions of the
revision: `cosmos3_pipeline.compose(overrides)`, and `plan_of(cfg)` of the package that plans, if there is one.
What else it uses makes it faster, and older revisions lack some of it. The work with Hydra is done by the
caller's modules in the folder `tools`, which is the caller's `config/`.

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

import functools
import gc
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer the requests on standard input, one per line."""
    gc.disable()  # saves a fifth of a review's time; its few hundred plans take little memory
    # Prints of the revision's code must not mix with the answers.
    answer_to, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        os.chdir(request["root"])  # paths in messages begin there
        # An editable installation puts the caller's own tree on the path as well.
        sys.path[:] = [p for p in sys.path if p not in request["hidden"]]
        _keep_plans()
        answers = _trace if "trace" in request else _both if "others" in request else _survey
        with _mistakes_told(located=request.get("located", False)):
            answer = answers(request)
        print(json.dumps(answer), file=answer_to, flush=True)


def _keep_plans() -> None:
    """Keep the plans of the VAE on disk, apart for each version of the code that makes them."""
    try:
        from cosmos3_pipeline.planning import vae
        from cosmos3_pipeline.vae.plugins import discover
    except ImportError:  # an older revision
        return
    kept = _module(Path(__file__).with_name("kept.py"))
    if not hasattr(vae, "made") or isinstance(vae.made, kept.Kept):
        return
    names = {"cosmos3_pipeline", *(cls.__module__.partition(".")[0] for cls in discover().strategies.values())}
    # A package without a file has its folders in `__path__`.
    folders = {Path(folder) for name in names for folder in getattr(sys.modules[name], "__path__", ())}
    if all(hasattr(sys.modules[name], "__path__") for name in names):  # a module alone has no folder of its own
        vae.made = kept.Kept(kept.kept_in(), folders)


def _survey(request: dict[str, Any]) -> dict[str, Any]:
    side = _Side(request)
    return {"cases": {name: side.answer(o, side.composed(o)) for name, o in side.cases().items()}}


def _both(request: dict[str, Any]) -> dict[str, Any]:
    """Compose the cases of two revisions that `touched` can change, and plan the cases that differ."""
    sides = [_Side(request), _Side({**request, **request["others"]})]
    both_have = [option for option in sides[0].options if option in sides[1].options]
    listed = [side.cases(both_have) for side in sides]
    files_of, touched, untouched = _tool(request, "closure").files_of, set(request["touched"]), 0
    answers: list[dict[str, Any]] = [{}, {}]
    for name in {**listed[0], **listed[1]}:
        asked = [cases.get(name) for cases in listed]
        if None not in asked and not any(
            files_of(overrides, side.known, request["name"]) & touched
            for overrides, side in zip(asked, sides, strict=True)
        ):
            untouched += 1
            continue
        made = [None if o is None else side.composed(o) for o, side in zip(asked, sides, strict=True)]
        values = [side.values(one) for one, side in zip(made, sides, strict=True)]
        if values[0] is not None and values[0] == values[1]:
            untouched += 1
            continue
        told: list[Any] = [None, None]
        for place, side in reversed(list(enumerate(sides))):
            if (overrides := asked[place]) is not None:
                # A plan of the base is of use only if the head has one. A mistake in a file of the head does not
                # depend on what the base's strategies say.
                refused = "problems" in (told[1] or {})
                vae = not (refused and asked[1] is not None and sides[1].is_not_plain(asked[1]))
                how = {"planned": not refused, "plan_vae": vae}
                told[place] = side.answer_once(overrides, made[place], values[place], **how)
                if "problems" in told[place] and values[place] is not None:
                    told[place]["values"] = values[place]  # what changed is told all the same
        for answer, one in zip(answers, told, strict=True):
            answer |= {} if one is None else {name: one}
    return {"sides": answers, "untouched": untouched}


class _Side:
    """The cases of one revision, composed, checked and planned with the code that this process imports.

    Hydra needs 0.2 s to refuse a composition, and a mistake in a file stops all cases that read the file. So the
    refusal is remembered with its cause: the key and the value, or the file, that the shortcut could not read.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        from cosmos3_pipeline.config.plugins import register

        register()
        self._request, self._conf = request, Path(request["conf"])
        self._flat, self._without_hydra = (getattr(_tool(request, "plain"), n) for n in ("flat", "without_hydra"))
        self.known = _tool(request, "closure").contents_around(self._conf, request["name"])
        self.options = self._options() if request["options"] else []
        self._compose, self._shortcut, self._not_plain = self._composers()
        self._causes: dict[tuple[str, ...], tuple[str, str]] = {}  # by overrides
        self._refusals: dict[tuple[str, str], Exception] = {}  # by cause
        self._answers: dict[str, dict[str, Any]] = {}  # by values
        self._groups = {option.partition("=")[0] for option in self.options if "/" not in option}

    def _options(self) -> list[str]:
        if isinstance(self.known.get(self._request["name"]), list):
            named = _tool(self._request, "closure").chosen_as(self.known, self._request["name"])
            found = _tool(self._request, "options").options(str(self._conf), self._request["name"])
            parts = [option.partition("=") for option in found]
            return [f"{named.get(group, group)}={name}" for group, _, name in parts]
        # Hydra lists no options if it cannot parse the primary config.
        paths = [path.rpartition("/") for path in sorted(self.known) if not path.startswith(("hydra/", "_"))]
        return [f"{group}={option}" for group, _, option in paths if group and not option.startswith("_")]

    def cases(self, beside: list[str] | None = None) -> dict[str, list[str]]:
        """The overrides of every case. `beside` are the options that may be chosen beside another one."""
        real = _real_models(self._conf, self.known)
        others = self.options if beside is None else beside
        options = {option: [option, *_beside(option, others, real)] for option in self.options}
        return {"default": [], **self._request["cases"], **options}

    def _composers(self) -> tuple[Any, Any, Any]:
        """The revision's `compose` with Hydra, its shortcut if it has one, and the shortcut's error."""
        import cosmos3_pipeline

        name, has_shortcut = self._request["name"], importlib.util.find_spec("cosmos3_pipeline.config.shortcut")
        own = name == "config" and Path(cosmos3_pipeline.__file__).parents[1] == self._conf.parent
        if own and not has_shortcut:
            return cosmos3_pipeline.compose, None, ()
        from cosmos3_pipeline.config.compose import compose
        from cosmos3_pipeline.config.source import Source

        source = Source(str(self._conf), name)
        if not has_shortcut:
            return lambda overrides: compose(overrides, source), None, ()
        from cosmos3_pipeline.config.shortcut import NotPlain, Shortcut

        return lambda overrides: compose(overrides, source), Shortcut(source, self.known), NotPlain

    def composed(self, overrides: list[str]) -> Any:
        """The composition of `overrides`, or the error that it raised."""
        try:
            return self._with_shortcut(overrides)
        except Exception as error:  # the code of another revision may raise anything
            self._remember(overrides, error)
            return error

    def _with_shortcut(self, overrides: list[str]) -> Any:
        if self._shortcut is None:
            return self._compose(overrides)
        try:
            return self._shortcut.compose(overrides)
        except self._not_plain as error:
            cause = getattr(error, "about", ""), repr(getattr(error, "said", None))
        self._causes[tuple(overrides)] = cause
        if cause in self._refusals:
            raise self._refusals[cause]
        return self._compose(overrides)

    def _remember(self, overrides: list[str], error: Exception) -> None:
        """Remember `error` for other compositions with the same cause, if its words are about the cause."""
        cause = self._causes.get(tuple(overrides), ("", ""))
        names = {cause[0], "=".join(cause[0].rsplit("/", 1))} - {""}  # task/t2v or task=t2v, or a key
        words = " ".join(re.sub(r"\[\d+\]", "", p.what) for p in getattr(error, "problems", ()))
        if any(name in words for name in names):
            self._refusals[cause] = error

    def is_not_plain(self, overrides: list[str]) -> bool:
        """Whether the shortcut could not compose `overrides`, for example because a file has a mistake."""
        return tuple(overrides) in self._causes

    def values(self, made: Any) -> dict[str, Any] | None:
        """The values of a composition, references followed; None if it has errors, which a check will report."""
        try:
            found = self._flat(self._without_hydra(made.cfg) if hasattr(made, "cfg") else made.typed())
        except Exception:  # the code of another revision may raise anything
            return None
        assert isinstance(found, dict)
        return found

    def answer_once(
        self, overrides: list[str], made: Any, values: dict[str, Any] | None, *, planned: bool, plan_vae: bool
    ) -> dict[str, Any]:
        """As `answer`, made once for all cases with the same `values`: many options are the default ones."""
        # A check may also ask which keys, and which options below a node, were typed.
        typed = [one for one in overrides if one.partition("=")[0] not in self._groups]
        key = repr((sorted((values or {}).items()), typed, planned, plan_vae))
        if values is None or key not in self._answers:
            self._answers[key] = self.answer(overrides, made, planned=planned, plan_vae=plan_vae)
        return {**self._answers[key], "overrides": overrides}

    def answer(
        self, overrides: list[str], made: Any, *, planned: bool = True, plan_vae: bool = True
    ) -> dict[str, Any]:
        """The answer for one case: its config, and its plan if `planned`, or the problems that refuse it."""
        try:
            checked = _checked(made, plan_vae)
            cfg = getattr(checked, "config", checked)
            told = {"config": self._flat(cfg), "plan": _plan(checked, cfg) if planned else None}
        # The code of another revision may raise anything, and the error is the answer for this case.
        except Exception as error:
            self._remember(overrides, error)
            problems = getattr(error, "problems", None) or [getattr(error, "problem", None)]
            told = {"problems": [_words(problem, error) for problem in problems]}
        return {"overrides": overrides, **told}


def _checked(made: Any, plan_vae: bool) -> Any:
    """The checked composition; only its config if an older revision's `compose` has checked it already."""
    if isinstance(made, Exception):
        raise made
    if not (hasattr(made, "typed") or hasattr(made, "cfg")):  # an older revision's compose checks too
        return made
    from cosmos3_pipeline.planning.checks import check_composition

    known = inspect.signature(check_composition).parameters  # an older revision always plans the VAE
    how: dict[str, Any] = {"plan_vae": plan_vae} if "plan_vae" in known else {}
    try:
        return check_composition(made, **how)
    except Exception as error:
        if type(error).__name__ != "NotPlain":
            raise
    from cosmos3_pipeline.config.compose import compose

    return check_composition(compose(made.overrides, made.source), **how)


def _real_models(conf: Path, known: Any) -> set[str]:
    """The options of `model` in `conf` with published weights, which are too large for a laptop."""
    found = set()
    for file in (conf / "model").glob("*.yaml"):
        content = known[f"model/{file.stem}"]
        said = content[1] if isinstance(content, list) else None
        if isinstance(said, dict) and said.get("repo"):
            found.add(file.stem)
    return found


def _beside(option: str, options: list[str], real: set[str]) -> list[str]:
    """Further overrides for planning `option`. Alone it could be a 16B model on a laptop, or a toy on 8 GPUs."""
    words, _, name = option.partition("=")
    group = words.rpartition("@")[2]  # a group's package is its old name, if it was renamed
    if group == "model" and name in real:
        others = [other for other in options if other.startswith("topology=h")]
        return ["topology=h200_x4"] if "topology=h200_x4" in others else others[:1]
    if group == "weights" and "topology=h200_x4" in options:  # placement matters for large models
        return [*["model=nano"] * ("nano" in real), "topology=h200_x4"]
    if group == "topology" and not name.startswith("cpu") and "nano" in real:
        return ["model=nano"]
    # A strategy is refused if its flag is off.
    on = {"vae/encode": "vae=parallel", "vae/decode": "vae=parallel_decode"}.get(group)
    return [on] if on in options else []


@contextmanager
def _mistakes_told(*, located: bool) -> Iterator[None]:
    """Look up the file or override behind a mistake once for all cases that have it, or never if not `located`.

    A checkpoint is also read once for all cases.

    The look-up is slow if Hydra has to do it: a quarter of a second.
    """
    try:
        from cosmos3_pipeline.checkpoint import adopt
        from cosmos3_pipeline.checkpoint.inspect import inspect_checkpoint
        from cosmos3_pipeline.config.shortcut import read_each_file_once
        from cosmos3_pipeline.planning import checks
    except ImportError:  # an older revision
        yield
        return
    read_each_file_once()
    vars(adopt)["inspect_checkpoint"] = functools.cache(inspect_checkpoint)
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
        vars(adopt)["inspect_checkpoint"] = inspect_checkpoint


def _tool(request: dict[str, Any], name: str) -> Any:
    """The caller's module `name`, even if the revision has a module of that name."""
    return _module(Path(request["tools"]) / f"{name}.py")


def _module(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    if spec.name in sys.modules:
        return sys.modules[spec.name]
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


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


def _plan(checked: Any, cfg: Any) -> dict[str, Any] | None:
    planning: Any = importlib.import_module("cosmos3_pipeline.planning") if checked is not cfg else None
    if hasattr(planning, "summary_of"):
        return dict(planning.summary_of(checked))
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
    quick = _quick_trace(conf, name, known)
    answers = []
    for overrides, keys in request["trace"]:
        traced = quick(overrides) or provenance.trace(overrides, conf, config_name=name)
        chains = {key: traced.chain(key) for key in keys}
        answers.append({key: [c[-1].winner.source, c[-1].key] for key, c in chains.items() if c})
    return {"trace": answers}


def _quick_trace(conf: Path, name: str, known: Any) -> Any:
    """A function that traces overrides without Hydra, and returns None if it cannot."""
    try:
        from cosmos3_pipeline.config.shortcut import NotPlain, Shortcut
        from cosmos3_pipeline.config.source import Source
    except ImportError:  # an older revision
        return lambda overrides: None
    shortcut = Shortcut(Source(str(conf), name), known)

    def trace(overrides: list[str]) -> Any:
        try:
            return shortcut.traced(overrides) if hasattr(shortcut, "traced") else None
        except NotPlain:
            return None

    return trace


if __name__ == "__main__":
    main()
