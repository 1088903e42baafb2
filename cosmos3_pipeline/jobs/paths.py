"""The files that a composition names, each by its whole path: whoever reads it later may be in another folder."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from cosmos3_pipeline.checkpoint.hub import is_hub_id
from cosmos3_pipeline.config.schema import Config
from cosmos3_pipeline.config.tasks import FROM_VIDEO, PATHS, WORDS


def with_whole_paths(cfg: Config) -> Config:
    """`cfg` with every path to what is here made absolute; from then on no reader asks where a run was started.

    What is no path to something here, such as a hub id or `from_video`, stays as it is.
    """
    task, controls = cfg.task, cfg.task.controls
    found = {key: whole(getattr(task, key)) for key in PATHS}
    for key in WORDS:
        words = getattr(task, key)
        found[key] = f"@{whole(words[1:])}" if words and words.startswith("@") else words
    path = cfg.model.path
    own = {field.name: whole(getattr(controls, field.name)) for field in fields(controls)}
    lora = [replace(one, path=whole(one.path) or one.path) for one in cfg.model.lora]
    return replace(
        cfg,
        task=replace(task, controls=replace(controls, **own), **found),  # type: ignore[arg-type]
        model=replace(cfg.model, path=path if path and is_hub_id(path) else whole(path), lora=lora),
        verify=replace(cfg.verify, latents=whole(cfg.verify.latents)),
    )


def whole(path: str | None) -> str | None:
    """The absolute path of a file or folder that is there, `~` expanded; any other text as it is."""
    if path is None or path == FROM_VIDEO:
        return path
    file = Path(path).expanduser()
    return str(file.absolute()) if file.exists() else path
