"""The job server of a cluster: found, reached, its token and version checked, its refusals in one line."""

import contextlib
import json
import os
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from cluster.recipe.placement import Node
from cluster.runtime.local import check_reachable
from cluster.runtime.local_cluster import running_cluster
from cluster.runtime.ray_internals import job_client_class
from perceiver.config import UserError
from perceiver.storage import first_line
from perceiver.tracking.redaction import redact_text

CONNECT_S = 5


@dataclass(frozen=True)
class Access:
    """How to reach a cluster: its address, and what Ray's own job commands take beside it.

    Attributes:
        address: ``http://host:8265``, or an address of Ray's; None for the environment's or the local cluster.
        headers: HTTP headers as JSON, such as those of a proxy that asks who comes.
        verify: ``false`` to take any TLS certificate, or a file or folder of trusted ones.
    """

    address: str | None = None
    headers: str | None = None
    verify: str = "true"

    def url(self) -> str:
        """Return the address of the job server.

        Raises:
            UserError: there is none, or nothing listens there.
        """
        local = running_cluster()
        environment = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
        address = self.address or environment or (local.dashboard if local else None)
        if not address:
            raise UserError(
                "no cluster: give --address http://HEAD:8265 or set RAY_API_SERVER_ADDRESS, or start one on this "
                "machine with: perceiver cluster up"
            )
        if local and address == local.address:
            return local.dashboard
        return _http_url(address)

    def json_headers(self) -> dict[str, str]:
        """Return the headers, those of RAY_JOB_HEADERS if none were given.

        Raises:
            UserError: they are not a JSON object of texts.
        """
        text = self.headers or os.environ.get("RAY_JOB_HEADERS")
        return text_object(text, "--headers") if text else {}

    def trust(self) -> bool | str:
        """Return what the HTTP library takes as ``verify``.

        Raises:
            UserError: a file or folder that holds no certificates.
        """
        flag = {"true": True, "1": True, "false": False, "0": False}.get(self.verify.lower())
        if flag is not None:
            return flag
        file, folder = (None, self.verify) if Path(self.verify).is_dir() else (self.verify, None)
        try:
            ssl.create_default_context(cafile=file, capath=folder)
        except OSError as error:
            raise UserError(
                f"--verify {self.verify}: {error.strerror or error}; wanted true, false, or a file or folder of "
                "certificates (PEM)"
            ) from None
        return self.verify


def text_object(text: str, option: str) -> dict[str, str]:
    """Read a JSON object whose values are texts.

    Raises:
        UserError: it is something else.
    """
    try:
        tree = json.loads(text)
    except ValueError:
        tree = None
    if not isinstance(tree, dict) or not all(isinstance(value, str) for value in tree.values()):
        raise UserError(f"""{option} is not a JSON object of texts, such as '{{"team": "vision"}}'""")
    return tree


def connect(access: Access) -> "JobServer":
    """Connect to a cluster's job server.

    Raises:
        UserError: it does not answer, wants another token, or runs another version of Ray.
    """
    url, headers, verify = access.url(), access.json_headers(), access.trust()
    headers = _with_token(url, headers, verify)
    # Ray lets the environment overrule the argument.
    os.environ["RAY_API_SERVER_ADDRESS"] = url
    import ray
    from ray.exceptions import AuthenticationError

    try:
        client = job_client_class()(url, headers=headers, verify=verify)
    except AuthenticationError as error:
        raise UserError(_token_line(shown(url), str(error))) from None
    except (requests.RequestException, ConnectionError, RuntimeError, OSError) as error:
        raise UserError(f"no Ray job server answers at {shown(url)} ({_first_line(error)}): check --address") from None
    server = JobServer(url, client)
    there = server.get("/api/version").get("ray_version", "unknown")
    if there != ray.__version__:
        raise UserError(
            f"{server.url} runs Ray {there}, this machine has Ray {ray.__version__}: install ray=={there} here, or "
            f"give the cluster an image with ray=={ray.__version__}"
        )
    return server


def _http_url(address: str) -> str:
    """Return the dashboard's URL for any address that Ray's commands take."""
    if "://" not in address:
        check_listening(f"http://{address}")
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"http://{address}/api/version", timeout=CONNECT_S).status_code in (200, 401, 403):
                return f"http://{address}"
    elif not address.startswith("ray://"):
        check_listening(address)
        return address.rstrip("/")
    check_reachable(address)
    from ray.dashboard.utils import get_address_for_submission_client

    os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        return get_address_for_submission_client(address)
    except Exception as error:  # noqa: BLE001  Ray raises whatever its client meets
        raise UserError(
            f"no Ray cluster answers at {shown(address)} ({_first_line(error)}): give the dashboard's http://HEAD:8265"
        ) from None


def check_listening(url: str) -> None:
    """Refuse a URL behind which nothing listens, within a few seconds."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise UserError(f"--address {shown(url)}: {error}; wanted http://HOST:PORT") from None
    if not host or parts.scheme not in ("http", "https"):
        raise UserError(f"--address {shown(url)} is no address: wanted http://HOST:8265, the cluster's dashboard")
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except OSError as error:
        raise UserError(
            f"nothing answers at {shown(url)} ({error.strerror or error}): check --address, and the tunnel or "
            "port-forward if the cluster is behind one"
        ) from None


def _with_token(url: str, headers: dict[str, str], verify: bool | str) -> dict[str, str]:
    """Return the headers with this machine's token if the cluster asks for one, and set RAY_AUTH_MODE to its answer.

    The header is needed where Ray was imported before: it reads RAY_AUTH_MODE at its import only.
    """
    token = _token()
    # A busy server may not answer in time; then a token that is there is sent.
    unknown = os.environ.get("RAY_AUTH_MODE") or ("token" if token else "disabled")
    try:
        answer = requests.get(f"{url}/api/authentication_mode", timeout=CONNECT_S, headers=headers, verify=verify)
        mode = answer.json().get("authentication_mode", "disabled") if answer.ok else "disabled"
    except requests.exceptions.SSLError:
        raise UserError(f"{shown(url)} shows a certificate that is not trusted: give --verify FILE") from None
    except (requests.RequestException, ValueError):
        mode = unknown
    if mode == "token" and not headers and not token:
        raise UserError(
            f"{shown(url)} asks for a token and there is none here: put the cluster's into ~/.ray/auth_token "
            "(mode 0600), or name its file in RAY_AUTH_TOKEN_PATH"
        )
    os.environ["RAY_AUTH_MODE"] = mode if mode in ("token", "disabled") else "token"
    if mode == "disabled" or not token or any(name.lower() == "authorization" for name in headers):
        return headers
    return {**headers, "Authorization": f"Bearer {token}"}


def _token() -> str:
    """Return the token that Ray would send: RAY_AUTH_TOKEN, else its file's; empty if there is none."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    with contextlib.suppress(OSError):
        return os.environ.get("RAY_AUTH_TOKEN") or path.read_text().strip()
    return ""


def _token_line(url: str, reason: str) -> str:
    what = "is not this cluster's" if "nvalid" in reason or "orbidden" in reason else "is missing"
    return (
        f"{url}: the token {what}; it is read from RAY_AUTH_TOKEN, the file in RAY_AUTH_TOKEN_PATH, or "
        "~/.ray/auth_token: put the cluster's there"
    )


def shown(url: str) -> str:
    """Return an address for the user's eyes: without the login that it may hold."""
    return redact_text(url) if "://" in url else redact_text(f"http://{url}").removeprefix("http://")


def _first_line(error: BaseException) -> str:
    return redact_text(first_line(error))


class JobServer:
    """A cluster's job server that has answered.

    Args:
        url: its address.
        client: Ray's client to it.

    Attributes:
        url: the address as it is shown, without a login; only the client needs that.
        client: Ray's.
    """

    def __init__(self, url: str, client: Any) -> None:
        self.url, self.client = shown(url), client

    def get(self, path: str) -> dict[str, Any]:
        """Return the JSON that a path of the dashboard answers with."""
        with self.answers():
            response = self.client._do_request("GET", path)
            response.raise_for_status()
            return response.json()

    @contextlib.contextmanager
    def answers(self, what: str = "") -> Iterator[None]:
        """Turn what Ray and the network raise into one line for the user."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise UserError(_token_line(self.url, str(error))) from None
        except (requests.RequestException, ConnectionError) as error:
            raise UserError(f"{self.url} does not answer any more ({_first_line(error)})") from None
        except (RuntimeError, ValueError, TypeError) as error:
            line = next((s for s in reversed(str(error).splitlines()) if "Error" in s), _first_line(error))
            raise UserError(
                f"{self.url} refused{' ' + what if what else ''}: {redact_text(line.strip()[:300])}"
            ) from None

    def nodes(self) -> list[Node]:
        """Return the cluster's live nodes."""
        rows = self.get("/api/v0/nodes?limit=10000&detail=1")["data"]["result"]["result"]
        return [
            Node(row["node_ip"], row["resources_total"], row.get("labels") or {}, bool(row.get("is_head_node")))
            for row in rows
            if row["state"] == "ALIVE"
        ]
