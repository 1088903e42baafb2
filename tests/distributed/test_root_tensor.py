"""What the root has written is what every rank has, and what a rank then does to it is seen by nobody else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from ranks import run_on_ranks
from vae_models import WAN22, make_vae, vae_config

from cosmos3_pipeline.distributed import root_tensor
from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.distributed.root_tensor import SHARED_BYTES, SHARED_BYTES_IF_READABLE, RootTensor
from cosmos3_pipeline.vae import ParallelVAE
from cosmos3_plugins.layer_pipeline import LayerPipeline
from cosmos3_plugins.replicated import Replicated
from cosmos3_plugins.spatial_shard import SpatialShard


def _picture(elements: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(elements).remainder(251).to(dtype).view(2, -1)


def _given(
    rank: int, elements: int, dtype: torch.dtype, apart: int | None, readable: bool
) -> tuple[bool, bool, dict[str, object]]:
    """Whether this rank has what the root wrote, before and after every rank has written into its own."""
    if rank == apart:
        root_tensor._boot = lambda: "of another machine"
    comm, expected = Comm(), _picture(elements, dtype)
    Comm.reads_memory = readable  # type: ignore[method-assign,assignment]
    if expected.nbytes < (SHARED_BYTES_IF_READABLE if readable else SHARED_BYTES):
        RootTensor._mapped = None  # type: ignore[method-assign,assignment]
    elif apart is None:
        comm.broadcast = None  # type: ignore[method-assign,assignment] # nothing is sent
    with comm.run():
        whole = RootTensor(comm, expected.shape, like=expected)
        assert (whole.tensor is None) == (rank > 0)
        if whole.tensor is not None:
            whole.tensor.copy_(expected)
        given = whole.everywhere()
        same = torch.equal(given, expected)
        comm.agree(None)
        given.add_(rank)
        comm.agree(None)
        return same, torch.equal(given, expected + rank), comm.ledger.as_dict()


@pytest.mark.parametrize("apart", [None, 0, 1], ids=["one_machine", "root_apart", "one_apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nbytes", [SHARED_BYTES - 8, SHARED_BYTES, 3 * SHARED_BYTES + 8])
def test_every_rank_has_its_own(nbytes: int, dtype: torch.dtype, apart: int | None) -> None:
    _check_given(nbytes, dtype, apart, readable=False)


@pytest.mark.parametrize("nbytes", [SHARED_BYTES_IF_READABLE - 8, SHARED_BYTES_IF_READABLE])
def test_what_can_be_read_out_of_the_roots_memory_is_mapped_only_if_it_is_larger(nbytes: int) -> None:
    _check_given(nbytes, torch.float32, None, readable=True)


def _check_given(nbytes: int, dtype: torch.dtype, apart: int | None, *, readable: bool) -> None:
    results = run_on_ranks(_given, 3, nbytes // dtype.itemsize, dtype, apart, readable)
    assert [(same, own) for same, own, _ in results] == [(True, True)] * 3
    # However it got there, the root has handed it out once.
    assert [counts.get("broadcast") for _, _, counts in results] == [{"calls": 1, "bytes": nbytes}, None, None]


def _pages(rank: int, nbytes: int) -> int:
    """Bytes of the memory that the root has made for a tensor before it writes the first chunk."""
    whole = RootTensor(Comm(), (nbytes,), like=torch.empty(0, dtype=torch.uint8))
    return os.stat(whole._memory.place.path).st_blocks * 512 if whole._memory is not None else 0


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memory without a name here")
def test_the_pages_of_what_is_mapped_are_made_at_once() -> None:
    assert run_on_ranks(_pages, 2, SHARED_BYTES_IF_READABLE)[0] >= SHARED_BYTES_IF_READABLE


def _again_and_again(rank: int) -> tuple[int, int]:
    """Open files after one use, and after many."""
    comm, counts = Comm(), []
    for _ in range(5):
        with comm.run():
            whole = RootTensor(comm, (SHARED_BYTES_IF_READABLE // 4,), like=torch.empty(0))
            if whole.tensor is not None:
                whole.tensor.fill_(1)
            whole.everywhere()
        counts.append(len(list(Path("/proc/self/fd").iterdir())))
    return counts[0], counts[-1]


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memory without a name here")
def test_no_file_stays_open() -> None:
    for first, last in run_on_ranks(_again_and_again, 2):
        # Four more uses; a thread of torch's store may have one open just now.
        assert abs(last - first) < 3


def _decoded(rank: int, strategy: LayerPipeline | SpatialShard) -> torch.Tensor:
    vae = ParallelVAE(make_vae(vae_config(WAN22)), Replicated(), strategy)
    picture = vae.decode(_latent()).sample
    assert picture.nbytes > SHARED_BYTES
    return picture.mul_(rank + 1)


def _latent() -> torch.Tensor:
    return torch.randn(2, WAN22["z_dim"], 2, 9, 8, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("strategy", [LayerPipeline(), SpatialShard()], ids=lambda s: s.name)
def test_a_decoded_picture_is_each_ranks_own(strategy: LayerPipeline | SpatialShard) -> None:
    alone = ParallelVAE(make_vae(vae_config(WAN22)), Replicated(), Replicated()).decode(_latent()).sample
    for rank, picture in enumerate(run_on_ranks(_decoded, 2, strategy)):
        assert torch.equal(picture, alone * (rank + 1))
