"""Sound latents to a waveform, on the root alone."""

from __future__ import annotations

from diffusers.modular_pipelines.cosmos.decoders import Cosmos3SoundDecodeStep

from cosmos3_pipeline.config.schema import TaskConfig
from cosmos3_pipeline.stages.context import RunContext


class SoundStage:
    """Leaves `context.waveform` [channels, samples], each sample in -1..1, on the root.

    Without `task.sound` it does nothing. The waveform is decoded before the picture: the sound tokenizer then has
    the memory that the VAE's decoder takes later, and the frames need not wait for their sound in the file. The
    sound tokenizer leaves the device at once, and is read again for the next clip.
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
