"""From a command line to a picture on disk, for every task, on one rank and on several."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, SMALL, frames_of, launch, make_clip, make_photo, metrics, wait_for_ranks
from limits import HANGS
from PIL import Image
from safetensors.numpy import load_file


def test_a_video_of_the_frames_and_size_asked_for(generate: Callable[..., Path]) -> None:
    output = generate("output.latents=true", "task.fps=16")
    frames = frames_of(output / "video.mp4")
    assert frames.shape == (9, 80, 96, 3)
    assert frames.std() > 15
    assert load_file(output / "latents.safetensors")["latents"].shape == (1, 48, 3, 5, 6)
    report = metrics(output)
    assert report["origin"]["command"].startswith("python launch.py model=toy_random task.height=80")
    assert report["beyond_bytes"] < report["peak_bytes"]
    assert report["schema_version"] == 1
    assert list(report["stages"]) == ["text", "encode", "denoise", "decode", "export"]
    assert report["seconds"] > 0 and report["peak_bytes"] > 10**7
    assert report["seed"] == 0
    saved = yaml.safe_load((output / "config.yaml").read_text())
    assert saved["task"]["fps"] == 16 and saved["sampler"]["steps"] == 2
    assert not list(output.glob("*.partial*"))


def test_an_image(generate: Callable[..., Path]) -> None:
    output = generate("task=t2i", "task.num_frames=1")
    assert Image.open(output / "image.png").size == (96, 80)
    assert not (output / "video.mp4").exists()


def test_a_photograph_and_a_clip_change_the_video(
    generate: Callable[..., Path], one_rank: Path, tmp_path: Path
) -> None:
    photo, clip = make_photo(tmp_path / "photo.jpg"), make_clip(tmp_path / "clip.mp4")
    hashes = {
        metrics(one_rank)["frames_sha256"],
        metrics(generate("task=i2v", f"task.image={photo}"))["frames_sha256"],
        metrics(generate("task=v2v", f"task.video={clip}"))["frames_sha256"],
    }
    assert len(hashes) == 3


@pytest.mark.thorough
def test_a_transfer_is_the_same_on_two_ranks(generate: Callable[..., Path], tmp_path: Path) -> None:
    """Guidance and the VAE in both directions over ranks: chunks begin with frames that were decoded elsewhere."""
    control = make_clip(tmp_path / "control.mp4")
    run = ("task=transfer", f"task.controls.edge={control}", "task.num_frames=12", "task.resample=false")
    run = (*run, "task.num_video_frames_per_chunk=9", "topology.threads_per_rank=1")
    one = metrics(generate(*run))
    two = generate(*run, "topology=cpu_x2", "vae=parallel", "output.control=true")
    assert metrics(two)["frames_sha256"] == one["frames_sha256"]
    assert len(frames_of(two / "video.mp4")) == len(frames_of(two / "control.mp4")) == 12
    plan = json.loads((two / "plan.json").read_text())["stages"]
    for stage in ("encode", "denoise", "decode"):
        ranks = metrics(two)["stages"][stage]["ranks"]
        sent = sum(
            count["bytes"] for rank in ranks for kind, count in rank["wire"].items() if not kind.startswith("recv")
        )
        assert sent == plan[stage]["sent_bytes"], stage


@pytest.mark.sampled(1)
@pytest.mark.parametrize("ranks", [2, 3])
def test_parallel_decode_gives_the_same_frames(generate: Callable[..., Path], one_rank: Path, ranks: int) -> None:
    parallel = generate("vae=parallel_decode", f"topology.ranks_per_node={ranks}", "topology.threads_per_rank=1")
    reports = [metrics(one_rank), metrics(parallel)]
    assert reports[0]["frames_sha256"] == reports[1]["frames_sha256"]
    assert reports[1]["topology"]["ranks"] == ranks
    assert len(reports[1]["stages"]["decode"]["ranks"]) == ranks
    assert reports[1]["vae"]["decode"]["strategy"] == "layer_pipeline"
    assert reports[0]["vae"]["decode"]["strategy"] == "replicated"


def test_a_rank_that_dies_ends_the_run_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    output, ranks = tmp_path / "killed", list[int]()

    def kill_one(run: int) -> None:
        ranks.extend(wait_for_ranks(run, 2))
        os.kill(ranks[1], signal.SIGKILL)

    endless = ("sampler.steps=500", "sampler.flow_shift=1", "topology=cpu_x2", f"hydra.run.dir={output}")
    done = launch(*SMALL, *endless, meanwhile=kill_one)
    assert done.returncode == 1
    assert "signal 9" in done.stderr
    assert not [p for p in output.iterdir() if p.suffix in (".mp4", ".png") or ".partial" in p.name]
    assert not any(Path(f"/proc/{pid}/stat").exists() for pid in ranks)


@pytest.mark.thorough
def test_stopping_a_run_ends_its_ranks_and_says_so(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [
            sys.executable,
            "launch.py",
            *SMALL,
            "sampler.steps=900",
            "sampler.flow_shift=1",
            "topology=cpu_x2",
            f"hydra.run.dir={tmp_path}",
        ],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    ranks = wait_for_ranks(run.pid, 2)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=HANGS)
    assert run.returncode == 130
    assert "stopped by SIGINT; nothing half-written is left" in errors
    assert not list(tmp_path.glob("*.mp4*"))
    assert not any(Path(f"/proc/{pid}/stat").exists() for pid in ranks)


@pytest.mark.parametrize("topology", ["cpu_x1", "cpu_x2"])
def test_an_input_that_is_no_picture_is_refused_in_three_parts(tmp_path: Path, topology: str) -> None:
    broken = tmp_path / "not_a_photo.jpg"
    broken.write_bytes(b"this is no picture")
    done = launch(
        *SMALL, "task=i2v", f"task.image={broken}", f"topology={topology}", f"hydra.run.dir={tmp_path / 'o'}"
    )
    assert done.returncode != 0
    assert "not_a_photo.jpg" in done.stderr and "works:" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    done = launch("task.promt=x", f"hydra.run.dir={tmp_path / 'refused'}")
    assert done.returncode == 2
    assert "did you mean task.prompt?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "refused").exists()


def test_configs_of_ones_own_are_checked_too(tmp_path: Path) -> None:
    (tmp_path / "more" / "experiment").mkdir(parents=True)
    mine = "# @package _global_\nsampler:\n  steps: 3\n"
    (tmp_path / "more" / "experiment" / "mine.yaml").write_text(mine)
    asked = ("experiment=mine", f"hydra.run.dir={tmp_path / 'run'}", "--config-dir", str(tmp_path / "more"))
    assert launch("job=plan", *asked).returncode == 0
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["steps"] == 3
    done = launch("task.height=100", *asked)
    assert done.returncode == 2
    assert "works: task.height=96" in done.stderr


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--help"]])
def test_the_config_and_the_help_are_shown(flags: list[str]) -> None:
    done = launch(*flags)
    assert done.returncode == 0 and "parallel_decode" in done.stdout


@pytest.mark.thorough
def test_the_sglang_experiment_runs_in_miniature_and_reports_what_that_pull_request_does(
    generate: Callable[..., Path],
) -> None:
    report = metrics(generate("experiment=sglang_27037", "topology=cpu_x4"))
    assert (report["topology"]["cfg"], report["topology"]["ulysses"]) == (2, 2)
    assert report["vae"]["decode"].items() >= {"strategy": "layer_pipeline", "exactness": "bitwise"}.items()
    assert report["seconds"] > 0 and report["peak_bytes"] > 0
    assert report["stages"]["denoise"]["seconds"] > 0 and report["stages"]["decode"]["seconds"] > 0
    assert report["against_replicated"]["identical"] is True
    assert report["against_replicated"]["ssim"] == pytest.approx(1.0)
    sent = [rank["wire"]["send"]["bytes"] for rank in report["stages"]["denoise"]["ranks"]]
    assert min(sent) > 0


def test_auto_says_in_the_metrics_what_it_picked_and_why(generate: Callable[..., Path], one_rank: Path) -> None:
    report = metrics(generate("topology=cpu_x2", "vae/decode=auto", "vae.required_exactness=bitwise"))
    used = report["vae"]["decode"]
    assert used["strategy"] == "auto"
    assert used["exactness"] == "bitwise"
    assert re.match(r"picked (layer_pipeline|replicated|wavefront)( \(.*\))?, bitwise: about ", used["note"])
    assert report["frames_sha256"] == metrics(one_rank)["frames_sha256"]
