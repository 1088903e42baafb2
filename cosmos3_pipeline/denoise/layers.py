"""The sources of `ParallelTransformer`'s layers. A source yields layers in order.

A layer stays whole only until the next layer is asked for. Therefore not all layers of a pathway have to be on the
device at once: a source may read, copy or gather one layer ahead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from diffusers import Cosmos3OmniTransformer
from torch import Tensor

from cosmos3_pipeline.denoise.pathway import Pathway


class Layers(Protocol):
    """The layers of both pathways.

    `shared` says that every rank keeps a shard of each layer. Then all ranks iterate over a pathway together, even
    a rank that computes nothing in it.
    """

    @property
    def shared(self) -> bool: ...

    def embed(self, input_ids: Tensor) -> Tensor:
        """The embedded words [tokens, hidden] of `input_ids` [tokens]."""
        ...

    def text(self) -> Iterator[Pathway]:
        """The text pathway's layers in their order."""
        ...

    def vision(self) -> Iterator[Pathway]:
        """The generation pathway's layers in their order."""
        ...


class LoadedLayers:
    """The layers of a transformer that is loaded as a whole."""

    shared = False

    def __init__(self, transformer: Cosmos3OmniTransformer) -> None:
        self._model = transformer
        self._text = [Pathway.understanding(layer) for layer in transformer.layers]
        self._vision = [Pathway.generation(layer) for layer in transformer.layers]

    def embed(self, input_ids: Tensor) -> Tensor:
        embedded = self._model.embed_tokens(input_ids)
        assert isinstance(embedded, Tensor)
        return embedded

    def text(self) -> Iterator[Pathway]:
        return iter(self._text)

    def vision(self) -> Iterator[Pathway]:
        return iter(self._vision)
