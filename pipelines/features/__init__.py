"""Features: what a sample consists of. One kind a file: how it is stored, decoded and shown to the model."""

from typing import Annotated

from pydantic import Field

from pipelines.features.image import ImageFeature
from pipelines.features.label import LabelFeature, LabelsFeature
from pipelines.features.points import PointsFeature
from pipelines.features.text import TextFeature

Feature = Annotated[ImageFeature | LabelFeature | LabelsFeature | TextFeature | PointsFeature,
                    Field(discriminator="kind")]

__all__ = ["Feature", "ImageFeature", "LabelFeature", "LabelsFeature", "PointsFeature", "TextFeature"]
