"""Where the configs of a program are, by its `@hydra.main` and its flags. Imports no torch."""

from __future__ import annotations

import inspect
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.hydra import Hydra
from hydra._internal.utils import (
    compute_search_path_dir,
    create_config_search_path,
    detect_calling_file_or_module_from_task_function,
    detect_task_name,
)
from hydra.conf import HydraConf
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig

from cosmos3_pipeline.config import config_dir
from cosmos3_pipeline.config.closure import Loader, first_line, folder_of
from cosmos3_pipeline.config.provenance import beside_a_running_hydra, file_of, for_people, place_of


@dataclass(frozen=True)
class Source:
    """The primary config `name` in the folder `main` (a path or `pkg://...`).

    `further` is a folder that is searched before `main`. `job` is Hydra's name for the program.
    """

    main: str | None
    name: str = "config"
    further: str | None = None
    job: str = "launch"

    @classmethod
    def of(cls, hydra_main: Callable[[], None], args: Namespace) -> Source | None:
        """The source of a function with `@hydra.main`, under Hydra's flags; None for any other function."""
        said = inspect.getclosurevars(hydra_main).nonlocals
        if not {"task_function", "config_path", "config_name"} <= set(said):
            return None
        file, module = detect_calling_file_or_module_from_task_function(said["task_function"])
        main = compute_search_path_dir(file, module, args.config_path or said["config_path"])
        further = None if args.config_dir is None else str(Path(args.config_dir).absolute())
        return cls(
            main, args.config_name or said["config_name"] or "config", further, detect_task_name(file, module)
        )

    @classmethod
    def of_a_running_job(cls, hydra_config: DictConfig | HydraConf) -> Source:
        """The source of a job that Hydra itself composed. `hydra_config` is Hydra's own node."""
        places = {
            one.provider: one.path if one.schema == "file" else f"{one.schema}://{one.path}"
            for one in hydra_config.runtime.config_sources
        }
        name = hydra_config.job.config_name or "config"
        return cls(places.get("main"), name, places.get("command-line"), hydra_config.job.name)

    @contextmanager
    def opened(self) -> Iterator[ConfigLoader]:
        """Hydra's loader for these folders, also while Hydra runs a job."""
        search_path = create_config_search_path(self.main)
        if self.further is not None:
            place = self.further if "://" in self.further else f"file://{self.further}"
            search_path.prepend("command-line", place, SearchPathQuery(provider="schema"))
        with beside_a_running_hydra():
            yield Hydra.create_main_hydra2(self.job, search_path).config_loader

    @cache  # noqa: B019 - sources are few, and equal if their fields are
    def groups(self) -> dict[str, list[str]]:
        """The options of every group, such as `vae` and `vae/decode`."""
        with self.opened() as loader:
            return dict(_groups(self._repository(loader), ""))

    def _repository(self, loader: ConfigLoader) -> CachingConfigRepository:
        """The configs that `loader` finds, with those that the primary config adds to the search path."""
        return cast(ConfigLoaderImpl, loader)._parse_overrides_and_create_caching_repo(self.name, [])[1]

    def place(self, config_path: str, key: str) -> str:
        """Where people find `key` of the config at `config_path`: `conf/task/t2v.yaml:14`."""
        with self.opened() as loader:
            return place_of(config_path, key, self._repository(loader))

    def unreadable(self) -> Iterator[tuple[str, yaml.MarkedYAMLError]]:
        """The files of the configs that are not valid YAML: the path for people, and the parser's error."""
        folders = [folder for place in (self.further, self.main) if place and (folder := folder_of(place))]
        for folder in folders:
            for file in sorted(folder.rglob("*.yaml")):
                try:
                    yaml.load(file.read_text(encoding="utf-8", errors="replace"), Loader)
                except yaml.MarkedYAMLError as error:
                    yield for_people(file, folder), error

    def abouts(self) -> dict[str, dict[str, str]]:
        """When to choose each option of each group: the first comment line of its file."""
        found = {}
        with self.opened() as loader:
            repository = self._repository(loader)
            for group, options in self.groups().items():
                files = {option: file_of(f"{group}/{option}", repository) for option in options}
                found[group] = {option: first_line(file) for option, file in files.items()}
        return found


def _groups(repository: CachingConfigRepository, parent: str) -> Iterator[tuple[str, list[str]]]:
    for name in repository.get_group_options(parent, ObjectType.GROUP):
        group = f"{parent}/{name}" if parent else name
        if not group.startswith(("hydra", "_")):
            yield group, repository.get_group_options(group, ObjectType.CONFIG)
            yield from _groups(repository, group)


BUILTIN = Source(str(config_dir()))
