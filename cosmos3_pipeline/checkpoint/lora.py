"""LoRA adapters as diffusers' `Cosmos3OmniTransformer` saves them, and the weights that each adapter changes.

Names and metadata: diffusers 0.42 `loaders/peft.py`, `utils/peft_utils.py`. The scale of a module and the meaning
of patterns: peft 0.21 `tuners/lora/layer.py`, `utils/other.py`. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cosmos3_pipeline.checkpoint.files import is_regular, not_whole, printable, unreadable
from cosmos3_pipeline.checkpoint.hub import is_hub_id
from cosmos3_pipeline.checkpoint.stored import FLOATS, Header, LowRank, StoredTensor, read_header
from cosmos3_pipeline.checkpoint.weights import Part, Weight
from cosmos3_pipeline.config.schema import LoraConfig
from cosmos3_pipeline.errors import Refusal, did_you_mean

FILE = "pytorch_lora_weights.safetensors"  # as `save_lora_adapter` calls it
PREFIX = "transformer."  # before every name if a pipeline saved the adapter
METADATA = "lora_adapter_metadata"
DOWN, UP, ALPHA = "down", "up", "alpha"
# peft's names, and older trainers' names that diffusers converts for every model.
SUFFIXES = {
    ".lora_A.weight": DOWN,
    ".lora_B.weight": UP,
    ".lora.down.weight": DOWN,
    ".lora.up.weight": UP,
    ".alpha": ALPHA,
}
# Parts of names that other formats use, and why adapters in these formats are not merged here.
OTHERS = {
    "lora_magnitude_vector": "it belongs to a DoRA, which also scales the columns of the weight",
    "lora_B.bias": "it changes a bias, and only matrices are merged here",
    "lora_embedding_": "it changes an embedding, of which only the prompt's rows are read here",
    "lora_down": "it is named as kohya's trainer names it, which diffusers does not convert for this transformer",
    "lora_up": "it is named as kohya's trainer names it, which diffusers does not convert for this transformer",
    "lokr_": "it belongs to a LoKr, which is no product of two matrices",
    "hada_": "it belongs to a LoHa, which is no product of two matrices",
    "base_model.": "it is named as peft names what it saves by itself, with the scale in another file",
}
# Metadata keys of methods whose result is not a scaled matrix product added to the weight.
VARIANTS = (
    *("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config"),
    *("monteclora_config", "velora_config"),
)
# Values of init_lora_weights. Any other start of a training changes the model's weights too, so it is refused.
STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
SAVED_AGAIN = "the adapter as diffusers' `transformer.save_lora_adapter(FOLDER)` writes it"
READ = tuple(part for part in Part if part is not Part.NOTHING)  # by some run
NUMBERS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}


@dataclass(frozen=True)
class Adapter:
    """An adapter's file and its products by name of the weight, such as `layers.0.self_attn.to_q.weight`.

    key: the config key of the adapter. The scales of `added` include the adapter's weight in the config.
    """

    key: str
    file: Path
    added: Mapping[str, LowRank]

    def check_fits(self, weights: Iterable[Weight], *, read: Collection[Part] = READ) -> None:
        """Raise Refusal unless the adapter fits a transformer with these weights, of which a run reads `read`."""
        layers = [weight for weight in weights if _is_linear(weight)]
        linear = {weight.name: weight.shape for weight in layers}
        strangers = [name for name in self.added if name not in linear]
        if strangers:
            module, known = _module(strangers[0]), [_module(name) for name in linear]
            raise Refusal(
                what=f"{self.key}: {self.file} changes {module}"
                + (f" and {len(strangers) - 1} more that are not there" if len(strangers) > 1 else ""),
                why="this checkpoint's transformer has no linear layer of that name, so it would be ignored",
                works=did_you_mean(module, known, otherwise="an adapter that was trained on this model"),
            )
        used = {weight.name for weight in layers if weight.part in read}
        if used.isdisjoint(self.added):
            first, *others = map(_module, self.added)
            raise Refusal(
                what=f"{self.key}: {self.file} changes only {first}"
                + (f" and {len(others)} more" if others else ""),
                why="this run does not read what it changes, so the adapter would have no effect",
                works=f"a task that reads it, an adapter of other layers, or no {self.key}",
            )
        for name, low_rank in self.added.items():
            shape = low_rank.up.shape[0], low_rank.down.shape[1]
            if shape != linear[name]:
                raise Refusal(
                    what=f"{self.key}: {self.file} changes {_module(name)} by a matrix of shape {list(shape)}",
                    why=f"the weight has the shape {list(linear[name])}, so the adapter is another model's",
                    works="an adapter that was trained on this model",
                )


def read_adapters(asked: Sequence[LoraConfig]) -> tuple[Adapter, ...]:
    """The adapters of `model.lora`, in its order. Reads headers, and the numbers called alpha.

    Raises:
        Refusal: there is no file, it holds no adapter, or the adapter is no sum of matrix products.
    """
    return tuple(read_adapter(one, number) for number, one in enumerate(asked))


def read_adapter(asked: LoraConfig, number: int) -> Adapter:
    """The adapter at position `number` of `model.lora`. Raises Refusal as `read_adapters` does."""
    key = _key(number)
    if not math.isfinite(asked.weight):
        raise Refusal(
            what=f"{key}.weight={asked.weight}",
            why="the adapter is multiplied by it, and the picture would be black",
            works=f"{key}.weight=1.0, as it was trained",
        )
    file = _file(asked.path, key)
    header = read_header(file)
    modules = _modules(header, file, key)
    scales = _Scales.of(header.metadata, modules, file, key)
    added = {}
    for name, (down, up) in _pairs(modules, file, key).items():
        added[f"{name}.weight"] = LowRank(down, up, scales.scale(name, rank=up.shape[1], weight=asked.weight))
    return Adapter(key, file, added)


def with_added(stored: StoredTensor, adapters: Iterable[Adapter]) -> StoredTensor:
    """`stored` with the products that `adapters` add to it."""
    added = tuple(adapter.added[stored.name] for adapter in adapters if stored.name in adapter.added)
    return replace(stored, added=added) if added else stored


def with_hash(asked: LoraConfig, number: int) -> LoraConfig:
    """The adapter at position `number` of `model.lora`, with the SHA-256 of its file.

    Raises:
        Refusal: the config names another SHA-256.
    """
    key = _key(number)
    file = _file(asked.path, key)
    try:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(file, error) from error
    if asked.sha256 not in (None, found):
        raise Refusal(
            what=f"{key}.sha256={asked.sha256}: {file} has another",
            why=f"it is {found}: the file was replaced since, and the picture would be another",
            works=f"the file of that run, or {key}.sha256=null",
        )
    return replace(asked, sha256=found)


def _key(number: int) -> str:
    return f"model.lora[{number}]"


def _file(path: str, key: str) -> Path:
    """The file of the adapter at `path`, which is a file or a folder. Raises Refusal."""
    given = Path(path).expanduser()
    if is_hub_id(path) and not given.parent.is_dir():
        raise Refusal(
            what=f"{key}.path={path}: there is no such file or folder",
            why="an id of the hub is taken for model.path only",
            works=f"`hf download {path} --local-dir FOLDER`, and {key}.path=FOLDER",
        )
    if given.is_dir():
        if is_regular(given / FILE):
            return given / FILE
        others = sorted(file.name for file in given.glob("*.safetensors"))
        raise Refusal(
            what=f"{key}.path={path}: the folder has no {FILE}",
            why="its other files may be of anything" if others else "it has no safetensors at all",
            works=f"{key}.path={given / others[0]}" if others else SAVED_AGAIN,
        )
    if not is_regular(given):
        there = [other.name for other in given.parent.iterdir()] if given.parent.is_dir() else []
        raise Refusal(
            what=f"{key}.path={path}: there is no such file or folder",
            why=f"{printable(str(given.absolute()))} does not exist",
            works=did_you_mean(given.name, there, otherwise="the path of a file that exists"),
        )
    if given.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise Refusal(
            what=f"{key}.path={path} is no safetensors file",
            why="only safetensors are read here: loading a pickle can run any program",
            works=SAVED_AGAIN,
        )
    return given


def _modules(header: Header, file: Path, key: str) -> dict[str, dict[str, StoredTensor]]:
    """The tensors of each module, by their role: down, up or alpha."""
    found: dict[str, dict[str, StoredTensor]] = {}
    for full, tensor in header.tensors.items():
        name = full.removeprefix(PREFIX)
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
        why = next((why for part, why in OTHERS.items() if part in name), None)
        if suffix is None or why is not None:
            if why is None and not any("lora" in other for other in header.tensors):
                why = "no tensor of the file is named as one of a LoRA is"
            raise Refusal(
                what=f"{key}: {file} holds {printable(full)}",
                why=why or f"the names of an adapter end with {', '.join(SUFFIXES)}; it would be ignored",
                works=SAVED_AGAIN,
            )
        if tensor.dtype not in (FLOATS if SUFFIXES[suffix] != ALPHA else (*NUMBERS, "BF16")):
            raise Refusal(
                what=f"{key}: {full} in {file} is {tensor.dtype}",
                why=f"adapters are read as {', '.join(FLOATS)}; others are quantized, or of something else",
                works="the unquantized adapter",
            )
        found.setdefault(name.removesuffix(suffix), {})[SUFFIXES[suffix]] = tensor
    if not found:
        raise Refusal(
            what=f"{key}: {file} holds no tensor",
            why="an adapter has two matrices for each layer that it changes",
            works=SAVED_AGAIN,
        )
    return found


def _pairs(
    modules: Mapping[str, Mapping[str, StoredTensor]], file: Path, key: str
) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """The matrices down and up of each module. Raises Refusal if one is missing or they cannot be multiplied."""
    found = {}
    for name, parts in modules.items():
        missing = [part for part in (DOWN, UP) if part not in parts]
        if missing:
            raise Refusal(
                what=f"{key}: {file} has no matrix {' and '.join(missing)} for {printable(name)}",
                why="the product of both matrices is added to a weight",
                works=SAVED_AGAIN,
            )
        down, up = parts[DOWN], parts[UP]
        if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
            raise Refusal(
                what=f"{key}: for {printable(name)} {file} has matrices of shape {list(down.shape)} down and "
                f"{list(up.shape)} up",
                why="the rank of the adapter is the first number of one and the second of the other",
                works=SAVED_AGAIN,
            )
        found[name] = down, up
    return found


@dataclass(frozen=True)
class _Scales:
    """The scale of an adapter's products: alpha / rank, or alpha / sqrt(rank) if it is rank-stabilised.

    alphas: by module. patterns: regular expressions for the end of a module's name; the first match counts.
    `alpha` counts for other modules; None means the rank.
    """

    alphas: Mapping[str, float]
    patterns: Mapping[str, float]
    alpha: float | None
    stabilised: bool

    @classmethod
    def of(
        cls,
        metadata: Mapping[str, Any],
        modules: Mapping[str, Mapping[str, StoredTensor]],
        file: Path,
        key: str,
    ) -> _Scales:
        alphas = {name: _number(parts[ALPHA], file) for name, parts in modules.items() if ALPHA in parts}
        words = metadata.get(METADATA)
        if words:
            if alphas:
                raise _two_sources(file, key, f"names alphas in its metadata and has {next(iter(alphas))}.alpha")
            return cls._of_settings(_settings(words, modules, file), modules, file, key)
        without = [name for name in modules if name not in alphas]
        if alphas and without:
            raise _two_sources(file, key, f"has an alpha for {next(iter(alphas))} and none for {without[0]}")
        return cls(alphas, {}, None, stabilised=False)

    @classmethod
    def _of_settings(
        cls,
        settings: Mapping[str, Any],
        modules: Mapping[str, Mapping[str, StoredTensor]],
        file: Path,
        key: str,
    ) -> _Scales:
        for name in VARIANTS:
            if settings.get(name):
                raise _variant(file, key, f"{name}={settings[name]}", "it is no sum of two matrices' product")
        start = settings.get("init_lora_weights", True)
        if start not in STARTS:
            raise _variant(
                file,
                key,
                f"init_lora_weights={start}",
                "such a training begins by changing the weights of the model, which the adapter then expects",
            )
        try:
            ranks = dict(settings.get("rank_pattern") or {})
            for name, parts in modules.items():
                rank = _of_pattern(ranks, name, settings["r"])
                if UP in parts and parts[UP].shape[-1:] != (rank,):
                    raise not_whole(file, f"its metadata says that {name} has the rank {rank}, its matrix another")
            patterns = {pattern: float(alpha) for pattern, alpha in (settings.get("alpha_pattern") or {}).items()}
            _of_pattern(patterns, "", 0.0)
            return cls({}, patterns, float(settings["lora_alpha"]), bool(settings.get("use_rslora")))
        except (KeyError, TypeError, AttributeError, ValueError, re.error) as error:
            if isinstance(error, Refusal):
                raise
            raise not_whole(file, f"its adapter's metadata is no LoraConfig of peft: {error!r:.80}") from error

    def scale(self, module: str, *, rank: int, weight: float) -> float:
        """The scale of `module` with the adapter's `weight`, in the order in which peft multiplies."""
        otherwise = rank if self.alpha is None else self.alpha
        alpha: float = self.alphas.get(module, _of_pattern(self.patterns, module, otherwise))
        return weight * alpha / (math.sqrt(rank) if self.stabilised else rank)


def _settings(words: Any, modules: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """peft's LoraConfig in the metadata `words`. The keys have a prefix if a pipeline saved them."""
    try:
        said = json.loads(words)
        prefixed = {key.removeprefix(PREFIX): value for key, value in said.items() if key.startswith(PREFIX)}
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise not_whole(file, f"the metadata of its adapter is no JSON: {error!r:.80}") from error
    return prefixed or said


def _of_pattern(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches the end of `module`, as in peft; else `otherwise`."""
    return next((v for pattern, v in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), otherwise)


def _number(tensor: StoredTensor, file: Path) -> float:
    """The value of a tensor with one element. Raises Refusal for more elements, or a value that is not finite."""
    if math.prod(tensor.shape) != 1:
        raise not_whole(file, f"{tensor.name} is of shape {list(tensor.shape)}, not one number")
    try:
        with file.open("rb") as stream:
            stream.seek(tensor.start)
            raw = stream.read(tensor.nbytes)
    except OSError as error:
        raise unreadable(file, error) from error
    # bfloat16 is the upper half of float32.
    form, raw = ("<f", b"\0\0" + raw) if tensor.dtype == "BF16" else (NUMBERS[tensor.dtype], raw)
    value = float(struct.unpack(form, raw)[0])
    if not math.isfinite(value):
        raise not_whole(file, f"{tensor.name} is {value}")
    return value


def _is_linear(weight: Weight) -> bool:
    """Whether `weight` is the matrix of a linear layer. Embeddings, also of actions, are no linear layers."""
    return len(weight.shape) == 2 and weight.part is not Part.ACTION and weight.name != "embed_tokens.weight"


def _module(weight: str) -> str:
    return printable(weight.removesuffix(".weight"))


def _two_sources(file: Path, key: str, what: str) -> Refusal:
    return Refusal(
        what=f"{key}: {file} {what}",
        why="trainers disagree which scale such a file means",
        works=SAVED_AGAIN,
    )


def _variant(file: Path, key: str, setting: str, why: str) -> Refusal:
    return Refusal(what=f"{key}: {file} says {setting}", why=why, works="an adapter of plain LoRA")
