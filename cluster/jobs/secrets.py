"""Checks that a job contains no secret: its package, command, environment and metadata are visible to other users."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.jobs.config import Submission
from cluster.jobs.server import text_object
from cluster.recipe.file import apply_override, packaged
from perceiver.config import UserError
from perceiver.tracking.redaction import contains_secret, leaves, redact_text, secret_keys
from perceiver.yaml_reader import parse_yaml

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
BY_REFERENCE = "write env:NAME or $NAME there and set NAME where the cluster's nodes start"


def needed(tree: Mapping[str, Any], wanted: Submission) -> list[str]:
    """Return the names of the environment variables that the job reads on the cluster."""
    values = [value for _, value in leaves(tree) if isinstance(value, str)]
    named = [value.removeprefix("env:") for value in values if value.startswith("env:")]
    named += [value[1:] for value in values if value.startswith("$") and NAME.fullmatch(value[1:])]
    return sorted({*named, *wanted.secrets})


def check_secrets(tree: Mapping[str, Any], wanted: Submission, runtime_env: Mapping[str, Any]) -> None:
    """Refuse secret values in the settings, overrides, runtime environment and metadata.

    Raises:
        UserError: there is a secret; the message names its key, not its value.
    """
    for name in wanted.secrets:
        if not NAME.fullmatch(name):
            raise UserError(
                f"--secret {redact_text(name.split('=')[0])}: wanted the name of an environment variable on the cluster"
            )
    for key in secret_keys(tree):
        raise UserError(f"{key} contains a secret, which would be uploaded with the job: {BY_REFERENCE}")
    for override in wanted.overrides:
        alone: dict[str, Any] = {}
        apply_override(alone, override)
        for key in secret_keys(alone):
            raise UserError(f"the override of {key} contains a secret, and the job's command shows it: {BY_REFERENCE}")
    words = {"RECIPE": wanted.recipe, "--run": wanted.run, "--submission-id": wanted.submission_id}
    for option in secret_keys({name: word or "" for name, word in words.items()}):
        raise UserError(f"{option} contains a secret, which all users of the cluster can see: use another name")
    metadata = text_object(wanted.metadata_json, "--metadata-json") if wanted.metadata_json else {}
    for key in secret_keys(metadata):
        raise UserError(_visible("--metadata-json:", key))
    for key in secret_keys(runtime_env):
        section, _, name = key.partition(".")
        if section == "env_vars":
            raise UserError(_visible("--env" if name in wanted.env else "--runtime-env-json:", name))
        raise UserError(
            f"--runtime-env-json: {key} contains a secret, which all users of the cluster can see: remove it and set "
            "it where the nodes start (PIP_INDEX_URL, ~/.netrc, the image)"
        )


def check_secret_files(files: Sequence[str]) -> None:
    """Refuse secrets in files that are uploaded unchanged, overridden values and comments included.

    Raises:
        UserError: there is a secret; the message names the file and the key or line.
    """
    for file in files:
        text = packaged(file).read_text(encoding="utf-8", errors="replace")
        try:
            tree = parse_yaml(text, file)  # JSON is YAML
        except UserError:
            tree = None
        for key in secret_keys(tree):
            raise UserError(
                f"{file}: {key} contains a secret, and the file is uploaded unchanged, also if the key is overridden: "
                f"{BY_REFERENCE}"
            )
        for number, line in enumerate(text.splitlines(), 1):
            if contains_secret(line):
                raise UserError(f"{file}: line {number} contains a secret, and the file is uploaded: remove it")


def _visible(option: str, key: str) -> str:
    return (
        f"{option} {key} looks like a secret, which all users of the cluster can see: pass its name with --secret "
        f"{key} and set it where the cluster's nodes start"
    )
