"""The stages of a run come from its config and plan, and each can be replaced from Python."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from cosmos3_pipeline import compose
from cosmos3_pipeline.config.schema import Config
from cosmos3_pipeline.config.shortcut import composition_of
from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.jobs.generate import generate
from cosmos3_pipeline.jobs.prompts import PromptsFailed
from cosmos3_pipeline.jobs.start import prepare
from cosmos3_pipeline.planning.plan import Plan, make_plan
from cosmos3_pipeline.stages import STAGES
from cosmos3_pipeline.stages.build import build_stages
from cosmos3_pipeline.stages.context import Picture, RunContext
from cosmos3_pipeline.stages.text import TextStage


@dataclass
class Noted:
    """A stage that makes no picture, but says that it has run."""

    config: Config
    plan: Plan

    def __call__(self, context: RunContext) -> None:
        with (context.directory / "steps.txt").open("a") as file:
            file.write(f"{self.config.sampler.steps} {self.plan.steps}\n")
        context.picture = Picture(context.directory / "none.mp4", self.plan.clip.num_frames, "")


SILENT = tuple(name for name in STAGES if name != "sound")  # of a task without sound


def test_they_are_in_the_order_in_which_the_data_moves() -> None:
    config = compose()
    names = {name: type(stage).__name__ for name, stage in build_stages(config, make_plan(config)).items()}
    assert list(names) == list(SILENT)
    assert names == {name: f"{name.title()}Stage" for name in SILENT}


def test_one_that_is_replaced_runs_in_the_place_of_the_librarys(tmp_path: Path) -> None:
    prepared = prepare(composition_of(["sampler.steps=3"]))
    generate(prepared, tmp_path, stages={name: Noted for name in STAGES})
    assert (tmp_path / "steps.txt").read_text() == "3 3\n" * len(SILENT)
    assert json.loads((tmp_path / "metrics.json").read_text())["picture"] == "none.mp4"


def test_a_name_that_no_stage_has_is_refused() -> None:
    config = compose()
    with pytest.raises(Refusal, match=r"did you mean export\?"):
        build_stages(config, make_plan(config), {"exprot": Noted})


class Choosy(TextStage):
    """Refuses one prompt of several."""

    def tokenize(self, context: RunContext) -> None:
        if "blue" in self._task.prompt:
            raise Refusal("a blue boat", "it is blue", "another colour")
        super().tokenize(context)


def test_a_line_of_a_prompt_file_that_fails_stops_no_other(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red kite\na blue boat\na green hill\n")
    small = ["task=t2i", "task.height=32", "task.width=32", "sampler.steps=1"]
    prepared = prepare(composition_of([*small, f"task.prompt_file={tmp_path / 'prompts.txt'}"]))
    with pytest.raises(PromptsFailed, match=r"lines \[2\] of 3"):
        generate(prepared, tmp_path, stages={"text": lambda config, plan: Choosy(config.task, config.sampler)})
    lines = json.loads((tmp_path / "prompts.json").read_text())["lines"]
    assert ["it is blue" in (line["failed"] or "") for line in lines] == [False, True, False]
    assert [(tmp_path / line["folder"] / "image.png").exists() for line in lines] == [True, False, True]
