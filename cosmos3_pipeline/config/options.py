"""Every option of every config group, as Hydra finds them. Imports no torch.

Nothing is taken from the rest of the library, so a review can list the options of another revision with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType


def options(conf: str, config_name: str = "config") -> Iterator[str]:
    """`group=option` for every option of every group of the folder `conf`, experiments first.

    And of the folders that the primary config `config_name` adds to the search path.
    """
    with hydra.initialize_config_dir(conf, version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        assert isinstance(loader, ConfigLoaderImpl)
        # One repository for all groups: asking the loader makes one for each.
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
