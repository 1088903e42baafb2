"""The arguments of the commands beside a run, such as `cosmos3 diff`. A mistake is answered as everywhere else."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from cosmos3_pipeline.errors import Problem, nearest


class Arguments(argparse.ArgumentParser):
    """The parser of `command`. The first line of `description` that begins with the command is its example.

    Wrong arguments end the process with exit code `usage`, after what is wrong, why, and what to type instead.
    """

    def __init__(self, command: str, description: str, *, usage: int) -> None:
        super().__init__(
            command,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        found = re.search(rf"^  ({re.escape(command)} \S.*?)(?:   .*)?$", description, re.MULTILINE)
        self._example, self._usage = found[1] if found else command, usage
        self._typed: list[str] = []

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The values of `arguments`."""
        self._typed = list(arguments)
        asked, unknown = self.parse_known_args(self._typed)
        if unknown:
            self._no_place_for(unknown)
        return asked

    def _no_place_for(self, unknown: Sequence[str]) -> NoReturn:
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        meant, dashed = list(self._typed), [word for word in unknown if word.startswith("-")]
        for word in dashed or unknown:
            name, equals, value = word.partition("=")
            near = nearest(name, flags) if dashed else None
            place = meant.index(word)
            meant[place : place + 1] = [f"{near}{equals}{value}"] if near else []
        why = f"its flags are {', '.join(flags)}" if dashed else "it takes no more words"
        what = ", ".join(dashed or unknown)
        self._refuse(f"{self.prog} has no {what}", why, meant)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        names = [str(name) for name in action.choices]
        near = nearest(str(value), names) or names[0]
        meant = [re.sub(rf"(^|=){re.escape(str(value))}$", rf"\g<1>{near}", word) for word in self._typed]
        called = next(iter(action.option_strings), str(action.dest).upper())
        self._refuse(f"{self.prog} with {called} {value}", f"it is one of {', '.join(names)}", meant)

    def error(self, message: str) -> NoReturn:
        """Refuse arguments that are missing, in argparse's words."""
        self._refuse(" ".join([self.prog, *self._typed]), message, None)

    def _refuse(self, what: str, why: str, meant: Iterable[str] | None) -> NoReturn:
        works = self._example if meant is None else shlex.join([*self.prog.split(), *meant])
        print(Problem(what, why, works), file=sys.stderr)
        sys.exit(self._usage)
