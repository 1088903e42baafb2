"""The sampler that a checkpoint ships, and its schedule. Imports no torch.

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
# NVIDIA's converter writes this class for Edge. It is UniPC over the native grid, which begins at 1 - 1/1000.
# UniPC's own grid begins at 1. The pipeline's `use_native_flow_schedule` gives UniPC the native grid.
EDGE_UNIPC = "Cosmos3EdgeUniPCMultistepScheduler"
# The sampler of checkpoints that were distilled to a few fixed steps. Each step draws its own noise.
DISTILLED = "FlowMatchEulerDiscreteScheduler"
# The published Edge does not tell its shift: its scheduler_config.json is Nano's, whose flow_shift of 1.0 is
# UniPC's default. NVIDIA's converter now writes 3.0 for Edge, and TensorRT-LLM, vLLM-Omni and SGLang use 3.0 too.
NATIVE_FLOW_SHIFT = 3.0
# Largest difference between two files' values of one noise level, which may be written with fewer digits.
ROUNDED = 1e-4


@dataclass(frozen=True)
class Sampler:
    """The sampler of a checkpoint. `settings` are the arguments of the diffusers class `class_name`.

    native_grid: whether the sigmas before the shift are linspace(1 - 1/1000, 0), with which Edge was trained.
    native_flow_shift: the shift that the checkpoint asks for; None if it leaves the shift to the task.
    distilled_sigmas: the noise level of each fixed step of a distilled checkpoint, from 1 downwards; None if the
    checkpoint runs with any number of steps.
    """

    class_name: str
    settings: Mapping[str, Any]
    native_grid: bool
    native_flow_shift: float | None
    distilled_sigmas: tuple[float, ...] | None = None

    def settings_for(self, flow_shift: float | None) -> dict[str, Any]:
        """The settings with the run's `flow_shift`; None keeps the checkpoint's own schedule.

        Nano, Super and Edge are all published with Karras sigmas, which have neither shift nor grid. So any shift,
        the run's or the checkpoint's, switches Karras sigmas off, as NVIDIA's recommended call does. Source:
        diffusers' page on Cosmos3.
        """
        shift = self.native_flow_shift if flow_shift is None else flow_shift
        if shift is None:  # also for a distilled checkpoint, because a run's shift is refused with it
            return dict(self.settings)
        return {**self.settings, "use_karras_sigmas": False, "flow_shift": shift}


def sampler_of(
    config: Mapping[str, Any], index: Mapping[str, Any], modular: Mapping[str, Any], file: Path
) -> tuple[Sampler, rules.Read]:
    """The sampler by a scheduler's `config`, which is the content of `file`, and the values of the `index`.

    `modular` is the content of the folder's modular index, which has the steps of a distilled checkpoint.

    Raises:
        Refusal: the class or its settings cannot run here, or two files contradict each other about the steps.
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
    """The sampler of fixed steps. diffusers reads the steps in `modular`, NVIDIA's framework in `config`."""
    read = rules.apply(rules.DISTILLED_SCHEDULER, config, file)
    fixed = read.values["fixed_step_sampler_config"]
    framework = None
    if fixed is not None:
        t_list = rules.apply(rules.FIXED_STEPS, fixed, f"fixed_step_sampler_config of {file}").values["t_list"]
        # NVIDIA's framework may end the list with 0, the noise level of the clean picture.
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
    """Why `sigmas` are not the noise levels of fixed steps, or None if they are."""
    if why := rules.NOISE_LEVELS(sigmas):
        return why
    falls = all(before > after for before, after in pairwise(sigmas))
    return None if falls else "each step must have less noise than the step before"


def _not_alike(some: Sequence[float], others: Sequence[float]) -> bool:
    return len(some) != len(others) or any(abs(a - b) > ROUNDED for a, b in zip(some, others, strict=True))
