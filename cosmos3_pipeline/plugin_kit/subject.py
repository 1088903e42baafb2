"""The strategy under test, in a form that can be sent to a rank. Imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from cosmos3_pipeline.vae.strategy import Strategy


class SubjectError(ValueError):
    """The command line names no strategy."""


@dataclass(frozen=True)
class Subject:
    """`package:Class` and its settings."""

    spec: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, spec: str | None, settings: Sequence[str]) -> Subject:
        """Parse the options of the command line. Raises SubjectError."""
        if spec is None or spec.count(":") != 1:
            raise SubjectError(
                f"--strategy={spec}; the kit tests one strategy, by the module and name of its class; "
                "give --strategy package:Class, for example cosmos3_plugins.replicated:Replicated"
            )
        values = {}
        for setting in settings:
            key, equals, text = setting.partition("=")
            if not equals:
                raise SubjectError(
                    f"--setting {setting}; a setting is a key and a value; give --setting {key}=VALUE"
                )
            values[key] = yaml.safe_load(text)
        return cls(spec, values)

    def load(self) -> type[Any]:
        """The object that `spec` names, without a check. Raises ImportError or AttributeError if it is missing."""
        module, _, name = self.spec.partition(":")
        loaded: type[Any] = getattr(importlib.import_module(module), name)
        return loaded

    def build(self) -> Strategy:
        """The strategy with its settings."""
        built = self.load()(**self.settings)
        assert isinstance(built, Strategy), f"{self.spec} is no cosmos3_pipeline.vae.strategy.Strategy"
        return built
