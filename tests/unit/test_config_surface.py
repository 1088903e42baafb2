"""conf/ and the schema cover each other: every option composes, every key is the schema's and is read."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from options import TASK_NEEDS

from cosmos3_pipeline import compose
from cosmos3_pipeline.config import config_dir
from cosmos3_pipeline.config.compose import compose as composition
from cosmos3_pipeline.config.kinds import schema_keys
from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.vae.plugins import discover

CONF = config_dir()
LIBRARY = Path(__file__).parents[2]
OPTIONS = sorted(p.relative_to(CONF).with_suffix("") for p in CONF.rglob("*.yaml") if p.parent != CONF)


# The overrides that an option needs beside the defaults.
NEEDS = {"weights/sharded": ["topology=cpu_x2"], **{f"task/{name}": needs for name, needs in TASK_NEEDS.items()}}
for direction in ("encode", "decode"):
    flag = [f"vae.parallel_{direction}=true", "task=v2v"]
    NEEDS |= {f"vae/{direction}/{file.stem}": flag for file in (CONF / "vae" / direction).glob("*.yaml")}
    NEEDS[f"vae/{direction}/pipeline_of_shards"] = [*flag, "topology=cpu_x2"]


@pytest.mark.long
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_composes(option: Path) -> None:
    compose([f"{option.parent}={option.name}", *NEEDS.get(option.as_posix(), [])])


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_opens_with_when_to_choose_it(option: Path) -> None:
    lines = (CONF / option).with_suffix(".yaml").read_text().splitlines()
    first = next(line for line in lines if not line.startswith("# @package"))
    assert re.match(r"# \w.{20,}", first), first


def test_every_key_of_the_schema_has_a_value_in_the_default_run() -> None:
    cfg = composition([]).cfg
    missing = [k for k in schema_keys() if OmegaConf.is_missing(*_node_and_name(cfg, k))]
    assert missing == []


def _node_and_name(cfg, key):
    parent, _, name = key.rpartition(".")
    return (OmegaConf.select(cfg, parent) if parent else cfg), name


def test_every_key_of_conf_is_the_schemas() -> None:
    known = set(schema_keys())
    strategy_keys = {f.name for cls in discover().strategies.values() for f in dataclasses.fields(cls)}
    for file in CONF.rglob("*.yaml"):
        group = file.parent.relative_to(CONF).as_posix()
        if group in (".", "experiment") or group.startswith("hydra/"):
            continue
        for key in _leaves(yaml.safe_load(file.read_text()) or {}):
            if group in ("vae/encode", "vae/decode"):
                assert key in strategy_keys, f"{file}: {key}"
            else:
                assert f"{group.replace('/', '.')}.{key}" in known, f"{file}: {key}"


def _leaves(node, prefix=""):
    for key, value in node.items():
        if key == "defaults" and not prefix:
            continue
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_every_leaf_of_the_schema_is_read_by_the_library_or_by_an_interpolation() -> None:
    code = "\n".join(p.read_text() for p in LIBRARY.glob("cosmos3_pipeline/**/*.py") if p.name != "schema.py")
    interpolations = "\n".join(p.read_text() for p in CONF.rglob("*.yaml"))
    unread = _unread("Config", code, interpolations)
    # These three nodes are handed on whole, see the next test.
    assert [
        key
        for key in unread
        if not key.startswith(("TransformerConfig.", "VaeModelConfig.", "SoundTokenizerConfig."))
    ] == []


def test_every_dimension_of_a_model_reaches_the_model_that_is_made(tmp_path: Path) -> None:
    from cosmos3_pipeline.models.toy import write_toy

    model = plain(compose(["model=toy_random"]).model)
    parts = ("transformer", "vae", "sound_tokenizer")
    write_toy(tmp_path, **{name: model[name] for name in parts})
    for name in parts:
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert {key: written[key] for key in model[name]} == model[name]


def _unread(type_name, code, interpolations):
    from cosmos3_pipeline.config import schema

    for field in dataclasses.fields(getattr(schema, type_name)):
        if dataclasses.is_dataclass(getattr(schema, str(field.type), None)):
            yield from _unread(field.type, code, interpolations)
            continue
        used = re.search(rf"(\.{field.name}\b|[\"']{field.name}[\"'])", code)
        referred = re.search(rf"\$\{{[^}}]*\b{field.name}\b", interpolations)
        if not (used or referred):
            yield f"{type_name}.{field.name}"


@pytest.mark.parametrize(
    ("overrides", "key", "expected"),
    [
        (["vae=parallel_decode"], "vae.parallel_decode", True),
        (["vae=parallel_decode", "vae.parallel_decode=false"], "vae.parallel_decode", False),
        (["topology=cpu_x2"], "vae.parallel_decode", True),
        (["topology=cpu_x2", "vae=replicated"], "vae.parallel_decode", False),
        (["model=nano", "task=t2i"], "sampler.flow_shift", 3.0),
        (["model=nano"], "sampler.flow_shift", 10.0),
        (["model=nano"], "task.width", 1280),
        (["model=nano", "task=t2i"], "sampler.steps", 50),
    ],
)
def test_choices_mean_what_they_say(overrides: list[str], key: str, expected: object) -> None:
    assert OmegaConf.select(composition(overrides).cfg, key) == expected
