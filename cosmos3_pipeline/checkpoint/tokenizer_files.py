"""Check that the files of a text tokenizer exist and have the right form. Loading checks the rest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosmos3_pipeline.checkpoint.files import LARGEST_JSON, is_regular, not_whole, read_json, read_text, unreadable
from cosmos3_pipeline.checkpoint.rules import clipped
from cosmos3_pipeline.errors import Refusal

# A fast tokenizer has one file of vocabulary, a slow tokenizer of Qwen two.
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
LARGEST_TEMPLATE = 2**20
TEMPLATE_FILE = "chat_template.jinja"


def check_tokenizer_files(folder: Path, config: Mapping[str, Any], classes: tuple[str, ...]) -> None:
    """Raise Refusal unless `folder` has a vocabulary and a chat template.

    `config` is the content of tokenizer_config.json. The name of its class must begin with one of `classes`.
    """
    named = config.get("tokenizer_class")
    if not str(named).startswith(classes):
        raise Refusal(
            what=f"{folder / 'tokenizer_config.json'} says tokenizer_class: {clipped(named)}",
            why=f"the tokenizers of Cosmos3 are {' or '.join(classes)}",
            works="the tokenizer as NVIDIA published it",
        )
    try:
        files = list(folder.iterdir())
    except OSError as error:
        raise unreadable(folder, error) from error
    for file in files:
        if not file.is_dir() and is_regular(file) and file.stat().st_size > LARGEST_JSON:
            raise not_whole(file, f"it has {file.stat().st_size} bytes; no real one has more than {LARGEST_JSON}")
    if not any(all(is_regular(folder / name) for name in names) for names in VOCABULARIES):
        raise Refusal(
            what=f"{folder} has no vocabulary",
            why=f"there is neither {' nor '.join(' and '.join(names) for names in VOCABULARIES)}",
            works="the whole checkpoint: the download may have ended early",
        )
    if config.get("auto_map"):
        raise Refusal(
            what=f"{folder / 'tokenizer_config.json'} has an auto_map",
            why="it would run a program that came with the checkpoint",
            works="the tokenizer as NVIDIA published it",
        )
    special = folder / "special_tokens_map.json"
    if not config.get("eos_token") and not (is_regular(special) and read_json(special).get("eos_token")):
        raise Refusal(
            what=f"{folder / 'tokenizer_config.json'} has no eos_token",
            why="the prompt ends with it; the class of the tokenizer would take another one in its place",
            works="the tokenizer as NVIDIA published it",
        )
    template = config.get("chat_template")
    if is_regular(folder / TEMPLATE_FILE):
        template = read_text(folder / TEMPLATE_FILE, largest=LARGEST_TEMPLATE)
    elif is_regular(folder / "chat_template.json"):
        template = read_text(folder / "chat_template.json", largest=LARGEST_TEMPLATE)
    if not template or (isinstance(template, str) and not template.strip()):
        raise Refusal(
            what=f"{folder} has no chat template",
            why=f"the prompt is put into it, and there is none in {TEMPLATE_FILE} or tokenizer_config.json",
            works="the tokenizer as it was published",
        )
