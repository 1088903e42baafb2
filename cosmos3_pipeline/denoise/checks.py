"""Which layouts of the denoising ranks are possible, decided from numbers only. Imports no torch."""

from __future__ import annotations

from cosmos3_pipeline.denoise.shards import Grid, even_rows
from cosmos3_pipeline.errors import Refusal


class CfgLayoutError(Refusal):
    """The `cfg` axis asks for more guidance passes than there are."""


class UlyssesLayoutError(Refusal):
    """The attention heads do not divide over the `ulysses` axis."""


class CpLayoutError(Refusal):
    """A group of the `cp` grid would hold no tokens."""


def check_tokens(tokens: int, grid: Grid) -> None:
    """Refuse a grid in which a whole group would have no tokens, because its attention would be empty.

    `tokens` is the length of the sequence. If there is only one group, single ranks may have no tokens.

    Raises:
        CpLayoutError: there are too few tokens.
    """
    held = even_rows(tokens, grid.ranks)
    if grid.groups > 1 and not held[-grid.ulysses]:
        groups = max(sum(n > 0 for n in held) // grid.ulysses, 1)
        raise CpLayoutError(
            what=f"cp=[{grid.rows},{grid.columns}] x ulysses={grid.ulysses} over {tokens} tokens",
            why=f"tokens go to ranks in blocks, so that {sum(n == 0 for n in held)} of {grid.ranks} ranks, "
            "and with them a whole group, would have none",
            works=f"cp=[{groups},1]" if groups > 1 else "cp=[1,1]",
        )


PASSES = 2  # of guidance: with the prompt, and with the negative prompt


def check_layout(
    *, num_attention_heads: int, num_key_value_heads: int, cfg: int, ulysses: int, guidance_scale: float
) -> None:
    """Refuse a layout for which the model has too few heads or the guidance too few passes.

    Only query heads and guidance passes limit the layout: any number of tokens can be split (unevenly), and
    key/value heads are sent to every rank that needs them.

    Raises:
        CfgLayoutError: more than two ranks on `cfg`, or two without guidance.
        UlyssesLayoutError: `num_attention_heads` does not divide by `ulysses`.
    """
    if cfg > PASSES:
        raise CfgLayoutError(
            what=f"cfg={cfg} ranks for guidance",
            why="guidance has two passes, one with the prompt and one with the negative prompt",
            works=f"cfg=2 and ulysses={ulysses * cfg // 2}" if cfg % 2 == 0 else "cfg=2",
        )
    if cfg == 2 and guidance_scale == 1.0:
        raise CfgLayoutError(
            what=f"cfg=2 with guidance_scale={guidance_scale}",
            why="at guidance scale 1.0 there is one pass only, so the second rank would have nothing to do",
            works="cfg=1, or any other guidance scale",
        )
    if num_attention_heads % ulysses:
        divisors = [n for n in range(1, num_attention_heads + 1) if num_attention_heads % n == 0]
        near = sorted(sorted(divisors, key=lambda n: (abs(n - ulysses), n))[:2])
        raise UlyssesLayoutError(
            what=f"ulysses={ulysses} with {num_attention_heads} attention heads "
            f"({num_key_value_heads} key/value heads)",
            why=f"each rank attends with its own heads, and {num_attention_heads} / {ulysses} is "
            f"{num_attention_heads / ulysses:.2f}",
            works=" or ".join(f"ulysses={n}" for n in near),
        )
