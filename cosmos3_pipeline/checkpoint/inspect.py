"""Inspect a checkpoint before weights are read: whether it is Cosmos3, complete, and can run here.

A Cosmos3 checkpoint is a diffusers folder: `model_index.json` and one subfolder per component.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cosmos3_pipeline.checkpoint import rules
from cosmos3_pipeline.checkpoint.files import (
    INDEX,
    MODULAR_INDEX,
    NEGATIVE_PROMPT,
    is_regular,
    not_whole,
    read_json,
)
from cosmos3_pipeline.checkpoint.lora import Adapter, with_added
from cosmos3_pipeline.checkpoint.rules import clipped
from cosmos3_pipeline.checkpoint.sampler import DISTILLED, EDGE_UNIPC, UNIPC, Sampler, sampler_of
from cosmos3_pipeline.checkpoint.sound import HOP, SAMPLE_RATE, SOUND_TOKENIZER, sound_weights
from cosmos3_pipeline.checkpoint.stored import FLOATS, StoredTensor, stored_tensors
from cosmos3_pipeline.checkpoint.tokenizer_files import check_tokenizer_files
from cosmos3_pipeline.checkpoint.weights import Part, Weight, transformer_weights, vae_weights
from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.vae.builder import ProgramError
from cosmos3_pipeline.vae.program import program_for

# The published Nano and Super have the first name. Checkpoints converted since July 2026 have the second name.
PIPELINES = ("Cosmos3OmniDiffusersPipeline", "Cosmos3OmniPipeline")
DISTILLED_CLASSES = {"Cosmos3DistilledModularPipeline", "Cosmos3DistilledBlocks"}
# Beginnings of the names of the tokenizer classes with which checkpoints are published and saved.
TOKENIZERS = ("Qwen2Tokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")
LARGEST_NEGATIVE_PROMPT = 2**18
# Folder of each component -> its config file, and the class that the file must name (None: checked elsewhere).
COMPONENTS = {
    "transformer": ("config.json", "Cosmos3OmniTransformer"),
    "vae": ("config.json", "AutoencoderKLWan"),
    "scheduler": ("scheduler_config.json", None),
    "text_tokenizer": ("tokenizer_config.json", None),
}
# Read only if sound is asked for.
SOUND_COMPONENT = ("config.json", "Cosmos3AVAEAudioTokenizer")
# diffusers' Cosmos3 blocks compute latent sizes with these factors while the VAE is not loaded.
SPATIAL, TEMPORAL = 16, 4
# Files that prove quantized weights, in the folder or in a component's folder, and the tool that wrote them.
QUANTIZED_FILES = {
    "hf_quant_config.json": "ModelOpt",
    "modelopt_state.pth": "ModelOpt",
    "quantization_config.json": "by the method that the file names",
}
# Names that quantizers give to the tensors that belong to a weight.
QUANTIZED_NAMES = ("weight_scale", "input_scale", "weight_scale_2", "qweight", "qzeros", "scales", "absmax")


@dataclass(frozen=True)
class Placed:
    """A tensor of the model, and the place of its bytes."""

    weight: Weight
    stored: StoredTensor


@dataclass(frozen=True)
class CheckpointInfo:
    """The contents of a checkpoint folder. Config values are complete: a key that a file lacks has its default.

    negative_prompt: the checkpoint's text; None if it has none, or if it is distilled and nothing reads a text.
    sound_tokenizer: None if it was not asked for.
    tensors: for each component with weights.
    not_read: keys and components that change no picture here, as "file: key".
    strangers: keys that this library does not know, as "file: key".
    adapters: LoRA adapters that are added to the tensors as they are read.
    """

    folder: Path
    index: Mapping[str, Any]
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    sampler: Sampler
    negative_prompt: str | None
    tensors: Mapping[str, tuple[Placed, ...]]
    not_read: tuple[str, ...]
    strangers: tuple[str, ...]
    adapters: tuple[Adapter, ...] = ()
    sound_tokenizer: Mapping[str, Any] | None = None

    def parts(self, component: str, parts: Collection[Part]) -> tuple[Placed, ...]:
        """The tensors of `component` that belong to `parts`."""
        return tuple(placed for placed in self.tensors[component] if placed.weight.part in parts)

    def with_adapters(self, adapters: Sequence[Adapter]) -> CheckpointInfo:
        """This checkpoint with `adapters` added to the transformer, in their order.

        Raises:
            Refusal: an adapter that does not fit.
        """
        placed = self.tensors["transformer"]
        for adapter in adapters:
            adapter.check_fits(one.weight for one in placed)
        merged = tuple(replace(one, stored=with_added(one.stored, adapters)) for one in placed)
        return replace(self, tensors={**self.tensors, "transformer": merged}, adapters=tuple(adapters))


def inspect_checkpoint(path: str | Path, *, sound: bool = False) -> CheckpointInfo:
    """Inspect the diffusers folder at `path`. Reads configs and the headers of weight files only.

    sound: whether the checkpoint must make sound. Its transformer then needs a head for sound, and the folder
    needs a sound tokenizer.

    Raises:
        Refusal: there is no folder or no Cosmos3 checkpoint, it cannot run here, or files are incomplete.
    """
    folder = Path(path).expanduser()
    index_file = _find_index(path, folder)
    raw_index = read_json(index_file)
    if raw_index.get("_class_name") not in PIPELINES:
        raise Refusal(
            what=f"{folder} holds a {raw_index.get('_class_name')}",
            why=f"its components and their call differ from those of a {PIPELINES[-1]}",
            works="a Cosmos3 checkpoint in diffusers' layout, such as nvidia/Cosmos3-Nano",
        )
    configs = {name: _component_config(folder, name, raw_index) for name in COMPONENTS}
    rules.refuse_quantized(configs["transformer"], folder / "transformer" / COMPONENTS["transformer"][0])
    _refuse_quantized_files(folder)
    modular = read_json(folder / MODULAR_INDEX) if is_regular(folder / MODULAR_INDEX) else {}
    if configs["scheduler"].get("_class_name") != DISTILLED:
        _refuse_distilled(folder, raw_index, modular)

    components = {*COMPONENTS, *rules.INDEX.read, *rules.INDEX.not_read}
    index = rules.apply(rules.INDEX, raw_index, index_file)
    files = {name: folder / name / COMPONENTS[name][0] for name in COMPONENTS}
    sampler, scheduler = sampler_of(configs["scheduler"], index.values, modular, files["scheduler"])
    transformer = rules.apply(rules.TRANSFORMER, configs["transformer"], files["transformer"])
    vae = rules.apply(rules.VAE, configs["vae"], files["vae"])
    rules.check_transformer(transformer.values, files["transformer"])
    _check_vae(vae.values, files["vae"])
    vae_values = {**vae.values, "scale_factor_spatial": SPATIAL, "scale_factor_temporal": TEMPORAL}
    if transformer.values["latent_channel"] != vae.values["z_dim"]:
        raise Refusal(
            what=f"{files['transformer']} says latent_channel: {transformer.values['latent_channel']}",
            why=f"the VAE beside it has z_dim: {vae.values['z_dim']}, and one makes what the other decodes",
            works="transformer and vae of one checkpoint",
        )
    if sound:
        tokenizer = _sound_tokenizer(folder, raw_index, transformer.values)
    check_tokenizer_files(folder / "text_tokenizer", configs["text_tokenizer"], TOKENIZERS)
    weights = {
        "transformer": transformer_weights(transformer.values),
        "vae": vae_weights(vae_values),
    }
    tensors = {name: _placed(folder / name, weights[name]) for name in weights}
    reads = {INDEX: index, "transformer": transformer, "vae": vae, "scheduler": scheduler}
    if sound:
        reads[SOUND_TOKENIZER] = tokenizer
        own = sound_weights(tokenizer.values, tokenizer.values["vocoder_input_dim"])
        tensors[SOUND_TOKENIZER] = _placed(folder / SOUND_TOKENIZER, own, unread="encoder.")
    return CheckpointInfo(
        folder=folder,
        index=index.values,
        transformer=transformer.values,
        vae=vae_values,
        sampler=sampler,
        negative_prompt=None if sampler.distilled_sigmas else _negative_prompt(folder / NEGATIVE_PROMPT),
        tensors=tensors,
        not_read=tuple(
            f"{file}: {key}"
            for file, read in reads.items()
            for key in read.not_read
            if not (sound and key == SOUND_TOKENIZER)
        ),
        strangers=tuple(
            f"{file}: {key}" for file, read in reads.items() for key in read.strangers if key not in components
        ),
        sound_tokenizer=tokenizer.values if sound else None,
    )


def _sound_tokenizer(folder: Path, index: Mapping[str, Any], transformer: Mapping[str, Any]) -> rules.Read:
    """The config of the sound tokenizer. Raises Refusal if its latents do not fit `transformer`."""
    if not transformer["sound_gen"]:
        raise Refusal(
            what=f"task.sound=true with {folder}",
            why="its transformer has no head for sound (sound_gen: false in transformer/config.json)",
            works="Cosmos3-Nano or -Super, which have one, or task.sound=false",
        )
    file, class_name = folder / SOUND_TOKENIZER / SOUND_COMPONENT[0], SOUND_COMPONENT[1]
    if not is_regular(file):
        raise Refusal(
            what=f"task.sound=true, and {folder} has no {SOUND_TOKENIZER}/{file.name}",
            why="the sound tokenizer makes the waveform, and nothing else can",
            works="the whole checkpoint with that folder, or task.sound=false",
        )
    config = read_json(file)
    if (named := config.get("_class_name")) != class_name:
        raise _other_class(f"{file} names the class {clipped(named)}", SOUND_TOKENIZER, class_name)
    _check_entry(folder / INDEX, SOUND_TOKENIZER, index.get(SOUND_TOKENIZER), class_name)
    read = rules.apply(rules.SOUND_TOKENIZER, config, file)
    for key, found, wanted, name in (
        ("vocoder_input_dim", read.values["vocoder_input_dim"], transformer["sound_dim"], "sound_dim"),
        ("sampling_rate", SAMPLE_RATE / HOP, transformer["sound_latent_fps"], "sound_latent_fps"),
    ):
        if found != wanted:
            raise Refusal(
                what=f"{file} says {key}: {read.values[key]}",
                why=f"the transformer beside it has {name}: {wanted}, and one makes what the other decodes",
                works="transformer and sound tokenizer of one checkpoint",
            )
    return read


def _find_index(path: str | Path, folder: Path) -> Path:
    if not folder.is_dir():
        raise Refusal(
            what=f"there is no checkpoint at {path}",
            why=f"{folder.absolute()} {'is a file' if folder.exists() else 'does not exist'}",
            works="model.path=FOLDER with a diffusers folder of Cosmos3, or model=toy",
        )
    if is_regular(folder / INDEX):
        return folder / INDEX
    inside = sorted(p.parent.name for p in folder.glob(f"*/{INDEX}"))
    raise Refusal(
        what=f"{folder} is not a diffusers folder",
        why=f"it has no {INDEX}",
        works=f"model.path={folder / inside[0]}" if inside else f"the folder that holds {INDEX}",
    )


def _component_config(folder: Path, name: str, index: Mapping[str, Any]) -> dict[str, Any]:
    file, class_name = COMPONENTS[name]
    if not is_regular(folder / name / file):
        raise Refusal(
            what=f"{folder} has no {name}/{file}",
            why=f"a Cosmos3 pipeline needs its {name}",
            works="the whole checkpoint: the download may have ended early, or left out subfolders",
        )
    config = read_json(folder / name / file)
    found = config.get("_class_name")
    if class_name is not None and found != class_name:
        raise _other_class(f"{folder / name / file} names the class {clipped(found)}", name, class_name)
    _check_entry(folder / INDEX, name, index.get(name), found)
    return config


def _check_entry(file: Path, name: str, entry: Any, class_name: Any) -> None:
    """Raise Refusal unless the index names the same library and class as the component's config."""
    library = "transformers" if name == "text_tokenizer" else "diffusers"
    if not isinstance(entry, list) or len(entry) != 2 or entry[0] != library or not isinstance(entry[1], str):
        raise _other_class(f"{file} says {name}: {clipped(entry)}", name, f"[{library}, {class_name or '...'}]")
    if name == "text_tokenizer":
        if not entry[1].startswith(TOKENIZERS):
            raise _other_class(f"{file} says {name}: {clipped(entry)}", name, " or ".join(TOKENIZERS))
    elif entry[1] != class_name and not {entry[1], class_name} <= {UNIPC, EDGE_UNIPC}:
        raise _other_class(f"{file} says {name}: {clipped(entry)}", name, f"{class_name}, as {name}/ itself says")


def _other_class(what: str, name: str, expected: str) -> Refusal:
    return Refusal(
        what=what,
        why=f"the class of the {name} of Cosmos3 is {expected}",
        works="a Cosmos3 checkpoint in diffusers' layout, such as nvidia/Cosmos3-Nano",
    )


def _refuse_quantized_files(folder: Path) -> None:
    for name, method in QUANTIZED_FILES.items():
        for file in (folder / name, *(folder / component / name for component in ("transformer", "vae"))):
            if file.exists():
                raise rules.quantized(f"{folder} has {file.relative_to(folder)}", method)


def _refuse_distilled(folder: Path, index: Mapping[str, Any], modular: Mapping[str, Any]) -> None:
    """Raise Refusal if an index says that the checkpoint is distilled, because its scheduler is not."""
    for name, config in ((INDEX, index), (MODULAR_INDEX, modular)):
        classes = {config.get("_class_name"), config.get("_blocks_class_name")}
        if config.get("is_distilled") or "distilled_sigmas" in config or classes & DISTILLED_CLASSES:
            raise Refusal(
                what=f"{folder / name} says that the checkpoint is distilled",
                why=f"the scheduler beside it is no {DISTILLED}, which alone has the fixed steps and their noise",
                works="index and scheduler of one checkpoint",
            )


def _negative_prompt(file: Path) -> str | None:
    """The caption in `file` on one line, as NVIDIA's framework writes it into the prompt."""
    if not is_regular(file):
        if file.is_symlink():
            raise not_whole(file, "it is a link to a file that is not there")
        return None
    return json.dumps(read_json(file, largest=LARGEST_NEGATIVE_PROMPT))


def _check_vae(values: Mapping[str, Any], file: Path) -> None:
    for name in ("latents_mean", "latents_std"):
        if len(values[name]) != values["z_dim"]:
            raise Refusal(
                what=f"{file} has {len(values[name])} values in {name}",
                why=f"each of the z_dim: {values['z_dim']} latent channels has its own",
                works="the file as it was published",
            )
    try:
        program = program_for("decode", values)
        program_for("encode", values)
    except ProgramError as error:
        problem = error.problem
        raise Refusal(f"{file} says {problem.what}", problem.why, "the file as it was published") from error
    for key, expected, found in (
        ("scale_factor_spatial", SPATIAL, program.spatial),
        ("scale_factor_temporal", TEMPORAL, program.temporal),
    ):
        said = found if values[key] is None else values[key]
        if said != expected or found != expected:
            raise Refusal(
                what=f"{file} says {key}: {said}" + ("" if said == found else f", its layers {found}"),
                why=f"the VAE of Cosmos3 is Wan2.2's, with {key}={expected}",
                works="a Cosmos3 checkpoint in diffusers' layout, such as nvidia/Cosmos3-Nano",
            )


def _placed(component: Path, weights: Iterable[Weight], *, unread: str | None = None) -> tuple[Placed, ...]:
    """Each weight with its tensor in the files. Weights that nothing reads may be missing.

    Tensors whose names begin with `unread` are ignored.
    """
    stored = {
        name: tensor
        for name, tensor in stored_tensors(component).items()
        if unread is None or not name.startswith(unread)
    }
    expected = {weight.name: weight for weight in weights}
    _refuse_quantized_tensors(component, stored)
    for name, tensor in stored.items():
        if name not in expected:
            raise Refusal(
                what=f"{tensor.file} holds {name}",
                why=f"a model of the numbers in {component.name}/config.json has no such tensor, so it would be "
                "ignored",
                works="config.json and weights of one checkpoint",
            )
    for name, weight in expected.items():
        if name not in stored and weight.part is not Part.NOTHING:
            raise Refusal(
                what=f"{component} has no {name}",
                why=f"a model of the numbers in {component.name}/config.json has it, of shape {weight.shape}",
                works="config.json and weights of one checkpoint, downloaded to the end",
            )
    placed = tuple(Placed(weight, stored[name]) for name, weight in expected.items() if name in stored)
    for one in placed:
        _check_tensor(component, one)
    return placed


def _check_tensor(component: Path, placed: Placed) -> None:
    weight, stored = placed.weight, placed.stored
    if stored.shape != weight.shape:
        raise Refusal(
            what=f"{stored.name} in {stored.file} has the shape {list(stored.shape)}",
            why=f"by the numbers in {component.name}/config.json it is {list(weight.shape)}",
            works="config.json and weights of one checkpoint",
        )
    if stored.dtype not in FLOATS:
        raise Refusal(
            what=f"{stored.name} in {stored.file} is {stored.dtype}",
            why=f"weights are read as {', '.join(FLOATS)}; others are quantized, or of something else",
            works="the unquantized checkpoint",
        )


def _refuse_quantized_tensors(component: Path, stored: Mapping[str, StoredTensor]) -> None:
    for name, tensor in stored.items():
        if tensor.dtype.startswith(("F8", "F6", "F4")) or name.rpartition(".")[2] in QUANTIZED_NAMES:
            raise rules.quantized(f"{tensor.file} holds {name}", tensor.dtype)
