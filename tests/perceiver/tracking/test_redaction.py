"""What is secret is masked, what is not stays."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perceiver.config import UserError
from perceiver.tracking.redaction import MASK, Unshown, flatten, holds_secret, leaves, redact, redact_text, resolve


@pytest.mark.parametrize(
    "key",
    ["password", "db.password", "AWS_SECRET_ACCESS_KEY", "hfToken", "api_key", "s3.key", "s3.credentials", "x.apikey"],
)
def test_values_of_secret_keys_are_masked(key: str) -> None:
    assert redact({key: "hunter2"}) == {key: MASK}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.tokenizer", "bytes"),
        ("max_tokens", 512),
        ("token", 3),
        ("data.keys", "a"),
        ("password", "env:DB_PASSWORD"),
        ("token", "file:/run/secrets/token"),
        ("optim.lr", 1e-3),
        ("data.url", "s3://bucket/path?versionId=3"),
        ("password", ""),
        ("password", None),
    ],
)
def test_other_values_and_references_stay(key: str, value: object) -> None:
    assert redact({key: value}) == {key: value}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://me:hunter2@db:5432/x", f"postgresql://{MASK}@db:5432/x"),
        ("see https://u:p%40@h/a and s3://k:v@b", f"see https://{MASK}@h/a and s3://{MASK}@b"),
        ("https://h/x?X-Amz-Signature=abc&y=1", f"https://h/x?X-Amz-Signature={MASK}&y=1"),
        ("key AKIAABCDEFGHIJKLMNOP here", f"key {MASK} here"),
        ("Authorization: Bearer abc.def", f"Authorization: Bearer {MASK}"),
        ("mail me@example.com", "mail me@example.com"),
    ],
)
def test_secrets_inside_texts_are_masked(text: str, expected: str) -> None:
    assert redact_text(text) == expected


def test_redaction_reaches_into_containers() -> None:
    tree = {"data": {"options": {"secret": "s", "urls": ["https://a:b@c"]}}, "n": [1, 2]}
    assert redact(tree) == {"data": {"options": {"secret": MASK, "urls": [f"https://{MASK}@c"]}}, "n": [1, 2]}
    mixed = {"data.mixture": [{"url": "https://a:b@c", "token": "x"}]}
    assert redact(mixed) == {"data.mixture": [{"url": f"https://{MASK}@c", "token": MASK}]}
    assert redact(dict(leaves({"tokens": 3, "token": ["x", "y"]}))) == {"tokens": 3, "token.0": MASK, "token.1": MASK}


def test_variables_that_storage_options_name_stay() -> None:
    options = {"secret": "$S3_SECRET", "token": "hunter2", "key": "$2b$x"}
    tree = {"data": {"storage_options": options}, "token": "$hunter2"}
    kept = {"secret": "$S3_SECRET", "token": MASK, "key": MASK}
    assert redact(tree) == {"data": {"storage_options": kept}, "token": MASK}
    assert redact(flatten(tree)) == flatten({"data": {"storage_options": kept}, "token": MASK})


def test_leaves_are_found_in_lists_of_mappings() -> None:
    tree = {"a": [{"b": 1}, [2]], "c": {}, "d": None}
    assert list(leaves(tree)) == [("a.0.b", 1), ("a.1.0", 2), ("d", None)]


def test_prose_is_no_secret_but_what_it_quotes_may_be() -> None:
    assert not holds_secret("# Basic settings; the Bearer of news; https://host/x; env:TOKEN")
    assert holds_secret("# once: https://me:hunter2@host") and not holds_secret(f"# https://{MASK}@host")


WORDS = st.text("abc", min_size=1)


@given(st.dictionaries(WORDS, st.dictionaries(WORDS, st.integers()), max_size=4))
def test_flatten_keeps_every_leaf(tree: dict[str, dict[str, int]]) -> None:
    flat = flatten(tree)
    assert sum(len(branch) or 1 for branch in tree.values()) == len(flat)


def test_references_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_URI", "sqlite:///x")
    (tmp_path / "t").write_text("secret\n")
    assert resolve("env:SOME_URI") == "sqlite:///x"
    assert resolve(f"file:{tmp_path / 't'}") == "secret"
    assert resolve("file:///x") == "file:///x"
    with pytest.raises(UserError, match="NOT_SET"):
        resolve("env:NOT_SET")
    with pytest.raises(UserError, match="cannot read"):
        resolve(f"file:{tmp_path / 'absent'}")


def test_an_unshown_value_is_in_no_text_of_it() -> None:
    shown = {"mlflow": Unshown({"uri": "http://me:hunter2@mlflow"})}
    assert shown["mlflow"].value["uri"] == "http://me:hunter2@mlflow"
    assert "hunter2" not in f"{shown} {shown['mlflow']}"
