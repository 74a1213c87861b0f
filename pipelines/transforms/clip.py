"""Clips: the part of a recording that is shown. Sound and pictures of a recording share it and stay in sync."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from pydantic import Field

from perceiver.config import Config, Positive, Seconds


class ClipConfig(Config):
    """Where clips of recordings start, for audio and video, as in the Perceiver paper (4.2)."""

    jitter: Seconds | None = Field(
        default=None,
        description="seconds that a training clip's start varies about the middle, also beyond the ends (silence,"
        " still frames); null: anywhere in the recording",
    )
    eval_clips: int = Field(
        default=1,
        ge=1,
        le=10_000,
        description="evenly spaced clips of an evaluation sample, whose scores are averaged (paper: 16); 1: the middle",
    )
    show: Literal["both", "audio", "video"] = Field(
        default="both", description="streams to decode of a recording with sound and pictures"
    )
    max_seconds: Positive = Field(default=600.0, description="longer recordings are bad samples")

    def axes(self, training: bool) -> tuple[int, ...]:
        """Return the axis in front of a sample's shape: (K,) in an evaluation of K > 1 clips."""
        return () if training or self.eval_clips == 1 else (self.eval_clips,)

    def eval_rows(self, micro_batch: int) -> int:
        """Return the samples of an evaluation batch with about `micro_batch` clips, at least 1."""
        return max(1, micro_batch // self.eval_clips)


def exceeds_clips(seconds: float, length: float, config: ClipConfig) -> bool:
    """Return whether the clips of an evaluation leave more than a hundredth of a recording out.

    Args:
        seconds: length of the recording.
        length: of a clip, in seconds.
        config: the number of clips.
    """
    return seconds > 1.01 * length * config.eval_clips


def clips_excess(length: float, config: ClipConfig) -> str:
    """Return what happens to recordings that `exceeds_clips`."""
    clips = f"{config.eval_clips} clips" if config.eval_clips > 1 else "the middle"
    where = "a random part" if config.jitter is None else f"a part up to {config.jitter:g} s off the middle"
    return (
        f"longer than what an evaluation shows, {clips} of {length:.4g} s (training: {where}): raise "
        "data.clip.eval_clips, whose scores are averaged, or the length of a clip"
    )


def clip_starts(
    seconds: float, length: float, config: ClipConfig, training: bool, random: Callable[[], Generator]
) -> NDArray[np.float64]:
    """Return the starts of the clips in seconds: (1,) in training, (eval_clips,) in evaluation.

    A recording shorter than the clip is shown from its start, unless `jitter` moves it.

    Args:
        seconds: length of the recording.
        length: of a clip, in seconds.
        config: where clips start.
        training: random starts, or the fixed ones of evaluation.
        random: returns the generator; called only if something is random.
    """
    room = max(0.0, seconds - length)
    if not training:
        return np.linspace(0, room, config.eval_clips) if config.eval_clips > 1 else np.array([room / 2])
    if config.jitter is None:
        return np.array([random().uniform(0, room) if room else 0.0])
    return np.array([room / 2 + (random().uniform(-config.jitter, config.jitter) if config.jitter else 0.0)])
