"""Layers that pass through the device: one ahead, in order, however a passage ends."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from checkpoints import make_layout
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from cosmos3_pipeline.checkpoint.inspect import CheckpointInfo, inspect_checkpoint
from cosmos3_pipeline.checkpoint.weights import Part, Slab, Weight, slabs_of
from cosmos3_pipeline.errors import Refusal
from cosmos3_pipeline.models.passing import Passing, SlabFiles, spread

WIDTH = 40  # not a multiple of the alignment


class Counting:
    """Fills layer n with the number n. It records the layers that were begun, and fails at the layer `fails`."""

    def __init__(self, fails: int | None = None) -> None:
        self.begun: list[int] = []
        self.fails = fails

    def bring(self, number: int, slab: Tensor) -> Callable[[], None]:
        self.begun.append(number)

        def arrive() -> None:
            if number == self.fails:
                raise Refusal(what="a layer", why="it is broken", works="another")
            slab.fill_(number)

        return arrive


def modules(layers: int) -> nn.Module:
    model = nn.Module()
    with torch.device("meta"):
        model.layers = nn.ModuleList(nn.Linear(WIDTH, 3) for _ in range(layers))
    return model


def slabs(layers: int) -> list[Slab]:
    shapes = (("weight", (3, WIDTH)), ("bias", (3,)))
    return [
        Slab.of(Weight(f"layers.{layer}.{name}", shape, Part.VISION) for name, shape in shapes)
        for layer in range(layers)
    ]


def passing(source: Counting, layers: int = 4, **options: object) -> tuple[nn.Module, Passing]:
    model = modules(layers)
    where = {"dtype": torch.float32, "device": torch.device("cpu")}
    return model, Passing(slabs(layers), model, source, **where, **options)  # type: ignore[arg-type]


def is_here(model: nn.Module, number: int) -> bool:
    return all(not p.is_meta and bool((p == number).all()) for p in model.layers[number].parameters())


def test_the_next_layer_is_begun_while_one_is_here_and_no_other() -> None:
    source = Counting()
    model, layers = passing(source)
    for _ in range(2):
        for number in layers:
            assert is_here(model, number)
            assert source.begun[-1] == (number + 1) % 4
    assert source.begun == [0, 1, 2, 3, 0, 1, 2, 3, 0]


def test_a_pathway_that_passes_once_begins_nothing_after_its_last_layer() -> None:
    source = Counting()
    _, layers = passing(source, again=False)
    assert list(layers) == [0, 1, 2, 3] == source.begun


@pytest.mark.parametrize("staying", [(), (0,), (3,), (0, 2), (0, 1, 2), (0, 1, 2, 3)], ids=str)
def test_layers_that_stay_are_brought_once(staying: tuple[int, ...]) -> None:
    source = Counting()
    model, layers = passing(source, staying=staying)
    for _ in range(3):
        for number in layers:
            assert is_here(model, number)
    moving = [number for number in range(4) if number not in staying]
    assert all(source.begun.count(number) == 1 for number in staying)
    if len(moving) > 1:
        assert all(source.begun.count(number) >= 3 for number in moving)
    else:  # one alone finds its memory as it left it
        assert all(source.begun.count(number) == 1 for number in moving)


def test_two_slabs_are_all_that_passing_takes() -> None:
    model, layers = passing(Counting())
    seen = {model.layers[number].weight.untyped_storage().data_ptr() for _ in range(3) for number in layers}
    assert len(seen) == 2


def test_a_passage_that_was_left_in_the_middle_begins_anew() -> None:
    model, layers = passing(Counting())
    for number in layers:
        if number == 2:
            break
    for number in layers:
        assert is_here(model, number)


def test_a_layer_that_cannot_be_brought_says_so_and_the_others_still_come() -> None:
    source = Counting(fails=2)
    model, layers = passing(source)
    for _ in range(2):
        here = []
        with pytest.raises(Refusal, match="it is broken"):
            for number in layers:
                here.append(number)
        assert here == [0, 1]
    source.fails = None
    assert all(is_here(model, number) for number in layers)


def test_what_leaves_is_gone() -> None:
    model, layers = passing(Counting(), staying=(1,))
    list(layers)
    layers.drop()
    assert all(p.is_meta for p in model.parameters())
    for number in layers:
        assert is_here(model, number)


@given(layers=st.integers(1, 80), data=st.data())
@settings(deadline=None)
def test_staying_layers_are_spread_evenly(layers: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, layers))
    found = sorted(spread(count, layers))
    assert len(found) == count and set(found) <= set(range(layers))
    gaps = [b - a for a, b in pairwise(found)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointInfo:
    return inspect_checkpoint(make_layout(tmp_path_factory.mktemp("slabs") / "super", "super"))


@pytest.mark.parametrize("part", [Part.TEXT, Part.VISION])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_shares_of_a_slab_are_the_slab(part: Part, ranks: int, checkpoint: CheckpointInfo) -> None:
    """Every rank's part, side by side, has every tensor of the files where its start says."""
    placed = checkpoint.parts("transformer", (part,))
    files = SlabFiles(slabs_of((p.weight for p in placed), part), {p.weight.name: p.stored for p in placed})
    stored: dict[str, Tensor] = {}
    for file in (checkpoint.folder / "transformer").glob("*.safetensors"):
        stored |= load_file(file)
    for number, slab in enumerate(files.slabs):
        share = slab.share(ranks)
        parts = [torch.zeros(share, dtype=torch.float32) for _ in range(ranks)]
        for rank, own in enumerate(parts):
            files.read(number, own, first=rank * share, check=True, advance=lambda nbytes: None)
        whole = torch.cat(parts)
        for weight, start in zip(slab.weights, slab.starts, strict=True):
            found = whole[start : start + weight.elements].view(weight.shape)
            assert torch.equal(found, stored[weight.name].float()), weight.name
            assert start % 32 == 0


@pytest.mark.long
def test_a_file_that_is_cut_while_its_layers_pass_is_told(checkpoint: CheckpointInfo, tmp_path: Path) -> None:
    folder = make_layout(tmp_path / "nano", "nano")
    info = inspect_checkpoint(folder)
    placed = info.parts("transformer", (Part.VISION,))
    files = SlabFiles(slabs_of((p.weight for p in placed), Part.VISION), {p.weight.name: p.stored for p in placed})
    in_layers = (p.stored for p in placed if p.weight.layer is not None)
    last = max(in_layers, key=lambda stored: (str(stored.file), stored.start))
    with last.file.open("r+b") as stream:
        stream.truncate(last.start + 1)
    slab = torch.empty(files.slabs[-1].elements)
    with pytest.raises(Refusal, match=r"(?s)ended within .*after its header was read"):
        for number in range(len(files.slabs)):
            files.read(number, slab[: files.slabs[number].elements], check=False, advance=lambda nbytes: None)
