"""Keeps secrets out of what a run or a job shows, stores and uploads.

One rule serves two purposes: redaction masks what it finds, and `perceiver submit` refuses it (`secret_keys`,
`contains_secret`). References to secrets (`env:NAME`, `file:PATH`) are neither resolved nor masked.
"""

import base64
import binascii
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from perceiver.config import UserError, expand_home

MASK = "***"
LARGEST_FILE = 64 * 1024
"""Limit in bytes of a file that a reference names."""
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}

_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_STRONG = frozenset(
    ["password", "passwords", "passwd", "passphrase", "passcode", "pwd", "secret", "secrets", "credential"]
    + ["credentials", "cred", "creds", "apikey", "apikeys", "accesskey", "accesskeys", "secretkey", "privatekey"]
    + ["accountkey", "signingkey", "encryptionkey", "sshkey", "masterkey", "licensekey", "accesstoken", "authtoken"]
    + ["apitoken", "idtoken", "refreshtoken", "sessiontoken", "bearertoken", "authorization", "bearer", "sas", "dsn"]
    + ["connectionstring", "connectionstr", "connstring", "connstr", "cookie", "cookies", "jwt", "jwts", "psk"]
    + ["amzsignature", "googsignature"]
)
"""Words, and pairs of words joined, that make a key one of a secret wherever they are in it."""
_ENDINGS = tuple(_STRONG - {"cred", "bearer", "sas", "dsn", "psk", "jwt", "jwts"})
"""Those that do so at the end of a longer word, too: `PGPASSWORD`, `CLIENTSECRET`; `sacred` is a word."""
_LAST = frozenset(["token", "pass", "auth", "oauth", "pat", "pw"])
"""Words that do so only at its end: `hf_token` is a secret, `token_length` is a number."""
_SERVICES = (
    "hf|huggingface|hub|github|gh|gitlab|bitbucket|wandb|comet|neptune|mlflow|openai|anthropic|cohere|mistral|aws|azure|gcp"
    "|google|slack|discord|telegram|stripe|twilio|sendgrid|npm|pypi|docker|databricks|snowflake|datadog|sentry|vault|kaggle"
    "|cloudflare|replicate|ngc|nvidia|api|access|auth|bearer|refresh|session|oauth|service|deploy"
)
_OWNERS = (
    "db|database|user|admin|root|my|sql|mysql|pg|postgres|redis|mongo|smtp|imap|s?ftp|e?mail|ssh|sudo|login|ldap|http|proxy"
    "|auth|key|(?:key|trust)?store|vault|wifi|ssl|tls|cert|app|service|svc|master|client|server|host"
)
_JOINED = re.compile(rf"(?:{_SERVICES})_?(?:tokens?|keys?)|(?:{_OWNERS})(?:pass|pw)")
"""Words such as `hftoken` and `dbpass`, and pairs such as `hf_tokens`; not `compass`, `max_tokens`, `sort_key`."""
_ORDINARY_KEY = re.compile(
    "metric|sort|partition|public|primary|foreign|group|cache|index|sample|image|label|row|object|s|feature|data|column"
    "|join|hash|search|lookup|shard|dict|config|map|field|item|registry|host|event"
)
"""Words before `KEY` in the name of an environment variable that is no secret: `SORT_KEY`."""
_TAIL = re.compile(
    "value|text|string|headers?|prod|production|dev|development|stage|staging|test|testing|qa|live|sandbox|old|new|backup"
    "|previous|current|default|main|primary|secondary"
)
"""Last words of keys that tell which secret it is or in which form: `token_prod`, `auth_header`."""
_QUALITIES = frozenset(
    ["length", "len", "count", "size", "limit", "min", "max", "dim", "index", "id", "name", "names", "file", "files"]
    + ["path", "paths", "folder", "error", "exception", "warning", "type", "kind", "mode", "policy", "expires"]
    + ["field", "prompt", "env"]
)
"""Last words of keys that describe a secret: `password_file`, `secret_name`."""
_SYMBOLS = frozenset(["cls", "mask", "masked", "pad", "eos", "bos", "unk", "sep", "per", "special", "class", "query"])
"""Words before `token` in the vocabulary of models: `pad_token`, `loss_per_token`."""
_SIGNED = frozenset(["sig", "signature", "key", "token", "password", "secret", "credential"])
"""Further words of query arguments that authorize a request."""

_FORMATS = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])|gh[opsru]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{12,}"
    r"|hf_[A-Za-z0-9]{16,}|npm_[A-Za-z0-9]{16,}|dapi(?=[A-Za-z]*\d)[0-9A-Za-z]{24,}(?:-\d)?|AIza[\w-]{24,}|xox[abeoprs]-[\w-]{8,}"
    r"|sk-(?=[a-z-]*[A-Z0-9])[\w-]{16,}|[sr]k_(?:live|test)_[A-Za-z0-9]{16,}|pypi-[\w-]{24,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?)"
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----[\s\S]*?"
    r"(?:-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----|\Z)"
)
_SCHEME = re.compile(r"(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]*://")
_NEXT_URL = re.compile(r"[\s,;\"'(<>|]+[A-Za-z][A-Za-z0-9+.-]*://")
_LOGIN = re.compile(r"[^/?#\s\"'<>@:\[]*(?P<colon>:?)")
_PORT = re.compile(r"\d{2,5}(?:/\S*)?[\s,;)].*", re.DOTALL)
_AUTHORITY = re.compile(r"[^/?#\s\"'<>]*@")
_QUERY = re.compile(r"(?P<lead>[?&;#])(?P<name>[^=&;#\s\"'?]+)=(?P<value>[^&;#\s\"']+)")
_ASSIGNED = re.compile(
    r"(?P<dashes>(?<![\w-])--?)?(?<![A-Za-z_])(?<![A-Za-z_][.-])"
    r"(?P<key>(?i:(?:api|access|secret|private|account|signing|encryption|ssh|master|license)"
    r"[ \t]+keys?|connection[ \t]+string)(?![\w.-])|[A-Za-z_][\w.-]*+)(?:\[\w+\])?(?P<quote>\\*[\"']\]?)?"
    r"(?P<sep>[ \t]*(?:=>|:=|=(?!=)|:(?!//|:))[ \t]*|[ \t]+)"
)
_PAIR = re.compile(
    r"(?P<dashes>--)?(?<![\w.-])(?i:name|key)\\*[\"']?[ \t]*[:=][ \t]*\\*[\"']?(?P<key>[\w.-]+)(?![\w.-])\\*[\"']?"
    r"(?:[ \t]*,)?[\s#]{0,80}\\*[\"']?(?i:value)(?P<quote>\\*[\"'])?(?P<sep>[ \t]*[:=][ \t]*)"
)
"""A key and its value as two entries: `{"name": "DB_PASSWORD", "value": "..."}`."""
_COMMAND_LOGIN = re.compile(
    r"(?P<lead>(?:\b(?:curl|wget|https?|xh)\b[^\n|;&]{0,400}?[ \t\"',](?:-u|--user|--proxy-user|-U|-a|--auth)"
    r"(?:[\"']?,[ \t]{0,9}|[ \t=]{0,9})(?P<open>[\"'])?[^\s:\"']+:"
    r"|\bsshpass(?:[ \t]+|[\"']?,[ \t]{0,9}[\"']?)-p(?:[\"']?,[ \t]{0,9}|[ \t]{0,9})(?P<quote>[\"'])?))"
    r"(?P<value>(?(open)[^\"'\n]+|(?(quote)[^\"'\n]+|[^\s\"']+)))"
)
"""A login as commands take it: `curl -u me:...`, `sshpass -p ...`, also as lists of arguments."""
_ARGUMENT = re.compile(
    r"(?P<lead>(?<![\w-])(?P<key>--?[A-Za-z][\w-]*)(?:[\"']?[ \t]{0,9},\s{0,80}|[\"']?\s{0,9}\n[ \t]{0,80}-[ \t]{1,9})"
    r"(?P<open>[\"'])?)(?P<value>(?(open)[^\"'\n]+|[^\s\"',\]]+))"
)
"""An option and its value in a list of arguments: `["--password", "..."]`, in JSON or YAML."""
_SAID = re.compile(
    r"(?P<lead>(?P<whose>\b(?:my|our|your)[ \t]{1,9}(?:\w{1,40}[ \t]{1,9})??)?(?<![\w.-])"
    r"(?P<key>(?:api|access|secret|private)[ \t]key|[a-z_][\w-]*+)[ \t]{1,9}(?:is|was)(?:[ \t]?:)?[ \t]{1,9}"
    r"(?P<quote>[\"'`]?))(?P<value>[^\s\"'`]+)(?P<end>[\"'`]?[ \t]*$)?",
    re.IGNORECASE | re.MULTILINE,
)
"""A secret in a sentence: `my password is ...`."""
_LIKE_A_SECRET = re.compile(r"(?=\S*\d)(?=\S*[A-Za-z])|\S*[a-z][A-Z]")
_SAID_PROSE = re.compile(
    r"\w+ed|not|set|unset|wrong|right|missing|empty|invalid|valid|unknown|incorrect|correct|ok|fine|weak|strong|short|long"
    r"|safe|secret|secure|public|private|new|old|shown|hidden|known|given|there|here|gone|stale|bad|good|unsafe|insecure"
    r"|absent|present|optional|mandatory|unavailable|available|confidential",
    re.IGNORECASE,
)
"""Last words of sentences such as `your token is invalid`."""
_VALUE = re.compile(
    r"(?P<got>got[ \t]+)?(?P<scheme>(?:Bearer|Basic|Digest|Token)[ \t]+)?(?P<open>\\*[\"'])?", re.IGNORECASE
)
_WORD = re.compile(r"\S+")
_CLAUSE = re.compile(r"[^\n]*?(?=[,;)}\]](?:\s|$)|\\?[\"'](?:[,;)}\]\s]|$)|\n|$)")
_LINE = re.compile(r"[^\r\n]*")
_LINE_START = re.compile(r"[ \t>#-]*(?:export[ \t]+)?[\"']?")
_PROSE = re.compile(
    r"(?:the|is|are|was|a|an|no|not|cannot|must|wanted|expected|missing|unknown|invalid|set|give|pass|see|use|this"
    r"|that|in|of|for|from|with|has|does|must|should|may|will|and|or)(?=[\s,.:;]|$)"
)
_ORDINARY = re.compile(
    r"(?:none|null|true|false|undefined|~|\d{1,3}(?:\.\d+)?[ ]?(?:[mnu]?s|min|h|%)?|\d*\.\d+(?:e[+-]?\d+)?"
    r"|\d+(?:\.\d*)?e[+-]?\d+)?",
    re.IGNORECASE,
)
"""Values under a secret's key that are none: empty, switches, and small or fractional numbers."""
_MASKED = re.compile(r"\*{3}(?:[&;#]|$)")
_REFERENCE = re.compile(r"env:\w+|file:(?!//)\S+|\$[A-Z_][A-Z0-9_]*|\$\{\w+\}|\$\(cat [^)]*\)|\*{3}")
_NAME = re.compile(r"[A-Z][A-Z0-9_]*(?![\w.-])")
"""The name of a variable, which `perceiver submit --secret` takes."""
_VARIABLE = re.compile(r"\$[A-Za-z_]\w*")
_AUTH_HEADER = re.compile(r"\b(?P<kind>bearer|basic)(?P<space>[ \t]+)(?P<value>[\w.~+/=-]+)", re.IGNORECASE)
_SPOKEN = frozenset(["authentication", "authorization", "credential", "credentials", "token", "tokens"])


def is_reference(value: object) -> bool:
    """Return whether a value is a reference to a secret (`env:NAME`, `file:PATH`, but not a `file://` URL)."""
    return isinstance(value, str) and (
        value.startswith("env:") or (value.startswith("file:") and not value.startswith("file://"))
    )


def resolve(value: str) -> str:
    """Return the text that a reference stands for; any other text unchanged.

    Raises:
        UserError: the variable is not set, or the file cannot be read, is not a regular one, has more than 64 KiB or is
            not UTF-8.
    """
    if not is_reference(value):
        return value
    kind, _, name = value.partition(":")
    if kind == "env":
        if name not in os.environ:
            raise UserError(f"{value}: the environment variable {name} is not set; set it or give another reference")
        return os.environ[name]
    try:
        name = expand_home(name)
        if Path(name).exists() and not Path(name).is_file():
            raise UserError(f"{value}: not a regular file; give a file that contains the secret alone")
        with Path(name).open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise UserError(f"{value}: the file has more than 64 KiB; give a file that contains the secret alone")
        return content.decode().strip()
    except OSError as error:
        raise UserError(f"{value}: cannot read the file ({error.strerror}); give a readable file") from None
    except ValueError:  # whose text quotes the content
        raise UserError(f"{value}: cannot read the file (not UTF-8, or an invalid name); give a text file") from None


def server_address(url: str, key: str) -> tuple[str, int | None]:
    """Return host and port of a URL; host "" if it has none, the port by the scheme if it is not given.

    Args:
        url: the URL, with secrets, or what a reference to it stands for.
        key: setting or option of the URL, for the error.

    Raises:
        UserError: the URL cannot be split. It is not quoted: it may be a secret as a whole.
    """
    try:
        parts = urlsplit(url)
        return parts.hostname or "", parts.port or _PORTS.get(parts.scheme.partition("+")[0])
    except ValueError:
        raise UserError(
            f"{key}: got an invalid URL (not shown: it may be secret), wanted http://HOST:PORT or the like with a port "
            "up to 65535; in a password, percent-encode every character that is not a letter or digit (/ is %2F)"
        ) from None


def _words(key: str) -> list[str]:
    """Return the lower-case words of a key without numbers: `s3.accessKeys.0` -> `s`, `access`, `keys`."""
    words = (word.rstrip("0123456789") for word in re.split(r"[^a-z0-9]+", _CAMEL.sub("_", key).lower()))
    return [word for word in words if word]


def _is_strong(words: list[str]) -> bool:
    pairs = map("".join, zip(words, words[1:], strict=False))
    return bool(_STRONG.intersection([*words, *pairs])) or any(
        word.endswith(_ENDINGS) or _JOINED.fullmatch(word) for word in words
    )


def is_secret_key(key: str) -> bool:
    """Return whether a (dotted) key is that of a secret.

    It is if its last part has a word such as password, secret or credential, ends with token, pass, auth, pat or pw, is
    `key`, is a compound such as `access_key`, or is a service's key or tokens; also if a part above has a word such as
    password. Parts are split at `_`, `-`, spaces and capitals; case, numbers (`token.0`, `password1`), and last words
    such as `prod`, `header` and `value` are ignored.
    """
    parts = [words for part in re.split(r"[./]", key) if (words := _words(part))]
    if not parts:
        return False
    if parts[-1] == ["key"] and not re.search(r"key\d", key.lower()):
        return True
    if parts[-1] == ["value"] and len(parts) > 1 and parts[-2] != ["key"]:
        parts.pop()
    last = parts[-1]
    while len(last) > 1 and _TAIL.fullmatch(last[-1]):
        last = last[:-1]
    if last[-1] in _QUALITIES:
        return False
    if any(map(_is_strong, parts)) or _JOINED.fullmatch("_".join(last[-2:])):
        return True
    if last[-1] == "key" and len(last) > 1:
        return re.split(r"[./]", key)[-1].isupper() and not _ORDINARY_KEY.fullmatch(last[-2])
    return last[-1] in _LAST and (last[-1] != "token" or _SYMBOLS.isdisjoint(last[-2:-1]))


def redact_text(text: str) -> str:
    """Mask the secrets in a text.

    They are passwords in URLs, arguments of signed queries, values of secret keys (`key=value`, `key: value`,
    `--key value`, JSON, `"name": key, "value": ...`, `my password is ...`), logins of `curl`, `Bearer` and `Basic`
    headers, and the token formats of known services.
    """
    text = _QUERY.sub(_without_signature, _without_logins(_PRIVATE_KEY.sub(MASK, text)))
    text = _ARGUMENT.sub(_without_argument, _without_assigned(_without_assigned(text, _PAIR), _ASSIGNED))
    text = _SAID.sub(_without_said, _COMMAND_LOGIN.sub(_without_login, text))
    return _FORMATS.sub(MASK, _AUTH_HEADER.sub(_without_header, text))


UserError.mask = staticmethod(redact_text)


def contains_secret(text: str) -> bool:
    """Return whether a text has what `redact_text` masks."""
    return redact_text(text) != text


def _without_logins(text: str) -> str:
    """Mask `user:password@` and `token@` after `scheme://`; the password may contain `/ ? # @ :` and spaces."""
    done, place = "", 0
    while found := _SCHEME.search(text, place):
        start, quote = found.end(), text[found.start() - 1 : found.start()]
        end = _closing(text, start, quote) if quote in ("'", '"') else _LINE.match(text, start).end()  # type: ignore[union-attr]
        following = _NEXT_URL.search(text, start, end)
        length = _login_length(text[start : following.start()]) if following else 0
        length = length or _login_length(text[start:end])
        done += text[place:start] + (MASK + "@" if length else "")
        place = start + length
    return done + text[place:]


def _closing(text: str, start: int, quote: str) -> int:
    """Return the position of the closing quote, that of the end if there is none; backslashes escape."""
    while start < len(text) and text[start] != quote:
        start += 2 if text[start] == "\\" else 1
    return min(start, len(text))


def _login_length(body: str) -> int:
    """Return the length of `user:password@` at the start of what follows `scheme://`, 0 if there is none."""
    login, authority = _LOGIN.match(body), _AUTHORITY.match(body)
    if login is None or not login["colon"]:
        return authority.end() if authority else 0
    # A port may be followed by an @ later on the line: "http://head:8265, or ssh me@head".
    if authority is None and _PORT.fullmatch(body[login.end() : body.rfind("@") + 1]):
        return 0
    return body.rfind("@") + 1


def _without_signature(found: re.Match[str]) -> str:
    name = found["name"]
    secret = is_secret_key(name) or not _SIGNED.isdisjoint(_words(name))
    return f"{found['lead']}{name}={MASK}" if secret and not _is_plain(found["value"]) else found[0]


def _is_plain(value: str) -> bool:
    """Return whether a value under a secret's key is no secret: empty, a switch, a small number, a reference."""
    return bool(_ORDINARY.fullmatch(value) or _REFERENCE.fullmatch(value))


def _without_login(found: re.Match[str]) -> str:
    value = found["value"]
    return found[0] if value.isdigit() or _is_plain(value) else found["lead"] + MASK  # docker -u 1000:1000


def _without_argument(found: re.Match[str]) -> str:
    value = found["value"]
    prose = value.startswith("-") or not found["open"] and _PROSE.match(value)
    secret = is_secret_key(found["key"]) and not prose and not _is_plain(value)
    return found["lead"] + MASK if secret else found[0]


def _without_said(found: re.Match[str]) -> str:
    """Mask the value in `my password is ...`, but not the last word of `the password is missing`."""
    value, words = found["value"].rstrip(".,;:!?)"), _words(found["key"])
    strong = _is_strong(words)
    if not is_secret_key(found["key"]) or not strong and words[-1] not in ("token", "pw") or _is_plain(value):
        return found[0]
    secret = bool(found["quote"] or _LIKE_A_SECRET.match(value) and (strong or len(value) >= 8))
    secret = secret or bool(found["whose"] and found["end"] is not None and not _SAID_PROSE.fullmatch(value))
    rest = found[0][len(found["lead"]) + len(value) :]
    return found["lead"] + MASK + rest if secret else found[0]


def _without_assigned(text: str, form: re.Pattern[str]) -> str:
    done, place = "", 0
    for found in form.finditer(text):
        if found.start() < place or not _names_secret(found):
            continue
        begin, end = _value(text, found)
        value = text[begin:end]
        if _is_plain(value) or _is_plain(value.rstrip(",;)}].")) or _MASKED.match(value):
            continue
        done += text[place:begin] + MASK
        place = end
    return done + text[place:]


def _names_secret(found: re.Match[str]) -> bool:
    """Return whether an assignment in a text is one to a secret's key; after a space it is one to an option only."""
    key, option, by_space = found["key"], found["dashes"], found["sep"].isspace()
    if (by_space and not option) or key.lower() == "key":
        return False
    named = option and key == "secret" and _NAME.match(found.string, found.end())
    return is_secret_key(key) and not named


def _value(text: str, found: re.Match[str]) -> tuple[int, int]:
    """Return the span of the value of an assignment."""
    lead = _VALUE.match(text, found.end())
    assert lead is not None, "each of its parts is optional"
    begin = lead.end()
    if lead["open"]:
        quote = lead["open"][-1]
        if len(lead["open"]) == 1:
            return begin, _closing(text, begin, quote)
        close = re.compile(r"(?<!\\)" + re.escape(lead["open"])).search(text, begin)
        return begin, close.start() if close else len(text)
    before = text[found.start() - 1 : found.start()]
    if not found["quote"] and before and before in "'\"":
        return begin, _closing(text, begin, before)
    separator = found["sep"]
    if not lead["got"] and separator.strip() != "=" and _PROSE.match(text, begin):
        return begin, begin
    if separator.isspace() and text.startswith("--", begin):
        return begin, begin
    spaced = separator.strip() == ":" and separator != ":" or separator.endswith((" ", "\t")) and "=" in separator
    if not spaced:
        pattern = _WORD
    elif not lead["got"] and _LINE_START.fullmatch(text, text.rfind("\n", 0, found.start()) + 1, found.start()):
        pattern = _LINE
    else:
        pattern = _CLAUSE
    rest = pattern.match(text, begin)
    return begin, rest.end() if rest else begin


def _without_header(found: re.Match[str]) -> str:
    kind, value = found["kind"], found["value"].rstrip(".")
    secret = _is_basic(value) if kind.lower() == "basic" else len(value) >= 6 and value.lower() not in _SPOKEN
    return f"{kind}{found['space']}{MASK}" if secret else found[0]


def _is_basic(value: str) -> bool:
    """Return whether a word is `user:password` in base64."""
    try:
        return b":" in base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return False


def redact_value(key: str, value: Any) -> Any:
    """Return a value that is safe to show. References, booleans, None and ordinary numbers stay.

    Containers are traversed. In storage options, any `$name` is a reference to a variable (`perceiver.storage`);
    elsewhere `$NAME` in capitals and `${name}` are.
    """
    if isinstance(value, Mapping):
        named = {k: _named(value, str(k)) for k in value}
        return {
            redact_text(str(k)): redact_value(f"{key}.{named[k]}" if key else named[k], v) for k, v in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        items = list(value)
        program = next((item.rpartition("/")[2] for item in items if isinstance(item, str)), "")
        return [_redact_item(key, program, before, item) for before, item in zip([None, *items], items, strict=False)]
    if value is None or isinstance(value, bool):
        return value
    text = value if isinstance(value, str) else str(value)
    if is_reference(text):
        return redact_text(text)
    if "storage_options" in key.split(".") and _VARIABLE.fullmatch(text):
        return text
    if is_secret_key(key):
        return value if _is_plain(text) else MASK
    return value if isinstance(value, int | float) else redact_text(text)


def _named(mapping: Mapping[Any, Any], key: str) -> str:
    """Return the key of a value, which an entry of its own may be: `{"name": "DB_PASSWORD", "value": ...}`."""
    if not key.lower().endswith("value"):
        return key
    for word in ("name", "key", "Name", "Key"):
        name = mapping.get(key[:-5] + word)
        if isinstance(name, str) and name.lower() != "key" and is_secret_key(name):
            return name
    return key


def _redact_item(key: str, program: str, before: Any, item: Any) -> Any:
    """Redact an item of a list, which may be the value of the option before it: `["--password", "..."]`.

    Args:
        key: of the list.
        program: its first text, which may be a command: `["curl", "-u", "me:..."]`.
        before: the item before this one.
        item: the item.
    """
    if not isinstance(item, str) or not isinstance(before, str) or not before.startswith("-") or "=" in before:
        return redact_value(key, item)
    command = f"{program} {before} "
    found = _COMMAND_LOGIN.fullmatch(command + item.replace(" ", "_"))
    if found and found["lead"].startswith(command) and _without_login(found) != found[0]:
        return found["lead"].removeprefix(command) + MASK
    return redact_value(before if is_secret_key(before) else key, item)


def secret_keys(tree: Any, key: str = "") -> Iterator[str]:
    """Yield the dotted key of each value that redaction masks."""
    for (name, value), (shown, redacted) in zip(leaves(tree, key), leaves(redact_value(key, tree), key), strict=False):
        if name != shown or str(value) != str(redacted):
            yield shown


@dataclass(frozen=True, repr=False)
class Unshown:
    """A value whose text form does not show it, for arguments that a library displays.

    Ray's dashboard and its export files show the `train_loop_config` of each Ray Train run.
    """

    value: Any

    def __repr__(self) -> str:
        return "not shown: may contain secrets"


def redact(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return a flat or nested mapping that is safe to log, show and store (see `redact_value`)."""
    return redact_value("", params)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings with dotted keys: `{"a": {"b": 1}}` -> `{"a.b": 1}`. Empty mappings stay `{}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value in mappings and lists with its dotted key: `{"a": [{"b": 1}]}` -> `("a.0.b", 1)`."""
    if isinstance(node, Mapping):
        pairs: Any = node.items()
    elif isinstance(node, list | tuple | set | frozenset):
        pairs = enumerate(node)
    else:
        yield key, node
        return
    for name, value in pairs:
        yield from leaves(value, f"{key}.{name}" if key else str(name))
