"""Which sampler a checkpoint ships, and the schedule that it means by it. Imports no torch.

Source: diffusers `UniPCMultistepScheduler` and `Cosmos3SetTimestepsStep`; NVIDIA's converter for Edge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cosmos3_pipeline.checkpoint import rules
from cosmos3_pipeline.errors import Refusal

UNIPC = "UniPCMultistepScheduler"
# NVIDIA's converter writes this class for Edge. It is UniPC over the native grid, which begins at 1 - 1/1000 where
# UniPC's own begins at 1; the pipeline's `use_native_flow_schedule` gives UniPC that grid.
EDGE_UNIPC = "Cosmos3EdgeUniPCMultistepScheduler"
DISTILLED = "FlowMatchEulerDiscreteScheduler"
# The published Edge says nothing of its shift: its scheduler_config.json is Nano's, whose flow_shift of 1.0 is
# UniPC's default. NVIDIA's converter has written 3.0 for it since, and so do TensorRT-LLM, vLLM-Omni and SGLang.
NATIVE_FLOW_SHIFT = 3.0


@dataclass(frozen=True)
class Sampler:
    """The sampler of a checkpoint. `settings` are those of diffusers' `UniPCMultistepScheduler`.

    `native_grid`: the sigmas before the shift are linspace(1 - 1/1000, 0), as Edge was trained with.
    `native_flow_shift` is the shift that the checkpoint asks for, None where it leaves it to the task.
    """

    class_name: str
    settings: Mapping[str, Any]
    native_grid: bool
    native_flow_shift: float | None

    def settings_for(self, flow_shift: float | None) -> dict[str, Any]:
        """The settings with the run's `flow_shift`; with None the checkpoint's own schedule.

        Karras sigmas know neither shift nor grid, and Nano, Super and Edge are all published with them. So a
        shift, asked for or the checkpoint's own, switches them off, as NVIDIA's recommended call does. Source:
        diffusers' page on Cosmos3.
        """
        shift = self.native_flow_shift if flow_shift is None else flow_shift
        if shift is None:
            return dict(self.settings)
        return {**self.settings, "use_karras_sigmas": False, "flow_shift": shift}


def sampler_of(config: Mapping[str, Any], index: Mapping[str, Any], file: object) -> tuple[Sampler, rules.Read]:
    """The sampler that a scheduler's `config`, the content of `file`, and the values of the `index` describe.

    Raises:
        Refusal: a class that is not run here, or settings that it is not run with.
    """
    class_name = config.get("_class_name")
    if class_name not in (UNIPC, EDGE_UNIPC):
        raise Refusal(
            what=f"{file} names the sampler {class_name}",
            why=f"the sampler of Cosmos3 is a {UNIPC}; another one would give another picture",
            works=f"the checkpoint's own scheduler, a {UNIPC} or {EDGE_UNIPC}",
        )
    read = rules.apply(rules.SCHEDULER, config, file)
    edge = class_name == EDGE_UNIPC
    native = edge or index["use_native_flow_schedule"]
    shift = index["native_flow_shift"]
    if native and shift is None:
        own = read.values["flow_shift"]
        shift = NATIVE_FLOW_SHIFT if own == 1.0 else own
    return Sampler(str(class_name), read.values, native, shift), read


def distilled(what: str) -> Refusal:
    """The refusal of a checkpoint that was distilled to a few fixed steps."""
    return Refusal(
        what=f"{what}: this is a distilled checkpoint",
        why="it has a few fixed steps with noise of their own, and guidance in its weights; no task here runs it",
        works="the checkpoint that it was distilled from, such as nvidia/Cosmos3-Super",
    )
