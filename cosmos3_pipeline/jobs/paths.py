"""Makes the paths in a composition absolute, because it may be read later by a process in another folder."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from cosmos3_pipeline.checkpoint.hub import is_hub_id
from cosmos3_pipeline.config.schema import Config
from cosmos3_pipeline.config.tasks import FROM_VIDEO, PATHS, WORDS


def with_whole_paths(cfg: Config) -> Config:
    """`cfg` with every path to an existing file made absolute, so that no reader depends on the working directory.

    Any other text, such as a hub id or `from_video`, stays as it is.
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
    """The absolute path of a file or folder that exists, with `~` expanded. Any other text is unchanged."""
    if path is None or path == FROM_VIDEO:
        return path
    file = Path(path).expanduser()
    return str(file.absolute()) if file.exists() else path
