"""Tests of a strategy before any weight is read: its declaration, its plans, its refusals. Starts no rank."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from importlib.metadata import entry_points
from itertools import product

import pytest
from omegaconf import OmegaConf

from cosmos3_pipeline.config.plugins import settings_schema
from cosmos3_pipeline.errors import Problem
from cosmos3_pipeline.plugin_kit.cases import CASES, DIRECTIONS, Case
from cosmos3_pipeline.plugin_kit.subject import Subject
from cosmos3_pipeline.vae.clock import flops_until_end
from cosmos3_pipeline.vae.planning import assigned, plan_of
from cosmos3_pipeline.vae.plugins import ENTRY_POINT_GROUP
from cosmos3_pipeline.vae.program import Direction
from cosmos3_pipeline.vae.strategy import Exactness, OwnRunner, Strategy, StrategyError, StrategyPlan

MANY_RANKS = (16, 1000)


def plans(strategy: Strategy, case: Case, ranks: int) -> list[tuple[Direction, StrategyPlan]]:
    """The plans of `case` that the strategy does not refuse. A refusal must be a StrategyError."""
    found: list[tuple[Direction, StrategyPlan]] = []
    for direction in DIRECTIONS:
        if direction not in strategy.directions:
            continue
        try:
            found.append((direction, strategy.plan(case.program(direction), case.shape, ranks)))
        except StrategyError as error:
            assert_three_parts(error.problem)
    return found


def assert_three_parts(problem: Problem) -> None:
    """Fail if a refusal lacks one of its parts: what is wrong, why it cannot work, what would work."""
    assert problem.what and problem.why and problem.works, (
        f"a refusal says what, why and what would work: {problem}"
    )


def test_it_is_a_dataclass_of_settings_that_yaml_can_hold(subject: Subject) -> None:
    cls = subject.load()
    assert issubclass(cls, Strategy)
    assert dataclasses.is_dataclass(cls)
    node = OmegaConf.to_container(OmegaConf.structured(settings_schema(cls)))
    assert isinstance(node, dict)
    assert cls(**{str(key): value for key, value in node.items() if key != "_target_"}) == cls()


def test_it_declares_name_exactness_and_directions(strategy: Strategy) -> None:
    assert isinstance(strategy.name, str) and strategy.name.isidentifier()
    assert isinstance(strategy.exactness, Exactness)
    assert strategy.directions and strategy.directions <= {"decode", "encode"}


def test_its_entry_point_has_its_name(subject: Subject, strategy: Strategy) -> None:
    names = [point.name for point in entry_points(group=ENTRY_POINT_GROUP) if point.value == subject.spec]
    if not names:
        pytest.skip(f"no installed distribution declares {subject.spec} in the group {ENTRY_POINT_GROUP}")
    assert names == [strategy.name]


def test_planning_imports_no_torch(subject: Subject) -> None:
    code = (
        "import sys\n"
        "from cosmos3_pipeline.plugin_kit.cases import CLIP\n"
        "from cosmos3_pipeline.plugin_kit.subject import Subject\n"
        "from cosmos3_pipeline.plugin_kit.test_plan import plans\n"
        f"strategy = Subject({subject.spec!r}, {dict(subject.settings)!r}).build()\n"
        "plans(strategy, CLIP, 2)\n"
        "print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])\n"
    )
    # The new process must find the strategy where this process finds it.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", f"planning imports {done.stdout}{done.stderr}"


def test_one_rank_alone_sends_nothing(case: Case, strategy: Strategy) -> None:
    for _, plan in plans(strategy, case, 1):
        assert (plan.shares[0].sent_bytes, plan.shares[0].sent_messages) == (0, 0)


def test_several_ranks_are_of_use(strategy: Strategy, request: pytest.FixtureRequest) -> None:
    counts = range(2, request.config.getoption("--max-ranks") + 1)
    useful = {d for case in CASES for ranks in counts for d, _ in plans(strategy, case, ranks)}
    assert useful == strategy.directions, f"on several ranks it does only {sorted(useful)} of the kit's clips"


def test_plans_are_whole(case: Case, ranks: int, strategy: Strategy) -> None:
    for direction, plan in plans(strategy, case, ranks):
        program = case.program(direction)
        assert (plan.strategy, plan.direction) == (strategy.name, direction)
        assert plan.exactness.satisfies(strategy.exactness)
        assert plan.note
        assert [share.rank for share in plan.shares] == list(range(ranks))
        owned: set[tuple[int, int, int]] = set()
        for share in plan.shares:
            for (start, stop), size in zip(
                (share.ops, share.rows, share.cols), (len(program), case.rows, case.cols), strict=True
            ):
                assert 0 <= start < stop <= size, f"rank {share.rank} owns [{start}, {stop}) of {size}"
            assert share.activation_bytes > 0
            numbers = (share.flops, share.weight_bytes, share.activation_bytes)
            assert all(type(n) is int for n in (*numbers, share.sent_bytes, share.sent_messages))
            owned.update(product(range(*share.ops), range(*share.rows), range(*share.cols)))
        assert len(owned) == len(program) * case.rows * case.cols, "some op runs on some rows on no rank"
        assert sum(share.flops for share in plan.shares) >= program.flops(case.shape)
        weights = sum(share.weight_bytes for share in plan.shares)
        assert weights >= program.weight_elements() * case.shape.element_bytes


def test_plans_are_those_of_its_assignments(case: Case, ranks: int, strategy: Strategy) -> None:
    if isinstance(strategy, OwnRunner):
        pytest.skip("an OwnRunner declares its plan")
    for direction, plan in plans(strategy, case, ranks):
        program = case.program(direction)
        computed = plan_of(strategy, program, case.shape, assigned(strategy, program, case.shape, ranks), ranks)
        assert plan == computed, "its `plan` is not what its blocks take; only an OwnRunner declares a plan"
        assert plan.clip is not None and flops_until_end(plan.clip) == plan.until_end, "its clip is another"


def test_plans_depend_on_their_arguments_alone(case: Case, several: int, strategy: Strategy) -> None:
    assert plans(strategy, case, several) == plans(strategy, case, several)


@pytest.mark.parametrize("many", MANY_RANKS)
def test_more_ranks_than_it_can_use_are_refused(many: int, strategy: Strategy) -> None:
    for case in CASES:
        for direction, plan in plans(strategy, case, many):
            assert len(plan.shares) == many
            program = case.program(direction)
            # A rank that runs only norms has no FLOPs, but is not idle.
            idle = [s.rank for s in plan.shares if not s.flops and program.flops(case.shape, *s.ops)]
            assert not idle, f"ranks {idle[:8]} have nothing to do; such a plan is refused with StrategyError"
