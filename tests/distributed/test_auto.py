"""`auto` in real ranks: the pick does the work, for every clip anew."""

from __future__ import annotations

from typing import Any

import torch
from ranks import run_on_ranks
from vae_models import WAN22, make_vae, vae_config

from cosmos3_pipeline.vae.parallel_vae import ParallelVAE
from cosmos3_pipeline.vae.strategy import StrategyError
from cosmos3_plugins.auto import Auto
from cosmos3_plugins.replicated import Replicated

AUTO = Auto(link_gb_per_s=1e6, latency_us=0.0, memory_gb_per_s=1e6)


def _clips() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, vae_config(WAN22)["z_dim"], frames, 3, 4) for frames in (4, 1)]


def _by_itself(rank: int) -> tuple[list[Any], list[int], str]:
    vae = ParallelVAE(make_vae(WAN22), AUTO, AUTO)
    made, sent = [], []
    for z in _clips():
        before = vae.ledger.snapshot()
        chunks = [chunk.clone() for chunk in vae.decode_stream(z)]
        sent.append(vae.ledger.since(before).sent_bytes)
        made.append(torch.cat(chunks) if chunks else torch.empty(0))
    picture = vae.decode(_clips()[0]).sample
    made += [picture, vae.encode(picture).latent_dist.parameters]
    refusal = ""
    try:
        vae.release("decode")
    except StrategyError as error:
        refusal = str(error)
    return [tensor.numpy() for tensor in made], sent, refusal


def test_a_clip_goes_through_layers_and_an_image_stays_on_the_root() -> None:
    outcomes: list[Any] = run_on_ranks(_by_itself, 2)
    one = ParallelVAE(make_vae(WAN22), Replicated(), Replicated())
    expected = [torch.cat(list(one.decode_stream(z))) for z in _clips()]
    picture = one.decode(_clips()[0]).sample
    expected += [picture, one.encode(picture).latent_dist.parameters]
    for ours, theirs in zip(outcomes[0][0], expected, strict=True):
        assert (ours == theirs.numpy()).all()
    others = outcomes[1][0]
    assert [made.size for made in others[:2]] == [0, 0]
    for ours, theirs in zip(others[2:], expected[2:], strict=True):
        assert (ours == theirs.numpy()).all()
    assert outcomes[1][1][0] > 0 and outcomes[1][1][1] == 0  # layers for the clip, nothing sent for the image
    for _, _, refusal in outcomes:
        assert "give the strategy that its settled(...) returns" in refusal
