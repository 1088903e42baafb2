"""The ranks of a run as one `DeviceMesh` with named axes, and the process groups that each part of a run uses.

Axes, slowest first: `dp` (replicas: one prompt each), `spare` (ranks of a replica that repeat its denoising
and only help its VAE), `cfg` (guidance: conditional and unconditional pass), `ulysses` (sequence). Ulysses
talks in every layer, so its ranks are neighbours. Layout as in torchtitan's `ParallelDims`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.errors import Refusal

AXES = ("dp", "spare", "cfg", "ulysses")
REPLICA = "replica"  # the ranks of one dp replica: spare x cfg x ulysses, the VAE's group


@dataclass(frozen=True)
class RankMesh:
    """Where this rank stands on each axis. `device_mesh` is None in a world of one without process groups.

    The groups are gloo's, whatever the `device`: they say who belongs together. Each Comm has connections of its
    own, in which a message may take as long as `patience`.
    """

    dp: int = 1
    spare: int = 1
    cfg: int = 1
    ulysses: int = 1
    device_mesh: DeviceMesh | None = None
    replica_mesh: DeviceMesh | None = field(default=None, repr=False)
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
        ulysses: int = 1,
        device: torch.device | None = None,
        patience: timedelta = default_pg_timeout,
    ) -> RankMesh:
        """The mesh of the initialised world (one rank when there is none), `spare` taking the ranks left over.

        Every rank of the world must call it: making process groups is collective.

        Raises:
            Refusal: the world's ranks do not divide by dp x cfg x ulysses.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        wanted = dp * cfg * ulysses
        if world % wanted:
            raise Refusal(
                what=f"dp={dp} x cfg={cfg} x ulysses={ulysses} on {world} ranks",
                why=f"{world} ranks do not divide by {dp} x {cfg} x {ulysses} = {wanted}",
                works=f"{wanted * max(round(world / wanted), 1)} ranks, or axes whose product divides {world}",
            )
        spare = world // wanted
        device = device or torch.device("cpu")
        if not dist.is_initialized():
            return cls(device=device)
        mesh = init_device_mesh("cpu", (dp, spare, cfg, ulysses), mesh_dim_names=AXES)
        replica = mesh["spare", "cfg", "ulysses"]._flatten(REPLICA)
        return cls(
            dp=dp,
            spare=spare,
            cfg=cfg,
            ulysses=ulysses,
            device_mesh=mesh,
            replica_mesh=replica,
            device=device,
            patience=patience,
        )

    def size(self, axis: str) -> int:
        """Ranks on `axis`, one of `AXES` or `REPLICA`."""
        if axis == REPLICA:
            return math.prod((self.spare, self.cfg, self.ulysses))
        assert axis in AXES
        return int(getattr(self, axis))

    def rank(self, axis: str) -> int:
        """This rank's place on `axis`, from 0."""
        mesh = self._mesh(axis)
        return 0 if mesh is None else mesh.get_local_rank(None if axis == REPLICA else axis)

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The process group of the ranks that differ from this one on `axis` only, or None in a world of one."""
        mesh = self._mesh(axis)
        return None if mesh is None else mesh.get_group(None if axis == REPLICA else axis)

    def comm(self, axis: str) -> Comm:
        """The counted messages between the ranks of `group(axis)`: one Comm per axis, however often asked for.

        The first time is collective over the group.
        """
        if axis not in self._comms:
            self._comms[axis] = self.new_comm(axis)
        return self._comms[axis]

    def new_comm(self, axis: str) -> Comm:
        """Counted messages between the ranks of `group(axis)` with a ledger of their own; collective over them."""
        # For Comm no group is everybody; a mesh without one has this rank alone.
        assert self.device_mesh is not None or not dist.is_initialized(), "use RankMesh.build()"
        self._made.append(Comm(self.group(axis), device=self.device, patience=self.patience))
        return self._made[-1]

    def close(self) -> None:
        """Close the connections of all that were made here, once no rank waits for another."""
        for comm in self._made:
            comm.close()

    def _mesh(self, axis: str) -> DeviceMesh | None:
        assert axis in (*AXES, REPLICA)
        return self.replica_mesh if axis == REPLICA else self.device_mesh
