"""A typed setting that nothing would read is refused, and the same setting works where it is read."""

from __future__ import annotations

import re

import pytest

from cosmos3_pipeline import compose
from cosmos3_pipeline.config.kinds import schema_keys
from cosmos3_pipeline.config.overrides import typed_settings
from cosmos3_pipeline.errors import ConfigError
from cosmos3_pipeline.planning.unread import ROWS

RANDOM = "model=toy_random"
MUTE = (RANDOM,)
IMAGE = (RANDOM, "task=t2i")
POLICY = (RANDOM, "task=policy", "task.domain=bridge_orig_lerobot")
FOUND = (RANDOM, "task=inverse_dynamics", "task.domain=bridge_orig_lerobot")
TRANSFER = (RANDOM, "task=transfer", "task.num_frames=5", "task.controls.edge=edges.mp4")


@pytest.mark.parametrize(
    ("beside", "typed", "said", "read_beside"),
    [
        (IMAGE, "output.crf=20", "task=t2i", ()),
        (IMAGE, "output.preset=fast", "task=t2i", ()),
        (IMAGE, "output.encoder=h264_nvenc", "task=t2i", ()),
        (IMAGE, "output.encoders=2", "task=t2i", ()),
        (FOUND, "output.crf=20", "task=inverse_dynamics", POLICY),
        (IMAGE, "task.fps=30", "task=t2i", ()),
        (IMAGE, "model.recommended.fps=30", "task=t2i", ()),
        ((), "task.condition_keep=last", "task=t2v", ("task=v2v",)),
        (TRANSFER, "task.condition_keep=last", "task=transfer", ("task=v2v",)),
        (("task=i2v",), "task.resample=false", "task=i2v", ("task=v2v",)),
        ((), "task.background=[0,0,0]", "task=t2v", ("task=i2v",)),
        (TRANSFER, "task.edge_threshold=low", "no task.controls.edge=from_video", None),
        ((), "vae.decode.moving_cuts=false", "vae.parallel_decode=false", ("vae=parallel_decode",)),
        ((), "vae/decode=spatial_shard", "vae.parallel_decode=false", ("vae=parallel_decode",)),
        ((), "vae.parallel_encode=true", "task=t2v", ("task=i2v",)),
        (FOUND, "vae.parallel_decode=true", "task=inverse_dynamics", POLICY),
        ((), "model.repo=me/mine", "model.path=builtin:toy", (RANDOM,)),
        ((RANDOM,), "model.schedule.flow_shift=3", "sampler.flow_shift=10", None),
        ((RANDOM, "sampler.flow_shift=null"), "model.schedule.sigma_max=80", "use_karras_sigmas=false", None),
        ((RANDOM, "model.transformer.sound_gen=false"), "model.sound_tokenizer.dec_dim=8", "sound_gen", (RANDOM,)),
        (
            (RANDOM, "model.transformer.action_gen=false"),
            "model.transformer.action_dim=8",
            "action_gen",
            (RANDOM,),
        ),
        (("model.trained.when_outside=ignore",), "model.trained.fps=[30]", "when_outside=ignore", ()),
        ((), "model.recommended.image.steps=9", "task=t2v", ("task=t2i",)),
        ((), "model.recommended.transfer.fps=9", "task=t2v", ("task=transfer", "task.num_frames=5")),
        (("sampler.steps=4",), "model.recommended.video.steps=9", "sampler.steps=4", ()),
        (("task.prompt=kite",), "model.recommended.prompt=boat", "task.prompt=kite", ()),
        (POLICY, "model.recommended.action.num_frames=33", "task=policy", None),
        ((), "topology.patience_seconds=60", "one rank", ("topology=cpu_x2",)),
        ((), "model.transformer.hidden_size=64", "model.path=builtin:toy", (RANDOM,)),
        ((), "model={transformer: {hidden_size: 64}}", "model.path=builtin:toy", None),
    ],
    ids=str,
)
def test_what_nothing_reads_is_refused(
    beside: tuple[str, ...], typed: str, said: str, read_beside: tuple[str, ...] | None
) -> None:
    """`read_beside` are overrides with which the setting is read; None if the row needs no such proof."""
    with pytest.raises(ConfigError) as refused:
        compose([*beside, typed])
    problems = [each for each in refused.value.problems if each.what.startswith(f"{typed} with ")]
    assert len(problems) == 1 and said in problems[0].what
    assert "would be ignored" in problems[0].why or "takes its numbers" in problems[0].why
    assert "no " in problems[0].works or "one of them" in problems[0].works
    compose(beside)
    if read_beside == ():  # read by the default task, with its own defaults
        compose([typed] if "h264_nvenc" not in typed else [typed, "output.preset=slow"])
    elif read_beside is not None:
        compose([*read_beside, typed])


def test_an_option_may_set_what_one_task_does_not_read() -> None:
    compose(["vae=parallel", "topology=cpu_x2"])  # t2v encodes nothing
    compose(["model=toy_random", "task=t2i"])


def test_the_keys_of_the_table_are_the_schemas() -> None:
    keys = [*schema_keys(), "vae/encode", "vae.decode.x", "vae.encode.x"]
    assert [row.keys for row in ROWS if not any(re.fullmatch(row.keys, key) for key in keys)] == []


def test_a_node_sets_the_keys_in_it() -> None:
    said = ["task.controls={edge: a.mp4}", "+extras.tags=[kite]", "~task.image", "vae=tiled"]
    assert typed_settings(said) == {"task.controls.edge": said[0], "extras.tags": said[1][1:], "vae": "vae=tiled"}
