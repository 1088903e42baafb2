"""Writes a waveform that is as long as its clip: as the sound of a video, or as a WAV file. Imports no torch."""

from __future__ import annotations

import hashlib
import wave
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from cosmos3_pipeline.checkpoint.sound import SAMPLE_RATE
from cosmos3_pipeline.stages.files import whole_file

# The bit rate of AAC for two channels together. It is more than usual encoders take for music.
BITS_PER_SECOND = 192_000
# A sample of 16 bits is a sample in -1..1 times this number.
LOUDEST = 32767


@dataclass(frozen=True)
class Sound:
    """The entry of a sound in metrics.json: its length, its loudest sample in 0..1, the SHA-256 of its samples.

    The samples are hashed as little-endian float32, one channel after the other, before any compression.
    """

    seconds: float
    samples: int
    channels: int
    sample_rate: int
    peak: float
    sha256: str


def cut_to(waveform: NDArray[np.float32], seconds: Fraction) -> NDArray[np.float32]:
    """The first `seconds` of a waveform [channels, samples]. A decoded waveform is a multiple of 1920 samples."""
    return np.ascontiguousarray(waveform[:, : round(seconds * SAMPLE_RATE)], dtype="<f4")


def sound_of(waveform: NDArray[np.float32]) -> Sound:
    """The description of a waveform [channels, samples]."""
    channels, samples = waveform.shape
    return Sound(
        seconds=samples / SAMPLE_RATE,
        samples=samples,
        channels=channels,
        sample_rate=SAMPLE_RATE,
        peak=float(np.abs(waveform).max()),
        sha256=hashlib.sha256(waveform.data).hexdigest(),
    )


def write_wav(path: Path, waveform: NDArray[np.float32]) -> None:
    """Write [channels, samples] in -1..1 as a WAV file of 16 bits, which every player opens."""
    pcm = np.rint(waveform.T * LOUDEST).astype("<i2")
    with whole_file(path) as partial, wave.open(str(partial), "wb") as file:
        file.setnchannels(waveform.shape[0])
        file.setsampwidth(pcm.itemsize)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(pcm.tobytes())


class AudioTrack:
    """The waveform [channels, samples] as an AAC stream of an open container, beside its frames."""

    def __init__(self, container: Any, waveform: NDArray[np.float32]) -> None:
        self._container = container
        self._waveform = waveform
        self._stream = container.add_stream("aac", rate=SAMPLE_RATE, layout="stereo")
        self._stream.bit_rate = BITS_PER_SECOND
        self._written = 0

    def write_until(self, seconds: Fraction) -> None:
        """Append the samples before `seconds` that are not written yet."""
        stop = min(round(seconds * SAMPLE_RATE), self._waveform.shape[1])
        if stop <= self._written:
            return
        part = np.ascontiguousarray(self._waveform[:, self._written : stop])
        frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, self._written, Fraction(1, SAMPLE_RATE)
        self._container.mux(self._stream.encode(frame))
        self._written = stop

    def finish(self) -> None:
        """Write the samples that the encoder still holds."""
        self._container.mux(self._stream.encode(None))
