"""Keeping secrets out of what a run leaves behind: references that stay references, and redaction of the rest."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from perceiver.config import UserError

MASK = "***"

_WORDS = re.compile(r"[^a-z0-9]+")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_SECRET_WORDS = frozenset(
    ["password", "passwd", "passphrase", "pwd", "secret", "secrets", "token", "credential", "credentials"]
    + ["apikey", "accesskey", "secretkey", "privatekey", "authorization", "bearer", "sas"]
)
_KEY_KINDS = frozenset(["api", "access", "secret", "private", "account", "signing", "encryption", "ssh", "master"])
_URL_USER = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)[^/?#\s]*@", re.IGNORECASE)
_QUERY = re.compile(
    r"(?P<name>[?&;][^=&;#\s]*(?:sig|signature|token|secret|key|password|credential)[^=&;#\s]*=)[^&;#\s]+",
    re.IGNORECASE,
)
_FORMATS = re.compile(
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bhf_[A-Za-z0-9]{20,}"
    r"|\bsk-[A-Za-z0-9_-]{20,}|\bxox[abprs]-[\w-]{10,}|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*"
)
_VARIABLE = re.compile(r"\$[A-Za-z_]\w*")
_HEADERS = re.compile(r"(?<=Bearer )\S+|(?<=Basic )\S+")


def is_reference(value: object) -> bool:
    """Whether a value names a secret (`env:NAME`, `file:PATH`) and does not hold one. `file://` URLs are not meant."""
    return isinstance(value, str) and (
        value.startswith("env:") or (value.startswith("file:") and not value.startswith("file://"))
    )


def resolve(value: str) -> str:
    """The text that a reference stands for; any other text as it is.

    Raises:
        UserError: the variable is not set, or the file cannot be read.
    """
    if not is_reference(value):
        return value
    kind, _, name = value.partition(":")
    if kind == "env":
        if name not in os.environ:
            raise UserError(f"{value}: the environment variable {name} is not set; set it or give another reference")
        return os.environ[name]
    try:
        return Path(name).read_text().strip()
    except OSError as error:
        raise UserError(f"{value}: cannot read the file ({error.strerror}); give a readable file") from None


def is_secret_key(key: str) -> bool:
    """Whether a (dotted) key names a secret: its last part has a word such as password, secret, token or credential,
    is `key`, or is a compound such as `access_key`; places in a list (`tokens.0`) are passed over. The numbers of
    `max_tokens` and the like are no secrets."""
    last = next((part for part in reversed(re.split(r"[./]", key)) if not part.isdigit()), "")
    words = [word for word in _WORDS.split(_CAMEL.sub("_", last).lower()) if word]
    if not words:
        return False
    if _SECRET_WORDS.intersection(words) or words == ["key"]:
        return True
    return any(word == "key" and before in _KEY_KINDS for before, word in zip(words, words[1:], strict=False))


def redact_text(text: str) -> str:
    """Mask what is recognisable as a secret inside a text: `user:password@` in URLs, signed query arguments, and the
    token formats of well-known services."""
    return _HEADERS.sub(MASK, _without_formats(text))


def holds_secret(text: str) -> bool:
    """Whether prose, such as a file with comments, has what `redact_text` masks; the words after Basic and Bearer are
    not looked at, for prose has them."""
    return _without_formats(text) != text


def _without_formats(text: str) -> str:
    text = _URL_USER.sub(rf"\g<scheme>{MASK}@", text)
    text = _QUERY.sub(rf"\g<name>{MASK}", text)
    return _FORMATS.sub(MASK, text)


def redact_value(key: str, value: Any) -> Any:
    """One value, safe to show. References, numbers, booleans and None stay; containers are handled inside.

    Storage options name variables as `$NAME` (`perceiver.storage`), which are references there.
    """
    if isinstance(value, Mapping):
        return {k: redact_value(f"{key}.{k}", v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redact_value(key, item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = value if isinstance(value, str) else str(value)
    if is_reference(text) or ("storage_options" in key.split(".") and _VARIABLE.fullmatch(text)):
        return text
    return MASK if text and is_secret_key(key) else redact_text(text)


def redact(params: Mapping[str, Any]) -> dict[str, Any]:
    """A flat or nested mapping, safe to log, show and store (see `redact_value`)."""
    return {str(key): redact_value(str(key), value) for key, value in params.items()}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys: `{"a": {"b": 1}}` -> `{"a.b": 1}`. Empty mappings are kept as `{}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Each value inside mappings and lists, with its dotted key: `{"a": [{"b": 1}]}` -> `("a.0.b", 1)`."""
    if isinstance(node, Mapping):
        pairs: Any = node.items()
    elif isinstance(node, list | tuple | set | frozenset):
        pairs = enumerate(node)
    else:
        yield key, node
        return
    for name, value in pairs:
        yield from leaves(value, f"{key}.{name}" if key else str(name))
