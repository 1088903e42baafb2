"""`job=verify`: what it measures, what it refuses, and that a broken promise ends it with exit code 1."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, launch, make_photo
from PIL import Image
from safetensors.numpy import load_file, save_file

from cosmos3_pipeline import compose, run
from cosmos3_pipeline.errors import ConfigError
from cosmos3_pipeline.jobs.verify import check_verify
from cosmos3_pipeline.jobs.verify.distance import Distance, exactness_of
from cosmos3_pipeline.jobs.verify.picture import Row
from cosmos3_pipeline.stages.likeness import psnr_db
from cosmos3_pipeline.stages.media import read_frames
from cosmos3_pipeline.vae.strategy import Exactness

LYING_PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar

from cosmos3_plugins.layer_pipeline import LayerPipeline


@dataclass
class Lying(LayerPipeline):
    """The layer pipeline, but its bottom rows are brighter: bitwise, it says."""

    name: ClassVar[str] = "lying"

    def runner(self, vae, comm, direction):
        inner = super().runner(vae, comm, direction)

        class Brighter:
            def stream(self, z, *, pixels):
                for chunk in inner.stream(z, pixels=pixels):
                    if pixels == "float":
                        chunk[..., -16:, :] += 0.01
                    else:
                        chunk[:, :, -16:] = chunk[:, :, -16:].clamp(max=250) + 1
                    yield chunk

        return Brighter()
'''


def verify(output: Path, *args: str, returncode: int = 0, **env: str) -> tuple[dict[str, Any], str]:
    done = launch("job=verify", *SMALL, *args, f"hydra.run.dir={output}", **env)
    assert done.returncode == returncode, done.stderr + done.stdout
    return json.loads((output / "verify.json").read_text()), done.stdout + done.stderr


def test_the_strategies_of_the_composition_on_two_ranks(tmp_path: Path) -> None:
    report, printed = verify(tmp_path / "out", "topology=cpu_x2")
    assert report["schema_version"] == 1 and report["passed"]
    (check,) = report["checks"]
    assert (check["direction"], check["strategy"]) == ("decode", "layer_pipeline")
    assert (check["declared"], check["reached"], check["missed"]) == ("bitwise", "bitwise", None)
    assert check["values"] == {"max": 0.0, "mean": 0.0, "psnr_db": None, "range": 2.0}
    assert check["ssim"] == pytest.approx(1)
    assert check["seconds"] > 0
    for rank in check["ranks"]:
        assert (rank["sent_bytes"], rank["sent_messages"]) == (rank["planned_bytes"], rank["planned_messages"])
        assert rank["peak_bytes"] > 10**7
    assert sum(rank["sent_bytes"] for rank in check["ranks"]) > 0
    assert Image.open(tmp_path / "out" / "verify.png").height > 80
    assert "layer_pipeline" in printed and "bitwise" in printed


@pytest.mark.thorough
def test_encode_is_verified_where_the_task_has_an_input(tmp_path: Path) -> None:
    photo = make_photo(tmp_path / "photo.png")
    report, _ = verify(
        tmp_path / "out",
        "topology=cpu_x2",
        "task=i2v",
        f"task.image={photo}",
        "verify.strategies=[layer_pipeline,spatial_shard]",
        "model.vae_dtype=bfloat16",
    )
    seen = [(check["direction"], check["strategy"], check["passed"]) for check in report["checks"]]
    names = ("layer_pipeline", "spatial_shard")
    assert sorted(seen) == sorted((d, name, True) for d in ("encode", "decode") for name in names)


def test_a_run_that_skips_passes_is_compared_with_every_pass(tmp_path: Path) -> None:
    skips = ["sampler/cache=seacache", "sampler.cache.threshold=2.0", "sampler.guidance_interval=[900,1000]"]
    asked = [*SMALL, "sampler.steps=4", "sampler.flow_shift=3.0", "topology=cpu_x1"]
    asked = list({one.partition("=")[0]: one for one in asked}.values())
    run([*asked, *skips, "job=verify"], tmp_path / "verify")
    (check,) = json.loads((tmp_path / "verify" / "verify.json").read_text())["checks"]
    clips, latents, computed = [], [], []
    for name, more in (("every", []), ("some", skips)):
        made = run([*asked, *more, "output.latents=true", "output.crf=0"], tmp_path / name)
        latents.append(load_file(made.folder / "latents.safetensors")["latents"])
        clips.append(np.stack(read_frames(tmp_path / name / "video.mp4", frames=9)[0]))
        computed.append(made.metrics["denoise"]["passes"]["computed"])
    assert check["passes"] == {"every pass": computed[0], "run": computed[1]}
    assert sum(computed[1].values()) < sum(computed[0].values()) == 8
    off = np.linalg.norm(latents[1] - latents[0]) / np.linalg.norm(latents[0])
    assert check["latents_distance"] == pytest.approx(off, rel=1e-4) and off > 0.01
    assert (check["direction"], check["declared"], check["reached"]) == ("denoise", "approximate", "approximate")
    seen = psnr_db(255, np.square(clips[1].astype(float) - clips[0]).mean())
    assert check["levels"]["psnr_db"] == pytest.approx(seen, abs=1.0)  # a file of H.264 has other colours
    assert check["settings"] == {} and all(one in check["strategy"] for one in (skips[0], skips[2]))


def test_a_strategy_that_misses_its_declaration_ends_with_exit_code_1(tmp_path: Path) -> None:
    latents = tmp_path / "latents.safetensors"
    drawn = np.random.default_rng(0).standard_normal((1, 48, 3, 5, 6)).astype(np.float32)
    save_file({"latents": drawn}, latents)
    site = tmp_path / "site"
    info = site / "lying-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lying\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[cosmos3_pipeline.plugins]\nlying = lying_plugin:Lying\n")
    (site / "lying_plugin.py").write_text(LYING_PLUGIN)
    report, printed = verify(
        tmp_path / "out",
        "verify.strategies=[layer_pipeline,lying]",
        f"verify.latents={latents}",
        returncode=1,
        PYTHONPATH=str(site),
    )
    assert report["latents"] == str(latents)
    honest, lying = report["checks"]
    assert honest["passed"] and not lying["passed"] and not report["passed"]
    assert lying["reached"] == "approximate"
    assert lying["values"]["max"] == pytest.approx(0.01, rel=1e-3)
    # 16 of 80 rows are off by 0.01 on a range of 2.
    assert lying["values"]["psnr_db"] == pytest.approx(20 * math.log10(2 / (0.01 * math.sqrt(0.2))), abs=0.01)
    assert lying["levels"]["max"] >= 1
    assert 0.5 < lying["ssim"] < 1
    assert "decode with lying: it declares bitwise and is approximate" in printed
    sheet = np.asarray(Image.open(tmp_path / "out" / "verify.png"))
    assert sheet.shape[0] > 2 * 80


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    path = tmp_path / "latents.safetensors"
    save_file({"latents": np.zeros((1, 48, 3, 5, 6), np.float32)}, path)
    return path


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_verify(compose([*SMALL, *overrides]))
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["job=verify"], "nothing to verify"),
        (["job=verify", "topology=cpu_x2", "vae=replicated"], "topology=cpu_x2, or verify.strategies="),
        (["job=verify", "verify.strategies=[]"], "nothing to verify"),
        (["job=verify", "verify.strategies=[layer_pipelin]"], "did you mean layer_pipeline?"),
        (["verify.strategies=[layer_pipeline]"], "verify.strategies=['layer_pipeline'] with job=generate"),
        (["job=plan", "verify.latents=x"], "only job=verify reads it"),
        (["job=verify", "topology=cpu_x2", "task.prompt_file=p.txt"], "compared on one clip"),
        (["job=verify", "topology.ranks_per_node=6", "verify.strategies=[spatial_shard]"], "use 5 ranks or fewer"),
        (["job=verify", "topology=cpu_x2", "verify.latents=nowhere"], "verify.latents=nowhere cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(overrides: list[str], says: str) -> None:
    assert says in refusal(*overrides)


def test_latents_that_fit_are_taken(latents: Path) -> None:
    check_verify(compose([*SMALL, "job=verify", "topology=cpu_x2", f"verify.latents={latents}"]))


@pytest.mark.parametrize("wrong", ["name", "shape", "nan", "dtype"])
def test_latents_that_do_not_fit(latents: Path, wrong: str) -> None:
    tensor = load_file(latents)["latents"]
    tensors = {
        "name": {"z": tensor},
        "shape": {"latents": tensor[:, :, :, :4]},
        "nan": {"latents": np.where(np.arange(6) == 2, np.nan, tensor).astype(np.float32)},
        "dtype": {"latents": tensor.astype(np.float16)},
    }[wrong]
    save_file(tensors, latents)
    says = {
        "name": "its tensors are: z",
        "shape": "works: task.height=64 task.width=96 task.num_frames=9",
        "nan": "NaN or infinite",
        "dtype": "holds F16",
    }[wrong]
    assert says in refusal("job=verify", "topology=cpu_x2", f"verify.latents={latents}")


def distance(reference: torch.Tensor, other: torch.Tensor) -> Distance:
    found = Distance()
    for a, b in zip(reference.split(2), other.split(2), strict=True):  # in parts, as pictures come
        found.add(a, b)
    return found


def test_what_a_distance_means() -> None:
    torch.manual_seed(0)
    picture = torch.rand(6, 3, 8, 8) * 2 - 1
    assert exactness_of(distance(picture, picture.clone())) == Exactness.BITWISE
    assert exactness_of(distance(picture, picture + 2e-6)) == Exactness.ROUNDING
    one_off = picture.clone()
    one_off[3, 1, 2, 2] += 1e-3
    found = distance(picture, one_off)
    assert found.max_abs == pytest.approx(1e-3, rel=1e-3)
    assert found.psnr == pytest.approx(20 * math.log10(2 / (1e-3 / math.sqrt(picture.numel()))), abs=0.01)
    assert exactness_of(found) == Exactness.APPROXIMATE  # under 100 dB off, but one value is not rounding
    assert exactness_of(distance(picture, torch.rand_like(picture) * 2 - 1)) is None
    assert exactness_of(distance(picture, picture * torch.nan)) is None


def test_rounding_in_a_narrow_dtype_is_measured_from_float32() -> None:
    torch.manual_seed(0)
    exact = torch.rand(6, 3, 8, 8) * 2 - 1
    reference = exact.bfloat16()
    as_good = (exact + 1e-4).bfloat16()
    worse = (exact + 1e-2).bfloat16()

    def reached(result: torch.Tensor) -> Exactness | None:
        return exactness_of(
            distance(reference, result),
            float32=distance(exact, result),
            reference_float32=distance(exact, reference),
        )

    assert reached(reference) == Exactness.BITWISE
    assert reached(as_good) == Exactness.ROUNDING
    assert reached(worse) == Exactness.APPROXIMATE


def test_the_picture_shows_the_worst_frame_amplified() -> None:
    reference = [torch.full((4, 5, 3), 100, dtype=torch.uint8) for _ in range(3)]
    other = [frame.clone() for frame in reference]
    other[1][2, 3, 0] += 5
    other[2][0, 0] += 2
    row = Row.worst("some", "other", list(zip(reference, other, strict=True)))
    difference, factor = row.amplified()
    assert (row.index, factor) == (1, 51)
    assert difference[2, 3, 0] == 255 and difference.sum() == 255
