"""Freed buffers are kept for the next ones, unless the user has decided otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from vae_models import WAN22, make_vae, vae_config

from cosmos3_pipeline.vae import ParallelVAE, convolution, execute, host_memory, weights
from cosmos3_pipeline.vae.host_memory import SETTINGS
from cosmos3_plugins.replicated import Replicated

pytestmark = pytest.mark.ranks

# Bounds for the share of the buffers' pages that are mapped anew. If freed buffers are kept, a few of the 24 are
# still mapped anew, because small allocations come to lie between them. If none is kept, the share is near 1.
FEW, ALL = 0.25, 0.95

# Runs in a process of its own, because it changes settings of glibc. It takes and frees four buffers repeatedly
# and prints the share of their pages that is mapped anew, for a size that glibc can be told to keep and for one
# that it always maps, by default and with large buffers kept. Then it takes a long-lived buffer that fits into no
# freed one. It prints the MiB that this buffer takes, the MiB that stay when it is freed, and whether large
# buffers are kept after that as before.
CODE = """
import ctypes
import os
import resource
import torch
from cosmos3_pipeline.vae.host_memory import keep_freed_memory, keeping_large_buffers, long_lived

PAGE = os.sysconf("SC_PAGE_SIZE")
PR_SET_THP_DISABLE = 41

# Where the system maps huge pages on its own, pages of one size still come.
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * PAGE / 2**20

def mapped(mebibytes):
    for times in (2, 6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(times):
            buffers = [torch.ones(mebibytes << 18) for _ in range(4)]
            del buffers
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * PAGE / (4 * times * mebibytes << 20)

did = keep_freed_memory()
# The second are larger than all that the first have left free.
measured = [mapped(24), mapped(128)]
with keeping_large_buffers():
    measured.append(mapped(48))
    before = resident()
    with long_lived():
        weight = torch.ones(512 << 18)
    measured.append(resident() - before)
    del weight
    measured += [resident() - before, mapped(48)]
print(did, *measured)
"""


@cache
def _run(code: str = CODE, **environment: str) -> tuple[str, list[float]]:
    plain = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**plain, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    did, *measured = done.stdout.split()
    return did, [float(each) for each in measured]


@pytest.mark.thorough
@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="another C library than glibc")
def test_freed_buffers_are_kept() -> None:
    did, (small, larger, large, *_) = _run()
    assert did == "True"
    assert max(small, large) < FEW
    assert larger > ALL, "large ones are kept in the whole process"
    # The same buffers, given back each time because the user says so.
    did, (*shares, _, _, _) = _run(MALLOC_MMAP_THRESHOLD_="1000000")
    assert did == "False"
    assert min(shares) > ALL


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="another C library than glibc")
def test_what_lives_long_is_given_back() -> None:
    _, (*_, taken, left, after) = _run()
    assert taken > 500
    assert left < 50
    assert after < FEW, "the buffers after it are no longer kept"


def test_threads_that_end_in_another_order_leave_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[int] = []

    class Library:
        def mallopt(self, option: int, value: int) -> int:
            allowed.append(value)
            return 1

    monkeypatch.setattr(host_memory, "_keeping", Library())
    one, other = host_memory.keeping_large_buffers(), host_memory.keeping_large_buffers()
    one.__enter__()
    other.__enter__()
    with host_memory.long_lived():
        pass
    one.__exit__(None, None, None)
    other.__exit__(None, None, None)
    mapped = 65536
    assert allowed == [0, 0, mapped, 0, 0, mapped]


def test_ops_keep_large_buffers_and_reordered_weights_live_long(monkeypatch: pytest.MonkeyPatch) -> None:
    open_blocks: list[str] = []
    seen: dict[str, set[tuple[str, ...]]] = {"convolution": set(), "reordering": set()}

    def block(name: str) -> Callable[[], AbstractContextManager[None]]:
        @contextmanager
        def entered() -> Iterator[None]:
            open_blocks.append(name)
            yield
            open_blocks.pop()

        return entered

    def noting(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            seen[what].add(tuple(open_blocks))
            return call(*args, **kwargs)

        return noted

    monkeypatch.setattr(execute, "keeping_large_buffers", block("kept"))
    monkeypatch.setattr(convolution, "long_lived", block("long-lived"))
    monkeypatch.setattr(
        convolution.Convolution, "__call__", noting("convolution", convolution.Convolution.__call__)
    )
    name = "mkldnn_reorder_conv3d_weight"
    monkeypatch.setattr(torch._C._nn, name, noting("reordering", getattr(torch._C._nn, name)))
    vae = ParallelVAE(make_vae(vae_config(WAN22)), Replicated(), Replicated())
    for _ in vae.decode_stream(torch.zeros(1, WAN22["z_dim"], 2, 2, 2)):
        assert not open_blocks, "what the caller takes meanwhile is kept as well"
    assert seen == {"convolution": {("kept",)}, "reordering": {("kept", "long-lived")}}


def test_whoever_binds_ops_on_cpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(weights, "keep_freed_memory", lambda: asked.append(True))
    vae = ParallelVAE(make_vae(vae_config(WAN22)), Replicated(), Replicated())
    vae.decode(torch.zeros(1, WAN22["z_dim"], 1, 2, 2))
    assert asked


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_user_has_set_stays(name: str) -> None:
    value = "glibc.malloc.perturb=0" if name == "GLIBC_TUNABLES" else "1000000"
    code = "from cosmos3_pipeline.vae.host_memory import keep_freed_memory; print(keep_freed_memory())"
    assert _run(code, **{name: value}) == ("False", [])
