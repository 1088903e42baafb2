"""What flows from stage to stage, and what every stage may use."""

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
    """How a video was written: so many `encoders` at a time, each with one of `parts`.

    The encoders worked `encoder_seconds` together, most of it beside decoding. The file was there
    `seconds_after_last_frame` had come.
    """

    encoders: int
    parts: int
    encoder_seconds: float
    seconds_after_last_frame: float


@dataclass(frozen=True)
class Picture:
    """What a run has made: its file, and the SHA-256 of the uint8 RGB frames before any compression.

    `sound` is the one of its file, and `written` how a video was.
    """

    path: Path
    num_frames: int
    frames_sha256: str
    sound: Sound | None = None
    written: Written | None = None


class Measure(Protocol):
    """Entered for the time that a stage works.

    `portion` says that decode and export take turns: then the device is not waited for.
    """

    def __call__(self, stage: str, /, *, portion: bool = False) -> AbstractContextManager[object]: ...


def _not_measured(stage: str, /, *, portion: bool = False) -> AbstractContextManager[object]:
    return nullcontext()


@dataclass
class RunContext:
    """One run on one rank. The stages are called with it one after the other, on every rank of the replica.

    `components`, `clip` and `fps` (frames per second) say what to make, `chunks` that the clip is one of several;
    `mesh` says where this rank stands and `directory` where the root writes. `measure` is entered by the stages.
    """

    components: Components
    clip: Clip
    fps: float
    directory: Path
    chunks: Chunks | None = None
    mesh: RankMesh = field(default_factory=RankMesh)
    reporter: Reporter = field(default_factory=Silent)
    measure: Measure = _not_measured

    # What diffusers' blocks leave for each other: the prompts' tokens, the clean latents of the condition, then
    # `latents`, the denoised latents [1, C, T, h, w].
    state: PipelineState = field(default_factory=PipelineState)
    # What was changed of each input's own picture, by the input's key. Set by encode.
    inputs: dict[str, list[Change]] = field(default_factory=dict)
    # The words that the tokenizer was given. Set by text.
    words: Words | None = None
    # The passes through the transformer, of all ranks. Counted by denoise.
    passes: PassCounts = field(default_factory=PassCounts)
    # uint8 chunks [frames, H, W, 3] in order, on the root; other ranks take part and get none. Set by decode.
    frames: Iterator[Tensor] | None = None
    # The waveform [channels, samples] at 48 kHz, on the root, where the task has sound. Set by sound.
    waveform: Tensor | None = None
    # Set by export, on the root. A task may make one of them alone.
    picture: Picture | None = None
    actions: Path | None = None

    @property
    def num_frames(self) -> int:
        """Of the whole video."""
        return self.clip.num_frames if self.chunks is None else self.chunks.total

    @property
    def is_root(self) -> bool:
        """Whether this rank writes the files of its replica."""
        return self.mesh.rank(REPLICA) == 0


class Stage(Protocol):
    """One step of a run; built from the config, then called once per run."""

    def __call__(self, context: RunContext) -> None: ...
