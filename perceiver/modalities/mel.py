"""Log-mel spectrogram of audio: samples (B, T) -> one scalar per frame and mel bin, with positions.

Source: DMVR's defaults, which give the 4,800 inputs of Perceiver §4.2 for 61,440 samples: STFT of 2,048 with hop 1,024,
periodic Hann window, end padded, magnitude, 80 HTK mel bins from 80 to 7,600 Hz, log(x + 1e-6), no pre-emphasis.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.attention import no_autocast
from perceiver.config import Config, Real, Size, UserError
from perceiver.hashing import FIRST, GOLDEN, SECOND
from perceiver.modalities._positions import Positions
from perceiver.modalities._statistics import Deviation, Mean, numbers
from perceiver.modalities.audio import normalise_audio
from perceiver.positions import FourierConfig, Inputs, PositionConfig


class MelConfig(Config):
    """Mono audio under the batch key `audio`, turned into a log-mel spectrogram on the device.

    SpecAugment's sizes in the Perceiver paper are not known: it is off by default; 2 masks of each kind, as in its own
    paper, are a start. Its draws in a run are a function of seed, step and sample.
    """

    kind: Literal["mel"] = "mel"
    samples: Size = Field(default=61_440, description="Length of a clip in samples.")
    rate: int = Field(default=48_000, ge=100, le=1_000_000, description="Samples per second.")
    window: int = Field(default=2048, ge=2, le=1 << 20, description="STFT length in samples.")
    fft: int | None = Field(
        default=None,
        ge=2,
        le=1 << 20,
        description="FFT length, zeros after the window (VGGish: 512); null: none.",
    )
    hop: Size = Field(default=1024, description="Samples between frames.")
    bins: int = Field(default=80, ge=1, le=1 << 16, description="Mel bins.")
    low: Real = Field(default=80.0, ge=0, le=1e6, description="Lowest frequency in Hz.")
    high: Real = Field(default=7600.0, gt=0, le=1e6, description="Highest frequency in Hz.")
    centre: bool = Field(
        default=False,
        description="Frames are centred, the ends reflected (CNN-14); else zeros follow the end.",
    )
    spectrum: Literal["magnitude", "power"] = Field(default="magnitude", description="What the mel filters add up.")
    scale: Literal["htk", "slaney"] = Field(
        default="htk", description="Mel filters: HTK's with peak 1, or Slaney's with area 1, as librosa's default."
    )
    log: Literal["ln", "db"] = Field(default="ln", description="ln(x + log_offset), or 10 log10(max(x, log_offset)).")
    log_offset: Real = Field(default=1e-6, ge=1e-30, le=1e6, description="See `log` (CNN-14: db, 1e-10).")
    layout: Literal["sequence", "grid"] = Field(
        default="sequence", description="1-D positions over all scalars (paper), or 2-D over frames and bins."
    )
    mean: Mean = Field(default=0.0, description="Subtracted from the log-mel values; data: as measured.")
    std: Deviation = Field(default=1.0, description="The values are divided by it, after the mean; data: as measured.")
    time_masks: int = Field(
        default=0, ge=0, le=1000, description="SpecAugment: masked stretches of frames in training."
    )
    time_width: int = Field(default=10, ge=0, le=1 << 24, description="SpecAugment: most frames in a stretch.")
    frequency_masks: int = Field(default=0, ge=0, le=1000, description="SpecAugment: masked bands in training.")
    frequency_width: int = Field(default=10, ge=0, le=1 << 24, description="SpecAugment: most bins in a band.")
    positions: PositionConfig = Field(default=FourierConfig(), discriminator="kind", description="Positions.")

    def build(self) -> nn.Module:
        """Build the module."""
        return Mel(self)


FRONT_END = ("fft", "centre", "spectrum", "scale", "log", "log_offset")
"""Keys whose statistics `perceiver prepare` measures only at their defaults."""


def frame_count(config: MelConfig, samples: int) -> int:
    """Return the number of frames of a clip."""
    return 1 + samples // config.hop if config.centre else -(-samples // config.hop)


@lru_cache(maxsize=8)
def mel_matrix(
    bins: int, spectrum: int, rate: int, low: float, high: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return (spectrum, bins) triangular filters, linear on the HTK mel scale 1127 ln(1 + f/700); DC gets no weight."""
    frequencies = torch.linspace(0, rate / 2, spectrum, dtype=torch.float64)
    mel = 1127.0 * torch.log1p(frequencies / 700.0)
    edges = torch.linspace(
        1127.0 * math.log1p(low / 700.0), 1127.0 * math.log1p(high / 700.0), bins + 2, dtype=torch.float64
    )
    weights = _triangles(mel, edges)
    weights[0] = 0
    return weights.to(dtype=dtype, device=device)


@lru_cache(maxsize=8)
def slaney_matrix(
    bins: int, spectrum: int, rate: int, low: float, high: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return (spectrum, bins) triangular filters of area 1, linear in Hz between edges on Slaney's mel scale.

    It is linear up to 1 kHz, 15 mels, and logarithmic beyond: 27 mels for a factor of 6.4.
    """

    def mels(hertz: float) -> float:
        return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000, 6.4)

    places = torch.linspace(mels(low), mels(high), bins + 2, dtype=torch.float64)
    edges = torch.where(places < 15, places * 200 / 3, 1000 * 6.4 ** ((places - 15) / 27))
    weights = _triangles(torch.linspace(0, rate / 2, spectrum, dtype=torch.float64), edges)
    return (weights * 2 / (edges[2:] - edges[:-2])).to(dtype=dtype, device=device)


def _triangles(places: Tensor, edges: Tensor) -> Tensor:
    """Return (places, bins) triangles of peak 1 from each edge over the next to the one after it."""
    lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]
    rising = (places[:, None] - lower) / (centre - lower)
    falling = (upper - places[:, None]) / (upper - centre)
    return torch.minimum(rising, falling).clamp(min=0)


def log_mel(x: Tensor, config: MelConfig) -> Tensor:
    """Map samples (B, T) to a log-mel spectrogram (B, frames, bins)."""
    frames = frame_count(config, x.shape[1])
    if config.centre:
        half = config.window // 2
        x = nn.functional.pad(x[:, None], (half, config.window - half), mode="reflect")[:, 0]
    else:
        x = nn.functional.pad(x, (0, (frames - 1) * config.hop + config.window - x.shape[1]))
    x = x.unfold(1, config.window, config.hop)[:, :frames]
    window = torch.hann_window(config.window, periodic=True, dtype=x.dtype, device=x.device)
    spectrum = torch.fft.rfft(x * window, config.fft).abs()
    if config.spectrum == "power":
        spectrum = spectrum.square()
    matrix = slaney_matrix if config.scale == "slaney" else mel_matrix
    filters = matrix(
        config.bins, spectrum.shape[-1], config.rate, config.low, config.high, spectrum.dtype, spectrum.device
    )
    mel = spectrum @ filters
    if config.log == "db":
        return 10 * torch.log10(mel.clamp(min=config.log_offset))
    return torch.log(mel + config.log_offset)


def uniform_draws(seeds: Tensor, count: int) -> Tensor:
    """Return `count` numbers in [0, 1) for each seed (B,) int64: float32 (B, count), those of SplitMix64."""
    z = seeds[:, None] + torch.arange(1, count + 1, device=seeds.device) * _signed(GOLDEN)
    z = (z ^ _shifted(z, 30)) * _signed(FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(SECOND)
    return _shifted(z ^ _shifted(z, 31), 40).float() / (1 << 24)


def _signed(value: int) -> int:
    """Return the int64 of the same bits as an uint64; products of int64 wrap as those of uint64 do."""
    return value - (1 << 64) if value >> 63 else value


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift the bits of int64 to the right, with zeros from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class Mel(nn.Module):
    """Turns audio into one input per frame and bin: [log-mel value | position]."""

    keys = ("audio",)
    training_keys = ("mix_partner", "mix_share", "draw_seed")
    """MixUp of a task: the other row of each row (B,), and the share of its own log-mel values that it keeps (B,).
    SpecAugment: a number for each sample and step (B,) int64; torch's generator draws without it."""

    def __init__(self, config: MelConfig) -> None:
        super().__init__()
        if config.high > config.rate / 2 or config.low >= config.high:
            raise UserError(
                f"inputs.high: got {config.low} to {config.high} Hz at {config.rate} samples per second; wanted "
                "low < high <= rate/2"
            )
        if config.fft is not None and config.fft < config.window:
            raise UserError(f"inputs.fft: got {config.fft} for a window of {config.window}; wanted at least the window")
        self.config = config
        (self.mean,), (self.std,) = (numbers(key, getattr(config, key)) for key in ("mean", "std"))
        if config.centre and config.samples <= config.window - config.window // 2:
            raise UserError(
                f"inputs.centre: got {config.samples} samples to reflect for a window of {config.window}; wanted"
                " more than half a window"
            )
        frames = frame_count(config, config.samples)
        self.elements = frames * config.bins
        self.grid = (frames, config.bins) if config.layout == "grid" else (self.elements,)
        self.positions = Positions(config.positions, self.grid)
        self.channels = 1 + self.positions.channels

    def forward(self, raw: Mapping[str, Tensor], dtype: torch.dtype) -> Inputs:
        """Map samples (B, T), int16 or float, to inputs."""
        with torch.no_grad(), no_autocast(raw["audio"].device.type):
            mel = log_mel(normalise_audio(raw["audio"], dtype), self.config)
            if self.training:
                mel = self._augment(mel, raw.get("draw_seed"))
                if "mix_share" in raw:
                    mel = torch.lerp(mel[raw["mix_partner"]], mel, raw["mix_share"].to(mel)[:, None, None])
            mel = (mel - self.mean) / self.std
        grid = (mel.shape[1], mel.shape[2]) if self.config.layout == "grid" else (mel.shape[1] * mel.shape[2],)
        return self.positions(mel.flatten(1)[..., None], grid)

    def example(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        """Return raw zeros of the configured size for `batch` samples."""
        return {"audio": torch.zeros(batch, self.config.samples, dtype=torch.int16, device=device)}

    def as_map(self, values: Tensor) -> Tensor:
        """Return values (..., M) as a spectrogram is drawn: (..., bins, frames), the highest frequency first."""
        return values.unflatten(-1, (-1, self.config.bins)).transpose(-1, -2).flip(-2)

    def _augment(self, mel: Tensor, seeds: Tensor | None) -> Tensor:
        """Mask stretches of frames and bands of bins by the sample's mean (SpecAugment, arXiv 1904.08779)."""
        c = self.config
        count = 2 * (c.time_masks + c.frequency_masks)
        if not count:
            return mel
        if seeds is None:
            draws = torch.rand(len(mel), count, device=mel.device)
        else:
            draws = uniform_draws(seeds, count)
        drawn = iter(draws.split(1, 1))
        mean = mel.mean((1, 2), keepdim=True)
        for axis, masks, width in ((1, c.time_masks, c.time_width), (2, c.frequency_masks, c.frequency_width)):
            size = mel.shape[axis]
            for _ in range(masks):
                length = (next(drawn) * (width + 1)).floor()
                start = (next(drawn) * (size - length + 1).clamp(min=1)).floor()
                index = torch.arange(size, device=mel.device)
                hidden = (index >= start) & (index < start + length)
                mel = torch.where(hidden.unsqueeze(3 - axis), mean, mel)
        return mel
