"""Fixtures of the kit's tests: the strategy under test, and the observations of its ranks."""

from __future__ import annotations

import pytest

from cosmos3_pipeline.plugin_kit.cases import CASES, Case, honours
from cosmos3_pipeline.plugin_kit.observe import Observed, Seen, observe
from cosmos3_pipeline.plugin_kit.ranks import run_on_ranks
from cosmos3_pipeline.plugin_kit.subject import Subject, SubjectError
from cosmos3_pipeline.vae.strategy import Strategy


@pytest.fixture(scope="session")
def subject(request: pytest.FixtureRequest) -> Subject:
    """The strategy that the command line names."""
    try:
        return Subject.parse(request.config.getoption("--strategy"), request.config.getoption("--setting"))
    except SubjectError as error:
        raise pytest.UsageError(str(error)) from error


@pytest.fixture(scope="session")
def strategy(subject: Subject) -> Strategy:
    return subject.build()


@pytest.fixture(scope="session")
def observed(subject: Subject, strategy: Strategy) -> Observed:
    """Runs a case once per number of ranks, for all tests that use its observations."""
    results: dict[tuple[str, int], list[Seen] | AssertionError | None] = {}

    def see(case: Case, ranks: int) -> list[Seen] | None:
        key = (case.name, ranks)
        if key not in results:
            if not honours(strategy, case, ranks):
                results[key] = None
            else:
                # If a case hangs, every test of the case fails, but only the first test waits for the time limit.
                try:
                    results[key] = run_on_ranks(observe, ranks, subject, case)
                except AssertionError as error:
                    results[key] = error
        found = results[key]
        if isinstance(found, AssertionError):
            raise found
        return found

    return see


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise `ranks` with 1 to --max-ranks, `several` with 2 to --max-ranks, `case` with every case."""
    most = metafunc.config.getoption("--max-ranks")
    if "ranks" in metafunc.fixturenames:
        metafunc.parametrize("ranks", range(1, most + 1))
    if "several" in metafunc.fixturenames:
        metafunc.parametrize("several", range(2, most + 1))
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=lambda case: case.name)
