"""A small tokenizer for made-up models: byte-level pair encoding, with real markers."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cosmos3_pipeline.errors import Refusal

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>")
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)  # every byte, so that any text can be written

# Qwen's layout of a conversation, as the Cosmos3 checkpoints ship it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Nemotron's layout, as Cosmos3-Edge ships it: there is always a system turn, and the answer begins with <think>.
EDGE_CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)

TEXT = """
You are a helpful assistant who will generate videos from a give prompt.
You are a helpful assistant who will generate images from a give prompt.
The video is 7.9 seconds long and is of 24 FPS. This video is of 720x1280 resolution.
The video is not 7.9 seconds long and is not of 24 FPS. This video is not of 720x1280 resolution.
This image is of 960x960 resolution. This image is not of 960x960 resolution.
A red kite turns in the wind above a rocky coast at sunset. The camera follows it slowly from below.
A robot arm picks up a blue cup from the table and sets it down beside the window.
A car drives along a wet street at night, and the lights of the city shine on the road.
Waves break on the shore while a dog runs across the sand towards the water.
"""


def make_tokenizer(vocab_size: int, *, edge: bool = False, text: str = TEXT) -> PreTrainedTokenizerFast:
    """A fast tokenizer of at most `vocab_size` tokens for `text`, the same every time.

    `edge` chooses the chat template.

    Raises:
        Refusal: `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise Refusal(
            what=f"model.transformer.vocab_size={vocab_size} for a made-up model",
            why=f"256 bytes and {len(SPECIAL_TOKENS)} special tokens need {SMALLEST_VOCABULARY}",
            works=f"model.transformer.vocab_size={SMALLEST_VOCABULARY} or more",
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # The text may give fewer tokens than `vocab_size`. A real vocabulary has room for all of them.
    backend.train_from_iterator(text.strip().splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=EDGE_CHAT_TEMPLATE if edge else CHAT_TEMPLATE,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, *, class_name: str) -> None:
    """Write `tokenizer` in the files that published checkpoints have, with `class_name` in its config."""
    tokenizer.save_pretrained(str(folder))
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "tokenizer_class": class_name}, indent=2) + "\n", encoding="utf-8")
    if class_name.startswith("Qwen2"):
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        merges = "".join(f"{' '.join(merge)}\n" for merge in model["merges"])
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
