"""Statistics of the training split in a manifest, for normalisation; `pipelines.statistics` measures them."""

from typing import Annotated

from pydantic import Field, model_validator

from perceiver.config import Config, Real
from perceiver.storage import PositiveCount


class Statistics(Config):
    """Mean and deviation per channel; each sample has the same weight, whatever its size."""

    mean: tuple[Real, ...] = Field(min_length=1, description="mean of each channel, in the units that the model sees")
    std: tuple[Annotated[Real, Field(gt=0)], ...] = Field(
        min_length=1, description="standard deviation of each channel; 1 for a channel that does not vary"
    )
    samples: PositiveCount = Field(description="samples that were measured")

    @model_validator(mode="after")
    def _same_channels(self) -> "Statistics":
        if len(self.mean) != len(self.std):
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} deviations, wanted as many")
        return self


class Spectrogram(Config):
    """The settings of a log-mel spectrogram on which its values depend; keys as of `model.inputs` of kind mel."""

    rate: int = Field(ge=100, le=1_000_000, description="samples per second")
    window: int = Field(ge=2, le=1 << 20, description="STFT length in samples")
    hop: int = Field(ge=1, le=1 << 24, description="samples between frames")
    bins: int = Field(ge=1, le=1 << 16, description="mel bins")
    low: Real = Field(ge=0, le=1e6, description="lowest frequency in Hz")
    high: Real = Field(gt=0, le=1e6, description="highest frequency in Hz")

    @model_validator(mode="after")
    def _frequencies_in_order(self) -> "Spectrogram":
        if not self.low < self.high <= self.rate / 2:
            raise ValueError(
                f"{self.low:g} to {self.high:g} Hz at a rate of {self.rate}, wanted low < high <= rate / 2"
            )
        return self

    def option(self) -> str:
        """Return the settings as the option `--spectrogram` takes them."""
        return ",".join(f"{key}={value:g}" for key, value in self)


class SpectrogramStatistics(Statistics):
    """Mean and deviation of all values of a log-mel spectrogram."""

    spectrogram: Spectrogram = Field(description="its settings")
