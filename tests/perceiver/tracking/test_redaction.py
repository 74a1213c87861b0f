"""Secrets are masked, other values are not."""

import base64
import json
import os
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from perceiver.config import UserError
from perceiver.tracking.redaction import (
    MASK,
    Unshown,
    contains_secret,
    flatten,
    leaves,
    redact,
    redact_text,
    redact_value,
    resolve,
    secret_keys,
)

SECRET = "Xq7h2Lm9"


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


@pytest.mark.parametrize(
    "words",
    [["--password", SECRET], ["mysql", "--password", SECRET], ["curl", "-s", "-u", f"me:{SECRET}"]]
    + [["/usr/bin/curl", "--user", f"me:{SECRET} and more"], ["sshpass", "-p", SECRET, "ssh", "host"]],
)
def test_lists_of_arguments_show_no_secret(words: list[str]) -> None:
    assert SECRET not in str(redact_value("arguments", words)) and list(secret_keys({"arguments": words}))
    block = [yaml.safe_dump(words)] if "--password" in words else []
    for text in (json.dumps(words), str(words), f"run: [{', '.join(words)}]", *block):
        assert SECRET not in redact_text(text)
    plain = ["docker", "-u", "1000:1000", "--password-file", "a", "--password", "env:X"]
    assert redact_value("arguments", plain) == plain and redact_text(json.dumps(plain)) == json.dumps(plain)


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
    assert not contains_secret("# Basic settings; the Bearer of news; https://host/x; env:TOKEN")
    assert contains_secret("# once: https://me:hunter2@host") and not contains_secret(f"# https://{MASK}@host")


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


def test_a_file_that_is_no_secret_is_refused_without_its_content(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "large").write_bytes(b"a" * 65_537)
    (tmp_path / "fits").write_bytes(b"a" * 65_536)
    (tmp_path / "latin").write_bytes(b"hunter2\xe9")
    assert len(resolve(f"file:{tmp_path / 'fits'}")) == 65_536
    names = ["/dev/zero", "", "a\0b", *(str(tmp_path / name) for name in ("", "fifo", "link", "large", "latin"))]
    for reference in (f"file:{name}" for name in names):
        with pytest.raises(UserError) as caught:
            resolve(reference)
        assert str(caught.value).startswith(str(UserError(f"{reference}: "))) and "hunter2" not in str(caught.value)


def test_an_unshown_value_is_in_no_text_of_it() -> None:
    shown = {"mlflow": Unshown({"uri": "http://me:hunter2@mlflow"})}
    assert shown["mlflow"].value["uri"] == "http://me:hunter2@mlflow"
    assert "hunter2" not in f"{shown} {shown['mlflow']}"


PIECE = st.from_regex(r"[a-z][A-Za-z0-9]{7,14}", fullmatch=True)
"""A part of a secret to search for in the output; not all digits, which a text may contain anyway."""
KEYS = (
    ["password", "passwd", "pwd", "pass", "passcode", "passphrase", "dsn", "auth", "cookie", "pat", "db_pass", "secret"]
    + ["connection_string", "connectionString", "CONNECTION-STRING", "token", "api_key", "API-Key", "apiKey", "HFToken"]
    + ["credential", "credentials", "private_key", "privateKey", "AWS_SECRET_ACCESS_KEY", "client-secret", "GITHUB_PAT"]
    + [
        "password1",
        "pass1",
        "token2",
        "secret2",
        "dbpass",
        "userpass",
        "token_prod",
        "auth_prod",
        "pass_prod",
        "hf_tokens",
    ]
    + ["auth_header", "CLIENTSECRET", "AWSSECRETACCESSKEY", "creds", "jwt", "pw", "conn_string", "token.value"]
    + [
        "WANDB_KEY",
        "DBPASS",
        "PASSWORD1",
        "TOKEN_PROD",
        "CREDS",
        "JWT",
        "SOME_KEY",
        "PGPASSWORD",
        "hftoken",
        "openai_key",
    ]
)
TEXTS = [
    "{key}={secret}",
    "export {key}={secret}",
    "{key}: {secret}",
    "  - {key}: {secret}",
    "{key} = {secret}",
    "run --{key} {secret} --next 3",
    "run --{key}={secret} --next 3",
    '{{"n": 1, "{key}": "{secret}"}}',
    "{{'{key}': '{secret}', 'n': 1}}",
    r"{{\"{key}\": \"{secret}\"}}",
    "error: data.storage_options.{key}: got '{secret}', wanted a reference",
    "error: data.storage_options.{key}: got {secret}, wanted a reference",
    "see {key}: {secret}, and more",
    "https://host/path?x=1&{key}={secret}&y=2",
    "{key} => {secret}",
    "'{key}' => '{secret}'",
    "{key} := {secret}",
    '{{"name": "{key}", "value": "{secret}"}}',
    '{{"Key":"{key}","Value":"{secret}"}}',
    r"{{\"name\": \"{key}\", \"value\": \"{secret}\"}}",
    "- name: {key}\n  value: {secret}",
    "[{{name: {key}, value: {secret}}}]",
]
FORMATS = [
    ("ghp_", 36), ("gho_", 36), ("github_pat_", 40), ("glpat-", 20), ("hf_", 34), ("npm_", 36), ("AIza", 35),
    ("sk-", 40), ("xoxb-", 24), ("xoxp-", 24),
]  # fmt: skip


@given(st.sampled_from(KEYS), st.sampled_from(TEXTS), PIECE)
def test_a_random_value_of_a_secret_key_is_masked_in_every_form(key: str, form: str, secret: str) -> None:
    text = form.format(key=key, secret=secret)
    assert secret not in redact_text(text) and contains_secret(text)
    assert redact_text(redact_text(text)) == redact_text(text)
    assert secret not in redact_text(f"before\n{text}\nafter")


@given(
    st.sampled_from(["http", "https", "s3", "postgresql+psycopg2", "REDIS"]),
    st.lists(PIECE, min_size=1, max_size=4),
    st.lists(st.sampled_from(["/", "?", "#", "@", ":", " ", "%40", "&", "=", "@/", " @ "]), min_size=3),
    st.sampled_from(["{url}", "uri = {url} is down", '{{"uri": "{url}", "n": 1}}', "at '{url}': a@b", "--uri={url}"]),
)  # fmt: skip
def test_a_random_password_in_a_url_is_masked(scheme: str, pieces: list[str], signs: list[str], form: str) -> None:
    password = "".join(chain(*zip_longest(pieces, signs[: len(pieces) - 1], fillvalue="")))
    url = f"{scheme}://me:{password}@host:80/path"
    shown = redact_text(form.format(url=url))
    assert not any(piece in shown for piece in pieces) and "host:80/path" in shown
    assert list(secret_keys({"a": [{"b": form.format(url=url)}]})) == ["a.0.b"]


@given(st.sampled_from(FORMATS), st.data(), st.sampled_from(["{}", "note {} here", "x={}", '"{}"', "<{}>", "({})."]))
def test_a_random_token_of_a_known_service_is_masked(kind: tuple[str, int], data: st.DataObject, form: str) -> None:
    prefix, length = kind
    body = data.draw(st.text("abcXYZ0189", min_size=length, max_size=length))
    assert body not in redact_text(form.format(prefix + body))


@given(st.sampled_from(["Bearer", "bearer", "BEARER", "Basic", "basic", "BASIC"]), PIECE)
def test_random_headers_are_masked(kind: str, secret: str) -> None:
    value = secret if kind.lower() == "bearer" else base64.b64encode(f"me:{secret}".encode()).decode()
    for form in ("{} {}", "sent Authorization: {} {}", "-H '{} {}'", '{{"Authorization": "{} {}"}}'):
        assert value not in redact_text(form.format(kind, value))


SAID = [
    "api key: {}", "API key = {}", "secret key: {}", "connection string: {}", "curl -u me:{} https://h",
    "my password is {}",
    "curl -s --user me:{}", "curl -u 'me:two {}' h", 'curl -u "me:{}"', "sshpass -p {} ssh h", "wget --user me:{} h",
    "the password is {}.", "our db password was: {}", "My API key is {}", "the token is '{}'",
    "the secret is {}, I think",
]  # fmt: skip


@given(st.sampled_from(SAID), PIECE)
def test_a_random_secret_in_a_sentence_or_command_is_masked(form: str, piece: str) -> None:
    text = form.format(f"{piece}7Z")
    assert f"{piece}7Z" not in redact_text(f"before\n{text}\nafter")
    assert redact_text(redact_text(text)) == redact_text(text)


TREES = st.recursive(
    st.builds(lambda key, secret: ({key: secret}, secret), st.sampled_from(KEYS), PIECE)
    | st.builds(lambda piece: ({"url": f"s3://u:{piece}@h"}, piece), PIECE)
    | st.builds(lambda piece: ({f"https://u:{piece}@h": 1}, piece), PIECE)
    | st.builds(lambda key, piece: (["run", f"--{key}", piece], piece), st.sampled_from(KEYS), PIECE)
    | st.builds(lambda key, piece: ([{"name": key, "value": piece}], piece), st.sampled_from(KEYS), PIECE)
    | st.builds(lambda key, piece: ({"Value": piece, "Key": key}, piece), st.sampled_from(KEYS), PIECE),
    lambda inner: st.builds(lambda found: ({"a": [1, found[0]]}, found[1]), inner),
    max_leaves=3,
)


@given(TREES)
def test_a_random_secret_is_masked_and_refused_at_any_depth(found: tuple[Any, str]) -> None:
    tree, secret = found
    shown = redact({"data": tree})
    assert secret not in repr(shown) and list(secret_keys(tree)) and not list(secret_keys(shown))
    assert not any(secret in key for key in secret_keys(tree))


@given(st.integers(1000, 10**12))
def test_a_password_of_digits_is_masked(number: int) -> None:
    assert redact({"db": {"password": number}}) == {"db": {"password": MASK}}
    assert str(number) not in redact_text(f"password={number}")


PLAIN = [
    "model.num_self_attends_per_block=6", "max_tokens: 512", "tokens=100", "token_length = 2048", "compass: north",
    "author: someone", "path: /data/x", "pattern=*.jpg", "attention: flash", "passes=3",
    "--max-tokens 512", "key=a.jpg",
    "step 30  loss 1.234  accuracy 51.2%  1,234 samples/s", "forward pass: 12.3 ms", "http://localhost:8265/#/jobs",
    "http://head:8265, or ssh me@head", "s3://bucket/a@b/c", "https://docs.ray.io/en/latest: write to me@example.com",
    "basic settings", "Basic ResNet-50 block", "the bearer of news", "token: env:HF_TOKEN", "password=$DB_PASSWORD",
    "--secret MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN: the environment variable is not set", "RAY_AUTH_MODE=token",
    "set RAY_AUTH_TOKEN_PATH to its file", "loss_per_token: 0.33", "pad_token: [PAD]", "NoCredentialsError: Unable to",
    "sqlite:////tmp/a@b.db", "git@github.com:a/b.git", "password: ***", "pass its name with --secret NAME", "12:30:01",
    "sha256:0123456789abcdef0123456789abcdef", "task-classification-of-images-with-perceiver", "authority: us",
    "model.decoder.token_dim=3000", "secret_name: perceiver-token", "tokenizer: bytes", "password_file: /run/x",
    "metric_key: accuracy", "sort_key=name", "partition_key: day", "PUBLIC_KEY=abc", "SORT_KEY=label", "S3_KEY=a/b.jpg",
    "max_tokens=4096", "num_tokens: 100000", "tokens: 16384", "bypass: everything", "encompass: much", "lowpass=butter",
    "the password is wrong", "the password is missing", "your token is not set", "the password is not set",
    "keys: a, b",
    "your token is invalid", "my token is expired", "the token is 16x16 pixels", "a secret is a value", "key1: value",
    "the password is read from env:DB_PASSWORD", "the secret is in the file", "the key is image0", "sacred: music",
    "docker run -u 1000:1000 image", "x => y", "name: DB_PASSWORD",
    '{"name": "lr", "value": 0.1}', "curl -u me https://h",
    '{"name": "sort_key", "value": "label"}', "the forward pass is O(n2)", "each token is a patch",
    "cache_key: abc",
    "api keys are needed", "latent_tokens=20000", "key_value: abc", "use the api key of the team",
    "token_ids: [1, 20000]",
]  # fmt: skip


@pytest.mark.parametrize("text", PLAIN)
def test_plain_texts_are_unchanged(text: str) -> None:
    assert redact_text(text) == text
    assert redact({"note": text}) == {"note": text}


@given(st.text("abcdef ghijk.,-_/()[]0123456789\n", max_size=200))
def test_random_prose_is_unchanged(text: str) -> None:
    assert redact_text(text) == text


@pytest.mark.parametrize(
    "token",
    [
        "AKIAIOSFODNN7EXAMPLE",
        "ASIAIOSFODNN7EXAMPLE",
        "dapi0123456789abcdef0123456789abcdef",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N",
        "sk_live_0123456789abcdefABCDEF",
    ],
)
def test_tokens_of_a_fixed_form_are_masked(token: str) -> None:
    assert redact_text(f"x={token}") == f"x={MASK}" and redact_text(f"see {token}.") in (f"see {MASK}.", f"see {MASK}")


def test_a_private_key_is_masked_to_its_end() -> None:
    key = "-----BEGIN RSA PRIVATE KEY-----\nMIIabc\ndef\n-----END RSA PRIVATE KEY-----"
    assert redact_text(f"private_key: {key}\nnext") == f"private_key: {MASK}\nnext"
    assert "MII" not in redact_text(json.dumps({"note": key})) and "MII" not in redact_text(key[:45])


@pytest.mark.parametrize("part", ["a", "a-", "token ", "curl -u ", "name: a ", "my ", "x is ", " ", "\\", "'"])
def test_a_long_text_is_unchanged(part: str) -> None:
    """A quadratic search would take minutes."""
    text = part * (200_000 // len(part))
    assert redact_text(text) == text
