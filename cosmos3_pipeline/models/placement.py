"""A transformer whose weights are where `weights` says: on the device, sharded over the ranks, or streamed to it.

The text pathway passes through the device layer by layer and is then dropped, unless `weights.keep_text` keeps it.
`lm_head` is never read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from diffusers import Cosmos3OmniTransformer
from torch import Tensor, nn

from cosmos3_pipeline.checkpoint.inspect import CheckpointInfo
from cosmos3_pipeline.checkpoint.weights import VISION_ALONE, Part, Weight, generation_parts, slabs_of
from cosmos3_pipeline.config.schema import Placement
from cosmos3_pipeline.denoise.pathway import Pathway
from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.models.absent import absent, without_weights
from cosmos3_pipeline.models.known import known_to
from cosmos3_pipeline.models.passing import FromFiles, FromHost, FromRanks, Passing, SlabFiles, Source, spread
from cosmos3_pipeline.models.reading import Advance, Piece, read_pieces, read_tensors
from cosmos3_pipeline.planning.weights import WeightsPlan

EMBEDDING = "embed_tokens.weight"


class PlacedTransformer:
    """diffusers' transformer without weights, and its `Layers`, which load them.

    `model` has no weight at first. `load_vision` loads the generation pathway's weights that stay in memory: those
    outside of its layers, and the layers that stay. `release` drops them. `advance` is called with the bytes that
    are read for the first time. The transformer denoises the `modalities`, vision and others together with it. The
    ranks of `comm` share the weights, so all of them must make the same calls.

    Raises:
        Fault: a file cannot be read or its values are no weights, see `read_pieces`.
    """

    def __init__(
        self,
        checkpoint: CheckpointInfo,
        plan: WeightsPlan,
        *,
        dtype: torch.dtype,
        device: torch.device,
        comm: Comm,
        advance: Advance,
        modalities: Collection[str] = VISION_ALONE,
    ) -> None:
        self._generation = generation_parts(modalities)
        self.model = empty_transformer(checkpoint, (Part.TEXT, *self._generation), dtype=dtype, device=device)
        self._checkpoint, self._plan, self._comm = checkpoint, plan, comm
        self._dtype, self._device = dtype, device
        self._advance = advance
        self._text_modules = [Pathway.understanding(layer) for layer in self.model.layers]
        self._vision_modules = [Pathway.generation(layer) for layer in self.model.layers]
        self._text: Passing | None = None
        self._vision: Passing | None = None
        self._kept: list[Tensor] = []

    @property
    def shared(self) -> bool:
        """Whether the generation pathway's layers are sharded over the ranks of `comm` and gathered for use."""
        return self._plan.placement is Placement.sharded

    def embed(self, input_ids: Tensor) -> Tensor:
        """The embeddings of `input_ids` [n], as [n, width]. Only the rows of tokens that occur are read."""
        stored = next(p.stored for p in self._checkpoint.tensors["transformer"] if p.weight.name == EMBEDDING)
        width, words = stored.shape[1], input_ids.tolist()
        rows = {word: torch.empty(width, dtype=self._dtype) for word in sorted(set(words))}
        read_pieces(Piece(stored, word * width, row) for word, row in rows.items())
        found = [rows[word] for word in words]
        return (torch.stack(found) if found else torch.empty(0, width, dtype=self._dtype)).to(self._device)

    def text(self) -> Iterator[Pathway]:
        """The text pathway's layers. Layers that do not stay are dropped after the last one."""
        if self._text is None:
            files = self._files(Part.TEXT)
            staying = range(len(files.slabs)) if self._plan.keep_text else ()
            self._text = self._passing(files, FromFiles(files, self._device, self._advance), staying, again=False)
        yield from map(self._text_modules.__getitem__, self._text)
        if not self._plan.keep_text:
            self._text.drop()
            self._text = None

    def vision(self) -> Iterator[Pathway]:
        """The generation pathway's layers."""
        assert self._vision is not None, "load_vision() comes first"
        yield from map(self._vision_modules.__getitem__, self._vision)

    def load_vision(self) -> None:
        """Load the weights of the generation pathway that stay in memory while denoising."""
        if self._vision is not None:
            return
        try:
            self._load_vision()
        except BaseException:
            self.release()  # otherwise the next call would take half of the weights for all of them
            raise

    def _load_vision(self) -> None:
        outside = [p for p in self._checkpoint.parts("transformer", self._generation) if p.weight.layer is None]
        weights = read_tensors(outside, dtype=self._dtype, device=self._device, advance=self._advance)
        for name, weight in weights.items():
            _set(self.model, name, weight)
        files = self._files(Part.VISION)
        layers = len(files.slabs)
        if self._plan.placement is Placement.sharded:
            self._kept = self._read_share(files)
            self._vision = self._passing(files, FromRanks(self._kept, self._comm), pad=self._comm.size)
            return
        whole = self._plan.placement is Placement.resident
        staying = range(layers) if whole else spread(self._plan.resident_layers, layers)
        from_files = FromFiles(files, self._device, self._advance)
        source: Source = from_files
        if self._device.type != "cpu" and not whole:
            moving = sorted(set(range(layers)) - set(staying))
            self._kept = self._kept or [self._pinned(files, number) for number in moving]
            kept = dict(zip(moving, self._kept, strict=True))
            source = _Either(from_files, staying, FromHost(kept, self._device))
        self._vision = self._passing(files, source, staying)
        self._vision.settle()

    def release(self) -> None:
        """Drop the generation pathway from the device. The next `load_vision` loads it again."""
        if self._vision is not None:
            self._vision.drop()
            self._vision = None
        if self._plan.placement is Placement.sharded:
            self._kept = []  # shards are on the device; pinned layers stay on the host for the next clip
        for name, parameter in list(self.model.named_parameters()):
            if name.partition(".")[0] != "layers":
                _set(self.model, name, absent(parameter))

    @property
    def here_bytes(self) -> dict[Part, int]:
        """Bytes of the weights that are on the device now, by the part of the model that reads them."""
        parts = {p.weight.name: p.weight.part for p in self._checkpoint.tensors["transformer"]}
        found = dict.fromkeys((Part.TEXT, *self._generation), 0)
        for name, parameter in self.model.named_parameters():
            if not parameter.is_meta:
                found[parts[name]] += parameter.nbytes
        return found

    @property
    def text_read_bytes(self) -> int:
        """Bytes that encoding prompts reads from the files, without the rows of the embedding."""
        return sum(stored.nbytes for stored in self._files(Part.TEXT).stored.values())

    @property
    def vision_read_bytes(self) -> int:
        """Bytes that `load_vision` reads from the files, approximately."""
        total: int = sum(p.stored.nbytes for p in self._checkpoint.parts("transformer", self._generation))
        if self._plan.placement is Placement.sharded:
            return total // self._comm.size
        if self._plan.placement is Placement.streamed and self._device.type == "cpu":
            return total * self._plan.resident_layers // len(self._vision_modules)
        return total

    @property
    def kept_bytes(self) -> int:
        """Bytes of the generation pathway that this rank keeps between two layers, on the device or the host."""
        here = self.here_bytes
        return sum(here[part] for part in self._generation) + sum(tensor.nbytes for tensor in self._kept)

    def _files(self, part: Part) -> SlabFiles:
        placed = [p for p in self._checkpoint.parts("transformer", (part,)) if p.weight.layer is not None]
        return SlabFiles(slabs_of((p.weight for p in placed), part), {p.weight.name: p.stored for p in placed})

    def _passing(
        self,
        files: SlabFiles,
        source: Source,
        staying: Collection[int] = (),
        *,
        again: bool = True,
        pad: int = 1,
    ) -> Passing:
        return Passing(
            files.slabs,
            self.model,
            source,
            dtype=self._dtype,
            device=self._device,
            staying=staying,
            again=again,
            pad=pad,
        )

    def _read_share(self, files: SlabFiles) -> list[Tensor]:
        """This rank's shard of every layer."""
        kept = []
        for number, slab in enumerate(files.slabs):
            share = slab.share(self._comm.size)
            own = torch.zeros(share, dtype=self._dtype, device=self._device)
            files.read(number, own, first=share * self._comm.rank, check=True, advance=self._advance)
            kept.append(own)
        return kept

    def _pinned(self, files: SlabFiles, number: int) -> Tensor:
        slab = torch.empty(files.slabs[number].share(1), dtype=self._dtype, pin_memory=True)
        files.read(number, slab, check=True, advance=self._advance)
        return slab


class _Either:
    """Brings slabs that stay from one source, and slabs that move from another source."""

    def __init__(self, stay: Source, staying: Collection[int], move: Source) -> None:
        self._stay, self._staying, self._move = stay, staying, move

    def bring(self, number: int, slab: Tensor) -> Callable[[], None]:
        return (self._stay if number in self._staying else self._move).bring(number, slab)


def empty_transformer(
    checkpoint: CheckpointInfo, parts: Collection[Part], *, dtype: torch.dtype, device: torch.device
) -> Cosmos3OmniTransformer:
    """The transformer in `dtype` on the meta device. Its rotary frequencies, which no file has, are on `device`.

    Weights that are in none of `parts` are None. `lm_head` is None, and in the last layer's text pathway all
    weights except those for keys and values.
    """
    values = checkpoint.transformer
    with without_weights():
        model = Cosmos3OmniTransformer.from_config(known_to(Cosmos3OmniTransformer, values))
    weights: dict[str, Weight] = {
        placed.weight.name: placed.weight for placed in checkpoint.parts("transformer", parts)
    }
    for name, parameter in list(model.named_parameters()):
        if name not in weights:
            _leave_out(model, name)
        else:
            _set(model, name, absent(parameter, torch.float32 if weights[name].keeps_fp32 else dtype))
    # diffusers computes its frequencies on the host. Other devices would give other last bits.
    rotary = type(model.rotary_emb)(values["head_dim"], values["rope_theta"], model.config.rope_axes_dim)
    model.rotary_emb = rotary.to(device)
    return model.eval().requires_grad_(False)


def _set(model: nn.Module, name: str, values: Tensor) -> None:
    owner, _, parameter = name.rpartition(".")
    model.get_submodule(owner)._parameters[parameter] = nn.Parameter(values, requires_grad=False)


def _leave_out(model: nn.Module, name: str) -> None:
    """Replace the module of parameter `name` by None, or the parameter itself if no module holds it."""
    owner, _, parameter = name.rpartition(".")
    above, _, module = owner.rpartition(".")
    setattr(model.get_submodule(above), module or parameter, None)
