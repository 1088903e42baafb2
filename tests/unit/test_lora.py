"""LoRA adapters: merged as diffusers merges them, wherever a weight is kept, or refused with the reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import FILE, contents, make_adapter, merge, write
from checkpoints import TRANSFORMER_PARTS, make_layout
from diffusers import Cosmos3OmniTransformer
from safetensors.torch import save_file
from torch import Tensor

from cosmos3_pipeline import compose
from cosmos3_pipeline.checkpoint.inspect import CheckpointInfo, inspect_checkpoint
from cosmos3_pipeline.checkpoint.lora import read_adapters
from cosmos3_pipeline.checkpoint.weights import Part, slabs_of
from cosmos3_pipeline.config import compose as composing
from cosmos3_pipeline.config.schema import LoraConfig
from cosmos3_pipeline.errors import ConfigError, Fault, Refusal
from cosmos3_pipeline.jobs.generate import generate
from cosmos3_pipeline.jobs.start import prepare
from cosmos3_pipeline.models import reading
from cosmos3_pipeline.models.passing import SlabFiles
from cosmos3_pipeline.models.reading import read_tensors
from cosmos3_pipeline.planning.checks import check_composition
from cosmos3_pipeline.plugin_kit.live_bytes import LiveBytes
from cosmos3_pipeline.review.compare import picture

CPU = torch.device("cpu")
READ = (*TRANSFORMER_PARTS, Part.SOUND)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, an adapter of it, and another with ranks and scales by pattern."""
    root = tmp_path_factory.mktemp("lora")
    make_layout(root / "nano", "nano")
    make_adapter(root / "nano", root / "plain")
    patterns = {"rank_pattern": {"to_q": 3, r"layers\.0\..*to_v": 5}, "alpha_pattern": {"^proj_in": 7, "to_q": 11}}
    settings = {"r": 8, "lora_alpha": 5, "use_rslora": True, "target_modules": "all-linear", **patterns}
    make_adapter(root / "nano", root / "patterned", seed=1, **settings)
    return root


def opened(root: Path, *adapters: tuple[Path, float]) -> CheckpointInfo:
    asked = [LoraConfig(path=str(folder), weight=weight) for folder, weight in adapters]
    return inspect_checkpoint(root / "nano").with_adapters(read_adapters(asked))


def ours(root: Path, dtype: torch.dtype, *adapters: tuple[Path, float]) -> dict[str, Tensor]:
    info = opened(root, *adapters)
    return read_tensors(info.parts("transformer", READ), dtype=dtype, device=CPU)


def theirs(root: Path, dtype: torch.dtype, load: Callable[[Cosmos3OmniTransformer], object]) -> dict[str, Tensor]:
    model = Cosmos3OmniTransformer.from_pretrained(root / "nano" / "transformer", torch_dtype=dtype)
    load(model)
    return dict(model.state_dict())


def changed(weights: dict[str, Tensor], before: dict[str, Tensor]) -> set[str]:
    return {name for name, weight in weights.items() if not torch.equal(weight, before[name])}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, weight in found.items():
        assert weight.dtype == expected[name].dtype, name
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "names", [["plain"], ["patterned"], ["plain", "patterned"], ["patterned", "plain"]], ids=str
)
def test_the_merged_weights_are_diffusers_own(names: list[str], dtype: torch.dtype, root: Path) -> None:
    adapters = [(root / name, weight) for name, weight in zip(names, (0.8, -0.3), strict=False)]
    found = ours(root, dtype, *adapters)
    assert_same(found, theirs(root, dtype, lambda model: merge(model, adapters)))
    moved = changed(found, ours(root, dtype))
    assert {"proj_in.weight", "time_embedder.linear_2.weight"} < moved
    assert {"layers.1.self_attn.to_v.weight", "layers.1.self_attn.add_k_proj.weight"} < moved
    assert names == ["plain"] or "audio_proj_out.weight" in moved
    assert "embed_tokens.weight" not in moved and not any("norm" in name or "bias" in name for name in moved)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_adapters_is_that_of_the_list(dtype: torch.dtype, root: Path) -> None:
    adapters = [(root / "plain", 0.8), (root / "patterned", -0.3)]
    assert changed(ours(root, dtype, *adapters), ours(root, dtype, *reversed(adapters)))


def test_a_pipelines_prefix_is_in_names_and_metadata(root: Path, tmp_path: Path) -> None:
    tensors, metadata = contents(root / "patterned")
    settings = json.loads(metadata["lora_adapter_metadata"])
    prefixed = {f"transformer.{key}": value for key, value in settings.items()}
    words = {"lora_adapter_metadata": json.dumps(prefixed)}
    folder = write(tmp_path / "prefixed", {f"transformer.{k}": v for k, v in tensors.items()}, words)
    assert_same(ours(root, torch.float32, (folder, 0.5)), ours(root, torch.float32, (root / "patterned", 0.5)))


def test_without_metadata_the_scale_is_one(root: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "bare", contents(root / "patterned")[0])
    found = ours(root, torch.float32, (folder, 0.7))
    assert_same(found, theirs(root, torch.float32, lambda model: merge(model, [(folder, 0.7)])))
    assert changed(found, ours(root, torch.float32, (root / "patterned", 0.7)))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64], ids=str
)
def test_alphas_of_the_file_are_diffusers_network_alphas(dtype: torch.dtype, root: Path, tmp_path: Path) -> None:
    """There `load_lora_adapter` takes them beside the tensors, which is how diffusers' pipelines call it."""
    tensors = {f"transformer.{name}": tensor for name, tensor in contents(root / "patterned")[0].items()}
    modules = sorted({name.rpartition(".lora_")[0] for name in tensors})
    alphas = {f"{name}.alpha": torch.tensor(2 + number % 3).to(dtype) for number, name in enumerate(modules)}
    folder = write(tmp_path / "alphas", {**tensors, **alphas})

    def load(model: Cosmos3OmniTransformer) -> None:
        numbers = {name: alpha.item() for name, alpha in alphas.items()}
        model.load_lora_adapter(tensors, network_alphas=numbers, adapter_name="one")
        model.set_adapters(["one"], [0.6])
        model.fuse_lora()
        model.unload_lora()

    assert_same(ours(root, torch.float32, (folder, 0.6)), theirs(root, torch.float32, load))


def test_names_of_older_trainers_are_those_that_diffusers_converts(root: Path, tmp_path: Path) -> None:
    def older(name: str) -> str:
        return name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")

    tensors, _ = contents(root / "plain")
    folder = write(tmp_path / "older", {older(name): tensor for name, tensor in tensors.items()})
    found = ours(root, torch.float32, (folder, 1.0))
    assert_same(found, theirs(root, torch.float32, lambda model: merge(model, [(folder, 1.0)])))
    assert changed(found, ours(root, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=str)
def test_a_files_dtype_is_converted_as_diffusers_does(
    stored: torch.dtype, dtype: torch.dtype, root: Path, tmp_path: Path
) -> None:
    tensors, metadata = contents(root / "plain")
    folder = write(tmp_path / "half", {name: tensor.to(stored) for name, tensor in tensors.items()}, metadata)
    found = ours(root, dtype, (folder, 0.9))
    assert_same(found, theirs(root, dtype, lambda model: merge(model, [(folder, 0.9)])))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", TRANSFORMER_PARTS)
def test_a_rank_that_keeps_a_part_of_a_layer_has_the_bits_of_the_whole(
    part: Part, dtype: torch.dtype, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several blocks, with cuts within a row, within a weight and on a boundary."""
    monkeypatch.setattr(reading, "MERGED_ELEMENTS", 64 * 100)
    info = opened(root, (root / "plain", 0.8), (root / "patterned", -0.3))
    placed = [one for one in info.parts("transformer", (part,)) if one.weight.layer is not None]
    slabs = slabs_of((one.weight for one in placed), part)
    files = SlabFiles(slabs, {one.weight.name: one.stored for one in placed})
    weights = read_tensors(placed, dtype=dtype, device=CPU)
    ranks = 7
    for number, slab in enumerate(slabs):
        share = slab.share(ranks)
        parts = [torch.zeros(share, dtype=dtype) for _ in range(ranks)]
        for rank, own in enumerate(parts):
            files.read(number, own, first=rank * share, check=True, advance=lambda nbytes: None)
        gathered = torch.cat(parts)
        for weight, start in zip(slab.weights, slab.starts, strict=True):
            expected = weights[weight.name].view(-1)
            assert torch.equal(gathered[start : start + weight.elements], expected), weight.name


def test_blocks_of_a_published_width_have_the_bits_of_one_product() -> None:
    """Nano's wide matrix: a block of many rows is summed as the whole is."""
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(32, 4096, generator=generator), torch.randn(12288, 32, generator=generator)
    rows = -(-12288 // -(-12288 * 4096 // reading.MERGED_ELEMENTS))
    assert rows < 12288
    blocks = [up[row : row + rows] @ down for row in range(0, 12288, rows)]
    assert torch.equal(torch.cat(blocks), up @ down)


WIDE = "layers.0.mlp_moe_gen.down_proj.weight"


def test_a_merge_holds_less_than_the_product_of_one_weight(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MERGED_ELEMENTS", 64 * 8)
    peaks = []
    for info in (opened(root), opened(root, (root / "plain", 0.8))):
        wide = [
            one
            for one in info.tensors["transformer"]
            if one.weight.name == "layers.0.mlp_moe_gen.down_proj.weight"
        ]
        with LiveBytes([]) as live:
            read_tensors(wide, dtype=torch.bfloat16, device=CPU)
        peaks.append(live.peak)
    assert 0 < peaks[1] - peaks[0] < 4 * wide[0].weight.elements


def test_values_that_are_no_weights_end_the_run(root: Path, tmp_path: Path) -> None:
    tensors, metadata = contents(root / "plain")
    name = "proj_in.lora_A.weight"
    folder = write(tmp_path / "nan", {**tensors, name: tensors[name] * float("nan")}, metadata)
    with pytest.raises(Fault, match=rf"{name} in .*{FILE}"):
        ours(root, torch.float32, (folder, 1.0))
    with pytest.raises(Fault, match=r"with what .*plain.* adds, has .* NaN or too large"):
        ours(root, torch.float32, (root / "plain", 1e9))


def settings_of(root: Path, **changes: Any) -> dict[str, str]:
    settings = json.loads(contents(root / "plain")[1]["lora_adapter_metadata"])
    return {"lora_adapter_metadata": json.dumps({**settings, **changes})}


Q = "layers.0.self_attn.to_q"
PAIR = {f"{Q}.lora_A.weight": torch.ones(4, 128), f"{Q}.lora_B.weight": torch.ones(128, 4)}


def renamed(old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): tensor.clone() for name, tensor in PAIR.items()}


AGAIN = "save_lora_adapter"
# The tensors of a file, and words of the refusal's what, why and works.
REFUSED: dict[str, tuple[dict[str, Tensor], tuple[str, str, str]]] = {
    "no lora": ({"proj_in.weight": torch.ones(2, 2)}, ("holds proj_in.weight", "no tensor", AGAIN)),
    "empty": ({}, ("holds no tensor", "two matrices", AGAIN)),
    "typo": (
        renamed("to_q", "to_qq"),
        ("changes layers.0.self_attn.to_qq", "no linear layer", f"did you mean {Q}"),
    ),
    "unread": (
        {"lm_head.lora_A.weight": torch.ones(4, 128), "lm_head.lora_B.weight": torch.ones(512, 4)},
        ("changes only lm_head", "no effect", "of other layers"),
    ),
    "embedding": (renamed(Q, "embed_tokens"), ("embed_tokens", "no linear layer", "trained on this model")),
    "other layer": (renamed("layers.0", "layers.99"), ("layers.99.self_attn", "no linear layer", "did you mean")),
    "other shape": (
        {**PAIR, f"{Q}.lora_B.weight": torch.ones(64, 4)},
        (f"{Q} by a matrix of shape .64, ", "another model's", "trained on this model"),
    ),
    "other text": (
        {**PAIR, "text_encoder.to_q.bias": torch.ones(2)},
        ("holds text_encoder.to_q.bias", "would be ignored", AGAIN),
    ),
    "one matrix": (
        {f"{Q}.lora_A.weight": torch.ones(4, 128)},
        (f"no matrix up for {Q}", "product of both", AGAIN),
    ),
    "ranks": (
        {**PAIR, f"{Q}.lora_B.weight": torch.ones(128, 3)},
        ("shape .4, 128. down and .128, 3. up", "rank", AGAIN),
    ),
    "dora": (
        {**PAIR, f"{Q}.lora_magnitude_vector.weight": torch.ones(128)},
        ("magnitude", "DoRA", AGAIN),
    ),
    "bias": (
        {**PAIR, f"{Q}.lora_B.bias": torch.ones(128)},
        ("lora_B.bias", "changes a bias", AGAIN),
    ),
    "kohya": (renamed("lora_A", "lora_down"), ("lora_down", "kohya.*does not convert", AGAIN)),
    "peft": (
        renamed("layers.0", "base_model.model.layers.0"),
        ("base_model", "another file", AGAIN),
    ),
    "lokr": ({f"{Q}.lokr_w1": torch.ones(2, 2)}, ("lokr_w1", "LoKr", AGAIN)),
    "quantized": (
        {**PAIR, f"{Q}.lora_A.weight": torch.ones(4, 128).to(torch.int8)},
        ("is I8", "quantized", "unquantized"),
    ),
    "some alphas": (
        {**PAIR, **renamed("layers.0", "layers.1"), f"{Q}.alpha": torch.tensor(2.0)},
        (f"an alpha for {Q} and none for layers.1", "disagree", AGAIN),
    ),
    "alphas": ({**PAIR, f"{Q}.alpha": torch.ones(2)}, ("not whole", "not one number", "downloading")),
    "nan alpha": ({**PAIR, f"{Q}.alpha": torch.tensor(float("nan"))}, ("not whole", "is nan", "downloading")),
}


def check_parts(error: pytest.ExceptionInfo[Refusal], said: tuple[str, str, str]) -> None:
    problem = error.value.problem
    for words, part in zip(said, (problem.what, problem.why, problem.works), strict=True):
        assert re.search(words, part), part


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_merged_is_refused_by_name(name: str, root: Path, tmp_path: Path) -> None:
    tensors, said = REFUSED[name]
    folder = write(tmp_path / "adapter", tensors)
    with pytest.raises(Refusal) as refused:
        opened(root, (folder, 1.0))
    check_parts(refused, said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, ("use_dora=True", "no sum", "plain LoRA")),
        ({"init_lora_weights": "pissa"}, ("init_lora_weights=pissa", "begins by changing", "plain LoRA")),
        ({"r": 5}, ("not whole", "has the rank 5, its matrix another", "downloading")),
        ({"alpha_pattern": {"(": 3}}, ("not whole", "no LoraConfig", "downloading")),
        ({"lora_alpha": "six"}, ("not whole", "no LoraConfig", "downloading")),
        ({"rank_pattern": [3]}, ("not whole", "no LoraConfig", "downloading")),
    ],
    ids=str,
)
def test_metadata_of_another_method_is_refused(
    changes: dict[str, Any], said: tuple[str, str, str], root: Path, tmp_path: Path
) -> None:
    folder = write(tmp_path / "adapter", contents(root / "plain")[0], settings_of(root, **changes))
    with pytest.raises(Refusal) as refused:
        opened(root, (folder, 1.0))
    check_parts(refused, said)


def test_metadata_and_alphas_together_are_refused_as_diffusers_refuses_them(root: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", {**PAIR, f"{Q}.alpha": torch.tensor(2.0)}, settings_of(root))
    with pytest.raises(Refusal, match="names alphas in its metadata"):
        opened(root, (folder, 1.0))


def test_what_no_run_reads_may_be_changed(root: Path, tmp_path: Path) -> None:
    """An adapter for all linear layers has the one that writes words."""
    names = {name.removesuffix(".lora_A.weight") for name in contents(root / "patterned")[0]}
    read = {one.weight.name for one in opened(root).parts("transformer", READ)}
    assert {name for name in names if f"{name}.weight" not in read} >= {"lm_head", "layers.3.self_attn.to_q"}


def test_what_this_run_does_not_read_may_not_be_all_that_changes(tmp_path: Path) -> None:
    heads = {f"audio_proj_out.lora_{name}.weight": torch.ones(4, 4) for name in "AB"}
    lora = f"model.lora=[{{path: {write(tmp_path / 'adapter', heads)}}}]"
    works = {}
    for sound in ("true", "false"):
        with pytest.raises(ConfigError) as refused:
            check_composition(composing.compose(["model=toy_random", f"task.sound={sound}", lora]))
        (problem,) = refused.value.problems
        works[sound] = problem.why
    assert "this run does not read" in works["false"]
    assert "the adapter is another model's" in works["true"]  # its matrices are too small


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (["model=edge", "task.sound=true"], "no head for sound"),
        # Weights that are known are compared with the adapter's before the task is checked.
        (["model=toy_random", "task=policy", "task.view_point=null"], "this run does not read"),
    ],
)
def test_a_wrong_task_beside_an_adapter_is_refused(mistake: list[str], said: str, tmp_path: Path) -> None:
    heads = {f"audio_proj_out.lora_{name}.weight": torch.ones(4, 4) for name in "AB"}
    lora = f"model.lora=[{{path: {write(tmp_path / 'adapter', heads)}}}]"
    with pytest.raises(ConfigError, match=said):
        check_composition(composing.compose([*mistake, lora]))


PATHS = {
    "missing": ("plane", ("no such file", "does not exist", "did you mean plain")),
    "hub": ("owner/name", ("owner/name", "id of the hub", "hf download owner/name")),
    "empty folder": ("empty", (f"has no {FILE}", "no safetensors", AGAIN)),
    "other name": ("other", (f"has no {FILE}", "anything", "other/style.safetensors")),
    "pickle": ("style.bin", ("no safetensors file", "pickle", AGAIN)),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_path_without_an_adapter_is_refused(name: str, root: Path, tmp_path: Path) -> None:
    for folder in ("empty", "other", "plain"):
        (tmp_path / folder).mkdir()
    (tmp_path / "style.bin").touch()
    save_file(PAIR, tmp_path / "other" / "style.safetensors")
    path, said = PATHS[name]
    with pytest.raises(Refusal) as refused:
        opened(root, (Path(path) if name == "hub" else tmp_path / path, 1.0))
    check_parts(refused, said)


def overrides(root: Path, adapter: str) -> list[str]:
    return ["model=toy_random", f"model.path={root / 'nano'}", f"model.lora=[{adapter}]"]


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ("{path: ROOT/plain, weight: nan}", r"model.lora\[0\].weight=nan"),
        ("{path: ROOT/plain, weight: inf}", r"model.lora\[0\].weight=inf"),
        ("{path: ROOT/plain},{path: ROOT/none}", r"model.lora\[1\].path"),
        ("{path: ROOT/neither},{path: ROOT/none}", r"(?s)lora\[0\].path.*lora\[1\].path"),
        ("{path: ROOT/plain},{path: ROOT/./plain, weight: 0.5}", r"(?s)are one adapter.*weight: 1\.5"),
        ("{weight: 0.5}", r"path"),
        ("{path: ROOT/plain, wait: 0.5}", r"wait"),
        ("{path: ROOT/plain, weight: much}", r"much"),
    ],
)
def test_a_composition_is_refused_for_its_adapters(adapter: str, said: str, root: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        compose(overrides(root, adapter.replace("ROOT", str(root))))


def test_the_model_made_on_the_spot_is_checked_by_its_numbers(root: Path, tmp_path: Path) -> None:
    own = write(tmp_path / "own", PAIR)
    with pytest.raises(ConfigError, match="to_q by a matrix"):
        compose(["model=toy_random", "model.transformer.hidden_size=64", f"model.lora=[{{path: {own}}}]"])


@pytest.mark.long
def test_a_run_names_the_adapter_and_its_hash(root: Path, tmp_path: Path) -> None:
    """In the plan, in config.yaml and in metrics.json; and the same run again refuses another file."""
    adapter = make_adapter(root / "nano", tmp_path / "adapter", seed=2)
    small = ["task.num_frames=5", "task.height=32", "task.width=48", "sampler.steps=1", "output.latents=true"]
    asked = [*small, *overrides(root, f"{{path: {adapter}, weight: 0.5}}")]
    prepared = prepare(composing.compose(asked))
    (named,) = prepared.config.model.lora
    assert named.sha256 is not None and len(named.sha256) == 64
    assert any(str(adapter) in note and "0.5" in note for note in prepared.plan.notes)
    (tmp_path / "run").mkdir()
    generate(prepared, tmp_path / "run")
    (told,) = json.loads((tmp_path / "run" / "metrics.json").read_text())["checkpoint"]["lora"]
    assert told["sha256"] == named.sha256 and told["weight"] == 0.5 and told["file"] == str(adapter / FILE)
    assert told["layers"] == len(contents(adapter)[0]) // 2

    make_adapter(root / "nano", adapter, seed=3)
    with pytest.raises(ConfigError, match="has another"):
        prepare(composing.Composition.of_saved(prepared.config))


def test_a_review_calls_it_another_picture() -> None:
    moved = {"model.lora": ([], [{"path": "style", "weight": 1.0, "sha256": None}])}
    assert picture(moved, {}, {}) == "another picture (model.lora)"
