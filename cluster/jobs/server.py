"""The job server of a cluster: its address, token and version are checked, and its errors become one line."""

import contextlib
import logging
import os
import socket
import ssl
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import requests

from cluster.recipe.placement import Node
from cluster.runtime.local import check_reachable, token_file
from cluster.runtime.local_cluster import running_cluster
from cluster.runtime.ray_internals import ANSWER_S, CONNECT_S, job_client_class
from perceiver.config import UserError
from perceiver.storage import first_line, parse_json
from perceiver.tracking.redaction import redact_text, server_address


@dataclass(frozen=True)
class Access:
    """How to reach a cluster; the options are those of Ray's own job commands.

    Attributes:
        address: ``http://host:8265``, or an address of Ray's; default: the environment's, or the local cluster.
        headers: HTTP headers as JSON, such as those of an authenticating proxy.
        verify: ``false`` to accept any TLS certificate, or a file or folder of trusted ones.
    """

    address: str | None = None
    headers: str | None = None
    verify: str = "true"

    def url(self) -> str:
        """Return the address of the job server.

        Raises:
            UserError: there is no address, or nothing listens there.
        """
        address = self.address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
        if address and "://" in address:
            return _http_url(address)
        local = running_cluster()
        address = address or (local.dashboard if local else None)
        if not address:
            raise UserError(
                "no cluster: give --address http://HEAD:8265 or set RAY_API_SERVER_ADDRESS, or start one on this "
                "machine with: perceiver cluster up"
            )
        if local and address == local.address:
            return local.dashboard
        return _http_url(address)

    def json_headers(self) -> dict[str, str]:
        """Return the HTTP headers; default: RAY_JOB_HEADERS.

        Raises:
            UserError: they are not a JSON object of strings.
        """
        text = self.headers or os.environ.get("RAY_JOB_HEADERS")
        return text_object(text, "--headers") if text else {}

    def trust(self) -> bool | str:
        """Return the ``verify`` argument of the HTTP library.

        Raises:
            UserError: the file or folder contains no certificates.
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
    """Parse a JSON object whose values are strings.

    Raises:
        UserError: the text is not such an object.
    """
    try:
        tree = parse_json(text, option)
    except UserError:
        tree = None
    if not isinstance(tree, dict) or not all(isinstance(value, str) for value in tree.values()):
        raise UserError(f"""{option} is not a JSON object of strings such as '{{"team": "vision"}}'""")
    return tree


def connect(access: Access) -> "JobServer":
    """Connect to a cluster's job server.

    Raises:
        UserError: it does not answer, requires another token, or runs another version of Ray.
    """
    url, headers, verify = access.url(), access.json_headers(), access.trust()
    headers = _with_token(url, headers, verify)
    # In Ray the environment takes precedence over the argument.
    os.environ["RAY_API_SERVER_ADDRESS"] = url
    import ray
    from ray.exceptions import AuthenticationError

    try:
        client = job_client_class()(url, headers=headers, verify=verify)
    except AuthenticationError as error:
        raise UserError(_token_line(display_url(url), str(error))) from None
    except (requests.RequestException, ConnectionError, RuntimeError, OSError) as error:
        raise UserError(
            f"no Ray job server answers at {display_url(url)} ({_reason(error)}): check --address"
        ) from None
    server = JobServer(url, client, headers, verify)
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
    elif not server_address(address, "--address")[1]:
        raise UserError(f"--address {display_url(address)}: has no port, wanted http://HOST:8265 or ray://HOST:10001")
    fix = "set --address to its dashboard, http://HEAD:8265"
    check_reachable(address, fix)
    for name in ("RAY_CLIENT_INITIAL_CONNECTION_TIMEOUT_S", "RAY_CLIENT_MAX_CONNECTION_TIMEOUT_S"):
        os.environ.setdefault(name, "3")  # for each of three attempts; read by Ray's import
    from ray.dashboard.utils import get_address_for_submission_client

    os.environ.setdefault("RAY_AUTH_MODE", "token")
    logging.getLogger("ray.client_builder").setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            return get_address_for_submission_client(address)
    except Exception as error:  # noqa: BLE001  Ray raises whatever its client meets
        raise UserError(f"no Ray cluster answers at {display_url(address)} ({_reason(error)}): {fix}") from None


def check_listening(url: str) -> None:
    """Raise a UserError within a few seconds if nothing listens at a URL."""
    host, port = server_address(url, "--address")
    if not host or not url.lower().startswith(("http://", "https://")):
        raise UserError(f"--address {display_url(url)}: wanted the cluster's dashboard, http://HOST:8265")
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except OSError as error:
        raise UserError(
            f"nothing answers at {display_url(url)} ({error.strerror or error}): check --address, and the tunnel or "
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
        raise UserError(f"{display_url(url)} has an untrusted TLS certificate: trust it with --verify FILE") from None
    except (requests.RequestException, ValueError, RecursionError):
        mode = unknown
    if mode == "token" and not headers and not token:
        raise UserError(
            f"{display_url(url)} requires a token and none is set here: write the cluster's token to ~/.ray/auth_token "
            "(mode 0600), or set RAY_AUTH_TOKEN_PATH to its file"
        )
    os.environ["RAY_AUTH_MODE"] = mode if mode in ("token", "disabled") else "token"
    if mode == "disabled" or not token or any(name.lower() == "authorization" for name in headers):
        return headers
    return {**headers, "Authorization": f"Bearer {token}"}


def _token() -> str:
    """Return the token that Ray would send: RAY_AUTH_TOKEN, else its file's; empty if there is none."""
    with contextlib.suppress(OSError):
        return os.environ.get("RAY_AUTH_TOKEN") or token_file().read_text().strip()
    return ""


def _token_line(url: str, reason: str) -> str:
    what = "is not this cluster's" if "nvalid" in reason or "orbidden" in reason else "is missing"
    return (
        f"{url}: the token {what}: set RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token to the cluster's token"
    )


def display_url(url: str) -> str:
    """Return an address for messages, with a login masked."""
    return redact_text(url) if "://" in url else redact_text(f"http://{url}").removeprefix("http://")


def _reason(error: BaseException) -> str:
    """Return the first line of an error with secrets masked."""
    return redact_text(first_line(error))


class JobServer:
    """A cluster's job server.

    Args:
        url: its address; the attribute `url` has the login masked.
        client: Ray's job client.
        headers: HTTP headers of requests that Ray's client has no method for.
        verify: as in `Access.trust`.
    """

    def __init__(
        self, url: str, client: Any, headers: Mapping[str, str] | None = None, verify: bool | str = True
    ) -> None:
        self.url, self.client = display_url(url), client
        self._request = partial(requests.get, headers=headers, verify=verify, timeout=(CONNECT_S, ANSWER_S))
        self._address = url

    def get(self, path: str) -> dict[str, Any]:
        """Return the JSON response of a path of the dashboard."""
        with self.answers():
            response = self._request(self._address + path)
            if response.status_code in (401, 403):
                raise UserError(_token_line(self.url, response.text))
            response.raise_for_status()
            return response.json()

    @contextlib.contextmanager
    def answers(self, what: str = "") -> Iterator[None]:
        """Turn exceptions of Ray and the network into a UserError; ``what`` names what was requested."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise UserError(_token_line(self.url, str(error))) from None
        except (requests.RequestException, ConnectionError) as error:
            raise UserError(f"{self.url} no longer answers ({_reason(error)})") from None
        except (RuntimeError, ValueError, TypeError) as error:
            line = next((s for s in reversed(str(error).splitlines()) if "Error" in s), _reason(error))
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
