"""One thread in the tests' own process, as in the ranks that they start. Imports no torch: many tests need none.

References are made in this process, and a kernel that several threads share may sum in another order.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
# Threads of a run that waits for its turn on a busy processor would spin away the others' time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Plans that reviews keep: the tests share them, and leave the user's alone.
os.environ["XDG_CACHE_HOME"] = str(Path(tempfile.gettempdir()) / f"cosmos3_tests_{os.getuid()}")

# The same examples every time, however slow the machine; `--hypothesis-profile search` looks for others.
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("tests", deadline=None, derandomize=True, suppress_health_check=SLOW)
settings.register_profile("search", deadline=None, max_examples=1000, suppress_health_check=SLOW)
settings.load_profile("tests")


# A program that is started in the background or by `nohup` ignores these, and all processes that it starts inherit
# that. Tests send them to such processes.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--first-case", action="store_true", help="of every test only the first of its cases")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    for cases in _by_test(items):
        for sampled in cases[0].iter_markers("sampled"):
            usual = [case for case in cases if not case.get_closest_marker("thorough")]
            kept = {place * len(usual) // sampled.args[0] for place in range(sampled.args[0])}
            for place, case in enumerate(usual):
                if place not in kept:
                    case.add_marker(pytest.mark.thorough)
    yield  # here -m takes what it asks for
    if config.getoption("--first-case"):
        items[:] = [cases[0] for cases in _by_test(items)]


def _by_test(items: list[pytest.Item]) -> list[list[pytest.Item]]:
    found: dict[str, list[pytest.Item]] = {}
    for item in items:
        found.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return list(found.values())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Fails the test that leaves this process with more threads, not one that compares bits in it later."""
    yield
    if "torch" in sys.modules:
        threads = sys.modules["torch"].get_num_threads()
        assert threads == 1, f"this test left {threads} threads behind"
