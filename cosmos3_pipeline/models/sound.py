"""The sound tokenizer of a checkpoint: diffusers' class, with only its decoder made and read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import Cosmos3AVAEAudioTokenizer
from torch import nn
from torch.nn.utils import remove_weight_norm

from cosmos3_pipeline.checkpoint.inspect import CheckpointInfo
from cosmos3_pipeline.checkpoint.sound import SOUND_TOKENIZER
from cosmos3_pipeline.models.absent import without_weights
from cosmos3_pipeline.models.known import known_to
from cosmos3_pipeline.models.reading import read_tensors


def new_sound_tokenizer(config: Mapping[str, Any]) -> Cosmos3AVAEAudioTokenizer:
    """The model that diffusers' constructor makes from a config."""
    with _old_weight_norm():
        return Cosmos3AVAEAudioTokenizer(**known_to(Cosmos3AVAEAudioTokenizer, config))


def load_sound_tokenizer(
    checkpoint: CheckpointInfo, *, dtype: torch.dtype, device: torch.device
) -> Cosmos3AVAEAudioTokenizer:
    """The decoder in `dtype`. The encoder is None and never read.

    A convolution stores direction and length of its filters separately. diffusers multiplies them in each call and
    also keeps the product. Here they are multiplied once, convolution by convolution. The bits are the same, and
    each weight is in memory once.

    Raises:
        Fault: see `read_tensors`.
    """
    assert checkpoint.sound_tokenizer is not None  # inspected with `sound`
    with without_weights():
        model = new_sound_tokenizer({**checkpoint.sound_tokenizer, "encoder_enabled": False})
    tensors = read_tensors(checkpoint.tensors[SOUND_TOKENIZER], dtype=dtype, device=device)
    model.load_state_dict(tensors, assign=True)
    del tensors
    with torch.no_grad(), _old_weight_norm():
        for module in model.modules():
            if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
                remove_weight_norm(module)
    return model.eval().requires_grad_(False)


@contextmanager
def _old_weight_norm() -> Iterator[None]:
    """Hides PyTorch's warning that the weight norm which diffusers uses is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
