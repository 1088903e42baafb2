"""A video with sound as a user makes it: opened again, on two ranks, and as a line of a prompt file."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

SOUND = ("task.sound=true", "output.sound=true", "output.crf=20")
# One thread as on two ranks: with another number the last bits of a waveform differ.
STREAMED = ("weights=streamed", "weights.keep_text=true", "topology.threads_per_rank=1")
RATE, SAMPLES = 48000, 18000  # of 9 frames at 24 frames per second


def test_a_video_has_its_sound_on_two_ranks_and_of_each_prompt_wherever_the_weights_are(
    generate: Callable[..., Path], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red kite\na dog barks\n")
    pair = generate(*SOUND, "topology=cpu_x2", "weights=sharded", "task.prompt='a dog barks'")
    clips = generate(*SOUND, f"task.prompt_file={prompts}", *STREAMED)
    said = {}
    for name, folder in (("pair", pair), ("first", clips / "line_0001"), ("second", clips / "line_0002")):
        said[name] = json.loads((folder / "metrics.json").read_text())
        with av.open(str(folder / "video.mp4")) as file:
            video, audio = file.streams.video[0], file.streams.audio[0]
            assert (video.frames, video.start_time, audio.start_time) == (9, 0, 0)
            assert (audio.rate, audio.layout.name, audio.duration) == (RATE, "stereo", SAMPLES)
            heard = np.concatenate([frame.to_ndarray() for frame in file.decode(audio)], axis=1)[:, :SAMPLES]
        with wave.open(str(folder / "sound.wav")) as file:
            pcm = np.frombuffer(file.readframes(SAMPLES), "<i2").reshape(-1, 2).T / 32767
        assert pcm.shape == heard.shape == (2, SAMPLES)
        assert np.corrcoef(pcm.ravel(), heard.ravel())[0, 1] > 0.5  # noise, which AAC keeps badly
        assert said[name]["sound"]["samples"] == SAMPLES and 0.2 < said[name]["sound"]["peak"] < 1
        assert said[name]["stages"]["sound"]["seconds"] > 0
    sounds = {name: (one["sound"]["sha256"], one["frames_sha256"]) for name, one in said.items()}
    assert sounds["pair"] == sounds["second"] != sounds["first"]
