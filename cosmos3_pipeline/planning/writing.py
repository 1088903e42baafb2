"""The video file beside decoding: how many encoders keep up with it, and what is left after the last frame."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from cosmos3_pipeline.config.schema import Config, Device, Encoder
from cosmos3_pipeline.planning.geometry import chunks_of

# Threads of one x264. With another number the same frames give other bytes.
X264_THREADS = 4
# Frames that x264 looks ahead, where its preset has up to 60. So many are left when the last frame has come; with
# 10 the clips that were tried became no larger at the same PSNR.
LOOKAHEAD = 10
# Frames that wait in x264 besides, in its threads and for those that are shown after them, at most but with preset
# veryslow, where 33 were left in all.
IN_FLIGHT = 3 + X264_THREADS
# Seconds of one core for a megapixel, by x264's preset; measured with crf 17 on a core of an AMD EPYC, AVX-512.
CORE_SECONDS = {
    "ultrafast": 0.011,
    "superfast": 0.014,
    "veryfast": 0.015,
    "faster": 0.026,
    "fast": 0.028,
    "medium": 0.032,
    "slow": 0.064,
    "slower": 0.083,
    "veryslow": 0.117,
    "placebo": 0.39,
}
PRESETS = {Encoder.libx264: tuple(CORE_SECONDS), Encoder.h264_nvenc: ("fast", "medium", "slow")}
# What four threads make of one encoder's work.
THREADED = 3.0
# A part of a video of which each encoder has several: shorter ones would have more whole pictures in the file.
PART_FRAMES = 48
MOST_ENCODERS = 8
# What a GPU's own encoder makes in a second; low, as none was measured.
OWN_MEGAPIXELS_PER_S = 200.0


@dataclass(frozen=True)
class Writing:
    """How a video of `frames` is written: cut in `parts`, of which `encoders` are encoded at a time.

    `seconds` are those of all encoders, of which `exposed_seconds` come after the last frame or keep decoding
    waiting, and the rest is hidden behind it.
    """

    frames: int
    encoders: int
    parts: int
    seconds: float
    exposed_seconds: float

    def as_dict(self) -> dict[str, float]:
        """Plain values, for JSON."""
        return {**asdict(self), "hidden_seconds": self.seconds - self.exposed_seconds}


def writing_of(cfg: Config, decode_seconds: float) -> Writing:
    """How the video is written beside `decode_seconds` of decoding."""
    output, frames = cfg.output, chunks_of(cfg).total
    megapixels = cfg.task.height * cfg.task.width / 1e6
    if output.encoder is Encoder.libx264:
        cores = THREADED
        if cfg.topology.device is Device.cpu:
            cores = min(cores, cfg.topology.ranks_per_node * cfg.topology.threads_per_rank)
        frame = megapixels * CORE_SECONDS[output.preset] / cores
    else:
        frame = megapixels / OWN_MEGAPIXELS_PER_S
    alone = frames * frame
    keep_up = math.ceil(alone / decode_seconds) if decode_seconds else 1
    encoders = min(output.encoders or min(max(keep_up, 1), MOST_ENCODERS), frames)
    parts = encoders * max(1, round(frames / (PART_FRAMES * encoders))) if encoders > 1 else 1
    left = min(LOOKAHEAD + IN_FLIGHT, frames)
    # On a CPU they share the cores with each other; elsewhere the host has some for each.
    at_once = 1 if cfg.topology.device is Device.cpu else encoders
    behind = max(alone / at_once - decode_seconds, 0)
    return Writing(frames, encoders, min(parts, frames), alone, min(max(behind, left * frame), alone))
