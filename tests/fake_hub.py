"""A stand-in for huggingface.co on 127.0.0.1: the requests that a download makes, and how they can fail."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT, OTHER = "a" * 40, "b" * 40


@dataclass
class Answer:
    """An answer of the hub in place of a file or a list."""

    status: int
    code: str | None = None  # X-Error-Code, by which huggingface_hub tells the reasons apart
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class FakeHub:
    """One repository: `branches` name commits, `files` are those of every commit.

    `api` and `files_answer` replace the answers to questions about the repository and to requests for files.
    `drop_at` closes the connection after so many bytes of a file, once, or as often as `drops` says.
    """

    repo: str
    files: dict[str, bytes]
    branches: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "fp8": OTHER})
    api: Answer | None = None
    file_answer: Answer | None = None
    claimed_sizes: dict[str, int] = field(default_factory=dict)
    drop_at: dict[str, int] = field(default_factory=dict)
    drops: int = 1
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    tokens: set[str | None] = field(default_factory=set)
    url: str = ""

    def gets(self) -> Counter[str]:
        """How often each file was asked for, by its name."""
        paths = (path for method, path, _ in self.asked if method == "GET" and "/resolve/" in path)
        return Counter(path.split("/resolve/")[1].partition("/")[2] for path in paths)

    @property
    def names(self) -> list[str]:
        return sorted(self.files)

    def entry(self, name: str) -> dict[str, object]:
        size = self.claimed_sizes.get(name, len(self.files[name]))
        sha = hashlib.sha256(self.files[name]).hexdigest()
        lfs = {"oid": sha, "sha256": sha, "size": size, "pointerSize": 130}
        return {"oid": sha[:40], "blobId": sha[:40], "size": size} | (
            {"lfs": lfs} if name.endswith("tensors") else {}
        )

    def etag(self, name: str) -> str:
        sha = hashlib.sha256(self.files[name]).hexdigest()
        return sha if name.endswith("tensors") else sha[:40]


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint folder, and beside them others that a run does not read."""
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    unread = ("README.md", "assets/kite.png", "vision_encoder/model.safetensors")
    others = ("model.safetensors.index.json", "vae/diffusion_pytorch_model.bin", "transformer/flax_model.msgpack")
    return {**files, "assets/negative_prompt.json": b"{}", **dict.fromkeys((*unread, *others), b"not read")}


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """`hub` at `hub.url` until the end of the block."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_CONNECT(self) -> None:
        self._answer(Answer(407))

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path, self.headers.get("Range")))
        hub.tokens.add(self.headers.get("Authorization"))
        api = f"/api/models/{hub.repo}"
        if path.startswith(f"/{hub.repo}/resolve/"):
            if hub.file_answer is not None:
                self._answer(hub.file_answer)
                return
            commit, _, name = path.removeprefix(f"/{hub.repo}/resolve/").partition("/")
            self._file(hub.branches.get(commit, commit), name)
        elif hub.api is not None:
            self._answer(hub.api)
        elif path == f"{api}/refs":
            refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in hub.branches.items()]
            self._json({"branches": refs, "tags": [], "converts": []})
        elif path == api or path.startswith(f"{api}/revision/"):
            revision = path.removeprefix(api).removeprefix("/revision/") or "main"
            commit = hub.branches.get(revision, revision if revision in hub.branches.values() else None)
            if commit is None:
                self._answer(Answer(404, "RevisionNotFound"))
                return
            siblings = [{"rfilename": name, **hub.entry(name)} for name in hub.names]
            self._json({"id": hub.repo, "sha": commit, "siblings": siblings})
        elif path.startswith(f"{api}/tree/"):
            self._json([{"type": "file", "path": name, **hub.entry(name)} for name in hub.names])
        else:
            self._answer(Answer(404, "RepoNotFound"))

    def _file(self, commit: str, name: str) -> None:
        content = self.hub.files[name]
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{self.hub.etag(name)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.drop_at.get(name)
        if cut is not None and self.hub.drops:
            self.hub.drops -= 1
            self.wfile.write(content[first : first + cut])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(content[first:])

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _answer(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        if answer.code is not None:
            self.send_header("X-Error-Code", answer.code)
        self.send_header("Content-Length", "0")
        self.end_headers()
