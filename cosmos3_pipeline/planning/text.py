"""An estimate of how many tokens the prompts become. Only the tokenizer knows the number.

Source: diffusers `Cosmos3OmniPipeline.tokenize_prompt`.
"""

from __future__ import annotations

import math
from pathlib import Path

from cosmos3_pipeline.checkpoint.files import NEGATIVE_PROMPT
from cosmos3_pipeline.checkpoint.hub import local_folder
from cosmos3_pipeline.config.schema import Config, TaskConfig, TaskName
from cosmos3_pipeline.planning.actions import action_of

# English in a vocabulary of 150,000 is about four bytes per token.
BYTES_PER_TOKEN = 4
# The sentences on duration and size that the pipeline adds to a prompt.
DURATION = "The video is not 7.9 seconds long and is not of 24 FPS. "
RESOLUTION = "This video is not of 720x1280 resolution."
# The caption that surrounds the prompt of a task with actions.
ACTION_CAPTION = (
    '{"cinematography": '
    '{"framing": "This video is captured from a first-person perspective looking at the scene."}, '
    '"actions": [{"time": "0:00-0:03", "description": ""}], "duration": "3s", "fps": 5.0, '
    '"resolution": {"H": 480, "W": 832}, "aspect_ratio": "16,9"}'
)
SYSTEM = "You are a helpful assistant who will generate videos from a give prompt."
TRANSFER_SYSTEM = (
    "You are a helpful assistant that generates images or videos following the user's instructions and control "
    "signals (edge maps, blur, depth, or segmentation)."
)
WORDS_ENCODING = "utf-8-sig"  # drops a byte order mark
GIVEN = "task.negative_prompt"  # the origin of a negative prompt that the user set
NEGATIVE_PROMPT_BYTES = 14_850  # of the negative prompt in NVIDIA's checkpoints, as the tokenizer receives it
# Tokens of the chat: begin, role, line break and end of each turn, and the two that begin the picture.
MARKERS = 14


def text_tokens_of(cfg: Config) -> tuple[int, int]:
    """About how many tokens the prompt and the negative prompt of `cfg` become."""
    task = cfg.task
    system = 0 if task.system_prompt is False else len(SYSTEM)
    around = [system + len(RESOLUTION) + (0 if task.num_frames == 1 else len(DURATION))] * 2
    if action_of(task) is not None:
        around = [system + len(ACTION_CAPTION), system]
    elif task.name is TaskName.transfer:
        around = [0 if task.system_prompt is False else len(TRANSFER_SYSTEM)] * 2
    lengths = (len(_words(words).encode()) for words in (task.prompt, _negative_prompt(cfg)))
    prompt, negative = (
        MARKERS + math.ceil((added + length) / BYTES_PER_TOKEN)
        for added, length in zip(around, lengths, strict=True)
    )
    return prompt, negative


def _negative_prompt(cfg: Config) -> str:
    """The negative prompt of `cfg` or its checkpoint. Before a download, it is a text as long as NVIDIA's."""
    model, negative = cfg.model, cfg.task.negative_prompt
    if negative is not None:
        return negative
    folder = None if model.path is None else local_folder(model.path, model.commit or model.revision)
    if folder is not None:
        file = folder / NEGATIVE_PROMPT
        return file.read_text(encoding="utf-8") if file.is_file() else ""
    return "" if model.repo is None else "-" * NEGATIVE_PROMPT_BYTES


def prompts_of(task: TaskConfig) -> list[str]:
    """The prompt of each clip of a run. A prompt file that does not exist counts as one prompt."""
    if task.prompt_file is not None:
        return list(lines_of(_words(f"@{task.prompt_file}")).values())
    return [_words(task.prompt)]


def lines_of(text: str) -> dict[int, str]:
    """The prompts of a file, one per line, by line number from 1. Blank lines are left out."""
    lines = enumerate((line.strip() for line in text.split("\n")), 1)
    return {number: line for number, line in lines if line}


def _words(words: str) -> str:
    """`words`, or the text of the file that they name as `@FILE`, if it exists."""
    file = Path(words[1:]).expanduser()
    if not words.startswith("@") or not file.is_file():
        return words
    return file.read_text(encoding=WORDS_ENCODING, errors="replace")
