"""Features, the parts of a sample: one file per kind defines how it is stored, decoded and shown to the model."""

from typing import Annotated

from pydantic import Field

from pipelines.features.audio import AudioFeature
from pipelines.features.flow import FlowFeature
from pipelines.features.image import ImageFeature
from pipelines.features.label import LabelFeature, LabelsFeature
from pipelines.features.points import PointsFeature
from pipelines.features.series import SeriesFeature
from pipelines.features.text import TextFeature
from pipelines.features.video import MediaFeature, VideoFeature

Feature = Annotated[
    ImageFeature
    | LabelFeature
    | LabelsFeature
    | TextFeature
    | PointsFeature
    | SeriesFeature
    | AudioFeature
    | VideoFeature
    | MediaFeature
    | FlowFeature,
    Field(discriminator="kind"),
]

__all__ = [
    "AudioFeature",
    "Feature",
    "FlowFeature",
    "ImageFeature",
    "LabelFeature",
    "LabelsFeature",
    "MediaFeature",
    "PointsFeature",
    "SeriesFeature",
    "TextFeature",
    "VideoFeature",
]
