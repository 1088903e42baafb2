"""The words that the model is given: the prompt with its numbers filled in, and the checkpoint's negative prompt.

Cosmos3 was trained on captions in JSON. NVIDIA's framework writes size and duration into such a caption; to plain
words it appends sentences that say them, which diffusers does as well.

Source: NVIDIA cosmos-framework `inference/inference.py` and `inference/args.py`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from cosmos3_pipeline.checkpoint.files import NEGATIVE_PROMPT
from cosmos3_pipeline.planning.geometry import Clip
from cosmos3_pipeline.planning.text import GIVEN

# Width over height of each label that NVIDIA's captions have.
ASPECT_RATIOS = {"1,1": 1.0, "4,3": 4 / 3, "3,4": 3 / 4, "16,9": 16 / 9, "9,16": 9 / 16}


@dataclass(frozen=True)
class Words:
    """What the tokenizer is given. `sentences`: whether diffusers appends those on size and duration to both."""

    prompt: str
    negative_prompt: str
    negative_prompt_from: str
    sentences: bool


def words_for(prompt: str, negative_prompt: str | None, *, clip: Clip, fps: float, own: str | None) -> Words:
    """The words for a clip. `negative_prompt` None takes the checkpoint's `own`, or "" where that is None."""
    caption = _caption(prompt)
    source = GIVEN
    if negative_prompt is None:
        negative_prompt, source = "", "none, because the checkpoint has none"
        if own is not None:
            negative_prompt, source = own, f"the checkpoint's {NEGATIVE_PROMPT}"
    return Words(
        prompt=prompt if caption is None else json.dumps(_filled(caption, clip, fps)),
        negative_prompt=negative_prompt,
        negative_prompt_from=source,
        sentences=caption is None,
    )


def _caption(prompt: str) -> dict[str, Any] | None:
    """The caption where `prompt` is one in JSON, else None: a sentence may begin with a brace."""
    if not prompt.lstrip().startswith("{"):
        return None
    try:
        found = json.loads(prompt)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _filled(caption: dict[str, Any], clip: Clip, fps: float) -> dict[str, Any]:
    """The caption with the clip's numbers, over what it says of them itself; an image has no duration."""
    numbers: dict[str, Any] = {}
    if clip.num_frames > 1:
        numbers = {"duration": f"{int(clip.num_frames / fps)}s", "fps": float(fps)}
    else:
        caption = {key: value for key, value in caption.items() if key not in ("duration", "fps")}
    ratio = math.log(clip.width / clip.height)
    label = min(ASPECT_RATIOS, key=lambda name: abs(math.log(ASPECT_RATIOS[name]) - ratio))
    return {**caption, **numbers, "resolution": {"H": clip.height, "W": clip.width}, "aspect_ratio": label}
