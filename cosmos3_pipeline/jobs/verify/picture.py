"""verify.png: for each comparison the frame that differs most, of both sides, and the amplified difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from cosmos3_pipeline.stages.files import whole_file

CAPTION_PIXELS = 14
GAP_PIXELS = 4


@dataclass(frozen=True)
class Row:
    """The frame number `index` of `name`, which differs most from that of `beside`. Both are uint8 [H, W, 3]."""

    name: str
    beside: str
    index: int
    reference: NDArray[np.uint8]
    frame: NDArray[np.uint8]

    @classmethod
    def worst(cls, name: str, beside: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Row:
        """The pair of frames that differs most. The first frame of each pair is the reference's."""
        errors = [float((a.double() - b.double()).square().sum()) for a, b in pairs]
        index = int(np.argmax(errors))
        return cls(name, beside, index, pairs[index][0].numpy(), pairs[index][1].numpy())

    def amplified(self) -> tuple[NDArray[np.uint8], int]:
        """The difference times a whole factor that makes its largest value nearly white, and this factor."""
        difference = np.abs(self.reference.astype(np.int16) - self.frame)
        factor = 255 // max(int(difference.max()), 1)
        return (difference * factor).astype(np.uint8), factor


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the rows below each other: reference, strategy, difference."""
    height, width, _ = rows[0].frame.shape
    line = CAPTION_PIXELS + height + GAP_PIXELS
    # The caption needs this width, even if the picture is small.
    sheet = Image.new("RGB", (max(3 * width + 2 * GAP_PIXELS, 420), line * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, row in enumerate(rows):
        difference, factor = row.amplified()
        top = place * line
        names = f"frame {row.index}: {row.beside} | {row.name}"
        caption = f"{names} | difference x {factor}"
        if not difference.any():
            caption = f"{names} | no difference in any frame"
        pen.text((2, top + 1), caption, fill="black")
        for column, panel in enumerate((row.reference, row.frame, difference)):
            left = column * (width + GAP_PIXELS)
            sheet.paste(Image.fromarray(panel), (left, top + CAPTION_PIXELS))
    with whole_file(path) as partial:
        sheet.save(partial, format="PNG")
