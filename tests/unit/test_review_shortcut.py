"""Composing without Hydra: what Hydra makes of every option, and nothing that Hydra would refuse."""

from __future__ import annotations

import shutil
from itertools import zip_longest
from pathlib import Path

import pytest

from cosmos3_pipeline.config import compose as compose_module
from cosmos3_pipeline.config import config_dir
from cosmos3_pipeline.config import shortcut as shortcut_module
from cosmos3_pipeline.config.closure import contents, contents_around, files_of
from cosmos3_pipeline.config.compose import compose
from cosmos3_pipeline.config.shortcut import NotPlain, PlainComposition, Shortcut, composition_of
from cosmos3_pipeline.config.source import BUILTIN, Source
from cosmos3_pipeline.errors import ConfigError
from cosmos3_pipeline.planning.checks import check_composition
from cosmos3_pipeline.review import worker
from cosmos3_pipeline.review.revisions import TOOLS, Tree, read_cases, touched

CASES = read_cases(Path(__file__).parents[1] / "golden" / "cases.yaml")


def every_option() -> list[list[str]]:
    """Overrides that choose each option of each group once."""
    groups = BUILTIN.groups()
    columns = [[f"{group}={option}" for option in options] for group, options in groups.items() if options]
    return [[choice for choice in row if choice is not None] for row in zip_longest(*columns)]


PARTS = 4


@pytest.mark.sampled(1)
@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_it_is_what_hydra_composes(part: int) -> None:
    asked = [[], *every_option(), *(CASES[name] for name in ("super_four_steps_h200_x4", "toy_from_clip"))]
    asked += [
        ["task.prompt='a ${model.name}, 5'", "sampler.guidance_scale=4"],
        ["task.height=256", "task.canvas=[256,256]", "model.lora=[{path: a, weight: 0.5}]"],
        ["vae/decode=layer_pipeline", "vae.parallel_decode=true", "vae.decode.moving_cuts=false"],
        ["task.height=${model.recommended.image.height}", "task.modality=image", "vae=tiled"],
    ]
    shortcut = Shortcut(BUILTIN, contents(config_dir()))
    by_hydra = []
    for overrides in asked[part::PARTS]:
        try:
            made = repr(shortcut.compose(overrides).typed())
        except NotPlain:
            by_hydra.append(overrides)
        else:
            assert made == repr(compose(overrides).typed()), overrides
    assert len(by_hydra) <= 2, by_hydra  # words around a reference are Hydra's


@pytest.mark.parametrize(
    ("overrides", "plain"),
    [
        (["model=nano", "topology=h200_x4", "sampler.steps=7"], True),
        (["+extras.note=mine"], False),
        (["task.prompt=${oc.env:HOME}"], False),
        (["task.prompt=${job.name}"], False),
    ],
)
def test_hydra_composes_what_is_not_plain(overrides: list[str], plain: bool) -> None:
    made, by_hydra = composition_of(overrides), compose(overrides)
    assert isinstance(made, PlainComposition) == plain
    assert made.typed() == by_hydra.typed()
    for key in ("sampler.steps", "task.height", "model.transformer.hidden_size"):
        chains = [composed.traced().chain(key) for composed in (made, by_hydra)]  # type: ignore[union-attr]
        told = [[(link.key, link.winner.value, link.winner.place) for link in chain] for chain in chains]
        assert told[0] == told[1]


def test_origins_are_those_that_hydra_tells() -> None:
    overrides = ["topology=h200_x4", "model=nano", "sampler.steps=3", "vae/decode=tiled"]
    traced, by_hydra = Shortcut(BUILTIN, contents(config_dir())).traced(overrides), compose(overrides).traced()
    assert by_hydra is not None and traced.keys == by_hydra.keys
    for key in traced.keys:
        ends = [one.chain(key)[-1] for one in (traced, by_hydra)]
        assert len({(end.key, end.winner.place) for end in ends}) == 1, key


FILMS = """
defaults: [_self_, config, override topology: box, override model: little]
hydra: {searchpath: [pkg://cosmos3_pipeline.conf]}
extras: {film: the red circle}
"""
LITTLE = "defaults: [toy_random, _self_]\nname: little\nrecommended: {video: {steps: 2}}\n"
BOX = "defaults: [cpu_x2, override /vae/decode@_global_.vae.decode: spatial_shard, _self_]\nthreads_per_rank: 1\n"
MINE = "defaults: [unipc, _self_]\nseed: 7\n"
OWN = {"films": FILMS, "model/little": LITTLE, "topology/box": BOX, "sampler/mine": MINE}


def test_another_repositorys_configs_stand_before_the_librarys(tmp_path: Path) -> None:
    for path, text in OWN.items():
        file = tmp_path / f"{path}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    source, known = Source(str(tmp_path), "films"), contents_around(tmp_path, "films")
    shortcut = Shortcut(source, known)
    for overrides in [], ["sampler=mine"], ["topology=h200_x4", "model=nano"], ["vae=tiled", "topology=cpu_x2"]:
        assert repr(shortcut.compose(overrides).typed()) == repr(compose(overrides, source).typed()), overrides
    # Only the library's primary config names the group, and still a choice in it is seen.
    assert "sampler/mine" in files_of(["sampler=mine"], known, "films")
    assert "sampler/mine" not in files_of(["sampler=mine"], contents(tmp_path), "films")


def test_a_group_may_have_a_package(tmp_path: Path) -> None:
    """The group `weights` is renamed to `placement@weights`, and a file says its package itself."""
    conf = tmp_path / "conf"
    shutil.copytree(config_dir(), conf)
    (conf / "weights").rename(conf / "placement")
    for file, old, new in (
        ("config", "- weights:", "- placement@weights:"),
        ("placement/streamed", "placement: streamed", "placement: streamed\n# moved"),
        ("topology/cpu_x4", "\n  - _self_", "\n  - override /placement@_global_.weights: streamed\n  - _self_"),
        ("sampler/unipc", "# ", "# @package sampler\n# "),
    ):
        text = (conf / f"{file}.yaml").read_text()
        assert old in text
        (conf / f"{file}.yaml").write_text(text.replace(old, new, 1))
    source = Source(str(conf))
    shortcut = Shortcut(source, contents(conf))
    for overrides in [], ["placement@weights=streamed"], ["topology=cpu_x4"]:
        assert repr(shortcut.compose(overrides).typed()) == repr(compose(overrides, source).typed()), overrides
    with pytest.raises(NotPlain):
        shortcut.compose(["placement=streamed"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["sampler.stepz=3"],
        ["task.height=tall"],
        ["model=nono"],
        ["extras.note=1"],
        ["extras={a: 1}"],
        ["objective=nan"],
        ["objective='???'"],
        ["task.prompt=it's"],
    ],
)
def test_a_refusal_is_hydras(overrides: list[str]) -> None:
    texts = []
    for composing in (composition_of, compose):
        with pytest.raises(ConfigError) as caught:
            check_composition(composing(overrides))
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_a_file_that_is_edited_between_two_calls_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(config_dir(), conf)
    monkeypatch.setattr(shortcut_module, "config_dir", lambda: conf)
    assert composition_of([]).typed().sampler.seed == 0
    file = conf / "sampler" / "unipc.yaml"
    file.write_text(file.read_text().replace("seed: 0", "seed: 11"))
    assert composition_of([]).typed().sampler.seed == 11


def test_a_review_sees_an_edit_in_the_projects_own_search_path(tmp_path: Path) -> None:
    trees = []
    for name, seed in (("base", 5), ("same", 5), ("head", 6)):
        root = tmp_path / name
        (root / "films" / "more" / "sampler").mkdir(parents=True)
        (root / "conf").mkdir()
        (root / "conf" / "films.yaml").write_text("hydra: {searchpath: [pkg://films.more]}\ndefaults: [config]\n")
        (root / "films" / "more" / "sampler" / "rain.yaml").write_text(f"seed: {seed}\n")
        trees.append(Tree(name, root, root, root / "conf", "films", [], root / "errors"))
    base, same, head = trees
    assert touched(base, same) == []
    assert touched(base, head) is None  # each revision composes in its own process


def test_what_is_set_by_hand_and_what_follows() -> None:
    made = Shortcut(BUILTIN, contents(config_dir())).compose(["sampler.steps=7"])
    assert (made.literal("sampler.steps"), made.literal("sampler.flow_shift")) == (7, None)
    assert made.typed({"model.recommended.video.height": 512}).task.height == 512
    assert made.typed({"model.dtype": "float32"}).model.dtype.name == "float32"
    with pytest.raises(ConfigError):  # in Hydra's words
        made.typed({"task.height": "tall"})


Edit = tuple[str, str, str]  # file, old, new


@pytest.mark.parametrize(
    ("overrides", "edit"),
    [
        pytest.param(["+extras.tags=[kite]"], None, id="a key is added"),
        pytest.param(["~extras"], None, id="a node is deleted"),
        pytest.param(["sampler.steps=1,2"], None, id="a sweep"),
        pytest.param(["hydra.run.dir=x"], None, id="a key of Hydra"),
        pytest.param(["sampler.stepz=1"], None, id="no such key"),
        pytest.param(["sampler.steps=many"], None, id="another type"),
        pytest.param(["sampler.steps=0"], None, id="out of range"),
        pytest.param(["task.modality=smell"], None, id="not one of the choices"),
        pytest.param(["task.prompt=5"], None, id="a number for words"),
        pytest.param(["model=none_such"], None, id="no such option"),
        pytest.param(["model=[nano,toy]"], None, id="two options"),
        pytest.param(["model=nano", "model=toy"], None, id="a choice twice"),
        pytest.param(["vae.decode._target_=os.system"], None, id="code of nobody"),
        pytest.param(["task.prompt=${now:%Y}"], None, id="a resolver"),
        pytest.param(["task.image=${task.video}", "task.video=${task.image}"], None, id="a circle"),
        pytest.param([], ("sampler/unipc", "seed: 0", "seed: 0\nsead: 1"), id="no such key in a file"),
        pytest.param([], ("sampler/unipc", "seed: 0", "seed: 0\nseed: 1"), id="a key twice in a file"),
        pytest.param([], ("sampler/unipc", "seed: 0", "seed: ???"), id="a value is missing"),
        pytest.param([], ("sampler/unipc", "cache: none", "cache@_global_.cache: none"), id="another package"),
        pytest.param([], ("sampler/unipc", "cache: none", "override /job: plan"), id="of another package"),
        pytest.param([], ("topology/cpu_x1", "# ", "# @package _group_\n# "), id="a header"),
        pytest.param(
            ["experiment=sglang_27037"],
            ("experiment/sglang_27037", "# @package", "# Words.\n# @package"),
            id="a header that is none, because words are above it",
        ),
        pytest.param([], ("config", "  - job: generate", "  - optional job: generate"), id="an optional choice"),
        pytest.param(["topology=cpu_x2"], ("config", "  - vae: replicated\n", ""), id="nothing to override"),
        pytest.param([], ("job/generate", "name:", "hydra: {searchpath: []}\nname:"), id="another search path"),
    ],
)
def test_hydra_is_asked_for_the_rest(tmp_path: Path, overrides: list[str], edit: Edit | None) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(config_dir(), conf)
    if edit is not None:
        file = conf / f"{edit[0]}.yaml"
        assert edit[1] in file.read_text()
        file.write_text(file.read_text().replace(edit[1], edit[2], 1))
    with pytest.raises(NotPlain):
        Shortcut(Source(str(conf)), contents(conf)).compose(overrides)


MISTAKES = {
    "no such key": ("task/t2v", "sound: false", "sonud: false", "task.sonud"),
    "another type": ("task/t2v", "sound: false", "sound: soft", "task.sound"),
    "a number": ("task/t2v", "condition_keep: first", "condition_keep: 3", "task.condition_keep"),
    "a broken reference": ("task/t2v", "recommended.fps", "recommended.fsp", "task.fps"),
    "out of range": ("sampler/unipc", "seed: 0", "seed: -1", "sampler.seed"),
    "a node": ("model/toy", "  fps: 24", "  fps: {a: 1}", "model.recommended.fps"),
    "not YAML": ("task/t2v", "fps: ", "fps: [", "task/t2v"),
    "no such option": ("config", "task: t2v", "task: none_such", "task/none_such"),
}


def edited(conf: Path, path: str, old: str, new: str) -> Path:
    """A copy of the library's configs in `conf`, where the config at `path` says `new` for `old`."""
    shutil.copytree(config_dir(), conf)
    file = conf / f"{path}.yaml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    return conf


@pytest.mark.parametrize(("path", "old", "new", "about"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(tmp_path: Path, path: str, old: str, new: str, about: str) -> None:
    conf = edited(tmp_path / "conf", path, old, new)
    with pytest.raises(NotPlain) as raised:
        Shortcut(Source(str(conf)), contents(conf)).compose([])
    assert raised.value.about == about


@pytest.mark.parametrize("mistake", ["a broken reference", "not YAML", "no such option"])
def test_hydra_is_asked_once_for_all_cases_with_the_same_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    path, old, new, _ = MISTAKES[mistake]
    conf = edited(tmp_path / "conf", path, old, new)
    asked: list[object] = []
    by_hydra = compose_module.compose

    def counted(overrides: list[str], source: Source) -> object:
        asked.append(overrides)
        return by_hydra(overrides, source)

    monkeypatch.setattr(compose_module, "compose", counted)
    cases = {"default": [], "short": ["sampler.steps=3"], "small": ["task.height=96", "task.width=96"]}
    both = {"conf": str(config_dir()), "others": {"conf": str(conf), "cases": cases}, "cases": cases}
    with worker._mistakes_told(located=False):
        base, head = worker._both(
            {**both, "name": "config", "options": False, "tools": str(TOOLS), "touched": [path]}
        )["sides"]
    assert len(asked) == 1
    assert all("config" in case for case in base.values()) and head.keys() == cases.keys()
    assert all(case["problems"] == head["default"]["problems"] for case in head.values())
