"""The spool and the tracker: nothing is lost, nothing doubled, nothing secret leaves, training never waits."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perceiver.config import UserError
from perceiver.tracking.redaction import MASK, flatten, holds_secret, leaves, redact, redact_text, resolve
from perceiver.tracking.spool import Event, SpoolReader, SpoolWriter, segments, unsent
from perceiver.tracking.tracker import NullTracker, SendError, SpoolTracker


class Receiver:
    """A backend in memory that can be switched off, and that can fail after it has taken a batch."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.up = True
        self.fail_after_taking = 0
        self.refuse = ""
        self.closed = False
        self.attempts = 0

    def send(self, events: Sequence[Event]) -> list[tuple[Event, str]]:
        self.attempts += 1
        if not self.up:
            raise SendError("down")
        taken = [event for event in events if not self.refuse or self.refuse not in json.dumps(event)]
        self.events.extend(event for event in taken if event not in self.events)
        if self.fail_after_taking:
            self.fail_after_taking -= 1
            raise SendError("the answer was lost")
        return [(event, "refused") for event in events if event not in taken]

    def close(self) -> None:
        self.closed = True

    def steps(self) -> list[int]:
        return [event["step"] for event in self.events if event["kind"] == "metrics"]


def make(folder: Path, receiver: Receiver, **options: Any) -> SpoolTracker:
    return SpoolTracker(folder, receiver, interval_s=0.01, backoff_s=(0.01, 0.05), **options)


def test_events_arrive_in_order_and_the_folder_is_empty_afterwards(tmp_path: Path) -> None:
    receiver = Receiver()
    tracker = make(tmp_path, receiver)
    for step in range(500):
        tracker.log_metrics(step, {"loss": 1 / (step + 1)})
    tracker.set_tag("a", "b")
    tracker.log_artifact(tmp_path / "x.txt", "files")
    assert tracker.flush(10)
    tracker.close("finished")
    assert receiver.steps() == list(range(500))
    assert [event["kind"] for event in receiver.events[500:]] == ["tag", "artifact", "status"]
    assert receiver.events[-1]["value"] == "finished"
    assert receiver.closed
    assert list(tmp_path.iterdir()) == []


def test_an_outage_loses_nothing_and_keeps_the_order(tmp_path: Path) -> None:
    receiver = Receiver()
    tracker = make(tmp_path, receiver)
    for step in range(300):
        receiver.up = not 100 <= step < 200
        tracker.log_metrics(step, {"loss": 0.5})
        if step % 20 == 0:
            time.sleep(0.02)
    assert tracker.flush(10)
    tracker.close("stopped")
    assert receiver.steps() == list(range(300))


def test_flush_and_close_give_up_when_the_backend_stays_down(tmp_path: Path) -> None:
    receiver = Receiver()
    receiver.up = False
    tracker = make(tmp_path, receiver, close_timeout_s=0.2)
    tracker.log_metrics(1, {"loss": 1.0})
    began = time.monotonic()
    assert not tracker.flush(0.2)
    tracker.close("failed")
    assert time.monotonic() - began < 5
    assert unsent(tmp_path) == 2


def test_a_backend_that_is_down_is_not_called_all_the_time(tmp_path: Path) -> None:
    receiver = Receiver()
    receiver.up = False
    tracker = SpoolTracker(tmp_path, receiver, interval_s=0.01, backoff_s=(0.2, 10.0), close_timeout_s=0.1)
    tracker.log_metrics(1, {"loss": 1.0})
    time.sleep(1.0)
    tracker.detach()
    assert 1 <= receiver.attempts <= 8


def test_the_next_tracker_sends_what_the_last_one_left_and_ignores_how_it_ended(tmp_path: Path) -> None:
    receiver = Receiver()
    receiver.up = False
    first = make(tmp_path, receiver, close_timeout_s=0.05)
    for step in range(10):
        first.log_metrics(step, {"loss": 1.0})
    first.close("failed")
    receiver.up = True
    second = make(tmp_path, receiver)
    second.log_metrics(10, {"loss": 1.0})
    second.close("finished")
    assert receiver.steps() == list(range(11))
    assert [event["value"] for event in receiver.events if event["kind"] == "status"] == ["finished"]


def test_a_replay_keeps_how_the_run_ended(tmp_path: Path) -> None:
    receiver = Receiver()
    receiver.up = False
    first = make(tmp_path, receiver, close_timeout_s=0.05)
    first.log_metrics(1, {"loss": 1.0})
    first.close("failed")
    receiver.up = True
    second = make(tmp_path, receiver, replay_status=True)
    assert second.drain(10)
    second.detach()
    assert [event["kind"] for event in receiver.events] == ["metrics", "status"]
    assert unsent(tmp_path) == 0


def test_a_batch_whose_receipt_was_lost_comes_again_and_counts_once(tmp_path: Path) -> None:
    receiver = Receiver()
    receiver.fail_after_taking = 2
    tracker = make(tmp_path, receiver)
    for step in range(50):
        tracker.log_metrics(step, {"loss": 1.0})
    tracker.close("finished")
    assert receiver.steps() == list(range(50))
    assert receiver.attempts >= 3


def test_an_event_that_is_refused_for_good_is_kept_aside_and_holds_up_nothing(tmp_path: Path) -> None:
    receiver = Receiver()
    receiver.refuse = "poison"
    tracker = make(tmp_path, receiver)
    tracker.log_metrics(1, {"loss": 1.0})
    tracker.set_tag("poison", "x")
    tracker.log_metrics(2, {"loss": 1.0})
    tracker.close("finished")
    assert receiver.steps() == [1, 2]
    kept = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [(row["reason"], row["event"]["key"]) for row in kept] == [("refused", "poison")]


CRASH = """
import sys, time
from pathlib import Path
from perceiver.tracking.tracker import SpoolTracker, SendError
class Down:
    def send(self, events):
        raise SendError("down")
    def close(self): ...
tracker = SpoolTracker(Path(sys.argv[1]), Down())
step = 0
while True:
    tracker.log_metrics(step, {"loss": 1.0})
    print(step, flush=True)
    step += 1
"""


def test_every_event_survives_sigkill_exactly_once(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", CRASH, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    reported = [int(process.stdout.readline()) for _ in range(200)][-1]
    process.send_signal(signal.SIGKILL)
    process.wait()
    with segments(tmp_path)[0].open("ab") as file:
        file.write(b'{"kind":"metrics","st')
    receiver = Receiver()
    tracker = make(tmp_path, receiver)
    tracker.log_metrics(10**6, {"loss": 1.0})
    tracker.close("finished")
    steps = receiver.steps()
    assert steps == [*range(len(steps) - 1), 10**6]
    assert len(steps) - 2 >= reported
    assert segments(tmp_path) == []


def test_a_living_process_keeps_its_segment_to_itself(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", CRASH, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        receiver = Receiver()
        tracker = make(tmp_path, receiver)
        tracker.log_metrics(7, {"loss": 1.0})
        tracker.close("finished")
        assert receiver.steps() == [7]
        assert unsent(tmp_path) >= 1
    finally:
        process.kill()
        process.wait()


def test_numbers_that_are_not_finite_travel_and_the_lines_stay_json(tmp_path: Path) -> None:
    receiver = Receiver()
    receiver.up = False
    tracker = make(tmp_path, receiver, close_timeout_s=0.05)
    tracker.log_metrics(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e-300})
    tracker.close("failed")
    line = segments(tmp_path)[0].read_text().splitlines()[0]
    values = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["values"]
    assert math.isnan(float(values["a"]))
    assert [float(values[key]) for key in "bcd"] == [math.inf, -math.inf, 1e-300]


def test_a_full_disk_stops_nothing_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SpoolWriter(tmp_path)
    writer.append({"n": 0})
    real, full = os.write, True

    def write(fd: int, data: bytes) -> int:
        if not full:
            return real(fd, data)
        real(fd, data[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    writer.append({"n": 1})
    writer.append({"n": 2})
    full = False
    writer.append({"n": 3})
    chunk = SpoolReader(tmp_path, writer).read()
    assert chunk is not None
    assert [event["n"] for event in chunk.events] == [0, 1, 2, 3]
    assert writer.dropped == 0


def test_segments_rotate_and_are_deleted_once_sent(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, segment_bytes=100)
    for number in range(50):
        writer.append({"n": number})
    reader = SpoolReader(tmp_path, writer)
    assert len(segments(tmp_path)) > 3
    seen: list[int] = []
    while (chunk := reader.read()) is not None:
        seen += [event["n"] for event in chunk.events]
        reader.commit(chunk)
    assert seen == list(range(50))
    assert segments(tmp_path) == [writer.segment]


def test_logging_is_cheap_while_the_backend_is_down(tmp_path: Path) -> None:
    receiver = Receiver()
    receiver.up = False
    tracker = make(tmp_path, receiver, close_timeout_s=0.05)
    began = time.process_time()
    for step in range(2000):
        tracker.log_metrics(step, {f"train/metric_{index}": 0.5 for index in range(8)})
    cost = (time.process_time() - began) / 2000
    tracker.detach()
    assert cost < 1e-3


def test_the_null_tracker_takes_everything() -> None:
    tracker = NullTracker()
    tracker.log_metrics(1, {"a": 1.0})
    tracker.log_params({"a": 1})
    tracker.set_tag("a", "b")
    tracker.log_artifact(Path("x"))
    assert tracker.flush(0)
    tracker.close("finished")


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


def test_what_a_tracker_spools_is_redacted(tmp_path: Path) -> None:
    receiver = Receiver()
    tracker = make(tmp_path, receiver)
    tracker.log_params({"db.password": "hunter2", "data.url": "s3://id:hunter2@bucket"})
    tracker.set_tag("token", "hunter2")
    tracker.close("finished")
    assert "hunter2" not in json.dumps(receiver.events)


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
