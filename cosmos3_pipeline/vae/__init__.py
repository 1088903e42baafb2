"""The VAE in parallel: one program of ops, strategies that assign them to ranks, and one lowering of that.

Importing this package imports no torch; `ParallelVAE` does when it is asked for.
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
