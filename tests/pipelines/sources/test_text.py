"""Plain text: every document once whatever the ranges, pieces of complete characters, no document in both splits."""

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from perceiver.config import UserError
from pipelines.inspect.inspection import inspect
from pipelines.prepare import PrepareConfig, prepare
from pipelines.sources.text import documents
from tests.pipelines.raw import write
from tests.pipelines.test_prepare import rows_of

WORDS = ["one", "zwei", "три", "τέσσερα", "خمسة"]
LINES = st.lists(st.sampled_from([b"", b"a", b"bc def", "é ü".encode(), b"x" * 40]), max_size=30)


def config(**options: str) -> PrepareConfig:
    """Return the config: in this process, small shards, any share of bad texts."""
    return PrepareConfig(parallel="off", shard_rows=4, max_bad_fraction=1, options=options)


@given(
    lines=LINES,
    cuts=st.lists(st.integers(0, 400), max_size=6),
    ending=st.sampled_from([b"\n", b"\r\n"]),
    last=st.booleans(),
)
@example(lines=[b"", b"a"], cuts=[1], ending=b"\r\n", last=False)
@settings(max_examples=200, deadline=None)
def test_ranges_give_each_document_once(lines: list[bytes], cuts: list[int], ending: bytes, last: bool) -> None:
    raw = ending.join(lines) + (ending if last else b"")
    places = sorted({0, len(raw), *(cut for cut in cuts if cut < len(raw))})
    for by in ("line", "blank"):
        found = [
            text
            for start, stop in zip(places, places[1:], strict=False)
            for _, text in documents(io.BytesIO(raw), start, stop, by)
        ]
        blocks = raw.replace(b"\r\n", b"\n").split(b"\n" if by == "line" else b"\n\n")
        wanted = [block.strip(b"\n") for block in blocks if block.strip(b"\n")]
        assert [text.replace(b"\r\n", b"\n").strip(b"\n") for text in found] == wanted


def test_documents_are_joined_and_cut_between_words(tmp_path: Path) -> None:
    long = " ".join(WORDS[i % 5] + str(i) for i in range(300))
    src = write(
        tmp_path / "src",
        {"train.txt": f"first document\nof two lines\n\nsecond\n\n\n{long}\n".encode(), "test.txt": b"held out"},
    )
    manifest = prepare("text", str(src), str(tmp_path / "out"), config(length="100", join="2"))
    assert manifest.classes == () and set(manifest.features) == {"text"}
    texts = [row["text"] for row in rows_of(tmp_path / "out", manifest, "train")]
    assert texts[0] == "first document\nof two lines\nsecond"
    assert all(len(text.encode()) <= 100 for text in texts) and " ".join(texts[1:]) == long
    assert [row["text"] for row in rows_of(tmp_path / "out", manifest, "test")] == ["held out"]
    assert inspect(str(tmp_path / "out"), verify=True).sound


def test_a_word_longer_than_a_piece_is_cut_between_characters(tmp_path: Path) -> None:
    src = write(tmp_path / "src", {"train.txt": ("ж" * 101).encode(), "test.txt": b"x"})
    manifest = prepare("text", str(src), str(tmp_path / "out"), config(length="9"))
    texts = [row["text"] for row in rows_of(tmp_path / "out", manifest, "train")]
    assert "".join(texts) == "ж" * 101 and max(len(text.encode()) for text in texts) == 8


def test_json_lines_are_held_out_by_content_and_bad_ones_named(tmp_path: Path) -> None:
    lines = [json.dumps({"body": f"text number {i % 60} of a few", "url": i}).encode() for i in range(120)]
    lines[3:3] = [b"no json", b'{"other": 1}', b'{"body": 7}', b'{"body": "\xff"}', b"[" * 5000]
    src = write(tmp_path / "src", {"a.jsonl": b"\n".join(lines)})
    manifest = prepare("text", str(src), str(tmp_path / "out"), config(column="body", held_out="0.3"))
    texts = {split: [row["text"] for row in rows_of(tmp_path / "out", manifest, split)] for split in manifest.splits}
    assert sorted(texts["train"] + texts["test"]) == sorted(json.loads(line)["body"] for line in lines[:3] + lines[8:])
    assert not set(texts["train"]) & set(texts["test"]) and 8 <= len(set(texts["test"])) <= 28
    problems = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert manifest.rejected == 5
    assert sorted(row["reason"] for row in problems) == sorted(
        ["no JSON object with 'body'"] * 3 + ["'body' is not a string", "invalid UTF-8: invalid start byte"]
    )
    assert all(row["key"].startswith("a.jsonl@") for row in problems)


def test_whole_files_can_be_documents(tmp_path: Path) -> None:
    src = write(tmp_path / "src", {f"train/{i}.txt": f"a\n\nb {i}".encode() for i in range(6)} | {"test/0.txt": b"c"})
    manifest = prepare("text", str(src), str(tmp_path / "out"), config(document="file"))
    assert sorted(row["text"] for row in rows_of(tmp_path / "out", manifest, "train")) == [
        f"a\n\nb {i}" for i in range(6)
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"length": "x"}, "option length=x: wanted a whole number of at least 8"),
        ({"document": "page"}, "option document=page: wanted one of blank, line, file"),
        ({"held_out": "1"}, "option held_out=1: wanted a share"),
    ],
)
def test_wrong_options_are_one_line(tmp_path: Path, options: dict[str, str], message: str) -> None:
    src = write(tmp_path / "src", {"a.txt": b"text"})
    with pytest.raises(UserError, match=message):
        prepare("text", str(src), str(tmp_path / "out"), config(**options))
