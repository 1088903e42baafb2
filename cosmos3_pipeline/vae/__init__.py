"""The parallel VAE: one program of ops, strategies that assign ops to ranks, one lowering to actions of each rank.

Importing this package imports no torch. Only the attribute `ParallelVAE` imports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosmos3_pipeline.vae.parallel_vae import ParallelVAE

__all__ = ["ParallelVAE"]


def __getattr__(name: str) -> Any:
    if name == "ParallelVAE":
        from cosmos3_pipeline.vae.parallel_vae import ParallelVAE

        return ParallelVAE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
