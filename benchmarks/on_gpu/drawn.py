"""A transformer of a published size with random weights, and a checkpoint whose weights are drawn, not read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from cosmos_models import denoise_with, tiny_scheduler
from diffusers import Cosmos3OmniTransformer
from torch import Tensor, nn

from cosmos3_pipeline.config.schema import ModelConfig
from cosmos3_pipeline.models import passing, placement, reading
from cosmos3_pipeline.models.absent import without_weights
from cosmos3_pipeline.models.form import form_of
from cosmos3_pipeline.models.known import known_to
from cosmos3_pipeline.models.random_weights import scale_and_mean
from cosmos3_pipeline.models.reading import Piece


def drawn_transformer(
    model: ModelConfig, device: torch.device, dtype: torch.dtype, *, layers: int | None = None
) -> Cosmos3OmniTransformer:
    """The whole transformer of a model option, or its first `layers`. All ranks draw the same numbers."""
    values = form_of(model).transformer
    values = values if layers is None else {**values, "num_hidden_layers": layers}
    with without_weights():
        transformer = Cosmos3OmniTransformer.from_config(known_to(Cosmos3OmniTransformer, values))
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(transformer.named_parameters()):
        wanted = torch.float32 if name.startswith(tuple(transformer._keep_in_fp32_modules)) else dtype
        scale, mean = scale_and_mean(name, tuple(parameter.shape))
        weight = torch.empty(parameter.shape, dtype=wanted, device=device)
        owner, _, last = name.rpartition(".")
        module = transformer.get_submodule(owner)
        weight.normal_(mean, scale, generator=generator)
        module._parameters[last] = nn.Parameter(weight, requires_grad=False)
    # diffusers computes its frequencies on the host. Other devices would give other last bits.
    axes = transformer.config.rope_axes_dim
    rotary = type(transformer.rotary_emb)(values["head_dim"], values["rope_theta"], axes)
    transformer.rotary_emb = rotary.to(device)
    return transformer.eval()


@contextmanager
def drawn_in_place_of_files() -> Iterator[None]:
    """In the block, weights of a checkpoint without files are drawn directly into their memory."""
    with ExitStack() as stack:
        for module in (reading, placement, passing):
            stack.enter_context(patch.object(module, "read_pieces", _draw))
        yield


def _draw(pieces: Iterable[Piece], **settings: Any) -> None:
    """Replaces `reading.read_pieces` and keeps its promise: the values are complete when it returns."""
    for piece in pieces:
        scale, mean = scale_and_mean(piece.stored.name, piece.stored.shape)
        piece.target.normal_(mean, scale)
        if piece.target.is_cuda:
            torch.cuda.current_stream(piece.target.device).synchronize()


PROMPT_TOKENS = (120, 60)  # numbers of tokens of the prompt and of the negative prompt
GUIDANCE_SCALE = 6.0


def latents_by(denoiser: Any, transformer: Any, clip: tuple[int, int, int], *, steps: int) -> Tensor:
    """Latents by diffusers' modular workflow, with `denoiser` or by default diffusers' denoiser block.

    `clip` is height and width in pixels, and the number of frames. The prompts are random tokens.
    """
    generator, vocabulary = torch.Generator().manual_seed(0), transformer.config.vocab_size
    tokens = [torch.randint(0, vocabulary, (count,), generator=generator).tolist() for count in PROMPT_TOKENS]
    height, width, frames = clip
    latents: Tensor = denoise_with(
        denoiser,
        SimpleNamespace(transformer=transformer, scheduler=tiny_scheduler()),
        prompt_ids=(tokens[0], tokens[1]),
        height=height,
        width=width,
        num_frames=frames,
        steps=steps,
        guidance_scale=GUIDANCE_SCALE,
        seed=0,
    )
    return latents
