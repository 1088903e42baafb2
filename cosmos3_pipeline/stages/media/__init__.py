"""Photographs and clips in, videos out. Imports no torch.

`read_picture` and `read_frames` give RGB pictures as a viewer shows them, and a list of `Change`. Each `Change` is
one difference from the file's stored picture. The list is reported, so that no picture is changed silently.
"""

from cosmos3_pipeline.stages.media.audio import Sound, cut_to, sound_of, write_wav
from cosmos3_pipeline.stages.media.clips import each_frame, look_at, read_frames
from cosmos3_pipeline.stages.media.pictures import read_picture
from cosmos3_pipeline.stages.media.shown import Change
from cosmos3_pipeline.stages.media.writing import check_encoder, frame_rate, likeness_of_files, write_video

__all__ = [
    "Change",
    "Sound",
    "check_encoder",
    "cut_to",
    "each_frame",
    "frame_rate",
    "likeness_of_files",
    "look_at",
    "read_frames",
    "read_picture",
    "sound_of",
    "write_video",
    "write_wav",
]
