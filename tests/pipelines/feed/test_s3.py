"""A prepared data set on S3: written and read by the same code as a local one, whatever requests fail."""

from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow.parquet as pq
import pytest

from perceiver.config import UserError
from perceiver.storage import ReadError, ReadPolicy, open_folder, read_range, with_retries
from pipelines.feed.ingest import DataConfig, EvalShare, TrainShare, eval_batches, train_batches
from pipelines.prepare import PrepareConfig, prepare
from pipelines.shards import reader
from pipelines.shards.manifest import load_manifest
from tests.pipelines.faulty_s3 import FaultyS3
from tests.pipelines.feed.test_ingest import joined, same
from tests.pipelines.toys import digits_archive

POLICY = ReadPolicy(timeout=0.5, attempts=12, backoff=0.02, longest=0.2)
SECRET = {"key": "testing", "secret": "testing"}


@pytest.fixture(scope="module")
def s3() -> Iterator[FaultyS3]:
    """Yield the server with an empty bucket."""
    server = FaultyS3()
    boto3.client(
        "s3",
        endpoint_url=server.url,
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
        region_name="us-east-1",
    ).create_bucket(Bucket="data")
    yield server
    server.close()


@pytest.fixture(scope="module")
def both(s3: FaultyS3, tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, DataConfig]:
    """Return the same digits prepared into a local folder and into the bucket."""
    folder = tmp_path_factory.mktemp("digits")
    digits_archive(folder / "digits.whl", per_class=60)
    options = {**SECRET, "endpoint_url": s3.url}
    config = PrepareConfig(shard_rows=250, group_rows=20, parallel="off")
    local = prepare("digits", str(folder / "digits.whl"), str(folder / "out"), config)
    away = prepare(
        "digits", str(folder / "digits.whl"), "s3://data/digits", config.model_copy(update={"storage_options": options})
    )
    assert away == local == load_manifest("s3://data/digits", options)
    common = {"executor": "inline", "run_samples": 64, "read": POLICY}
    return (
        DataConfig(url=str(folder / "out"), **common),
        DataConfig(url="s3://data/digits", storage_options=options, **common),
    )


@pytest.fixture(autouse=True)
def cold(s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clear the caches and disable the faults."""
    monkeypatch.setattr(reader, "CACHE", reader.RowGroupCache())
    s3.reset()


def batches(data: DataConfig) -> dict:
    """Return a little more than an epoch of training rows."""
    return joined(
        list(train_batches(data, load_manifest(data.url, data.storage_options), TrainShare(1, 32, 16, 0, 16), "cpu"))
    )


def test_one_request_a_row_group(both: tuple[DataConfig, DataConfig], s3: FaultyS3) -> None:
    local, away = both
    data = away.model_copy(update={"cache_bytes": 64 << 20, "read": ReadPolicy()})
    manifest = load_manifest(data.url, data.storage_options)
    s3.met.clear()
    rows = joined(list(eval_batches(data, manifest, EvalShare("test", 16), "cpu")))
    assert s3.met.total() == 6, "six row groups of 20 rows"
    assert same(rows, joined(list(eval_batches(local, manifest, EvalShare("test", 16), "cpu"))))


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
def test_batches_survive_faults(both: tuple[DataConfig, DataConfig], s3: FaultyS3, rate: float) -> None:
    local, away = both
    s3.rate = rate
    assert same(batches(away.model_copy(update={"cache_bytes": 1})), batches(local))
    if rate > 0.1:
        assert sum(count for fault, count in s3.met.items() if fault != "good") > 5


def test_ray_tasks_read_from_s3(both: tuple[DataConfig, DataConfig], small_ray: None) -> None:
    local, away = both
    assert same(batches(away.model_copy(update={"executor": "ray"})), batches(local))


def test_a_server_that_never_answers_well_ends_in_one_clear_error(
    both: tuple[DataConfig, DataConfig], s3: FaultyS3
) -> None:
    folder = open_folder("s3://data/digits", both[1].storage_options)
    s3.rate = 1.0
    policy = ReadPolicy(timeout=1.0, attempts=2, backoff=0.01)
    with pytest.raises(ReadError, match=r"s3://data/digits/test-000000\.arrow .*2 attempts"):
        read_range(folder, "test-000000.arrow", 0, 100, policy)


def test_a_missing_bucket_or_manifest_is_the_user_s_error(both: tuple[DataConfig, DataConfig]) -> None:
    for url in ("s3://data/absent", "s3://no-such-bucket/x"):
        with pytest.raises(UserError, match=url):
            load_manifest(url, both[1].storage_options)


def test_a_missing_file_is_not_asked_for_again(tmp_path: Path) -> None:
    asked = []

    def request() -> None:
        asked.append(1)
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError):
        with_retries(request, "x", ReadPolicy())
    assert len(asked) == 1


def test_sources_read_files_of_any_name_from_a_store(
    s3: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", SECRET["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET["secret"])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    names = ["a b", "%E9", "#x", "q?v", "s;t", "*", "[a]", "a:b", "-x", "q?versionId=1"]
    client = boto3.client("s3")
    for number, name in enumerate(names):
        client.put_object(Bucket="data", Key=f"texts/{name}.txt", Body=b"one %d\n\ntwo %d\n" % (number, number))
    notes: list[str] = []
    config = PrepareConfig(parallel="off", options={"held_out": "none"}, max_bad_fraction=0.5)
    manifest = prepare("text", "s3://data/texts", str(tmp_path / "out"), config, note=notes.append)
    assert manifest.splits["train"].samples == 18
    listed = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert [row["key"] for row in listed] == ["q?versionId=1.txt"]
