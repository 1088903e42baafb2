"""An estimate of how many tokens the prompts become. Only the tokenizer knows the number.

Source: diffusers `Cosmos3OmniPipeline.tokenize_prompt`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from cosmos3_pipeline.checkpoint.files import NEGATIVE_PROMPT
from cosmos3_pipeline.checkpoint.hub import local_folder
from cosmos3_pipeline.config.schema import Config, TaskConfig, TaskName
from cosmos3_pipeline.planning.actions import action_of

# English in a vocabulary of 150,000 is about four bytes per token.
BYTES_PER_TOKEN = 4
# The longest text, in tokens, on which the transformer was trained.
LONGEST_TRAINED = 4096
# A text of more characters surely has more tokens than that: a token of any language has fewer than 16 on average.
LONGEST_TEXT = 16 * LONGEST_TRAINED
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
    lengths = (
        len(_words(words, most=LONGEST_TEXT + 1).encode()) for words in (task.prompt, _negative_prompt(cfg))
    )
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
    return list(_named_prompts(task).values())


def too_long(task: TaskConfig) -> Iterator[str]:
    """The overrides, or lines of a file, that give `task` a text of more than LONGEST_TEXT characters."""
    texts = _named_prompts(task)
    if task.negative_prompt is not None:
        texts["task.negative_prompt"] = _one(task.negative_prompt)
    for name, text in texts.items():
        if len(text) > LONGEST_TEXT:
            given = getattr(task, name.removeprefix("task."), "")
            yield f"{name}={given}" if given.startswith("@") else name


def _named_prompts(task: TaskConfig) -> dict[str, str]:
    if task.prompt_file is None:
        return {"task.prompt": _one(task.prompt)}
    lines = lines_of(_words(f"@{task.prompt_file}"))
    return {f"line {number} of task.prompt_file={task.prompt_file}": line for number, line in lines.items()}


def lines_of(text: str) -> dict[int, str]:
    """The prompts of a file, one per line, by line number from 1. Blank lines are left out.

    `text` was read with universal line ends, so LF, CRLF and CR end a line. Other separators of Unicode, and form
    feeds, are white space inside a prompt.
    """
    lines = enumerate((line.strip() for line in text.split("\n")), 1)
    return {number: line for number, line in lines if line}


def _one(words: str) -> str:
    """The text of one prompt, as far as it has to be known whether it is too long."""
    return _words(words, most=LONGEST_TEXT + 1)


def _words(words: str, *, most: int = -1) -> str:
    """`words`, or the first `most` characters of the file that they name as `@FILE`, if it exists."""
    file = Path(words[1:]).expanduser()
    if not words.startswith("@") or not file.is_file():
        return words
    with file.open(encoding=WORDS_ENCODING, errors="replace") as opened:
        return opened.read(most)
