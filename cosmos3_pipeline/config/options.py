"""Every option of every config group, as Hydra finds them. Imports no torch.

This module imports nothing from the rest of the library, so a review can use it on another revision.
"""

from __future__ import annotations

from collections.abc import Iterator

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType


def options(conf: str, config_name: str = "config") -> Iterator[str]:
    """`group=option` for every option of every group in the folder `conf`, experiments first.

    Folders that the primary config `config_name` adds to the search path are included.
    """
    with hydra.initialize_config_dir(conf, version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        assert isinstance(loader, ConfigLoaderImpl)
        # One repository serves all groups. The loader's own methods would make a repository for each group.
        _, repository = loader._parse_overrides_and_create_caching_repo(config_name, [])

        def groups(parent: str) -> Iterator[str]:
            for name in repository.get_group_options(parent, ObjectType.GROUP):
                group = f"{parent}/{name}" if parent else name
                if not group.startswith(("hydra", "_")):
                    yield group
                    yield from groups(group)

        for group in sorted(groups(""), key=lambda g: (g != "experiment", g)):
            for option in repository.get_group_options(group, ObjectType.CONFIG):
                if not option.startswith("_"):
                    yield f"{group}={option}"
