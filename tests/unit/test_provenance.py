"""Where a value comes from: files, overrides, references, and what was offered before."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cosmos3_pipeline.config import config_dir
from cosmos3_pipeline.config.compose import compose
from cosmos3_pipeline.config.plugins import register
from cosmos3_pipeline.config.provenance import Provenance, trace
from cosmos3_pipeline.config.source import Source
from cosmos3_pipeline.errors import ConfigError


def traced(*overrides: str) -> Provenance:
    register()
    return trace(overrides, config_dir())


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("overrides", "key", "places"),
    [
        pytest.param([], "task.fps", ["conf/task/t2v.yaml"], id="one file"),
        pytest.param(["task.fps=30"], "task.fps", ["conf/task/t2v.yaml", "task.fps=30"], id="override wins"),
        pytest.param(
            [], "model.dtype", ["conf/model/nano.yaml", "conf/model/toy.yaml"], id="option extends option"
        ),
        pytest.param(
            ["topology=h200_x8"],
            "topology.ulysses",
            ["conf/topology/cpu_x1.yaml", "conf/topology/h200_x4.yaml", "conf/topology/h200_x8.yaml"],
            id="chain of options",
        ),
        pytest.param(
            ["topology=cpu_x2"],
            "vae.parallel_decode",
            ["conf/vae/replicated.yaml", "conf/vae/parallel_decode.yaml"],
            id="another group's defaults list",
        ),
        pytest.param(
            ["model.recommended={video: {steps: 3}}"],
            "model.recommended.video.steps",
            ["conf/model/nano.yaml", "conf/model/toy.yaml", "model.recommended={video: {steps: 3}}"],
            id="override of a node",
        ),
        pytest.param(
            ["experiment=sglang_27037"],
            "sampler.seed",
            ["conf/sampler/unipc.yaml", "conf/experiment/sglang_27037.yaml"],
            id="global package",
        ),
        pytest.param([], "no.such.key", [], id="nothing sets it"),
    ],
)
def test_offers_are_in_merge_order_and_the_last_one_wins(
    overrides: list[str], key: str, places: list[str]
) -> None:
    assert [offer.source for offer in traced(*overrides).offers(key)] == places


def test_a_reference_is_followed_to_the_file_with_the_number() -> None:
    chain = traced("model=toy").chain("sampler.steps")
    assert [link.key for link in chain] == ["sampler.steps", "model.recommended.video.steps"]
    assert chain[-1].winner.source == "conf/model/toy.yaml"
    assert traced("task=t2i").chain("sampler.steps")[-1].key == "model.recommended.image.steps"


@pytest.mark.long
def test_lines_are_those_of_the_file() -> None:
    for key in ("task.fps", "topology.accelerator.memory_gb", "model.vae.z_dim"):
        file, _, line = traced().source(key).rpartition(":")
        text = (config_dir().parent / file).read_text().splitlines()[int(line) - 1]
        assert key.rpartition(".")[2] in text


def test_what_brought_a_file_in_is_told() -> None:
    assert traced("topology=cpu_x2").offers("vae.parallel_decode")[-1].because == "conf/topology/cpu_x2.yaml"
    assert traced("vae=parallel_decode").offers("vae.parallel_decode")[-1].because == "vae=parallel_decode"


@pytest.mark.parametrize(
    "overrides", [[], ["experiment=sglang_27037", "task=i2v"], ["topology=cpu_x4", "task.fps=30"]]
)
def test_the_winners_make_the_composed_config(overrides: list[str]) -> None:
    cfg, provenance = compose(overrides).cfg, traced(*overrides)
    for key in provenance.keys:
        value = provenance.chain(key)[-1].winner.value
        if isinstance(value, str) and "${" in value:
            continue
        composed = OmegaConf.select(cfg, key)
        composed = (
            OmegaConf.to_container(composed, enum_to_str=True) if OmegaConf.is_config(composed) else composed
        )
        assert getattr(composed, "value", composed) == getattr(value, "value", value), key


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        pytest.param("task/t2v", "fps: $", "fps: [$", "task/t2v.yaml:LINE:6 is not valid YAML", id="a bracket"),
        pytest.param("model/nano", "dtype: ", 'dtype: "', "model/nano.yaml:9:8 is not valid YAML", id="a quote"),
        pytest.param("topology/cpu_x1", "cfg: 1", "\tcfg: 1", "is not valid YAML", id="a tab"),
        pytest.param(
            "task/t2v", "name: t2v", "name: t2v\nname: t2v", "task/t2v.yaml:3:1 is not valid", id="twice"
        ),
        pytest.param("config", "extras: {}", "extras: {", "config.yaml:30:9 is not valid YAML", id="the primary"),
        pytest.param(
            "task/t2v", "sound: false", "sonud: false", "task.sonud (in FOLDER/task/t2v.yaml:LINE)", id="a key"
        ),
        pytest.param("task/t2v", "sound: false", "sound: soft", "(in FOLDER/task/t2v.yaml:LINE)", id="a type"),
        pytest.param("config", "task: t2v", "task: t2w", "FOLDER/config.yaml:7 names it", id="an option"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str, says: str
) -> None:
    conf = tmp_path / "kite" / "conf"
    shutil.copytree(config_dir(), conf)
    text = (conf / f"{file}.yaml").read_text()
    line = text[: text.index(old)].count("\n") + 1
    (conf / f"{file}.yaml").write_text(text.replace(old, new, 1))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refused:
        compose([], Source(str(conf)))
    assert says.replace("FOLDER", "kite/conf").replace("LINE", str(line)) in str(refused.value)
