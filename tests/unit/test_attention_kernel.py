"""Which kernel computes attention, with stand-ins for an accelerator and for FlashAttention-3."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from cosmos3_pipeline.denoise import attention, attention_kernel
from cosmos3_pipeline.denoise.shards import head_shares
from cosmos3_pipeline.distributed.host_path import FORCED
from cosmos3_pipeline.jobs.metrics import kernels

CUDA = torch.device("cuda:0")


@pytest.fixture
def flash_3(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """A stand-in for FlashAttention-3 on tensors of the host, and the calls that it was given."""
    calls: list[dict[str, Any]] = []

    def flash_attn_func(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
        calls.append({"query": query.shape, "key": key.shape, "causal": causal})
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(
            *heads_first, is_causal=causal, enable_gqa=True
        ).transpose(1, 2)

    stand_in = ModuleType(attention_kernel.FLASH_3)
    stand_in.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, attention_kernel.FLASH_3, stand_in)
    attention_kernel.flash_attention_3.cache_clear()
    yield calls
    attention_kernel.flash_attention_3.cache_clear()


@pytest.fixture(params=[8, 9, 10])
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    major: int = request.param
    monkeypatch.setattr(attention_kernel, "_capability", lambda device: major)
    attention_kernel.order.cache_clear()
    return major


def heads() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(5, n, 16, generator=generator) for n in (4, 2, 2))
    return query, key, value


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_3_is_given_tokens_before_heads(
    causal: bool, flash_3: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = attention_kernel.attention(*heads(), causal=causal)
    assert not flash_3
    monkeypatch.setattr(attention_kernel, "_takes_flash_3", lambda device, dtype: True)
    found = attention_kernel.attention(*heads(), causal=causal)
    assert flash_3 == [{"query": (1, 5, 4, 16), "key": (1, 5, 2, 16), "causal": causal}]
    assert torch.equal(found, expected)


def test_flash_attention_3_is_for_half_precision_on_hopper(capability: int) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        wanted = capability == 9 and dtype == torch.bfloat16
        assert attention_kernel._takes_flash_3(CUDA, dtype) == wanted
    assert not attention_kernel._takes_flash_3(torch.device("cpu"), torch.bfloat16)


def test_cudnn_is_first_from_hopper_on(capability: int) -> None:
    first, *rest = attention_kernel.order(CUDA)
    assert first == (SDPBackend.CUDNN_ATTENTION if capability >= 9 else SDPBackend.FLASH_ATTENTION)
    assert rest[-1] == SDPBackend.MATH


def test_metrics_say_what_computes_attention(capability: int, request: pytest.FixtureRequest) -> None:
    attention_kernel.flash_attention_3.cache_clear()
    assert "cudnn" in kernels(CUDA, torch.bfloat16)["attention"]
    request.getfixturevalue("flash_3")
    told = kernels(CUDA, torch.bfloat16)["attention"]
    assert (told == attention_kernel.FLASH_3) == (capability == 9)
    host = kernels(torch.device("cpu"), torch.bfloat16)
    assert host == {"attention": "scaled_dot_product_attention", "norms": "plain ops"}
    assert kernels(CUDA, torch.bfloat16)["norms"].startswith("triton ")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_accelerator_repeats_no_keys_where_heads_cut_through_a_group(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, share = torch.Generator().manual_seed(0), head_shares(12, 3, 2)[rank]
    counts = (6, share.num_keys, share.num_keys)
    query, key, value = (torch.randn(5, n, 16, generator=generator) for n in counts)
    expected = attention.attend(query, key, value, share, causal=True)
    given, kernel = list[int](), attention_kernel.attention

    def counting(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
        given.append(key.shape[1])
        return kernel(query, key, value, causal=causal)

    monkeypatch.setenv(FORCED, "1")
    monkeypatch.setattr(attention, "attention", counting)
    torch.testing.assert_close(attention.attend(query, key, value, share, causal=True), expected)
    assert not share.grouped and sum(given) == share.num_keys
