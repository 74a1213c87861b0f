"""Shards and the manifest: both are read as written, and an incomplete folder is refused in one line."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from perceiver.config import UserError
from pipelines.feed.ingest import DataConfig, check_files, load_data
from pipelines.inspect.inspection import inspect
from pipelines.shards.manifest import load_manifest
from pipelines.shards.reader import Reader
from tests.pipelines.raw import make_irregular
from tests.pipelines.toys import write_images


def test_a_saved_manifest_is_loaded(tmp_path: Path) -> None:
    manifest = write_images(tmp_path, {"train": [23, 7]}, rows_per_group=10)
    assert load_manifest(str(tmp_path)) == manifest
    assert manifest.split("train").samples == 30
    lines = (tmp_path / "manifest.json").read_text().splitlines()
    shown = [json.loads(line.strip().rstrip(",")) for line in lines if re.fullmatch(r" *\[\d.*\],?", line)]
    assert shown == [list(batch) for shard in manifest.split("train").shards for batch in shard.batches]


def test_folders_that_are_no_data_set_are_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent .*`perceiver prepare"):
        load_manifest(str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"manifest\.json .*`perceiver prepare"):
        load_manifest(str(tmp_path))
    with pytest.raises(UserError, match="nosuch://x"):
        load_manifest("nosuch://x")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        load_manifest(str(tmp_path / "file"))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda raw: raw[:-20], "not valid JSON"),
        (lambda raw: "[1]", "not a manifest"),
        (lambda raw: raw.replace('"format_version": 2', '"format_version": 99'), "version 99.* reads up to 2"),
        (lambda raw: raw.replace('"licence"', '"license"'), "licence"),
        (lambda raw: raw.replace('"rows": 6', '"rows": "many"'), r"splits.train.shards.0.rows"),
    ],
)
def test_broken_manifests_are_refused_in_one_line(tmp_path: Path, change, message: str) -> None:
    write_images(tmp_path, {"train": [6]})
    path = tmp_path / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=message) as caught:
        load_manifest(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_unknown_split_names_the_known_ones(tmp_path: Path) -> None:
    manifest = write_images(tmp_path, {"train": [2], "test": [2]})
    with pytest.raises(UserError, match="'val'.*train, test"):
        manifest.split("val")


def test_storage_options_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, {"train": [2]})
    with pytest.raises(UserError, match="NOT_SET_ANYWHERE"):
        load_manifest(str(tmp_path), {"key": "$NOT_SET_ANYWHERE"})
    monkeypatch.setenv("MKDIR", "yes")
    assert (
        json.loads((tmp_path / "manifest.json").read_text())["name"]
        == load_manifest(str(tmp_path), {"auto_mkdir": "$MKDIR"}).name
    )


FEATURES = {"image": {"kind": "image", "channels": 1}, "label": {"kind": "label"}}
BATCHES = [[232, 800, 3, 7], [1032, 800, 3, 8]]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batches": [[-8, 800, 3, 7], BATCHES[1]]}, "batches.0.0"),
        ({"batches": [[0, 800, 3, 7], BATCHES[1]]}, "batch 0 at"),
        ({"batches": [BATCHES[0], [1024, 800, 3, 8]]}, "batch 1 at"),
        ({"batches": [BATCHES[0], [1033, 800, 3, 8]]}, "batch 1 at"),
        ({"batches": [BATCHES[0], [1032, -800, 3, 8]]}, "batches.1.1"),
        ({"batches": [BATCHES[0], [1032, 0, 3, 8]]}, "batches.1.1"),
        ({"batches": [BATCHES[0], [1032, 1 << 70, 3, 8]]}, "batches.1.1"),
        ({"batches": [BATCHES[0], [1032, 1100, 3, 8]]}, "batch 1 at"),
        ({"batches": BATCHES[::-1]}, "batch 1 at"),
        ({"batches": [BATCHES[0], [1040, 800, 3, 8]]}, "batch 1 at"),
        ({"batches": [BATCHES[0]], "rows": 3}, "make a file of 1306 bytes, got 2130"),
        ({"batches": [[1032, 800, 3, 8]], "rows": 3}, "make a file of 2906 bytes"),
        ({"batches": [[832, 200, 3, 7], BATCHES[1]], "bytes": 2730}, "batch 0 at 832, wanted 232"),
        ({"batches": [[232, 800, 3, 7], [1032, 800, 3.0, 8]]}, "batches.1.2"),
        ({"batches": [[232, 800, 3, 7], [1032, 800, 3, True]]}, "batches.1.3"),
        ({"batches": [BATCHES[0], [1032, 800, 4, 8]]}, "batch 1 has 4 rows, wanted 3"),
        ({"batches": [BATCHES[0], [1032, 800, -3, 8]]}, "batches.1.2"),
        ({"batches": [BATCHES[0], [1032, 800, 3, -1]]}, "batches.1.3"),
        ({"batches": [BATCHES[0], [1032, 800, 3, 1 << 32]]}, "batches.1.3"),
        ({"batches": BATCHES[:1]}, "2 row groups .* and 1 batches"),
        ({"batches": [BATCHES[0], [1032, 800, 3]]}, "batches.1"),
        ({"rows": 7}, "3 row groups .* and 2 batches"),
        ({"rows": 5}, "batch 1 has 3 rows, wanted 2"),
        ({"rows": 1 << 60}, "rows"),
        ({"rows_per_group": 0}, "rows_per_group"),
        ({"rows_per_group": 1}, "6 row groups"),
        ({"groups": [[4, 3], [3, 3]]}, "do not add up to 6 rows"),
        ({"groups": [[7, 3], [-1, 3]]}, "groups.1.0"),
        ({"groups": [[6, 0]]}, "groups.0.1"),
        ({"rows_per_group": 1 << 70}, "rows_per_group"),
        ({"batches": [], "rows": 1 << 40, "rows_per_group": 1}, "1099511627776 row groups in 2130 bytes"),
        ({"bytes": 1000}, "batch 0 at|batch 1 at"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused_in_one_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shard = {"name": "a.arrow", "rows": 6, "rows_per_group": 3, "bytes": 2130, "batches": BATCHES}
    manifest = {"format_version": 2, "name": "x", "features": FEATURES, "licence": "", "source": ""}
    for shards in ([shard], [shard | change]):
        text = json.dumps(manifest | {"splits": {"train": {"shards": shards}}})
        (tmp_path / "manifest.json").write_text(text)
        if shards[0] is shard:
            assert load_manifest(str(tmp_path)).split("train").samples == 6
    with pytest.raises(UserError, match=rf"manifest.json: splits.train.shards.0.*{message}") as caught:
        load_manifest(str(tmp_path))
    assert "\n" not in str(caught.value)


NAMES = (
    "../x.arrow",
    "/etc/x.arrow",
    "http://127.0.0.1:1/x",
    "s3://b/x",
    "C:x",
    "a\\b",
    "",
    ".",
    "..",
    "a/b",
    "a\0b",
    "a\nb",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    change_manifest(write_images_to(tmp_path), ["splits", "train", "shards", 0, "name"], name)
    with pytest.raises(UserError, match=r"splits\.train\.shards\.0\.name: got .*wanted") as caught:
        load_manifest(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys, value, message",
    [
        (["splits"], {}, "splits: .*at least 1"),
        (["splits", "train", "shards"], [], "shards: .*at least 1"),
        (["features"], {}, "features: .*at least 1"),
        (["features", "image", "size"], [0, 8], r"features\.image.*size\.0: .*got 0"),
        (["features", "image", "size"], [8, -1], r"features\.image.*size\.1: .*got -1"),
        (["features", "image", "size"], [8.0, 8], r"size\.0: .*got 8\.0"),
        (["features", "image", "channels"], 2, "channels: wanted 1"),
        (["features", "image", "channels"], True, "channels = true"),
        (["features", "key"], {"kind": "label"}, "features: 'key'"),
        (["splits", "train", "shards", 0, "bytes"], "900", "bytes: .*got '900'"),
        (["splits", "train", "shards", 0, "rows"], True, "rows = true"),
        (["splits", "train", "shards", 0, "sha256"], "0" * 63, "sha256"),
        (["splits", "train", "shards", 0, "sha256"], "G" * 64, "sha256"),
        (["splits", "train", "columns"], {"image": "x"}, r"splits\.train\.columns has \['image'\]"),
        (["rejected"], -1, "rejected: .*got -1"),
        (["format_version"], True, "format_version"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key(
    tmp_path: Path, keys: list[Any], value: Any, message: str
) -> None:
    change_manifest(write_images_to(tmp_path), keys, value)
    with pytest.raises(UserError, match=f"manifest.json.*{message}") as caught:
        load_manifest(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"name"', '"licence": "none", "name"', 1),
        lambda text: "[" * 100_000,
        lambda text: text.replace('"rejected": 0', '"rejected": ' + "9" * 5000),
        lambda text: "\ud800",
    ],
)
def test_json_with_repeated_keys_or_depth_is_refused(tmp_path: Path, change: Any) -> None:
    path = write_images_to(tmp_path)
    path.write_bytes(change(path.read_text()).encode(errors="surrogatepass"))
    with pytest.raises(UserError, match=r"manifest\.json is not valid JSON") as caught:
        load_manifest(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["manifest.json", "train-0.arrow"])
@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
def test_what_is_not_a_regular_file_is_not_opened(tmp_path: Path, file: str, kind: str) -> None:
    data = DataConfig(url=str(tmp_path / "data"), executor="inline")
    path = write_images_to(tmp_path / "data").with_name(file)
    make_irregular(path, kind, tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"{file}.* (not a regular file|link to a file outside)"):
        check_files(data, load_data(data))
    if file != "manifest.json":
        [fault] = inspect(data.url).faults
        assert fault.startswith(f"{file}: ")
        reader = Reader.of(data.url, manifest := load_manifest(data.url), manifest.split("train"))
        assert reader.row_groups({(0, 0)})[0, 0].error.startswith(f"{file}: ")


def test_an_index_of_files_in_another_store_needs_permission(tmp_path: Path) -> None:
    with answering() as (url, requests):
        path = write_images_to(tmp_path)
        shard = {"name": f"{url}/a.parquet", "rows": 2, "rows_per_group": 2, "bytes": 900}
        split = {"shards": [shard], "columns": {"image": "image", "label": "label"}}
        change_manifest(path, ["splits", "train"], split)
        data = DataConfig(url=str(tmp_path), executor="inline", files=("http://127.0.0.1:1/", "http://127.0.0.1"))
        for read in (lambda: inspect(str(tmp_path)), lambda: load_data(data)):
            with pytest.raises(UserError, match=rf"index of {shard['name']}.*data\.files=\['{url}'\]"):
                read()
        assert not requests
        assert inspect(str(tmp_path), files=[url]).faults and requests
        shard["name"] = f"{url}/../a.parquet"
        change_manifest(path, ["splits", "train"], split)
        with pytest.raises(UserError, match=r"splits\.train\.shards\.0\.name"):
            load_manifest(str(tmp_path))


def write_images_to(folder: Path) -> Path:
    """Write a data set of one shard of six images in two row groups; return its manifest."""
    write_images(folder, {"train": [6], "test": [2]}, rows_per_group=3)
    return folder / "manifest.json"


def change_manifest(path: Path, keys: list[Any], value: Any) -> None:
    """Replace one value of a manifest."""
    tree = node = json.loads(path.read_text())
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    path.write_text(json.dumps(tree))


@contextmanager
def answering() -> Iterator[tuple[str, list[str]]]:
    """Yield the URL of an HTTP server on this machine and the list of the requested paths."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()
