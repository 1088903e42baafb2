"""TAB in bash, zsh and fish: the words come from Hydra, without internal groups."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANGS

from cosmos3_pipeline.config import completion

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.ranks


def shell(*command: str, given: str | None = None) -> str:
    done = subprocess.run(command, cwd=REPOSITORY, input=given, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (f"{sys.executable} launch.py model=n", {"model=nano"}),
        ("launch vae/decode=s", {"vae/decode=spatial_shard"}),
        ("launch topology=cpu_x2 sampler.st", {"sampler.steps="}),
        ("launch vae.decode.mov", {"vae.decode.moving_cuts="}),
        ("launch model.dtype=", {"model.dtype=float32"}),
        ("launch _str", set()),
        ("python other.py mod", set()),
    ],
)
def test_bash(typed: str, offered: set[str]) -> None:
    script = (
        f"shopt -s expand_aliases; alias launch='{sys.executable} launch.py'\n{completion.BASH}\n"
        'COMP_LINE="$1"; COMP_POINT=${#1}; _cosmos3_complete; echo "${COMPREPLY[*]}"\n'
    )
    assert set(shell("bash", "-c", script, "bash", typed).split()) == offered


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish is installed here")
def test_fish() -> None:
    asked = f'{completion.FISH}\ncomplete -C "{sys.executable} launch.py topology=h100"'
    files = (REPOSITORY / "conf" / "topology").glob("h100*.yaml")
    assert set(shell("fish", given=asked).split()) == {f"topology={file.stem}" for file in files}


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh is installed here")
def test_zsh() -> None:
    shell("zsh", "-n", given=completion.ZSH)  # that it can be read; its answer needs a terminal


def test_the_command_prints_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    for name, script in completion.SCRIPTS.items():
        assert completion.main([name]) == 0 and capsys.readouterr().out == script
    with pytest.raises(SystemExit) as ended:
        completion.main(["tcsh"])
    assert ended.value.code == completion.USAGE
