"""Features, the parts of a sample: one file per kind defines how it is stored, decoded and shown to the model."""

from typing import TYPE_CHECKING, Annotated, Any, Union, get_args

from pydantic import Field

from perceiver import registry
from pipelines.features.answer import AnswerFeature, AnswersFeature
from pipelines.features.audio import AudioFeature
from pipelines.features.boxes import BoxesFeature
from pipelines.features.embeddings import EmbeddingsFeature
from pipelines.features.flag import FlagFeature
from pipelines.features.flow import FlowFeature
from pipelines.features.image import ImageFeature
from pipelines.features.label import LabelFeature, LabelsFeature
from pipelines.features.points import PointsFeature
from pipelines.features.segmentation import SegmentationFeature
from pipelines.features.series import SeriesFeature
from pipelines.features.target import TargetFeature
from pipelines.features.text import TextFeature
from pipelines.features.video import MediaFeature, VideoFeature

Feature = Annotated[
    ImageFeature
    | LabelFeature
    | LabelsFeature
    | TargetFeature
    | SegmentationFeature
    | TextFeature
    | PointsFeature
    | SeriesFeature
    | EmbeddingsFeature
    | AudioFeature
    | VideoFeature
    | MediaFeature
    | FlowFeature
    | BoxesFeature
    | AnswerFeature
    | AnswersFeature
    | FlagFeature,
    Field(discriminator="kind"),
]

if not TYPE_CHECKING:
    _OWN = get_args(get_args(Feature)[0])
    del Feature

    def __getattr__(name: str) -> Any:
        # Made on use, since a plug-in that imports this package may be the first to do so.
        if name == "Feature":
            offered = registry.offered("feature", [kind.model_fields["kind"].default for kind in _OWN])
            return Annotated[Union[(*_OWN, *offered.values())], Field(discriminator="kind")]  # noqa: UP007
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AnswerFeature",
    "AnswersFeature",
    "AudioFeature",
    "BoxesFeature",
    "EmbeddingsFeature",
    "Feature",
    "FlagFeature",
    "FlowFeature",
    "ImageFeature",
    "LabelFeature",
    "LabelsFeature",
    "MediaFeature",
    "PointsFeature",
    "SegmentationFeature",
    "SeriesFeature",
    "TargetFeature",
    "TextFeature",
    "VideoFeature",
]
