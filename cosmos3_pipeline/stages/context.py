"""The data that flows from stage to stage, and the tools that every stage may use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from diffusers.modular_pipelines.modular_pipeline import PipelineState
from torch import Tensor

from cosmos3_pipeline.denoise.guidance import PassCounts
from cosmos3_pipeline.distributed.mesh import REPLICA, RankMesh
from cosmos3_pipeline.models.loading import Components
from cosmos3_pipeline.planning.chunks import Chunks
from cosmos3_pipeline.planning.geometry import Clip
from cosmos3_pipeline.stages.media import Change, Sound
from cosmos3_pipeline.stages.progress import Reporter, Silent
from cosmos3_pipeline.stages.words import Words


@dataclass(frozen=True)
class Written:
    """How a video was written: in `parts`, by `encoders` that work at the same time, one part each.

    `encoder_seconds` are the encoders' seconds added up; most of them overlap with decoding. The file was complete
    `seconds_after_last_frame` after the last frame had come.
    """

    encoders: int
    parts: int
    encoder_seconds: float
    seconds_after_last_frame: float


@dataclass(frozen=True)
class Picture:
    """The image or video that a run made: its file, and the SHA-256 of its uint8 RGB frames before compression.

    `sound` describes the sound in the file, and `written` says how a video was written.
    """

    path: Path
    num_frames: int
    frames_sha256: str
    sound: Sound | None = None
    written: Written | None = None


class Measure(Protocol):
    """A context that is entered for the time that a stage works.

    A `portion` is one turn of a stage, while decode and export take turns. The host does not wait for the device
    at the end of a portion.
    """

    def __call__(self, stage: str, /, *, portion: bool = False) -> AbstractContextManager[object]: ...


def _not_measured(stage: str, /, *, portion: bool = False) -> AbstractContextManager[object]:
    return nullcontext()


@dataclass
class RunContext:
    """One run on one rank. The stages are called with it one after the other, on every rank of the replica.

    `components`, `clip` and `fps` (frames per second) say what to make. With `chunks`, `clip` is one chunk of the
    video. `mesh` says where this rank stands and `directory` where the root writes. The stages enter `measure`.
    """

    components: Components
    clip: Clip
    fps: float
    directory: Path
    chunks: Chunks | None = None
    mesh: RankMesh = field(default_factory=RankMesh)
    reporter: Reporter = field(default_factory=Silent)
    measure: Measure = _not_measured

    # Values that diffusers' blocks pass to each other: the prompts' tokens, the clean latents of the condition,
    # then `latents`, the denoised latents [1, C, T, h, w].
    state: PipelineState = field(default_factory=PipelineState)
    # The changes that reading made to each input picture, by the config key of the input. Set by encode.
    inputs: dict[str, list[Change]] = field(default_factory=dict)
    # The words that the tokenizer got. Set by text.
    words: Words | None = None
    # The passes through the transformer, added up over all ranks. Counted by denoise.
    passes: PassCounts = field(default_factory=PassCounts)
    # uint8 chunks [frames, H, W, 3] in order, on the root. Other ranks take part and get no chunk. Set by decode.
    frames: Iterator[Tensor] | None = None
    # The waveform [channels, samples] at 48 kHz, on the root, if the task has sound. Set by sound.
    waveform: Tensor | None = None
    # Set by export, on the root. A task makes a picture, actions or both.
    picture: Picture | None = None
    actions: Path | None = None

    @property
    def num_frames(self) -> int:
        """The number of frames of the whole video, not of one chunk."""
        return self.clip.num_frames if self.chunks is None else self.chunks.total

    @property
    def is_root(self) -> bool:
        """Whether this rank writes the files of its replica."""
        return self.mesh.rank(REPLICA) == 0


class Stage(Protocol):
    """One step of a run; built from the config, then called once per run."""

    def __call__(self, context: RunContext) -> None: ...
