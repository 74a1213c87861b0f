"""Clips: which part of a recording is shown. Sound and pictures of one recording share it, so they stay in step."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from pydantic import Field

from perceiver.config import Config


class ClipConfig(Config):
    """Where clips of recordings start (audio, video and both alike), as in the Perceiver paper (4.2)."""

    jitter: float | None = Field(
        default=None,
        ge=0,
        description="seconds either way about the middle that a training clip's start varies, also"
        " beyond the ends (silence, still frames); null: anywhere inside the recording",
    )
    eval_clips: int = Field(
        default=1,
        ge=1,
        description="clips of an evaluation sample, spread from its start to its"
        " end, their scores averaged (paper: 16); 1: the middle",
    )
    show: Literal["both", "audio", "video"] = Field(
        default="both", description="what to decode of a recording with sound and pictures"
    )
    max_seconds: float = Field(default=600.0, gt=0, description="longer recordings are bad samples")

    def axes(self, training: bool) -> tuple[int, ...]:
        """The axis in front of a sample's shape: (K,) in an evaluation of K > 1 clips."""
        return () if training or self.eval_clips == 1 else (self.eval_clips,)

    def eval_rows(self, micro_batch: int) -> int:
        """Samples of an evaluation batch that has about as many clips as a training batch has samples; at least 1."""
        return max(1, micro_batch // self.eval_clips)


def clip_starts(
    seconds: float, length: float, config: ClipConfig, training: bool, random: Callable[[], Generator]
) -> NDArray[np.float64]:
    """Starts of the clips in seconds: (1,) in training, (eval_clips,) in evaluation.

    A recording shorter than the clip is shown from its start, unless `jitter` moves it.

    Args:
        seconds: length of the recording.
        length: of a clip, in seconds.
        config: where clips start.
        training: random, or the fixed ones of evaluation.
        random: gives the only source of randomness; called if something is random.
    """
    room = max(0.0, seconds - length)
    if not training:
        return np.linspace(0, room, config.eval_clips) if config.eval_clips > 1 else np.array([room / 2])
    if config.jitter is None:
        return np.array([random().uniform(0, room) if room else 0.0])
    return np.array([room / 2 + (random().uniform(-config.jitter, config.jitter) if config.jitter else 0.0)])
