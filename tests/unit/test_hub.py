"""Checkpoints of the hub, on a stand-in for it: what is downloaded, when, and how each failure reads."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from fake_hub import COMMIT, OTHER, Answer, FakeHub, files_of, serving
from huggingface_hub import constants
from limits import HANGS
from toy_runs import toy_dimensions

from cosmos3_pipeline import compose
from cosmos3_pipeline.checkpoint import hub as hub_module
from cosmos3_pipeline.checkpoint.hub import (
    HubCheckpoint,
    cached_checkpoint,
    components_for,
    fetch_checkpoint,
    is_hub_id,
    local_folder,
)
from cosmos3_pipeline.checkpoint.inspect import inspect_checkpoint
from cosmos3_pipeline.config.shortcut import composition_of
from cosmos3_pipeline.distributed import device
from cosmos3_pipeline.errors import ConfigError, Problem, Refusal
from cosmos3_pipeline.jobs.start import prepare
from cosmos3_pipeline.models.loading import open_checkpoint
from cosmos3_pipeline.models.toy import toy_checkpoint
from cosmos3_pipeline.planning.plan import make_plan

REPO = "nvidia/Cosmos3-Nano"
SHARD = "transformer/diffusion_pytorch_model-00002-of-00004.safetensors"
READ = {
    "model_index.json",
    "assets/negative_prompt.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    *(f"transformer/diffusion_pytorch_model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)),
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


@pytest.fixture(scope="module")
def toy_files() -> dict[str, bytes]:
    return files_of(toy_checkpoint(**toy_dimensions()))


@pytest.fixture
def hub(toy_files: dict[str, bytes], at: Callable[..., None]) -> Iterator[FakeHub]:
    """A repository with the files of a checkpoint, but hardly anything in its weights."""
    small = {
        name: f"{name:250}".encode() * 20 if name.endswith("tensors") else content
        for name, content in toy_files.items()
    }
    with serving(FakeHub(REPO, small)) as hub:
        at(ENDPOINT=hub.url)
        yield hub


@pytest.fixture
def toy_hub(hub: FakeHub, toy_files: dict[str, bytes]) -> FakeHub:
    """A repository that holds the toy model."""
    hub.files = dict(toy_files)
    return hub


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Sets constants of huggingface_hub, which reads its environment at import; begins with an empty cache."""

    def change(**changes: Any) -> None:
        for key, value in changes.items():
            monkeypatch.setattr(constants, key, value)
        url = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        forget()

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    change(
        HF_HUB_CACHE=str(tmp_path / "hub"),
        HF_TOKEN_PATH=str(tmp_path / "token"),
        HF_HUB_OFFLINE=False,
        HF_HUB_ETAG_TIMEOUT=5,
    )
    return change


def forget() -> None:
    """Forget what a new process would not know."""
    hub_module._fetched.cache_clear()
    hub_module._say.cache_clear()
    huggingface_hub.close_session()


def refused(repo: str = REPO, revision: str | None = None) -> Problem:
    with pytest.raises(Refusal) as caught:
        fetch_checkpoint(repo, revision)
    return caught.value.problem


def test_what_is_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(REPO)
    assert not any(is_hub_id(p) for p in ("/models/nano", "./nvidia/nano", "nano", "a/b/c", "~/nano", "../nano"))
    (tmp_path / REPO).mkdir(parents=True)
    assert not is_hub_id(REPO)


def test_the_files_that_a_run_reads_are_fetched_and_opened(toy_hub: FakeHub) -> None:
    fetched = fetch_checkpoint(REPO, None)
    assert (fetched.repo, fetched.revision, fetched.commit) == (REPO, None, COMMIT)
    there = {p.relative_to(fetched.folder).as_posix() for p in fetched.folder.rglob("*") if p.is_file()}
    tokenizer = {name for name in toy_hub.files if name.startswith("text_tokenizer/")}
    assert tokenizer and there == READ | tokenizer == set(toy_hub.gets())
    forget()
    toy_hub.asked.clear()
    info = open_checkpoint(REPO, revision=fetched.commit, **toy_dimensions())
    assert info.folder == fetched.folder and info.transformer["num_attention_heads"] == 8
    assert toy_hub.asked == []  # as the ranks open it: the commit is whole here


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, COMMIT), ("fp8", OTHER), (OTHER, OTHER)], ids=["main", "branch", "commit"]
)
def test_without_network_the_cache_is_enough(
    revision: str | None, commit: str, hub: FakeHub, at: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    fetched = fetch_checkpoint(REPO, revision)
    assert fetched.commit == commit and fetched.folder.name == commit
    hub.asked.clear()
    at(HF_HUB_OFFLINE=True)
    assert fetch_checkpoint(REPO, revision) == fetched == cached_checkpoint(REPO, revision)
    assert local_folder(REPO, revision) == fetched.folder
    at(HF_HUB_OFFLINE=False, ENDPOINT=closed_port())
    capsys.readouterr()
    assert fetch_checkpoint(REPO, revision) == fetched == fetch_checkpoint(REPO, revision)
    said = capsys.readouterr().err
    assert said.count(f"using commit {commit} from the hub's cache") == (0 if revision == commit else 1)
    assert hub.asked == []


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "no-network"])
def test_a_cached_copy_that_is_not_whole_is_refused_without_network(
    offline: bool, hub: FakeHub, at: Callable[..., None]
) -> None:
    folder = fetch_checkpoint(REPO, None).folder
    (folder / SHARD).unlink()
    at(HF_HUB_OFFLINE=offline, ENDPOINT=closed_port())
    problem = refused()
    assert f"lacks {SHARD}" in problem.what
    assert ("HF_HUB_OFFLINE is set" if offline else "Connection refused") in problem.why
    assert local_folder(REPO, None) is None


def test_a_branch_that_moved_is_fetched_anew_but_not_what_stayed(hub: FakeHub) -> None:
    old = fetch_checkpoint(REPO, None)
    forget()
    hub.asked.clear()
    hub.branches["main"] = OTHER
    hub.files["vae/config.json"] += b"\n"
    new = fetch_checkpoint(REPO, None)
    assert (old.commit, new.commit) == (COMMIT, OTHER)
    assert set(hub.gets()) == {"vae/config.json"}
    forget()
    assert cached_checkpoint(REPO, None).commit == OTHER
    assert fetch_checkpoint(REPO, COMMIT) == replace(old, revision=COMMIT)


def test_a_connection_that_breaks_off_is_taken_up_where_it_was(
    hub: FakeHub, at: Callable[..., None], monkeypatch: Any
) -> None:
    at(DOWNLOAD_CHUNK_SIZE=250)  # what was written of a file is taken up in whole chunks, of 10 MB by default
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.drop_at = {SHARD: 1000}
    fetched = fetch_checkpoint(REPO, None)
    ranges = [asked for method, path, asked in hub.asked if method == "GET" and path.endswith(SHARD)]
    assert ranges == [None, "bytes=1000-"]
    assert (fetched.folder / SHARD).read_bytes() == hub.files[SHARD]


def test_after_a_download_that_broke_off_whole_files_are_not_fetched_again(hub: FakeHub, monkeypatch: Any) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.drop_at, hub.drops = {SHARD: 0}, 100
    problem = refused()
    assert "breaks off" in problem.what and "files that are whole are kept" in problem.works
    kept = {name for name in hub.gets() if name != SHARD}
    assert kept
    forget()
    hub.asked.clear()
    hub.drop_at = {}
    fetch_checkpoint(REPO, None)
    assert set(hub.gets()) == set(expected(hub)) - kept and set(hub.gets().values()) == {1}


def expected(hub: FakeHub) -> set[str]:
    return READ | {name for name in hub.files if name.startswith("text_tokenizer/")}


@pytest.mark.long
def test_processes_that_start_together_download_once(hub: FakeHub) -> None:
    program = f"""
from cosmos3_pipeline.checkpoint.hub import fetch_checkpoint
print(fetch_checkpoint({REPO!r}, None).commit)
"""
    home = Path(constants.HF_HUB_CACHE).parent
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**env, "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    ended = [rank.communicate(timeout=HANGS) for rank in ranks]
    assert [out.strip() for out, _ in ended] == [COMMIT] * 3, ended
    assert set(hub.gets().values()) == {1}


ANSWERS = {
    "gated": (Answer(403, "GatedRepo"), None, "is gated", "without a token", "accept the licence on http.*login"),
    "gated, with a token": (
        Answer(403, "GatedRepo"),
        "hf_x",
        "is gated",
        "account of your token",
        "/nvidia/Cosmos3-Nano$",
    ),
    "no token": (Answer(401), None, "needs a token", "401", "hf auth login.*HF_TOKEN"),
    "a token that is not taken": (Answer(401), "hf_x", "does not take your token", "401", "valid token"),
    "a token that may not": (Answer(403), "hf_x", "your token may not read", "403", "permission"),
    "too many requests": (
        Answer(429, headers={"Retry-After": "7"}),
        None,
        "no more requests",
        "without a token it allows fewer",
        "in 7 seconds.*hf auth login",
    ),
    "a fault of the hub": (Answer(503), None, "fault of its own", "503", "later"),
    "another answer": (Answer(418), None, "does not give", "418", "model.path=FOLDER"),
    "disabled": (
        Answer(403, headers={"X-Error-Message": "Access to this resource is disabled."}),
        None,
        "is disabled",
        "disabled",
        "model.path=FOLDER",
    ),
}


@pytest.mark.parametrize(("answer", "token", "what", "why", "works"), ANSWERS.values(), ids=ANSWERS)
def test_each_no_of_the_hub_has_words_of_its_own(
    answer: Answer, token: str | None, what: str, why: str, works: str, hub: FakeHub, monkeypatch: Any
) -> None:
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.api = answer
    check_parts(refused(), what, why, works)
    assert hub.tokens == {None if token is None else f"Bearer {token}"}
    assert hub.gets() == {}


def check_parts(problem: Problem, what: str, why: str, works: str) -> None:
    for pattern, part in ((what, problem.what), (why, problem.why), (works, problem.works)):
        assert re.search(pattern, part), f"{pattern!r} is not in {part!r}"


def test_gated_files_of_a_repository_that_can_be_listed(hub: FakeHub) -> None:
    hub.file_answer = Answer(401, "GatedRepo")
    check_parts(refused(), "is gated", "without a token", f"{hub.url}/{REPO}, then `hf auth login`")


@pytest.mark.parametrize(
    ("repo", "works"),
    [
        ("nvidia/Cosmos3-Nona", "did you mean nvidia/Cosmos3-Nano?"),
        ("nvidia/cosmos3-super", "did you mean nvidia/Cosmos3-Super?"),
        ("acme/video", "model.path=nvidia/Cosmos3-Nano"),
    ],
)
def test_a_repository_that_does_not_exist(repo: str, works: str, hub: FakeHub) -> None:
    check_parts(refused(repo), f"no repository {repo}", "does not exist.*no token.*no folder", re.escape(works))


def test_a_revision_that_does_not_exist(hub: FakeHub) -> None:
    check_parts(refused(revision="fp9"), "model.revision=fp9", "main, fp8", "did you mean fp8?")
    forget()
    hub.branches = {}
    check_parts(refused(revision="v1"), "model.revision=v1", "does not know it", "model.revision=null")


@pytest.mark.parametrize("repo", ["nvidia/Cosmos3--Nano", "nvidia/Cosmos3.git", "nvidia/" + "x" * 100], ids=str)
def test_an_id_that_the_hub_cannot_have(repo: str, hub: FakeHub) -> None:
    assert is_hub_id(repo)
    problem = refused(repo)
    assert problem.what == f"model.path={repo} is neither a folder here nor an id of the hub"
    assert hub.asked == []


def test_a_repository_of_something_else(hub: FakeHub) -> None:
    del hub.files["model_index.json"]
    check_parts(refused(), "not a diffusers checkpoint", "no model_index.json", "nvidia/Cosmos3-Nano")
    assert hub.gets() == {}


def closed_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


@pytest.fixture
def silent_port() -> Iterator[str]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        yield f"http://127.0.0.1:{one.getsockname()[1]}"


def test_no_network(at: Callable[..., None]) -> None:
    at(ENDPOINT=closed_port())
    check_parts(
        refused(), "connection to http.* fails", "Connection refused", "access to the internet.*model.path="
    )


def test_an_unknown_name(at: Callable[..., None]) -> None:
    at(ENDPOINT="http://hub.invalid")
    check_parts(refused(), "http://hub.invalid cannot be reached", "name is not known", "access to the internet")


def test_no_answer(at: Callable[..., None], silent_port: str) -> None:
    at(ENDPOINT=silent_port, HF_HUB_ETAG_TIMEOUT=0.2)
    check_parts(refused(), "cannot be reached", "no answer within 0.2 s", "HF_HUB_ETAG_TIMEOUT=SECONDS")


def test_a_proxy_that_refuses(hub: FakeHub, at: Callable[..., None], monkeypatch: Any) -> None:
    monkeypatch.setenv("HTTPS_PROXY", hub.url)
    at(ENDPOINT="https://hub.invalid")
    check_parts(refused(), "proxy does not let", "407", "HTTPS_PROXY")


def test_a_connection_that_is_not_secure(hub: FakeHub, at: Callable[..., None]) -> None:
    at(ENDPOINT=hub.url.replace("http:", "https:"))
    check_parts(refused(), "not secure", "SSL", "SSL_CERT_FILE=FILE")


def test_offline_with_nothing_in_the_cache(hub: FakeHub, at: Callable[..., None]) -> None:
    at(HF_HUB_OFFLINE=True)
    check_parts(refused(), "not in the hub's cache", "HF_HUB_OFFLINE is set", "HF_HOME=FOLDER")
    assert hub.asked == []


def test_a_disk_without_room(hub: FakeHub, monkeypatch: Any) -> None:
    hub.claimed_sizes = {SHARD: 29_300_000_000}
    usage = type("usage", (), {"free": 20_000_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    cache = Path(constants.HF_HUB_CACHE)
    check_parts(
        refused(), f"needs 29.3 GB more, and 20 GB are free in {cache}", "cache", "^HF_HOME=FOLDER.*29.3 GB"
    )
    assert hub.gets() == {}
    partial = cache / f"models--{REPO.replace('/', '--')}" / "blobs" / "x.1234.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(5_000_000))
    forget()
    check_parts(refused(), "needs", "cache", r"^deleting .*\*.incomplete \(0.005 GB .*HF_HOME=")


def test_only_what_is_not_here_needs_room(hub: FakeHub, monkeypatch: Any) -> None:
    folder = fetch_checkpoint(REPO, None).folder
    (folder / "vae" / "config.json").unlink()
    (folder / SHARD).resolve().unlink()
    forget()
    usage = type("usage", (), {"free": len(hub.files[SHARD])})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    fetch_checkpoint(REPO, None)


DISKS = {
    "full": (OSError(errno.ENOSPC, "No space left on device"), "filled up", "No space left", "once there is room"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), "filled up", "quota", "HF_HOME=FOLDER"),
    "full, says hf_xet": (
        RuntimeError("I/O error: No space left on device (os error 28)"),
        "filled up",
        "os error",
        "",
    ),
    "read-only": (
        OSError(errno.EROFS, "Read-only file system"),
        "cannot be read and written",
        "Read-only",
        "HF_HOME=",
    ),
    "not ours": (PermissionError(errno.EACCES, "Permission denied"), "cannot be read", "denied", "HF_HOME="),
    "not whole": (
        OSError("Consistency check failed: file should be of size 9"),
        "could not be",
        "Consistency",
        "again",
    ),
    "hf_xet": (
        RuntimeError("CAS client error"),
        "could not be downloaded",
        "CAS client error",
        "model.path=FOLDER",
    ),
}


@pytest.mark.parametrize(("error", "what", "why", "works"), DISKS.values(), ids=DISKS)
def test_what_stops_a_download_in_its_middle(
    error: Exception, what: str, why: str, works: str, hub: FakeHub, monkeypatch: Any
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.file_download.http_get", broken)
    check_parts(refused(), what, why, works)


def test_a_cache_that_is_no_folder(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("a file")
    check_parts(refused(), "cannot be read and written", "hub", "HF_HOME=FOLDER that you may write")


def test_a_run_fetches_last_and_pins_the_commit(toy_hub: FakeHub) -> None:
    with pytest.raises(ConfigError, match=r"task\.image is not set"):
        prepare(composition_of(["model=toy_random", f"model.path={REPO}", "task=i2v"]))
    assert toy_hub.asked == []
    model = prepare(composition_of(["model=toy_random", f"model.path={REPO}", "model.revision=fp8"])).config.model
    assert (model.path, model.revision, model.commit) == (REPO, "fp8", OTHER)


def test_a_refusal_of_the_hub_is_a_problem_of_the_start(hub: FakeHub) -> None:
    hub.api = Answer(403, "GatedRepo")
    with pytest.raises(ConfigError, match="is gated"):
        prepare(composition_of(["model=toy_random", f"model.path={REPO}"]))


def test_dimensions_of_what_was_fetched_are_checked_before_the_ranks_start(
    toy_hub: FakeHub, monkeypatch: Any
) -> None:
    monkeypatch.setattr(device, "gpu", lambda index: index)  # as if this machine had one
    overrides = ["model=nano", "topology=h100_x1", f"model.path={REPO}"]
    assert compose(overrides).model.transformer.hidden_size == 4096
    prepared = prepare(composition_of(overrides))
    assert prepared.config.model.transformer.hidden_size == 64
    assert not any("cache" in note for note in prepared.plan.notes)


def test_a_plan_never_downloads_but_looks_into_the_cache(toy_hub: FakeHub) -> None:
    overrides = ["job=plan", "model=nano", f"model.path={REPO}"]
    plan = make_plan(compose(overrides))
    assert plan.notes[0] == f"{REPO} is not in the hub's cache: planned with the numbers of model=nano"
    assert toy_hub.asked == []
    fetch_checkpoint(REPO, None)
    toy_hub.asked.clear()
    cfg = compose(overrides)
    assert cfg.model.transformer.hidden_size == 64
    assert not any("cache" in note for note in make_plan(cfg).notes)
    assert toy_hub.asked == []


def test_a_checkpoint_that_is_no_part_of_the_package_is_refused() -> None:
    with pytest.raises(Refusal, match=r"model\.path=builtin:nope\n.*\n.*model\.path=builtin:toy"):
        local_folder("builtin:nope", None)


@pytest.mark.parametrize("path", [["model.path=conf"], []], ids=["folder", "no path"])
def test_a_revision_of_no_repository_is_refused(path: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([*path, "model.revision=fp8"])
    problem = caught.value.problems[0]
    assert (
        "model.revision=fp8" in problem.what and "ignored" in problem.why and "no model.revision" in problem.works
    )


def test_a_caller_may_ask_for_other_components(hub: FakeHub) -> None:
    fetched = fetch_checkpoint(REPO, None, components=("sound_tokenizer",))
    assert isinstance(fetched, HubCheckpoint)
    of_sound = {f"sound_tokenizer/{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors")}
    assert set(hub.gets()) == {"model_index.json", "assets/negative_prompt.json", *of_sound}


def test_sound_is_fetched_only_when_it_is_asked_for_and_then_alone(toy_hub: FakeHub) -> None:
    def fetched(sound: bool) -> set[str]:
        forget()
        toy_hub.asked.clear()
        fetch_checkpoint(REPO, None, components=components_for(sound=sound))
        return set(toy_hub.gets())

    assert not any(name.startswith("sound_tokenizer") for name in fetched(sound=False))
    assert local_folder(REPO, None) is not None
    assert local_folder(REPO, None, components=components_for(sound=True)) is None
    later = fetched(sound=True)
    assert later and all(name.startswith("sound_tokenizer/") for name in later)
    folder = local_folder(REPO, None, components=components_for(sound=True))
    assert folder is not None and inspect_checkpoint(folder, sound=True).sound_tokenizer is not None
