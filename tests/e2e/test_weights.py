"""`weights=...` as a user says it: the same picture, told in plan and metrics, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMALL, launch
from safetensors.torch import load_file

pytestmark = pytest.mark.long


def latents(folder: Path) -> torch.Tensor:
    return load_file(folder / "latents.safetensors")["latents"]


def test_a_streamed_run_is_the_resident_one(generate: Callable[..., Path]) -> None:
    resident, streamed = (generate("output.latents=true", *args) for args in ((), ("weights=streamed",)))
    assert torch.equal(latents(resident), latents(streamed))
    metrics = json.loads((streamed / "metrics.json").read_text())
    plan = json.loads((streamed / "plan.json").read_text())
    assert metrics["weights"] == plan["weights"]
    assert metrics["weights"]["placement"] == "streamed"
    # Between its layers a rank keeps only what is outside of them.
    kept = {
        run: json.loads((run / "metrics.json").read_text())["loading"]["transformer"]
        for run in (resident, streamed)
    }
    assert kept[streamed]["ranks"][0]["kept_bytes"] < kept[resident]["ranks"][0]["kept_bytes"] / 5
    assert all(run["ranks"][0]["kept_bytes"] == 0 for run in [metrics["loading"]["text"]])


@pytest.mark.parametrize("weights", ["resident", "sharded", "streamed"])
def test_prompts_of_a_file_are_encoded_in_one_pass(weights: str, tmp_path: Path) -> None:
    """The latents of each line are those of its own run; the empty line fails alone."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red kite\n@nowhere.txt\na blue boat on a lake, far away\na red kite\n", encoding="utf-8")
    out = tmp_path / "all"
    given = (*SMALL, "topology=cpu_x2", f"weights={weights}", "output.latents=true")
    done = launch(*given, f"task.prompt_file={prompts}", f"hydra.run.dir={out}")
    folders = sorted(out.glob("line_*"))
    made = [folder for folder in folders if (folder / "latents.safetensors").exists()]
    assert len(made) == 3, done.stderr + done.stdout
    assert torch.equal(latents(made[0]), latents(made[2]))
    for folder, prompt in zip(made[:2], ("a red kite", "a blue boat on a lake, far away"), strict=True):
        alone = tmp_path / folder.name
        single = launch(*given, f"task.prompt='{prompt}'", f"hydra.run.dir={alone}")
        assert single.returncode == 0, single.stderr
        assert torch.equal(latents(folder), latents(alone)), prompt
    # The text weights were read before the first clip, and not again.
    texts = [json.loads((folder / "metrics.json").read_text())["loading"]["text"] for folder in made]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["weights=sharded"], "no other rank"),
        (["weights.resident_layers=2"], "weights=streamed"),
        (["weights=streamed", "weights.resident_layers=99"], "layers"),
        (["weights=stramed"], "streamed"),
    ],
)
def test_what_makes_no_sense_is_refused(overrides: list[str], words: str) -> None:
    done = launch(*SMALL, *overrides)
    assert done.returncode != 0
    assert words in done.stderr and "Traceback" not in done.stderr
