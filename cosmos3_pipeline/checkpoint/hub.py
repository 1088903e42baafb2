"""A checkpoint on the Hugging Face hub: the files that a run reads, and their download.

`huggingface_hub` resolves, downloads and caches. This module decides which files are needed, whether the cache is
enough and whether the disk has room. It turns every failure into an error with what would work. Imports no torch.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import ssl
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos3_pipeline.checkpoint.files import INDEX, MODULAR_INDEX, NEGATIVE_PROMPT
from cosmos3_pipeline.checkpoint.sound import SOUND_TOKENIZER
from cosmos3_pipeline.errors import Refusal, did_you_mean

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoSibling

COSMOS3 = ("nvidia/Cosmos3-Nano", "nvidia/Cosmos3-Super", "nvidia/Cosmos3-Edge")
# The files that a run reads: these files of the root, and the files with these endings in each component's folder.
# Not read: components of other modalities, pictures, weights in other formats, and the index over all weights.
FILES = (INDEX, MODULAR_INDEX, NEGATIVE_PROMPT)
COMPONENTS = ("transformer", "vae", "scheduler", "text_tokenizer")
COMPONENTS_WITH_SOUND = (*COMPONENTS, SOUND_TOKENIZER)  # 1.9 GB more
SUFFIXES = (".safetensors", ".json", ".txt", ".jinja", ".model")

# Files that are downloaded in parallel. After a failed download huggingface_hub keeps complete files and drops
# partial files. With its default of eight files, all shards of a checkpoint could be partial.
FILES_AT_ONCE = 2

BUILTIN = "builtin:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_COPY = "model.path=FOLDER with a downloaded copy"
_AGAIN = "the same command again: files that are whole are kept"


@dataclass(frozen=True)
class HubCheckpoint:
    """A hub repository at one commit (40 hex digits), on this machine. `revision` is what was asked for."""

    repo: str
    revision: str | None
    commit: str
    folder: Path


def is_hub_id(path: str) -> bool:
    """Whether `path` has the form `owner/name` of a hub repository, and is no local path."""
    return _HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def _builtin(path: str) -> Path:
    brought = Path(__file__).parent / "builtin"
    names = sorted(one.name for one in brought.iterdir() if one.is_dir())
    if path.removeprefix(BUILTIN) not in names:
        raise Refusal(
            what=f"model.path={path}",
            why=f"{BUILTIN} names the checkpoints of this package, and it has no such checkpoint",
            works=" or ".join(f"model.path={BUILTIN}{name}" for name in names),
        )
    return brought / path.removeprefix(BUILTIN)


def components_for(*, sound: bool) -> tuple[str, ...]:
    """The components that a run reads; the sound tokenizer only if sound is asked for."""
    return COMPONENTS_WITH_SOUND if sound else COMPONENTS


def local_folder(path: str, revision: str | None, *, components: Sequence[str] = COMPONENTS) -> Path | None:
    """The folder of the checkpoint `path` on this machine, without a request to the hub.

    `path` is a folder, which need not exist, a hub id, or `builtin:toy` for the checkpoint in this package.
    Returns None for a hub id that is not completely in the hub's cache. Raises Refusal for an unknown `builtin:`
    name.
    """
    if path.startswith(BUILTIN):
        return _builtin(path)
    if not is_hub_id(path):
        return Path(path).expanduser()
    try:
        return cached_checkpoint(path, revision, components=components).folder
    except Refusal:
        return None


def cached_checkpoint(
    repo: str, revision: str | None, *, components: Sequence[str] = COMPONENTS, why: str = "the hub is not asked"
) -> HubCheckpoint:
    """The hub repository `repo` in the hub's cache, without a request to the hub.

    `why` is the reason why the hub is not asked, for the error.

    Raises:
        Refusal: the cache lacks the repository, or some files of `components`.
    """
    from huggingface_hub import constants

    held = _held(repo, revision, _patterns(components))
    if held is None:
        raise Refusal(
            what=f"{_named(repo, revision)} is not in the hub's cache",
            why=f"{why}, and {constants.HF_HUB_CACHE} has no copy of it",
            works=f"a run with access to {constants.ENDPOINT}, HF_HOME=FOLDER of a cache that has it, or {_COPY}",
        )
    missing = held.missing
    if missing is None:  # perhaps an earlier run did not need a component
        missing = tuple(name for name in components if not (held.checkpoint.folder / name).is_dir())
    if missing:
        raise Refusal(
            what=f"the copy of {_named(repo, revision)} in the hub's cache lacks {missing[0]}"
            + (f" and {len(missing) - 1} more of its files" if len(missing) > 1 else ""),
            why=f"its download ended early, and {why}",
            works=f"a run with access to {constants.ENDPOINT}, which downloads only these; or {_COPY}",
        )
    return held.checkpoint


def fetch_checkpoint(repo: str, revision: str | None, *, components: Sequence[str] = COMPONENTS) -> HubCheckpoint:
    """Download the hub repository `repo` at `revision` (branch, tag or commit; None: its main branch).

    Files in the hub's cache are not downloaded again, and a complete commit in the cache needs no request. Without
    a network, a complete copy in the cache is used. Several processes may call this at once: one downloads, the
    others wait. Within one process the answer is cached, so a run that asks twice gets the same commit.

    Raises:
        Refusal: the download failed. Complete files are kept, so the next call continues from there.
    """
    return _fetched(repo, revision, tuple(components))


@cache
def _fetched(repo: str, revision: str | None, components: tuple[str, ...]) -> HubCheckpoint:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined] # httpx's or httpx2's

    if constants.is_offline_mode():
        return cached_checkpoint(repo, revision, components=components, why="HF_HUB_OFFLINE is set")
    held = _held(repo, revision, _patterns(components))
    if held is not None and held.missing == () and held.checkpoint.commit == revision:
        return held.checkpoint
    try:
        timeout = float(constants.HF_HUB_ETAG_TIMEOUT)
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=timeout)
    except (HTTPError, OSError) as error:
        refusal = _explained(error, repo, revision)
        if held is None or not _unanswered(error):
            raise refusal from error
        problem = refusal.problem
        checkpoint = cached_checkpoint(repo, revision, components=components, why=f"{problem.what}: {problem.why}")
        _say(f"{problem.what}: {problem.why}; using commit {checkpoint.commit} from the hub's cache")
        return checkpoint
    assert info.sha is not None
    there = {file.rfilename: file for file in info.siblings or ()}
    files = {name: there[name] for name in _wanted(there, _patterns(components))}
    if INDEX not in files:
        raise Refusal(
            what=f"{_named(repo, revision)} is not a diffusers checkpoint",
            why=f"it has no {INDEX}",
            works=f"a Cosmos3 checkpoint in diffusers' layout, such as {COSMOS3[0]}",
        )
    if held is not None and held.has(info.sha, files):
        return held.checkpoint
    return _download(repo, revision, components, info.sha, files)


def _download(
    repo: str, revision: str | None, components: tuple[str, ...], commit: str, files: dict[str, RepoSibling]
) -> HubCheckpoint:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined] # httpx's or httpx2's
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined] # documented, but a lazy export

    patterns, storage = _patterns(components), _storage(repo)
    try:
        lock = Path(constants.HF_HUB_CACHE) / ".locks" / storage.name / "checkpoint.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            held = _held(repo, revision, patterns)
            if held is not None and held.has(commit, files):  # another process has downloaded the files meanwhile
                return held.checkpoint
            left = _bytes_left(storage, files)
            _refuse_full_disk(repo, revision, left, storage)
            _say(f"downloading {_named(repo, revision)}: {_gb(left)} to {storage}")
            folder = snapshot_download(repo, revision=revision, allow_patterns=patterns, max_workers=FILES_AT_ONCE)
    # hf_xet, which transfers large files, raises RuntimeError.
    except (HTTPError, OSError, RuntimeError) as error:
        raise _explained(error, repo, revision) from error
    return HubCheckpoint(repo, revision, Path(folder).name, Path(folder))


@dataclass(frozen=True)
class _Held:
    """A snapshot in the cache. `missing` are needed files; None if the cache has no list of the files."""

    checkpoint: HubCheckpoint
    missing: tuple[str, ...] | None

    def has(self, commit: str, files: Collection[str]) -> bool:
        folder = self.checkpoint.folder
        return self.checkpoint.commit == commit and all((folder / name).is_file() for name in files)


def _held(repo: str, revision: str | None, patterns: list[str]) -> _Held | None:
    """The snapshot of `repo` at `revision` in the cache and its missing files; None if there is no snapshot."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import (
        CachedRepoTreeNotFoundError,
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
    )

    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=True))
    except IncompleteSnapshotError as error:
        folder = Path(error.snapshot_path)
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise Refusal(
            what=f"model.path={repo} is neither a folder here nor an id of the hub",
            why=str(error),
            works=did_you_mean(repo, COSMOS3, otherwise=f"model.path={COSMOS3[0]}"),
        ) from error
    except OSError as error:
        raise _of_disk(error, repo, revision) or _of_anything(error, repo, revision) from error
    checkpoint = HubCheckpoint(repo, revision, folder.name, folder)
    try:
        names = [file.path for file in get_cached_repo_tree(repo, revision=folder.name)]
    except CachedRepoTreeNotFoundError:
        return _Held(checkpoint, None)
    return _Held(checkpoint, tuple(name for name in _wanted(names, patterns) if not (folder / name).is_file()))


def _patterns(components: Sequence[str]) -> list[str]:
    return [*FILES, *(f"{component}/*{suffix}" for component in components for suffix in SUFFIXES)]


def _wanted(names: Iterable[str], patterns: list[str]) -> list[str]:
    """The `names` that `snapshot_download` downloads with these patterns."""
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _storage(repo: str) -> Path:
    """The folder of `repo` in the hub's cache. Source: "Understand caching" in the docs of huggingface_hub."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _bytes_left(storage: Path, files: dict[str, RepoSibling]) -> int:
    """Bytes of `files` that the cache lacks. The cache stores a file under its checksum, once for all commits."""
    left = 0
    for file in files.values():
        blob = file.blob_id if file.lfs is None else file.lfs.sha256
        left += 0 if (storage / "blobs" / str(blob)).is_file() else file.size or 0
    return left


def _refuse_full_disk(repo: str, revision: str | None, needed: int, storage: Path) -> None:
    here = next(folder for folder in (storage, *storage.parents) if folder.exists())
    free = shutil.disk_usage(here).free
    if needed <= free:
        return
    partial = sum(file.stat().st_size for file in storage.glob("blobs/*.incomplete"))
    leftovers = f"deleting {storage}/blobs/*.incomplete ({_gb(partial)} of downloads that broke off), or "
    raise Refusal(
        what=f"{_named(repo, revision)} needs {_gb(needed)} more, and {_gb(free)} are free in {storage.parent}",
        why="the weights are read from the hub's cache, so they have to fit there",
        works=f"{leftovers if partial else ''}HF_HOME=FOLDER on a disk with {_gb(needed)} free",
    )


def _explained(error: Exception, repo: str, revision: str | None) -> Refusal:
    """The refusal that explains an error of huggingface_hub to a person who asked for `repo`."""
    from huggingface_hub.errors import HfHubHTTPError

    for cause in _chain(error):
        if isinstance(cause, HfHubHTTPError):
            return _of_answer(cause, repo, revision)
    if _is_of_network(error):  # before the disk, because an SSLError has the errno EPERM
        return _of_network(error, repo, revision)
    return _of_disk(error, repo, revision) or _of_anything(error, repo, revision)


def _of_answer(error: HfHubHTTPError, repo: str, revision: str | None) -> Refusal:
    """The refusal if the hub answered with an error."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page, token = f"{constants.ENDPOINT}/{repo}", get_token() is not None
    login = "`hf auth login`, or HF_TOKEN=TOKEN"
    said = error.server_message or _first_line(error)
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return Refusal(
            what=f"{repo} is gated: its files are given only to those who accepted its licence",
            why="the account of your token has not" if token else "without a token the hub cannot know who asks",
            works=f"accept the licence on {page}" + ("" if token else f", then {login}"),
        )
    if isinstance(error, RevisionNotFoundError):
        known = _refs(repo)
        return Refusal(
            what=f"{repo} has no branch, tag or commit model.revision={revision}",
            why=f"its branches and tags are: {', '.join(known)}" if known else "the hub does not know it",
            works=did_you_mean(str(revision), known, otherwise="model.revision=null, its main branch"),
        )
    if isinstance(error, DisabledRepoError):
        return Refusal(what=f"{repo} is disabled on the hub", why=said, works=_COPY)
    if isinstance(error, RepositoryNotFoundError):
        why = "your token may not see it" if token else "it is private and there is no token"
        near = did_you_mean(repo, COSMOS3, otherwise=f"model.path={COSMOS3[0]}")
        return Refusal(
            what=f"the hub shows no repository {repo}",
            why=f"it does not exist, or {why}; there is no folder {repo} here either",
            works=login if repo in COSMOS3 else f"{near} (a private repository: {login})",
        )
    if status == 401:
        return Refusal(
            what=f"the hub does not take your token for {repo}" if token else f"{repo} needs a token",
            why=f"it answered 401: {said}",
            works=f"{login} with a valid token of {constants.ENDPOINT}/settings/tokens",
        )
    if status == 403:
        return Refusal(
            what=f"your token may not read {repo}" if token else f"{repo} may not be read without a token",
            why=f"the hub answered 403: {said}",
            works="a token with the permission to read public gated repositories" if token else login,
        )
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        return Refusal(
            what=f"the hub answers no more requests for {_named(repo, revision)} for now",
            why="it answered 429: too many requests" + ("" if token else "; without a token it allows fewer"),
            works=(f"the same command in {wait} seconds" if wait else "the same command in some minutes")
            + ("" if token else f", or {login}"),
        )
    if status >= 500:
        return Refusal(
            what=f"{constants.ENDPOINT} has a fault of its own, asked for {_named(repo, revision)}",
            why=f"it answered {status}: {said}",
            works=f"the same command later, or {_COPY}",
        )
    return Refusal(
        what=f"the hub does not give {_named(repo, revision)}", why=f"it answered {status}: {said}", works=_COPY
    )


def _of_network(error: Exception, repo: str, revision: str | None) -> Refusal:
    """The refusal if the hub did not answer."""
    from huggingface_hub import constants

    chain, host = list(_chain(error)), constants.ENDPOINT
    proxies = [name for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY") if _environment(name)]
    kinds = _kinds(error)
    offline = "access to the internet; HF_ENDPOINT=URL of a mirror"
    if "ProxyError" in kinds:
        what, why = f"the proxy does not let requests for {host} through", _first_line(error)
        works = f"another {' or '.join(proxies) or 'proxy'}"
    elif any(isinstance(cause, ssl.SSLError) for cause in chain):
        what, why = f"the connection to {host} is not secure", f"{_first_line(error)}"
        works = "SSL_CERT_FILE=FILE with the certificates that your network uses, and a right clock"
    elif any(isinstance(cause, socket.gaierror) for cause in chain):
        what, why, works = (
            f"{host} cannot be reached",
            f"its name is not known here ({_first_line(error)})",
            offline,
        )
    elif "TimeoutException" in kinds:
        what, works = f"{host} cannot be reached", f"{offline}; HF_HUB_ETAG_TIMEOUT=SECONDS to wait longer"
        why = f"no answer within {constants.HF_HUB_ETAG_TIMEOUT} s"
    else:
        what, works = f"the connection to {host} fails or breaks off", f"{_AGAIN}; {offline}"
        why = f"{_first_line(error)}" + (f", through the proxy of {proxies[0]}" if proxies else "")
    return Refusal(what=f"{what}, asked for {_named(repo, revision)}", why=why, works=f"{works}; or {_COPY}")


def _of_disk(error: Exception, repo: str, revision: str | None) -> Refusal | None:
    """The refusal if the cache folder is full, or cannot be read or written; None for other errors."""
    from huggingface_hub import constants

    codes = {cause.errno for cause in _chain(error) if isinstance(cause, OSError)}
    if codes.intersection(_FULL) or "No space left on device" in str(error):
        return Refusal(
            what=f"the disk of {constants.HF_HUB_CACHE} filled up while {_named(repo, revision)} was downloaded",
            why=f"{_first_line(error)}; something else writes there too, or a quota is used up",
            works=f"HF_HOME=FOLDER on a disk with room; or, once there is room, {_AGAIN}",
        )
    if codes.intersection(_UNWRITABLE):
        return Refusal(
            what=f"the hub's cache {constants.HF_HUB_CACHE} cannot be read and written",
            why=_first_line(error),
            works=f"HF_HOME=FOLDER that you may write, or {_COPY}",
        )
    return None


def _of_anything(error: Exception, repo: str, revision: str | None) -> Refusal:
    return Refusal(
        what=f"{_named(repo, revision)} could not be downloaded",
        why=f"{type(error).__name__}: {_first_line(error)}",
        works=f"{_AGAIN}; or {_COPY}",
    )


def _unanswered(error: Exception) -> bool:
    """Whether the hub told nothing about the repository: no connection, too many requests, a server error."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return _is_of_network(error)


def _is_of_network(error: Exception) -> bool:
    return any("TransportError" in _kinds(cause) for cause in _chain(error))


def _kinds(error: BaseException) -> set[str]:
    # Compared by name, because huggingface_hub 1 raises errors of httpx and huggingface_hub 2 errors of httpx2.
    return {kind.__name__ for kind in type(error).__mro__}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _refs(repo: str) -> list[str]:
    """The branches and tags of `repo`; empty if the hub does not tell them."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined] # httpx's or httpx2's

    try:
        refs = HfApi().list_repo_refs(repo)
    except (HTTPError, OSError):
        return []
    return [ref.name for ref in (*refs.branches, *refs.tags)]


def _named(repo: str, revision: str | None) -> str:
    return repo if revision is None else f"{repo} (model.revision={revision})"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def _environment(name: str) -> str | None:
    return os.environ.get(name) or os.environ.get(name.lower())


@cache  # the same process may ask again, but a person needs to read the message once
def _say(words: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(words, file=sys.stderr)
