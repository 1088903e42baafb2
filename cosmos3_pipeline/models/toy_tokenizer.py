"""The toy model's tokenizer: byte-level pair encoding, trained on the text below, with Qwen's chat markers."""

from __future__ import annotations

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


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A fast tokenizer of at most `vocab_size` tokens, the same one every time.

    Raises:
        Refusal: `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise Refusal(
            what=f"model.transformer.vocab_size={vocab_size} for the toy model",
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
    backend.train_from_iterator(TEXT.strip().splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
