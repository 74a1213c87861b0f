"""The facts of a run, `run.json` in its folder, as they are read from outside."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from perceiver.config import UserError
from perceiver.storage import NonNegativeCount, StrictNumber, invalid_key, parse_json

FACTS = "run.json"


@dataclass(frozen=True)
class DataFacts:
    """What a run records of its training data.

    Args:
        name: name of the data set.
        licence: its licence.
        source: its origin.
        classes: names of the classes, in the order of the model's outputs.
        samples: number of samples of the training and of the evaluation split, by its name.
        features: kind of each feature.
        digest: of the content, see `pipelines.shards.manifest.content_digest`; empty: not recorded.
        files: places and versions of indexed files, see `pipelines.shards.manifest.file_versions`; else empty.
    """

    name: str
    licence: str
    source: str
    classes: tuple[str, ...] = ()
    samples: Mapping[str, NonNegativeCount] = field(default_factory=dict)
    features: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""
    files: str = ""


class RunFacts(BaseModel):
    """The keys of run.json that commands use, absent or null until they are known; others are not checked."""

    model_config = ConfigDict(extra="allow")

    name: str | None = None
    created: Annotated[StrictNumber, Field(allow_inf_nan=False)] | None = None
    status: str | None = None
    step: NonNegativeCount | None = None
    evaluation: dict[str, StrictNumber] | None = None
    data: DataFacts | None = None
    licence: str | None = None
    mlflow_run: str | None = None
    workers: dict[str, dict[str, Any]] = {}
    exchange: str | None = None
    refusal: str | None = None
    sessions: list[tuple[StrictNumber, StrictNumber | None]] = []
    changes: dict[str, str] = {}


def parse_facts(text: str | bytes, where: str) -> dict[str, Any]:
    """Return the content of a run.json.

    Args:
        text: the file.
        where: its place, for errors.

    Raises:
        UserError: it is not a JSON object, or a value is not of its key's type.
    """
    tree = parse_json(text, where)
    try:
        RunFacts.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where} is damaged: {invalid_key(error)}: restore it") from None
    return tree


def parse_classes(text: str, where: str) -> list[str]:
    """Return the names of classes from a JSON list.

    Raises:
        UserError: it is not a list of texts.
    """
    found = parse_json(text, where)
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise UserError(f"{where} is not a list of names: restore the file")
    return found
