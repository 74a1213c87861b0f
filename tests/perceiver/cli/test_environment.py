"""Locales, proxies and folders that cannot be written."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import requests

from cluster.runtime.local_cluster import up
from perceiver.config import UserError
from perceiver.environment import bypass_proxies

NO_ANSWER = "http://127.0.0.1:9"


def perceiver(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "perceiver", *arguments]
    return subprocess.run(command, capture_output=True, env=os.environ | environment, timeout=120)


@pytest.mark.parametrize("python", [{}, {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}])
def test_any_locale_reads_and_prints_every_character(python: dict[str, str]) -> None:
    done = perceiver("train", "grö·ße.yaml", LC_ALL="C", **python)
    assert done.returncode == 2 and "grö·ße.yaml" in done.stderr.decode()


def test_requests_to_this_machine_use_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802  the library's name
            self.send_response(204)
            self.end_headers()

    for name in ("http_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, NO_ANSWER)
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.setenv("NO_PROXY", "")
    bypass_proxies()
    assert os.environ["no_proxy"].startswith("example.org,") and os.environ["no_proxy"] == os.environ["NO_PROXY"]
    with HTTPServer(("127.0.0.2", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert requests.get(f"http://127.0.0.2:{server.server_port}", timeout=20).status_code == 204
        server.shutdown()
    with pytest.raises(requests.exceptions.ProxyError):
        requests.get("http://example.com", timeout=20)


def test_a_cluster_that_could_not_be_found_again_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for name in ("HOME", "PERCEIVER_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "file" / name))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="RAY_AUTH_TOKEN_PATH=.*PERCEIVER_CACHE="):
        up()


def test_a_file_that_cannot_be_written_is_one_line() -> None:
    code = "import perceiver.__main__ as p, perceiver.cli.models as m, sys\n"
    code += "def fail(*a, **k): raise OSError(30, 'Read-only file system', '/x')\n"
    code += "m.command.callback = fail; sys.argv = ['perceiver', 'models']; p.main()\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith(b"error: /x: Read-only file system (")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_device_as_stdout_is_one_line() -> None:
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "perceiver", "models", "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith(b"error: no space left on the device")
    assert len(done.stderr.splitlines()) == 1
