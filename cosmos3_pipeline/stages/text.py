"""Words to tokens: the prompts, with the sentences on size and duration that Cosmos3 was trained with."""

from __future__ import annotations

from diffusers.modular_pipelines.cosmos.encoders import Cosmos3TextEncoderStep, Cosmos3TransferTextStep

from cosmos3_pipeline.config.schema import SamplerConfig, TaskConfig, TaskName
from cosmos3_pipeline.denoise.texts import Prompt
from cosmos3_pipeline.models.tokenizer import check_tokens
from cosmos3_pipeline.planning.sampling import guidance_of
from cosmos3_pipeline.stages.context import RunContext
from cosmos3_pipeline.stages.words import Words, prompt_of, read_words, words_for


class TextStage:
    """Leaves `cond_input_ids` and `uncond_input_ids` in the state, and the encoded prompts in the components.

    `task.prompt` and `task.negative_prompt` are the words themselves, or `@` and the path of a file that holds
    them (a long caption). A caption in JSON is filled in, see `stages.words`. If `task.negative_prompt` or
    `task.system_prompt` is None, the checkpoint decides.
    """

    def __init__(self, task: TaskConfig, sampler: SamplerConfig) -> None:
        self._task = task
        self._sampler = sampler

    def __call__(self, context: RunContext) -> None:
        with context.measure("text"):
            self.tokenize(context)
            context.components.encode_texts(self.prompts(context))

    def tokenize(self, context: RunContext) -> None:
        """Turn the words into tokens, without encoding them.

        Raises Refusal for words that the model cannot take.
        """
        task = self._task
        prompt = prompt_of(task)
        negative = None if task.negative_prompt is None else read_words(task.negative_prompt)
        context.words = words = self.words(context, prompt, negative)
        context.components.tokenizer()
        state = context.state
        state.set("prompt", words.prompt)
        state.set("negative_prompt", words.negative_prompt)
        state.set("use_system_prompt", task.system_prompt)
        state.set("num_frames", context.clip.num_frames)
        state.set("height", context.clip.height)
        state.set("width", context.clip.width)
        state.set("fps", context.fps)
        state.set("add_resolution_template", words.sentences)
        state.set("add_duration_template", words.sentences)
        if task.name is TaskName.transfer:
            # diffusers' block for transfer appends no sentences on size and duration, and has its own system
            # prompt.
            state.set("use_system_prompt", task.system_prompt is not False)
            Cosmos3TransferTextStep()(context.components.pipeline, state)
        else:
            Cosmos3TextEncoderStep()(context.components.pipeline, state)
        for name in ("cond_input_ids", "uncond_input_ids"):
            check_tokens(list(state.get(name)), context.components.checkpoint)

    def words(self, context: RunContext, prompt: str, negative: str | None) -> Words:
        """The words that the tokenizer gets."""
        own = context.components.checkpoint.negative_prompt
        return words_for(prompt, negative, clip=context.clip, fps=context.fps, own=own)

    def prompts(self, context: RunContext) -> list[Prompt]:
        """The prompts of this rank's guidance passes. Call `tokenize` first."""
        mesh, pipeline = context.mesh, context.components.pipeline
        context.components.transformer()  # `_prepare_text_segment` reads its config
        guidance, found = guidance_of(self._task, self._sampler), []
        for name in guidance.prompts(ranks=mesh.size("cfg"), rank=mesh.rank("cfg")):
            ids = context.state.get(f"{name}_input_ids")
            segment = pipeline._prepare_text_segment(ids, context.components.device)
            found.append((segment["input_ids"], segment["text_mrope_ids"]))
        return found
