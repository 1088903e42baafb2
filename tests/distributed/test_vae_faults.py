"""After a fault every rank ends with its reason, and none waits for a rank that has ended.

A rank that waited would exceed the time limit of `run_on_ranks`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from ranks import run_on_ranks
from vae_models import WAN22, make_vae, vae_config

from cosmos3_pipeline.distributed.board import PeerFailed, PeerLost
from cosmos3_pipeline.vae import ParallelVAE
from cosmos3_pipeline.vae.execute import Execution
from cosmos3_plugins.layer_pipeline import LayerPipeline
from cosmos3_plugins.replicated import Replicated

pytestmark = pytest.mark.usefixtures("path")
CONFIG = vae_config(WAN22)


def _vae() -> ParallelVAE:
    return ParallelVAE(make_vae(CONFIG), LayerPipeline(), LayerPipeline())


def _latent(frames: int = 6) -> torch.Tensor:
    return torch.randn(1, CONFIG["z_dim"], frames, 3, 2, generator=torch.Generator().manual_seed(0))


def _outcome(call: Any) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


# Words of the error for each kind of bad input.
BAD_INPUTS = {
    "channels": "5 channels",
    "dimensions": "[batch, channels, frames, rows, columns]",
    "nan on one rank": "rank 1: the latent has 1 of 216 values that are NaN",
    "other shape on one rank": "work on one clip",
    "other dtype on one rank": "rank 1: the latent is torch.bfloat16",
    "encode of 20 pixels": "resize it to 16 x 32",
}


def _refused(rank: int) -> dict[str, tuple[str, str]]:
    """The error for each kind of bad input, given one after another to the same VAE."""
    vae, z, holed = _vae(), _latent(), _latent()
    holed[0, 0, 2, 1, 1] = float("nan")
    calls = {
        "channels": lambda: vae.decode(z[:, :-1]),
        "dimensions": lambda: list(vae.decode_stream(z[0])),
        "nan on one rank": lambda: vae.decode(holed if rank == 1 else z),
        "other shape on one rank": lambda: list(vae.decode_stream(z[:, :, : 5 if rank == 1 else 6])),
        "other dtype on one rank": lambda: vae.decode(z.bfloat16() if rank == 1 else z),
        "encode of 20 pixels": lambda: vae.encode(torch.zeros(1, 3, 1, 20, 32)),
    }
    return {kind: _outcome(call) for kind, call in calls.items()}


def test_bad_input_is_refused_on_every_rank() -> None:
    first, second = run_on_ranks(_refused, 2)
    assert first == second and first.keys() == BAD_INPUTS.keys()
    for kind, says in BAD_INPUTS.items():
        name, message = first[kind]
        assert name == "VaeInputError", kind
        assert says in message, kind


@contextmanager
def _breaking(at: int, how: Any) -> Iterator[None]:
    """The first op of this rank that comes to its chunk `at` ends in `how` instead."""
    run = Execution._run

    def broken(self: Any, action: Any) -> None:
        if action.chunk == at:
            how()
        run(self, action)

    with patch.object(Execution, "_run", broken):
        yield


def _raise() -> None:
    raise MemoryError("no memory for chunk")


def _mid_stream(rank: int, broken: int, way: str) -> tuple[Any, Any]:
    vae = _vae()
    calls = {
        "stream": lambda: list(vae.decode_stream(_latent())),
        "decode": lambda: vae.decode(_latent()),
        "encode": lambda: vae.encode(torch.zeros(1, 3, 17, 48, 32)),
    }
    with _breaking(2, _raise) if rank == broken else nullcontext():
        failed = _outcome(calls[way])
    again = vae.decode(_latent()).sample  # the group can be used again
    return failed, again


@pytest.mark.sampled(3)
@pytest.mark.parametrize("way", ["stream", "decode", "encode"])
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_rank_that_raises_in_mid_stream_stops_all(broken: int, way: str) -> None:
    outcomes = run_on_ranks(_mid_stream, 3, broken, way)
    expected = ParallelVAE(make_vae(CONFIG), Replicated(), Replicated()).decode(_latent()).sample
    for rank, ((name, message), again) in enumerate(outcomes):
        if rank == broken:
            assert (name, message) == ("MemoryError", "no memory for chunk")
        else:
            assert name == "PeerFailed"
            assert f"rank {broken} of the group failed (MemoryError: no memory for chunk)" in message
        assert torch.equal(again, expected)


def _killed(rank: int, dead: int) -> tuple[str, str]:
    vae = _vae()
    with _breaking(2, lambda: os._exit(9)) if rank == dead else nullcontext():
        return _outcome(lambda: list(vae.decode_stream(_latent())))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_killed_rank_is_reported_by_all_others(dead: int) -> None:
    outcomes = run_on_ranks(_killed, 3, dead, may_die=(dead,))
    for rank, outcome in enumerate(outcomes):
        if rank == dead:
            continue
        name, message = outcome
        assert name in (PeerFailed.__name__, PeerLost.__name__)
        assert "lost the connection to another rank" in message


def _abandoned(rank: int) -> tuple[int, Any]:
    vae = _vae()
    seen = 0
    stream = vae.decode_stream(_latent(12))
    for _ in stream:
        seen += 1
        if seen == 2:
            break
    stream.close()  # type: ignore[attr-defined]
    return seen, vae.decode(_latent()).sample


def test_closing_the_stream_early_ends_it_on_every_rank() -> None:
    outcomes = run_on_ranks(_abandoned, 3)
    assert [seen for seen, _ in outcomes] == [2, 0, 0]
    for _, picture in outcomes:
        assert torch.equal(picture, outcomes[0][1])
