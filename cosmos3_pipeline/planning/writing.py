"""Writing the video file during decoding: how many encoders keep up, and the time after the last frame."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from cosmos3_pipeline.config.schema import Config, Device, Encoder
from cosmos3_pipeline.planning.geometry import chunks_of

# Threads of one x264 encoder. Another number of threads gives other bytes for the same frames.
X264_THREADS = 4
# Frames that x264 looks ahead; its presets have up to 60. This many frames are not encoded yet when the last frame
# arrives. At 10, the tested clips became no larger at the same PSNR.
LOOKAHEAD = 10
# The most frames that wait in x264 besides: in its threads, and for frames that are shown later. Preset veryslow
# is an exception: 33 frames were left in all.
IN_FLIGHT = 3 + X264_THREADS
# Seconds of one core per megapixel, by x264 preset, measured with crf 17 on a core of an AMD EPYC with AVX-512.
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
# Speed-up of one encoder by four threads.
THREADED = 3.0
# Frames of one part of a video; an encoder encodes several. Shorter parts would put more key frames in the file.
PART_FRAMES = 48
MOST_ENCODERS = 8
# Speed of a GPU's own encoder. The number is low, because none was measured.
OWN_MEGAPIXELS_PER_S = 200.0


@dataclass(frozen=True)
class Writing:
    """How a video of `frames` is written: in `parts`. Each of the `encoders` encodes one part at a time.

    `seconds` is the time of all encoding. `exposed_seconds` of it come after the last frame or make decoding wait.
    The rest is hidden behind decoding.
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
    # On a CPU the encoders share the cores. An accelerator's host has cores for each encoder.
    at_once = 1 if cfg.topology.device is Device.cpu else encoders
    behind = max(alone / at_once - decode_seconds, 0)
    return Writing(frames, encoders, min(parts, frames), alone, min(max(behind, left * frame), alone))
