"""Machines that lack something: what a run works without, and what it refuses in three parts."""

from __future__ import annotations

import errno
import os
import resource
import select
from pathlib import Path

import pytest

from cosmos3_pipeline import stopping
from cosmos3_pipeline.config.shortcut import composition_of
from cosmos3_pipeline.distributed import host, machine, world
from cosmos3_pipeline.errors import ConfigError, Fault
from cosmos3_pipeline.jobs.start import prepare
from cosmos3_pipeline.stages.files import write_whole

WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"RANK": None}, None),
        ({"RANK": "1"}, None),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is empty or not set"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is empty or not set"),
        ({"MASTER_ADDR": None, "MASTER_PORT": " "}, "MASTER_ADDR and MASTER_PORT are empty or not set"),
        ({"RANK": "5"}, "RANK must be less than WORLD_SIZE"),
        ({"RANK": "-1"}, "RANK must be a whole number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT must be 1 to 65535"),
        ({"MASTER_ADDR": "no host"}, "no host has no address"),
    ],
    ids=str,
)
def test_the_environment_is_a_whole_world_or_none(changes: dict[str, str | None], said: str | None) -> None:
    environ = {name: value for name, value in (WHOLE | changes).items() if value is not None}
    found = [*world.world_problems(environ)]
    assert [said in problem.why for problem in found] == ([True] if said else [])
    assert all("env -u RANK" in problem.works for problem in found)


@pytest.mark.parametrize(
    ("error", "what", "works"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/out/a.mp4"),
            "/out/a.mp4 has no space",
            "hydra.run.dir=",
        ),
        (OSError(errno.EROFS, "Read-only file system", "/out"), "/out cannot be used", "hydra.run.dir=FOLDER"),
        (OSError(errno.EMFILE, "Too many open files"), "no more files", "ulimit -n"),
        (OSError(errno.EAGAIN, "Resource temporarily unavailable"), "no more processes", "ulimit -u"),
        (OSError(errno.EFBIG, "File too large", "/out/a"), "/out/a may not grow", "ulimit -f"),
        (OSError(errno.EFBIG, "File too large"), "a file may not grow", "ulimit -f"),
        (RuntimeError("bind. code: -24, name: EMFILE, message: too many"), "no more files", "ulimit -n"),
        (RuntimeError("can't start new thread"), "no more processes or threads", "threads_per_rank=1"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 12"), "gives no more memory", "fewer ranks"),
        (MemoryError(), "gives no more memory", "fewer ranks"),
        (
            ValueError("I/O error: No space left on device (os error 28)"),
            "/out has no space left",
            "hydra.run.dir=",
        ),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_a_machine_refuses_is_a_fault_in_three_parts(error: Exception, what: str, works: str) -> None:
    with pytest.raises(Fault) as fault, machine.told_as_fault("/out"):
        raise error
    problem = fault.value.problem
    assert what in problem.what and problem.why and works in problem.works


@pytest.mark.parametrize("file", [None, "/out/a.mp4"])
def test_a_full_standard_output_is_told_from_a_full_disk(
    file: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError(errno.ENOSPC, "No space left on device", file)
    monkeypatch.setattr(stopping._Stdout, "error", None if file else error)
    problem = machine.machine_problem(error, "/out")
    assert problem is not None
    assert problem.what == (f"{file} has no space left" if file else "standard output cannot be written")


def test_what_is_our_own_stays_a_traceback() -> None:
    with pytest.raises(KeyError), machine.told_as_fault("/out"):
        raise KeyError("task")


def test_a_place_is_known_by_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/cache/hf")
    cached = machine.machine_problem(OSError(errno.ENOSPC, "full", "/cache/hf/hub/x"))
    assert cached is not None and "HF_HOME=FOLDER" in cached.works


def test_an_output_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not [*machine.output_problems(tmp_path / "new" / "run", "hydra.run.dir")]
    (tmp_path / "file").touch()
    for folder in (Path("/dev/null"), tmp_path / "file" / "run"):
        (problem,) = machine.output_problems(folder, "hydra.run.dir")
        assert "is no folder" in problem.why
    monkeypatch.setattr(machine, "LEAST_FREE_BYTES", 1 << 60)
    (problem,) = machine.output_problems(tmp_path, "hydra.run.dir")
    assert "bytes left" in problem.why


def test_a_file_that_does_not_fit_is_named_and_not_left(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError) as error:
            write_whole(tmp_path / "plan.json", "x" * 10000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.filename == str(tmp_path / "plan.json") and not [*tmp_path.iterdir()]


def test_numbers_of_the_host_are_a_luxury(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_STATUS", "_RESET", "_MEMINFO"):
        monkeypatch.setattr(host, name, tmp_path / "none" / name)
    monkeypatch.setattr(host, "_GROUPS", ((tmp_path / "max", tmp_path / "current"),))
    (tmp_path / "max").write_text("max\n")
    host.reset_peak()
    assert host.resident_bytes() == host.peak_bytes() > 0
    memory = host.available_bytes()
    (tmp_path / "max").write_text("1000\n")
    (tmp_path / "current").write_text("400\n")
    assert host.available_bytes() == 600 < memory


def test_ranks_that_may_not_poll_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden() -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    asked = ["model=toy_random", "task=t2i", "task.height=32", "task.width=32"]
    two = [*asked, "topology=cpu_x2"]
    prepare(composition_of(two))
    monkeypatch.setattr(select, "poll", forbidden)
    prepare(composition_of(asked))
    prepare(composition_of([*two, "job=plan"]))
    with pytest.raises(ConfigError, match="2 ranks on a machine that forbids the system call poll"):
        prepare(composition_of(two))


def test_the_fork_server_needs_a_short_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.tempfile, "tempdir", "/tmp")
    assert machine.can_fork_ranks()
    monkeypatch.setattr(machine.tempfile, "tempdir", "/tmp/" + "d" * 80)
    assert not machine.can_fork_ranks()


def test_more_threads_than_a_machine_can_use_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    asked = ["model=toy_random", "task=t2i", "task.height=32", "task.width=32"]
    prepare(composition_of([*asked, "topology.threads_per_rank=64"]))
    with pytest.raises(ConfigError, match=r"topology\.threads_per_rank=65"):
        prepare(composition_of([*asked, "topology.threads_per_rank=65"]))


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        (["task=transfer", "task.controls.edge=no.mp4"], "task.controls.edge=no.mp4 is not a file"),
        (["task=i2v", "task.image=no.jpg"], "task.image=no.jpg is not a file"),
        (["task=transfer", "task.controls.edge="], "task.controls.edge= sets an empty text"),
        (["task.prompt_file=no.txt"], "task.prompt_file=no.txt is not a file"),
        (["task=i2v", f"task.image={'x' * 300}"], "cannot be looked for"),
        (["task=i2v", 'task.image="~nobody-here/x"'], "cannot be looked for"),
        (['model.path="~nobody-here/x"'], "cannot be looked for"),
    ],
    ids=str,
)
def test_a_plan_looks_for_the_files_that_it_names(asked: list[str], what: str) -> None:
    with pytest.raises(ConfigError) as refused:
        prepare(composition_of(["job=plan", "model=toy_random", *asked]))
    assert what in refused.value.problems[0].what


def test_paths_are_made_whole_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("photo.jpg", "words.txt"):
        Path(name).touch()
    asked = ["job=plan", "model=toy_random", "task=i2v", "task.image=photo.jpg", "task.prompt=@words.txt"]
    config = prepare(composition_of(asked)).config
    os.chdir("/")
    assert config.task.image == str(tmp_path / "photo.jpg")
    assert config.task.prompt == f"@{tmp_path / 'words.txt'}"
    assert config.model.path is None and config.task.last_image is None
