"""Which sampler a checkpoint ships, and the schedule that it means by it. Imports no torch.

Source: diffusers `UniPCMultistepScheduler` and `Cosmos3SetTimestepsStep`; NVIDIA's converter for Edge; for a
distilled checkpoint diffusers `Cosmos3DistilledSetTimestepsStep`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from cosmos3_pipeline.checkpoint import rules
from cosmos3_pipeline.checkpoint.files import MODULAR_INDEX
from cosmos3_pipeline.errors import Refusal

UNIPC = "UniPCMultistepScheduler"
# NVIDIA's converter writes this class for Edge. It is UniPC over the native grid, which begins at 1 - 1/1000 where
# UniPC's own begins at 1; the pipeline's `use_native_flow_schedule` gives UniPC that grid.
EDGE_UNIPC = "Cosmos3EdgeUniPCMultistepScheduler"
# The sampler of the checkpoints that were distilled to a few fixed steps, of which each draws noise of its own.
DISTILLED = "FlowMatchEulerDiscreteScheduler"
# The published Edge says nothing of its shift: its scheduler_config.json is Nano's, whose flow_shift of 1.0 is
# UniPC's default. NVIDIA's converter has written 3.0 for it since, and so do TensorRT-LLM, vLLM-Omni and SGLang.
NATIVE_FLOW_SHIFT = 3.0
# Two files may have written the same noise level with more and with fewer digits.
ROUNDED = 1e-4


@dataclass(frozen=True)
class Sampler:
    """The sampler of a checkpoint. `settings` are the arguments of the diffusers class `class_name`.

    `native_grid`: the sigmas before the shift are linspace(1 - 1/1000, 0), as Edge was trained with.
    `native_flow_shift` is the shift that the checkpoint asks for, None where it leaves it to the task.
    `distilled_sigmas` are the noise levels of the fixed steps of a distilled checkpoint, one for each step, from 1
    downwards. None: the checkpoint runs with any number of steps.
    """

    class_name: str
    settings: Mapping[str, Any]
    native_grid: bool
    native_flow_shift: float | None
    distilled_sigmas: tuple[float, ...] | None = None

    def settings_for(self, flow_shift: float | None) -> dict[str, Any]:
        """The settings with the run's `flow_shift`; with None the checkpoint's own schedule.

        Karras sigmas know neither shift nor grid, and Nano, Super and Edge are all published with them. So a
        shift, asked for or the checkpoint's own, switches them off, as NVIDIA's recommended call does. Source:
        diffusers' page on Cosmos3.
        """
        shift = self.native_flow_shift if flow_shift is None else flow_shift
        if shift is None:  # as for a distilled checkpoint, with which a run's shift is refused
            return dict(self.settings)
        return {**self.settings, "use_karras_sigmas": False, "flow_shift": shift}


def sampler_of(
    config: Mapping[str, Any], index: Mapping[str, Any], modular: Mapping[str, Any], file: Path
) -> tuple[Sampler, rules.Read]:
    """The sampler that a scheduler's `config`, the content of `file`, and the values of the `index` describe.

    `modular` is what the folder's modular index says, which has the steps of a distilled checkpoint.

    Raises:
        Refusal: a class that is not run here, settings that it is not run with, or steps that contradict.
    """
    class_name = config.get("_class_name")
    if class_name == DISTILLED:
        return _distilled(config, modular, file)
    if class_name not in (UNIPC, EDGE_UNIPC):
        raise Refusal(
            what=f"{file} names the sampler {class_name}",
            why=f"the sampler of Cosmos3 is a {UNIPC}; another one would give another picture",
            works=f"the checkpoint's own scheduler, a {UNIPC}, {EDGE_UNIPC} or {DISTILLED}",
        )
    read = rules.apply(rules.SCHEDULER, config, file)
    edge = class_name == EDGE_UNIPC
    native = edge or index["use_native_flow_schedule"]
    shift = index["native_flow_shift"]
    if native and shift is None:
        own = read.values["flow_shift"]
        shift = NATIVE_FLOW_SHIFT if own == 1.0 else own
    return Sampler(str(class_name), read.values, native, shift), read


def _distilled(config: Mapping[str, Any], modular: Mapping[str, Any], file: Path) -> tuple[Sampler, rules.Read]:
    """The sampler of fixed steps. diffusers reads them in the modular index, NVIDIA's framework in `config`."""
    read = rules.apply(rules.DISTILLED_SCHEDULER, config, file)
    fixed = read.values["fixed_step_sampler_config"]
    framework = None
    if fixed is not None:
        t_list = rules.apply(rules.FIXED_STEPS, fixed, f"fixed_step_sampler_config of {file}").values["t_list"]
        # NVIDIA's framework ends the list with the clean picture or leaves that out.
        framework = t_list if t_list is None or t_list[-1] != 0 else t_list[:-1]
    found = modular.get("distilled_sigmas", framework)
    if why := _not_steps(found):
        raise Refusal(
            what=f"{file.parent.parent} says distilled_sigmas: {rules.clipped(found)}",
            why=f"{file.name} names the {DISTILLED} of a distilled checkpoint, whose steps have noise levels of "
            f"their own: {why}",
            works=f"the {MODULAR_INDEX} as it was published",
        )
    if framework is not None and _not_alike(found, framework):
        raise Refusal(
            what=f"{file} says t_list: {rules.clipped(framework)}",
            why=f"{MODULAR_INDEX} says distilled_sigmas: {rules.clipped(found)}, and both are the noise levels of "
            "the steps",
            works="both files of one checkpoint",
        )
    sigmas = tuple(float(sigma) for sigma in found)
    return Sampler(
        DISTILLED, read.values, native_grid=False, native_flow_shift=None, distilled_sigmas=sigmas
    ), read


def _not_steps(sigmas: Any) -> str | None:
    """Why `sigmas` are not the noise levels of fixed steps, or None where they are."""
    if why := rules.NOISE_LEVELS(sigmas):
        return why
    falls = all(before > after for before, after in pairwise(sigmas))
    return None if falls else "each step must have less noise than the step before"


def _not_alike(some: Sequence[float], others: Sequence[float]) -> bool:
    return len(some) != len(others) or any(abs(a - b) > ROUNDED for a, b in zip(some, others, strict=True))
