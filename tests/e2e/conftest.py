"""Running launch.py as a user does, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from limits import HANGS
from PIL import Image
from warm import run_forked

REPOSITORY = Path(__file__).parents[2]
# Small enough to end in seconds, odd in latent rows (5), with more than one latent frame.
SMALL = ("model=toy_random", "task.height=80", "task.width=96", "task.num_frames=9", "sampler.steps=2")


@pytest.fixture(scope="session", autouse=True)
def toy_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One toy model for the whole session, apart from the user's own cache."""
    os.environ["COSMOS3_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def launch(
    *args: str, timeout: float = HANGS, meanwhile: Callable[[int], None] = lambda pid: None, **env: str
) -> subprocess.CompletedProcess[str]:
    """`python launch.py *args` from the checkout: a warm interpreter, unless `env` has more than a PYTHONPATH.

    `meanwhile` is called with the process of a warm one while it runs.
    """
    environ = {**os.environ, "COLUMNS": "200", **env}
    if not env.keys() - {"PYTHONPATH"}:
        return run_forked(
            Path("launch.py"), *args, cwd=REPOSITORY, env=environ, timeout=timeout, meanwhile=meanwhile
        )
    return subprocess.run(
        [sys.executable, "launch.py", *args],
        cwd=REPOSITORY,
        env=environ,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture
def generate(tmp_path: Path) -> Callable[..., Path]:
    """Run launch.py with a small clip and return the output directory; the run must succeed."""
    count = iter(range(100))

    def run(*args: str) -> Path:
        output = tmp_path / f"run{next(count)}"
        done = launch(*SMALL, *args, f"hydra.run.dir={output}")
        assert done.returncode == 0, done.stderr + done.stdout
        return output

    return run


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory, toy_cache: None) -> Path:
    """The run with nothing but the defaults on the small clip, which others are compared with."""
    output = tmp_path_factory.mktemp("one") / "run"
    done = launch(*SMALL, f"hydra.run.dir={output}")
    assert done.returncode == 0, done.stderr + done.stdout
    return output


def environment_with(package: Path, folder: Path) -> Path:
    """The interpreter of a fresh environment: this one's packages, and the wheel of `package` on top."""
    environment = folder / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=HANGS)
    (site,) = environment.glob("lib/python*/site-packages")
    # addsitedir and not a plain path, so that an editable installation is followed too
    here = sysconfig.get_path("purelib")
    (site / "outer.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    interpreter = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", str(package)], check=True, timeout=HANGS)
    return interpreter


def wait_for_ranks(parent: int, count: int, *, until: Callable[[], bool] = lambda: True) -> list[int]:
    """The processes that were forked for `parent` as ranks, once `until` holds and `count` of them exist."""
    end = time.monotonic() + HANGS
    while time.monotonic() < end:
        servers = [pid for pid in children(parent) if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        ranks = [pid for server in servers for pid in children(server)]
        assert servers or Path(f"/proc/{parent}/stat").read_text().split()[2] != "Z", "the run has ended"
        if until() and len(ranks) >= count:
            time.sleep(2)
            return ranks
        time.sleep(0.1)
    raise AssertionError("the ranks did not start")


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def metrics(output: Path) -> dict:
    return json.loads((output / "metrics.json").read_text())


def frames_of(path: Path) -> np.ndarray:
    """The frames of a video file, uint8 [frames, H, W, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def make_photo(path: Path, width: int = 173, height: int = 131) -> Path:
    """A picture with structure at several scales, of a size that nothing divides."""
    rows, cols = np.mgrid[0:height, 0:width]
    channels = [np.sin(rows / 9) + np.cos(cols / 13), np.sin((rows + cols) / 7), np.cos(rows * cols / 900)]
    Image.fromarray(((np.stack(channels, -1) + 2) * 63).astype(np.uint8)).save(path)
    return path


def make_clip(path: Path, frames: int = 12, width: int = 162, height: int = 122) -> Path:
    """A moving clip in a lossy file, of a size that 16 does not divide."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        rows, cols = np.mgrid[0:height, 0:width]
        for i in range(frames):
            picture = np.stack([np.sin((rows + 5 * i) / 11), np.cos((cols - 3 * i) / 8), np.sin(i + rows / 5)], -1)
            frame = av.VideoFrame.from_ndarray(((picture + 1) * 127).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
