"""Where a value comes from: files, overrides, references, and what was offered before."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from cosmos3_pipeline.config import config_dir
from cosmos3_pipeline.config.compose import compose
from cosmos3_pipeline.config.plugins import register
from cosmos3_pipeline.config.provenance import Provenance, trace


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
