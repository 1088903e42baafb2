"""Sound latents to a waveform, on the root alone."""

from __future__ import annotations

from diffusers.modular_pipelines.cosmos.decoders import Cosmos3SoundDecodeStep

from cosmos3_pipeline.config.schema import TaskConfig
from cosmos3_pipeline.stages.context import RunContext


class SoundStage:
    """Leaves `context.waveform` [channels, samples], each sample in -1..1, on the root.

    Without `task.sound` it does nothing. The sound is decoded before the picture, for two reasons. The sound
    tokenizer can use memory that the VAE's decoder needs later, and frames can be written together with their
    sound. The sound tokenizer is removed from the device afterwards, and is read again for the next clip.
    """

    def __init__(self, task: TaskConfig) -> None:
        self._sound = task.sound

    def __call__(self, context: RunContext) -> None:
        if not self._sound or not context.is_root:
            return
        with context.measure("sound"):
            with context.components.sound_tokenizer():
                Cosmos3SoundDecodeStep()(context.components.pipeline, context.state)
            context.waveform = context.state.get("sound")
            context.state.set("sound", None)
