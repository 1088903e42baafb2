"""Loads a checkpoint's text tokenizer and tries it on two prompts: a broken one would still make a picture."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from cosmos3_pipeline.checkpoint.inspect import CheckpointInfo
from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.planning.text import LONGEST_TRAINED

# A tokenizer with 150,000 tokens loads in a second or two and encodes a sentence in milliseconds.
LOAD_SECONDS = 120.0
WRITE_SECONDS = 10.0
# Two prompts, long enough to notice a chat template that cuts prompts.
WORDS = tuple(
    " ".join(f"{noun} number {count} of {count + 7}," for count in range(1, 9)) + " and that is all."
    for noun in ("kite", "harbour")
)
START_OF_PICTURE = "<|vision_start|>"
MARKERS = ("<|im_start|>", "<|im_end|>")


def load_tokenizer(checkpoint: CheckpointInfo) -> Any:
    """The tokenizer of `checkpoint`.

    Raises:
        Refusal: the tokenizer does not load, does not end, ignores the prompt, or writes unknown tokens.
    """
    folder = checkpoint.folder / "text_tokenizer"
    tokenizer = _within(
        LOAD_SECONDS,
        lambda: AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False),
        what=f"the tokenizer in {folder} cannot be loaded",
    )
    first, second = (_write(tokenizer, word, folder) for word in WORDS)
    special = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(START_OF_PICTURE)]
    if None in special or special[1] == tokenizer.unk_token_id:
        raise _broken(
            f"the tokenizer in {folder} has no end of sentence or no {START_OF_PICTURE}",
            "the picture begins after these two tokens",
        )
    written = _write(tokenizer, WORDS[0], folder, tokenize=False)
    letters = [m for m in MARKERS if m in written and tokenizer.convert_tokens_to_ids(m) not in first]
    if letters or not tokenizer.eos_token.startswith("<"):
        raise _broken(
            f"the tokenizer in {folder} writes {letters[0]} letter by letter"
            if letters
            else f"the tokenizer in {folder} ends a sentence with {tokenizer.eos_token!r}",
            "the text model tells turns and sentences apart by tokens of their own, such as <|im_end|>",
        )
    text = tokenizer.decode(first)
    if first == second or WORDS[0] not in text:
        raise _broken(
            f"the chat template in {folder} writes {text[:60]!r}... for the prompt {WORDS[0][:40]!r}...",
            "the words of the prompt are not all in it, so the picture would not be of them",
        )
    if len(first) > LONGEST_TRAINED:  # no sentence of plain words is so long
        raise _broken(
            f"the chat template in {folder} writes {len(first)} tokens for one sentence",
            f"Cosmos3 was trained with {LONGEST_TRAINED} at most",
        )
    check_tokens([*first, *second, *special], checkpoint)
    return tokenizer


def check_tokens(tokens: list[int], checkpoint: CheckpointInfo) -> None:
    """Raise Refusal if the transformer of `checkpoint` has no embedding for a token."""
    largest, vocabulary = max(tokens), checkpoint.transformer["vocab_size"]
    if largest >= vocabulary:
        raise _broken(
            f"the tokenizer in {checkpoint.folder / 'text_tokenizer'} writes the token {largest}",
            f"transformer/config.json says vocab_size: {vocabulary}, so the last one is {vocabulary - 1}",
        )


def _write(tokenizer: Any, words: str, folder: Path, *, tokenize: bool = True) -> Any:
    """A conversation that asks for `words`, as diffusers' pipeline builds it. Returns its tokens, or its text."""
    conversation = [{"role": "system", "content": "You help."}, {"role": "user", "content": words}]
    settings = {"add_generation_prompt": True, "add_vision_id": False, "return_dict": tokenize}
    written = _within(
        WRITE_SECONDS,
        lambda: tokenizer.apply_chat_template(conversation, tokenize=tokenize, **settings),
        what=f"the chat template in {folder} cannot be written",
    )
    return [int(token) for token in written.input_ids] if tokenize else written


def _within(seconds: float, action: Callable[[], Any], *, what: str) -> Any:
    """The result of `action`. It runs in a thread that is stopped after `seconds`, because a template may loop."""
    result: list[Any] = []
    failed: list[Exception] = []

    def act() -> None:
        try:
            result.append(action())
        # tokenizers and jinja raise any kind of exception, even Exception itself. All of them are reported.
        except Exception as error:
            failed.append(error)
        except SystemExit:
            pass  # `_stop` has ended this thread

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        _stop(thread)
    if failed:
        lines = str(failed[0]).strip().splitlines() or [""]
        raise _broken(what, f"{type(failed[0]).__name__}: {lines[0][:200]}") from failed[0]
    if not result:
        raise _broken(what, f"it did not end within {seconds:g} seconds")
    return result[0]


def _stop(thread: threading.Thread) -> None:
    """End `thread` by raising SystemExit in it. A loop in a template would take more and more memory."""
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    thread.join(1.0)


def _broken(what: str, why: str) -> Refusal:
    return Refusal(what=what, why=why, works="the text_tokenizer folder as it was published, downloaded again")
