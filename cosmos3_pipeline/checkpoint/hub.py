"""Fetching a checkpoint from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from cosmos3_pipeline.checkpoint.inspect import COMPONENTS, INDEX
from cosmos3_pipeline.errors import Refusal

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(path: str) -> bool:
    """Whether `path` names a repository of the Hugging Face hub, `owner/name`, and no folder here."""
    return _HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def fetch_checkpoint(repo: str) -> Path:
    """The local folder of the hub repository `repo`, downloaded where it is not in the hub's cache yet.

    Raises:
        Refusal: it is not in the cache and cannot be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(repo, allow_patterns=[INDEX, *(f"{name}/*" for name in COMPONENTS)]))
    except (OSError, HFValidationError) as error:  # the hub's own errors are OSErrors
        raise Refusal(
            what=f"the checkpoint {repo} is neither a folder here nor could it be fetched from the hub",
            why=str(error).strip().splitlines()[0],
            works="model.path=FOLDER with a downloaded copy, or `hf download` and `hf auth login` where there is "
            "internet",
        ) from error
