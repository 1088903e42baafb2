"""The ranks of a run as one `DeviceMesh` with named axes, and the process groups of these axes.

Axes, slowest first:
    dp       replicas, one prompt each
    spare    ranks of a replica that repeat its denoising and only help its VAE
    cfg      guidance: conditional and unconditional pass
    cp       sequence, over a grid of rows and columns
    ulysses  sequence, over heads

The ranks of a sequence exchange messages in every layer, and most bytes within `ulysses`. The ranks of these axes
are therefore neighbours. Layout as in torchtitan's `ParallelDims`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.errors import Refusal

AXES = ("dp", "spare", "cfg", "cp", "ulysses")
SEQUENCE = "sequence"  # the ranks of one sequence: cp x ulysses
REPLICA = "replica"  # the ranks of one dp replica, which are the VAE's group: spare x cfg x cp x ulysses
# Flattened axes: each combines the last ones of `AXES`.
_FLAT = {SEQUENCE: AXES[3:], REPLICA: AXES[1:]}


@dataclass(frozen=True)
class RankMesh:
    """The size of each axis, and the process groups of this rank. `device_mesh` is None in a world of one.

    `cp` is (rows, columns); the ranks of a row are neighbours.

    The process groups use gloo for every `device`, because they only say which ranks belong together. Each Comm
    has its own connections, in which a message may take as long as `patience`.
    """

    dp: int = 1
    spare: int = 1
    cfg: int = 1
    cp: tuple[int, int] = (1, 1)
    ulysses: int = 1
    device_mesh: DeviceMesh | None = None
    flat_meshes: Mapping[str, DeviceMesh] = field(default_factory=dict, repr=False)
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    patience: timedelta = default_pg_timeout
    _comms: dict[str, Comm] = field(default_factory=dict, init=False, repr=False, compare=False)
    _made: list[Comm] = field(default_factory=list, init=False, repr=False, compare=False)

    @classmethod
    def build(
        cls,
        *,
        dp: int = 1,
        cfg: int = 1,
        cp: tuple[int, int] = (1, 1),
        ulysses: int = 1,
        device: torch.device | None = None,
        patience: timedelta = default_pg_timeout,
    ) -> RankMesh:
        """The mesh of the initialised world (one rank when there is none). The remaining ranks form axis `spare`.

        Every rank of the world must call it, because making process groups is collective.

        Raises:
            Refusal: the world's ranks do not divide by dp x cfg x cp x ulysses.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        sizes = (dp, cfg, *cp, ulysses)
        wanted = math.prod(sizes)
        if world % wanted:
            raise Refusal(
                what=f"dp={dp} x cfg={cfg} x cp=[{cp[0]},{cp[1]}] x ulysses={ulysses} on {world} ranks",
                why=f"{world} ranks do not divide by {' x '.join(map(str, sizes))} = {wanted}",
                works=f"{wanted * max(round(world / wanted), 1)} ranks, or axes whose product divides {world}",
            )
        spare = world // wanted
        device = device or torch.device("cpu")
        if not dist.is_initialized():
            return cls(device=device)
        mesh = init_device_mesh("cpu", (dp, spare, cfg, math.prod(cp), ulysses), mesh_dim_names=AXES)
        return cls(
            dp=dp,
            spare=spare,
            cfg=cfg,
            cp=cp,
            ulysses=ulysses,
            device_mesh=mesh,
            flat_meshes={name: mesh[axes]._flatten(name) for name, axes in _FLAT.items()},
            device=device,
            patience=patience,
        )

    def size(self, axis: str) -> int:
        """The number of ranks on `axis`, which is one of `AXES`, `SEQUENCE` or `REPLICA`."""
        if axis in _FLAT:
            return math.prod(map(self.size, _FLAT[axis]))
        assert axis in AXES
        return math.prod(self.cp) if axis == "cp" else int(getattr(self, axis))

    def rank(self, axis: str) -> int:
        """This rank's index on `axis`, from 0."""
        mesh = self._mesh(axis)
        return 0 if mesh is None else mesh.get_local_rank(None if axis in _FLAT else axis)

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The process group of the ranks that differ from this rank only on `axis`; None in a world of one."""
        mesh = self._mesh(axis)
        return None if mesh is None else mesh.get_group(None if axis in _FLAT else axis)

    def comm(self, axis: str) -> Comm:
        """The Comm between the ranks of `group(axis)`. Every call for the same axis returns the same Comm.

        The first call is collective over the group.
        """
        if axis not in self._comms:
            self._comms[axis] = self.new_comm(axis)
        return self._comms[axis]

    def new_comm(self, axis: str) -> Comm:
        """A new Comm between the ranks of `group(axis)`, with a new ledger; collective over these ranks."""
        # Comm(None) means all ranks, but a mesh without process groups has only this rank.
        assert self.device_mesh is not None or not dist.is_initialized(), "use RankMesh.build()"
        self._made.append(Comm(self.group(axis), device=self.device, patience=self.patience))
        return self._made[-1]

    def close(self) -> None:
        """Close the connections of all Comms made by this mesh, once no rank waits for another."""
        for comm in self._made:
            comm.close()

    def _mesh(self, axis: str) -> DeviceMesh | None:
        assert axis in (*AXES, *_FLAT)
        return self.flat_meshes.get(axis) if axis in _FLAT else self.device_mesh
