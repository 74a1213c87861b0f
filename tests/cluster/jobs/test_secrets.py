"""Submission refuses random secrets in every place and form, and no message shows one."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.jobs.config import Submission
from cluster.jobs.secrets import check_secret_files, check_secrets
from cluster.jobs.server import check_listening
from cluster.recipe.config import Recipe
from perceiver.config import UserError
from perceiver.tracking.redaction import flatten, is_secret_key, server_address
from perceiver.tracking.runs import TrackingConfig
from perceiver.yaml_reader import parse_yaml

SECRET = st.from_regex(r"[a-z][A-Za-z0-9]{9,14}", fullmatch=True)
KEYS = st.sampled_from(
    [
        "DBPASS",
        "token_prod",
        "WANDB_KEY",
        "creds",
        "jwt",
        "pass1",
        "CLIENTSECRET",
        "pass",
        "passwd",
        "password",
        "passcode",
        "passphrase",
        "dsn",
        "auth",
        "cookie",
        "pat",
        "db_pass",
        "apiKey",
    ]
    + ["connection-string", "SECRET", "hf_token", "credentials", "private_key", "AWS_SECRET_ACCESS_KEY"]
)
TEXTS = st.sampled_from(
    ["postgresql://me:{}@db/x", "s3://k:a/b?c#{}@b", "https://me:two words {}@h", "x --password {} --n 1", "pwd={}"]
    + ["Bearer {}", "AUTHORIZATION: bearer {}", '{{"token": "{}"}}', "https://h/x?X-Amz-Signature={}", "glpat-{}xxxxxx"]
    + ["api key: {}", "token => {}", "curl -u me:{} h", '{{"name": "DB_PASSWORD", "value": "{}"}}']
    + ["https://h/x?sig={}&b=1", "AWS_SECRET_ACCESS_KEY={}", "connection_string: Server=h;Pwd={};"]
)


def values(key: str, text: str, secret: str) -> list[dict[str, str]]:
    """Return mappings that contain the secret under its key, and in a text under an ordinary key."""
    return [{key: secret}, {"note": text.format(secret)}]


def refused(secret: str, tree: dict[str, Any] | None = None, env: dict[str, Any] | None = None, **options: Any) -> None:
    with pytest.raises(UserError) as caught:
        check_secrets(tree or {}, Submission(recipe=options.pop("recipe", "x.yaml"), **options), env or {})
    assert secret not in str(caught.value) and "secret" in str(caught.value)


@settings(deadline=None)
@given(KEYS, TEXTS, SECRET)
def test_a_secret_is_refused_wherever_a_user_can_put_one(key: str, text: str, secret: str) -> None:
    for found in values(key, text, secret):
        refused(secret, {"tracking": {"tags": found}})
        refused(secret, {"data": {"mixture": [{"storage_options": found}]}})
        refused(secret, metadata_json=json.dumps(found))
        refused(secret, env={"env_vars": found})
        refused(secret, env={"pip": {"packages": [found]}})
        refused(secret, env={"config": {"deep": [[found]]}})
    refused(secret, env={"pip": {"packages": ["--password", secret]}})
    refused(secret, env={"py_modules": [f"https://me:{secret}@h/a.zip"]})
    refused(secret, recipe=f"https://me:{secret}@h/a.yaml")
    refused(secret, submission_id=f"hf_{secret}{secret}")
    refused(secret, overrides=[f"tracking.tags.{key}={json.dumps(secret)}"])
    refused(secret, overrides=[f"tracking.tags.note={json.dumps(text.format(secret))}"])


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(KEYS, TEXTS, SECRET)
def test_a_secret_in_an_uploaded_file_is_refused(tmp_path: Path, key: str, text: str, secret: str) -> None:
    trees = [{"a": [found]} for found in values(key, text, secret)]
    comments = [f"a: 1\n# {key}: {secret}\n", f"a: 1  # {key}={secret}\n", f"a: 1\n# was {text.format(secret)}\n"]
    for content in [*map(yaml.safe_dump, trees), *map(json.dumps, trees), *comments, f"a: [\n{key}: {secret}\n"]:
        (tmp_path / "a.yaml").write_text(content)
        with pytest.raises(UserError, match="secret") as caught:
            check_secret_files([str(tmp_path / "a.yaml")])
        assert secret not in str(caught.value)


def property_names(schema: Any) -> set[str]:
    """Return the names of all properties in a JSON schema."""
    if isinstance(schema, list):
        return set().union(*map(property_names, schema))
    if not isinstance(schema, dict):
        return set()
    return set(schema.get("properties", {})).union(*map(property_names, schema.values()))


def test_no_key_of_ours_is_that_of_a_secret() -> None:
    names = property_names(Recipe.model_json_schema())
    keys = [key for path in Path("recipes").rglob("*.yaml") for key in flatten(parse_yaml(path.read_text(), "x"))]
    assert len(names) > 100 and len(keys) > 300
    assert not [key for key in (*names, *keys) if is_secret_key(key)]


def test_ordinary_settings_references_and_recipes_pass(tmp_path: Path) -> None:
    plain = {"max_tokens": 5, "token_length": "long", "author": "me", "compass": "N", "path": "/x", "passes": "two"}
    by_reference = {"password": "env:DB_PASSWORD", "token": "file:/run/token", "secret": "${NAME}"}
    check_secrets({"a": [plain, by_reference]}, Submission(recipe="x.yaml", overrides=["a.max_tokens=7"]), {})
    recipes = [str(path) for path in Path("recipes").rglob("*.yaml")]
    check_secret_files(recipes)
    assert len(recipes) > 10


@pytest.mark.parametrize(
    "uri", ["http://me:a/hunter2@h", "http://me:hunter2@h:port", "postgresql://me:hunter2[@h/x", "http://[hunter2"]
)
def test_a_malformed_url_is_refused_without_its_password(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORE", uri)
    (tmp_path / "uri").write_text(uri)
    for check in (
        lambda: TrackingConfig(uri=uri).store_uri(tmp_path),
        lambda: TrackingConfig(uri="env:STORE").store_uri(tmp_path),
        lambda: TrackingConfig(uri=f"file:{tmp_path / 'uri'}").store_uri(tmp_path),
        lambda: check_listening(uri),
        lambda: server_address(uri, "key"),
    ):
        with pytest.raises(UserError, match="port up to 65535") as caught:
            check()
        assert "hunter2" not in str(caught.value)
