"""The tensors in a component's safetensors files, by the headers alone.

Source: the safetensors format: 8 bytes of header length, a JSON header, then the tensors without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos3_pipeline.checkpoint.files import is_regular, not_whole, read_json, unreadable
from cosmos3_pipeline.errors import Refusal

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# Bits of one element of each dtype that the format knows.
ELEMENT_BITS = {
    **{"F64": 64, "I64": 64, "U64": 64, "C64": 64},
    **{"F32": 32, "I32": 32, "U32": 32},
    **{"F16": 16, "BF16": 16, "I16": 16, "U16": 16},
    **{"I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
FLOATS = ("F32", "BF16", "F16")  # dtypes from which weights are read
LARGEST_HEADER = 100 * 2**20  # the limit of safetensors
_LFS_POINTER = b"version "  # first 8 bytes; as a header length they would be absurd
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5", "*.gguf", "*.bin.index.json")


# The file of a tensor whose shape alone is known. Reading it leaves memory unchanged.
NO_FILE = Path()


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file. `dtype` is spelt as in safetensors, and `start` is its first byte in the file.

    `added` are the products that a reader adds to its values, in this order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int
    added: tuple[LowRank, ...] = ()


@dataclass(frozen=True)
class LowRank:
    """A matrix [outputs, inputs]: `scale` times the product of `up` [outputs, rank] and `down` [rank, inputs]."""

    down: StoredTensor
    up: StoredTensor
    scale: float


def stored_tensors(component: Path) -> dict[str, StoredTensor]:
    """Every tensor of the component in this folder, by name, from one file or from the shards of its index.

    Raises:
        Refusal: files are missing, cut or of another format, or they contradict each other.
    """
    if not is_regular(component / INDEX):
        if not is_regular(component / WEIGHTS):
            raise _no_weights(component)
        return read_header(component / WEIGHTS).tensors
    placed = _weight_map(component / INDEX)
    names = sorted(set(placed.values()))
    missing = [name for name in names if not is_regular(component / name)]
    if missing:
        raise Refusal(
            what=f"{component} has {len(names) - len(missing)} of {len(names)} weight files",
            why=f"{INDEX} names {missing[0]}, which is not there",
            works="the whole checkpoint: the download may have ended early",
        )
    found: dict[str, StoredTensor] = {}
    for name in names:
        for tensor in read_header(component / name).tensors.values():
            if placed.get(tensor.name) != name:
                raise _disagree(
                    component / INDEX, f"{name} holds {tensor.name}, which the index does not place there"
                )
            found[tensor.name] = tensor
    for name, file in placed.items():
        if name not in found:
            raise _disagree(component / INDEX, f"it places {name} in {file}, which does not hold it")
    return found


def _weight_map(index: Path) -> Mapping[str, str]:
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise not_whole(index, "its weight_map names no weight file")
    for tensor, file in placed.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise not_whole(index, f"its weight_map places {tensor} in {file!r:.80}, no file of this folder")
        if not file.endswith(".safetensors"):
            raise _no_weights(index.parent)
    return placed


@dataclass(frozen=True)
class Header:
    """The tensors of a file by name, in the order of its header, and the file's metadata."""

    tensors: dict[str, StoredTensor]
    metadata: Mapping[str, Any]


def read_header(file: Path) -> Header:
    """The header of a safetensors file.

    Raises:
        Refusal: the file is cut, unreadable or of another format.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            if start == _LFS_POINTER:
                raise not_whole(file, "it is a git-lfs pointer, not the weights themselves")
            length = int.from_bytes(start, "little") if len(start) == 8 else size
            if 8 + length > size:
                raise not_whole(file, f"it ends after {size} bytes, within its header")
            if length > LARGEST_HEADER:
                raise not_whole(file, f"its header would have {length} bytes, more than the format allows")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise unreadable(file, error) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, Refusal):
            raise
        raise not_whole(file, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise not_whole(file, f"its header is a {type(header).__name__}, not a list of tensors by name")
    metadata = header.pop("__metadata__", None)
    tensors = [_tensor(file, name, entry, 8 + length) for name, entry in header.items()]
    end = 8 + length
    for tensor in sorted(tensors, key=lambda t: (t.start, t.nbytes)):
        if tensor.start != end:
            raise not_whole(file, f"{tensor.name} begins at byte {tensor.start}, the one before it ends at {end}")
        end += tensor.nbytes
    if end != size:
        raise not_whole(file, f"it has {size} bytes, its header speaks of {end}")
    return Header({tensor.name: tensor for tensor in tensors}, metadata if isinstance(metadata, dict) else {})


def _tensor(file: Path, name: str, entry: Any, base: int) -> StoredTensor:
    said = str(entry)[:80]
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (_counts(shape) and _counts(offsets)) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise not_whole(file, f"its header does not say where {name} is: {said}")
    if not isinstance(dtype, str) or dtype not in ELEMENT_BITS:
        raise not_whole(file, f"{name} has the dtype {dtype}, which the format does not know")
    nbytes = offsets[1] - offsets[0]
    if nbytes * 8 != math.prod(shape) * ELEMENT_BITS[dtype]:
        raise not_whole(file, f"{name} has {nbytes} bytes, which are not {dtype} of shape {shape}")
    return StoredTensor(name, dtype, tuple(shape), file, base + offsets[0], nbytes)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _no_weights(component: Path) -> Refusal:
    others = sorted({file.name for pattern in _PICKLES for file in component.glob(pattern)})
    variants = sorted(file.name for file in component.glob("*.safetensors*"))
    if others and not variants:
        return Refusal(
            what=f"{component} holds {others[0]}, not safetensors",
            why="only safetensors are read here: loading a pickle can run any program",
            works="a checkpoint with safetensors, as NVIDIA publishes it, or "
            "`pipeline.save_pretrained(FOLDER, safe_serialization=True)` where the file is trusted",
        )
    return Refusal(
        what=f"{component} has no weights",
        why=f"there is neither {WEIGHTS} nor {INDEX}" + (f", only {', '.join(variants[:3])}" if variants else ""),
        works="the whole checkpoint: the download may have ended early",
    )


def _disagree(index: Path, why: str) -> Refusal:
    return Refusal(
        what=f"{index} does not fit the files beside it",
        why=why,
        works="index and weight files of one download",
    )
