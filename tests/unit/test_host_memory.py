"""Freed buffers are kept for the next ones, unless the user has decided otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from vae_models import WAN22, make_vae, vae_config

from cosmos3_pipeline.vae import ParallelVAE, weights
from cosmos3_pipeline.vae.host_memory import SETTINGS
from cosmos3_plugins.replicated import Replicated

# For a process of its own: how many pages are mapped while four buffers of 24 MiB are taken and freed repeatedly.
CODE = """
import resource
import torch
from cosmos3_pipeline.vae.host_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        buffers = [torch.ones(6 << 20) for _ in range(4)]
        del buffers
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

did = keep_freed_memory()
faults()
print(did, faults())
"""


def _run(**environment: str) -> tuple[str, int]:
    plain = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**plain, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    did, faults = done.stdout.split()
    return did, int(faults)


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="another C library than glibc")
def test_freed_buffers_are_kept() -> None:
    did, faults = _run()
    assert did == "True"
    assert faults < 1000
    # The same buffers, given back each time because the user says so.
    did, faults = _run(MALLOC_MMAP_THRESHOLD_="1000000")
    assert did == "False"
    assert faults > 10 * 1000


def test_whoever_binds_ops_on_cpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(weights, "keep_freed_memory", lambda: asked.append(True))
    vae = ParallelVAE(make_vae(vae_config(WAN22)), Replicated(), Replicated())
    vae.decode(torch.zeros(1, WAN22["z_dim"], 1, 2, 2))
    assert asked


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_user_has_set_stays(name: str) -> None:
    value = "glibc.malloc.perturb=0" if name == "GLIBC_TUNABLES" else "1000000"
    assert _run(**{name: value})[0] == "False"
