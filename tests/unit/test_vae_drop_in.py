"""`ParallelVAE` where a diffusers pipeline is already: loading, saving, copying, and what it refuses."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cosmos_models import tiny_pipeline
from diffusers import AutoencoderKLWan, Cosmos3OmniPipeline, DiffusionPipeline, ModularPipeline
from diffusers.modular_pipelines import Cosmos3OmniBlocks
from torch import nn
from torch._subclasses import FakeTensorMode
from vae_models import WAN22, make_vae, vae_config

from cosmos3_pipeline.vae import ParallelVAE
from cosmos3_pipeline.vae.builder import ProgramError
from cosmos3_pipeline.vae.inputs import VaeInputError
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_plugins.layer_pipeline import LayerPipeline
from cosmos3_plugins.replicated import Replicated

PAGE = Path(__file__).parents[2] / "docs" / "diffusers.md"
CONFIG = vae_config(WAN22)
BOTH: dict[str, Any] = {"encode": Replicated(), "decode": LayerPipeline()}
LATENT = torch.randn(1, CONFIG["z_dim"], 2, 3, 2, generator=torch.Generator().manual_seed(0))
PICTURE = torch.zeros(1, 3, 1, 32, 32)


def alone(model: Any) -> ParallelVAE:
    return ParallelVAE(model, **BOTH)


def picture(vae: Any) -> torch.Tensor:
    with torch.no_grad():
        decoded: torch.Tensor = vae.decode(LATENT.to(vae.dtype)).sample
    return decoded


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(autouse=True)
def default_dtype_is_kept() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_pipeline_is_the_one_without_it(tmp_path: Path, dtype: torch.dtype) -> None:
    plain = tiny_pipeline()
    parallel = Cosmos3OmniPipeline(
        **{**plain.components, "vae": alone(plain.vae)}, enable_safety_checker=plain.config.enable_safety_checker
    )
    parallel.to(dtype)  # also `plain`, whose models it has
    plain.save_pretrained(tmp_path / "plain")
    parallel.save_pretrained(tmp_path / "parallel")
    assert files(tmp_path / "parallel") == files(tmp_path / "plain")
    opened = DiffusionPipeline.from_pretrained(tmp_path / "parallel", dtype=dtype, enable_safety_checker=False)
    assert type(opened.vae) is AutoencoderKLWan
    assert all(torch.equal(a, b) for a, b in zip(opened.vae.parameters(), plain.vae.parameters(), strict=True))


def test_a_pipeline_takes_it_while_loading_and_from_another_pipeline(tmp_path: Path) -> None:
    plain = tiny_pipeline()
    plain.save_pretrained(tmp_path)
    vae = alone(plain.vae)
    opened = Cosmos3OmniPipeline.from_pretrained(tmp_path, vae=vae, enable_safety_checker=False)
    assert opened.vae is vae is opened.components["vae"]
    # Without vae=... diffusers takes no model over whose type is not exactly the pipeline's own, and says so.
    assert Cosmos3OmniPipeline.from_pipe(opened, vae=vae).vae is vae
    opened.enable_model_cpu_offload(device="cpu")
    assert torch.isfinite(picture_of_48_channels(opened.vae)).all()


def picture_of_48_channels(vae: Any) -> torch.Tensor:
    decoded: torch.Tensor = vae.decode(torch.ones(1, 48, 1, 2, 2)).sample
    return decoded


def test_a_modular_pipeline_saves_it_as_the_model(tmp_path: Path) -> None:
    model = tiny_pipeline().vae
    modular = Cosmos3OmniBlocks().init_pipeline()
    modular.update_components(vae=alone(model))
    modular.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    opened = ModularPipeline.from_pretrained(str(tmp_path))
    opened.load_components(names=["vae"])
    assert type(opened.vae) is AutoencoderKLWan
    assert torch.equal(picture_of_48_channels(opened.vae), picture_of_48_channels(model))


@pytest.mark.parametrize(
    "how",
    [{}, {"max_shard_size": "50KB"}, {"variant": "fp16"}, {"safe_serialization": False}],
    ids=["one file", "shards", "variant", "pickle"],
)
def test_saved_alone_it_is_the_model(tmp_path: Path, how: dict[str, Any]) -> None:
    model = make_vae(CONFIG)
    model.save_pretrained(tmp_path / "model", **how)
    alone(model).save_pretrained(tmp_path / "vae", **how)
    same, other = files(tmp_path / "vae"), files(tmp_path / "model")
    assert same.keys() == other.keys()
    # Two pickles of the same tensors differ.
    assert how == {"safe_serialization": False} or same == other
    opened = AutoencoderKLWan.from_pretrained(tmp_path / "vae", variant=how.get("variant"))
    assert torch.equal(picture(opened), picture(model))


def test_saved_from_a_folder_it_is_that_folder(tmp_path: Path) -> None:
    make_vae(CONFIG).save_pretrained(tmp_path / "model")
    ParallelVAE.from_folder(tmp_path / "model", **BOTH).save_pretrained(tmp_path / "vae")
    assert files(tmp_path / "vae") == files(tmp_path / "model")


def test_weights_that_it_has_not_cannot_be_saved_or_copied(tmp_path: Path) -> None:
    half = make_vae(CONFIG)
    half.encoder.to("meta")
    with pytest.raises(ValueError, match=r"encoder.conv_in.weight is on the meta device; .*; load"):
        alone(half).save_pretrained(tmp_path)
    half.encoder = None
    with pytest.raises(ValueError, match=r"encoder.conv_in.weight is not in the model; .*; load"):
        alone(half).save_pretrained(tmp_path)
    vae = ParallelVAE(make_vae(CONFIG), Replicated(), Replicated())
    vae.release(decode=LatentShape(1, 2, 3, 2))
    for call, says in (
        (
            lambda: vae.save_pretrained(tmp_path),
            "saving .*; this rank has kept only its own share .*; save it before",
        ),
        (lambda: copy.deepcopy(vae), "copying .*; copy it before"),
        (lambda: vae.load_state_dict({}), "load_state_dict.*; set those of an AutoencoderKLWan"),
    ):
        with pytest.raises(RuntimeError, match=says):
            call()
    assert list(tmp_path.iterdir()) == []


def test_from_pretrained_takes_what_the_model_takes(tmp_path: Path) -> None:
    model = make_vae(CONFIG)
    model.save_pretrained(tmp_path / "vae", variant="fp16", max_shard_size="50KB")
    where = {"subfolder": "vae", "variant": "fp16", "local_files_only": True, "use_safetensors": True}
    vae = ParallelVAE.from_pretrained(tmp_path, **BOTH, **where)
    assert type(vae) is ParallelVAE and not vae.training
    assert (picture(vae) - picture(model)).abs().max() <= 1e-5
    assert ParallelVAE.from_pretrained(tmp_path, **BOTH, **where, dtype=torch.bfloat16).dtype == torch.bfloat16
    vae, report = ParallelVAE.from_pretrained(tmp_path, **BOTH, **where, output_loading_info=True)
    assert type(vae) is ParallelVAE and report["missing_keys"] == []
    assert ParallelVAE.from_config(model.config, **BOTH).config.z_dim == CONFIG["z_dim"]


def test_a_load_that_fails_changes_nothing(tmp_path: Path) -> None:
    make_vae(CONFIG).save_pretrained(tmp_path)
    for missing, given in (("encode and decode", {}), ("decode", {"encode": Replicated()})):
        with pytest.raises(
            TypeError, match=rf"from_pretrained\(\) without {missing}; .*; .* decode=LayerPipeline"
        ):
            ParallelVAE.from_pretrained(tmp_path, dtype=torch.bfloat16, **given)
        with pytest.raises(TypeError, match=rf"from_config\(\) without {missing}; "):
            ParallelVAE.from_config(CONFIG, **given)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_res_blocks": "two"}))
    # The fixture looks at the default dtype, which the model's own from_pretrained leaves at bfloat16 here.
    with pytest.raises(TypeError):
        ParallelVAE.from_pretrained(tmp_path, **BOTH, dtype=torch.bfloat16)


def test_a_call_that_needs_gradients_is_refused() -> None:
    model = make_vae(CONFIG).requires_grad_(True)
    vae, z, x = alone(model), LATENT.clone().requires_grad_(), PICTURE.clone().requires_grad_()
    for call in (lambda: vae.decode(z), lambda: next(vae.decode_stream(z)), lambda: vae.encode(x), lambda: vae(x)):
        with pytest.raises(VaeInputError, match=r"(?s)requires grad.* inference.* call it under torch.no_grad"):
            call()
    with torch.no_grad():
        assert torch.equal(vae.decode(z).sample, picture(vae))
    # Parameters of a new AutoencoderKLWan require grad: that alone asks for none.
    assert not vae.decode(LATENT).sample.requires_grad
    for ask in (vae.train, vae.requires_grad_):
        with pytest.raises(NotImplementedError, match="no strategy computes gradients"):
            ask()
    assert not vae.eval().training and not any(p.requires_grad for p in vae.requires_grad_(False).parameters())


# The public names of AutoencoderKLWan that are refused here, with a word that the message must contain.
TILED = "cosmos3_plugins.tiled"
REFUSED = {
    "enable_tiling": TILED,
    "tiled_encode": TILED,
    "tiled_decode": TILED,
    "blend_v": TILED,
    "blend_h": TILED,
    "enable_slicing": "cosmos3_plugins.layer_pipeline",
    "enable_parallelism": "give encode=..., decode=",
    "enable_group_offload": "exclude_modules='vae'",
    "enable_layerwise_casting": "bfloat16",
    "enable_gradient_checkpointing": "train the AutoencoderKLWan",
    "enable_xformers_memory_efficient_attention": "sdpa_kernel",
    "enable_npu_flash_attention": "sdpa_kernel",
    "enable_xla_flash_attention": "sdpa_kernel",
    "set_attention_backend": "sdpa_kernel",
}
AS_IN_DIFFUSERS = {  # methods that need no test of ours, and raise where the model's own do
    *("compile_repeated_blocks", "dequantize", "push_to_hub", "register_for_auto_class", "register_to_config"),
    *("extract_init_dict", "get_config_dict", "load_config", "to_json_file", "to_json_string", "save_config"),
    *("get_memory_footprint", "num_parameters", "is_gradient_checkpointing", "has_compatibles", "config_name"),
    *("ignore_for_config", "config", "device", "dtype"),
}
NOTHING_TO_DO = {
    *("disable_tiling", "disable_slicing", "clear_cache", "disable_gradient_checkpointing"),
    *("disable_xformers_memory_efficient_attention", "disable_npu_flash_attention", "disable_xla_flash_attention"),
    "reset_attention_backend",
}
# Pipelines call these on every model that they have.
CALLED_BY_PIPELINES = {
    *("set_use_memory_efficient_attention_xformers", "set_use_npu_flash_attention"),
    "set_use_xla_flash_attention",
}
OURS = {"encode", "decode", "from_pretrained", "from_single_file", "from_config", "save_pretrained"}


def test_no_switch_of_the_model_is_silently_ignored() -> None:
    public = {n for n in dir(AutoencoderKLWan) if not n.startswith("_") and not hasattr(nn.Module, n)}
    assert public == {*REFUSED, *AS_IN_DIFFUSERS, *NOTHING_TO_DO, *CALLED_BY_PIPELINES, *OURS}
    model = make_vae(CONFIG)
    vae = alone(model)
    for name, works in REFUSED.items():
        with pytest.raises(NotImplementedError) as refusal:
            getattr(vae, name)()
        what, why, would = str(refusal.value).split("; ", 2)
        assert what == f"{name}() of a ParallelVAE" and why and works in would
    for name in NOTHING_TO_DO:
        getattr(vae, name)()
    for name in CALLED_BY_PIPELINES:
        getattr(vae, name)(True)
    for switch in ("use_tiling", "use_slicing"):
        setattr(vae, switch, False)
        with pytest.raises(NotImplementedError, match=f"enable_{switch[4:]}"):
            setattr(vae, switch, True)
        assert getattr(vae, switch) is False
    for name in ("z_dim", "temperal_downsample", "temperal_upsample", "spatial_compression_ratio"):
        assert getattr(vae, name) == getattr(model, name)
    assert (vae.num_parameters(), vae.to_json_string()) == (model.num_parameters(), model.to_json_string())
    assert vae.get_memory_footprint() == model.get_memory_footprint()


def test_weights_have_the_names_of_the_model_and_can_be_set() -> None:
    model, other = make_vae(CONFIG), make_vae(CONFIG, seed=1)
    vae = alone(model)
    assert [n for n, _ in vae.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert not torch.equal(picture(vae), picture(alone(other)))
    for assign in (False, True):
        vae.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(picture(vae), picture(alone(other)))


def test_copies_are_parallel_too_and_have_weights_of_their_own() -> None:
    vae = alone(make_vae(CONFIG))
    expected = picture(vae)
    for other in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        assert type(other) is ParallelVAE
        nn.init.zeros_(other.decoder.conv_in.weight)
        assert torch.equal(picture(vae), expected) and not torch.equal(picture(other), expected)
    assert copy.copy(vae).autoencoder is vae.autoencoder
    assert repr(vae).startswith("ParallelVAE(") and isinstance(vae, AutoencoderKLWan)


def test_forward_is_that_of_the_model() -> None:
    model = make_vae(CONFIG)
    x = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    for how in ((False,), (True,)):
        made, expected = (m(x, *how, False, torch.Generator().manual_seed(1))[0] for m in (alone(model), model))
        assert (made - expected).abs().max() <= 1e-5


def test_an_offloaded_model_is_fetched_before_it_works() -> None:
    vae = alone(make_vae(CONFIG))
    fetched: list[Any] = []
    vae._hf_hook = SimpleNamespace(pre_forward=fetched.append)
    vae.decode(LATENT)
    vae.encode(PICTURE)
    assert fetched == [vae, vae]


def test_the_page_shows_code_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = PAGE.read_text().split("```python\n")[1].split("```")[0]
    tiny_pipeline().save_pretrained(tmp_path / "Cosmos3-Nano")
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    try:
        exec(code, names := {})
    finally:
        torch.distributed.destroy_process_group()
    assert type(names["pipe"].vae) is ParallelVAE
    assert type(Cosmos3OmniPipeline.from_pretrained(tmp_path / "saved").vae) is AutoencoderKLWan


def test_a_model_whose_encoder_does_not_fit_the_picture_decodes() -> None:
    model = make_vae({**CONFIG, "in_channels": 3})  # as in the tests of Bria Fibo, with patch_size 2
    assert (picture(alone(model)) - picture(model)).abs().max() <= 1e-5
    with pytest.raises(ProgramError, match=r"(?s)in_channels=3 with patch_size=2.* give a multiple of 4"):
        alone(model).encode(PICTURE)


WITHOUT_HYDRA = """
import sys
sys.modules.update(dict.fromkeys(("hydra", "omegaconf", "antlr4", "av", "rich")))  # importing them fails
import torch
from diffusers import AutoencoderKLWan
sys.modules["yaml"] = None  # which diffusers needs itself
import cosmos3_pipeline
from cosmos3_pipeline.vae import ParallelVAE
from cosmos3_plugins.auto import Auto
from cosmos3_plugins.layer_pipeline import LayerPipeline
from cosmos3_plugins.pipeline_of_shards import PipelineOfShards
from cosmos3_plugins.replicated import Replicated
from cosmos3_plugins.spatial_shard import SpatialShard
from cosmos3_plugins.tiled import Tiled

model = AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
for strategy in (Replicated(), LayerPipeline(), PipelineOfShards(groups=1), SpatialShard(), Tiled()):
    vae = ParallelVAE(model, encode=strategy, decode=strategy)
    z = vae.encode(torch.zeros(1, 3, 1, 32, 32)).latent_dist.mode()
    assert vae.decode(z).sample.shape == (1, 3, 1, 32, 32)
    assert len(list(vae.decode_stream(z))) == 1
"""


@pytest.mark.long
def test_it_needs_nothing_of_the_application() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_HYDRA], check=True)


def test_a_strategy_by_name_alone_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="encode='replicated'; a strategy is an object"):
        ParallelVAE(make_vae(CONFIG), "replicated", Replicated())  # type: ignore[arg-type]


def test_a_device_without_an_index_is_the_one_that_tensors_name() -> None:
    """A VAE on "cuda" and its input on "cuda:0" are on the same device. Fake tensors show this without a GPU."""
    with torch.device("meta"):
        autoencoder = AutoencoderKLWan(**CONFIG)
    with FakeTensorMode():
        vae = ParallelVAE(
            autoencoder, encode=Replicated(), decode=Replicated(), dtype=torch.float32, device=torch.device("cuda")
        )
        assert vae.device == torch.empty(0, device="cuda").device == torch.device("cuda", 0)
