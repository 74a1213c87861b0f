"""GLUE's files: each task's columns and classes, pairs, numbers, rows that cannot be used, files that are others."""

from pathlib import Path

import pytest

from perceiver.config import UserError
from perceiver.text_ids import joined
from pipelines.features import LabelFeature, TargetFeature, TextFeature
from pipelines.sources.glue import TASKS
from tests.pipelines.raw import write
from tests.pipelines.sources.test_layouts import prepared

HEADERS = {
    "sst2": "sentence\tlabel",
    "mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "stsb": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
    "mnli": "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
    "qnli": "index\tquestion\tsentence\tlabel",
    "rte": "index\tsentence1\tsentence2\tlabel",
}
ROWS = {
    "cola": ["gj04\t1\t\tOur \"friends won't buy it.", "gj04\t0\t*\tThey drank the pub."],
    "sst2": ["a fine film \t1", "dull\t0"],
    "mrpc": ["1\t7\t8\tHe said so .\tSo he said .", "0\t7\t9\tHe said so .\tShe left ."],
    "qqp": ["1\t2\t3\tWho is it?\tWho is that?\t1", "2\t2\t4\tWho is it?\tWhere?\t0"],
    "stsb": ["0\tg\tf\t2012\t1\tn\tn\tA plane.\tA jet.\t4.200", "1\tg\tf\t2012\t2\tn\tn\tA cat.\tA jet.\t0.0"],
    "mnli": [
        "0\t1\t1a\tfiction\tIt rains.\tIt is wet.\tentailment\tentailment",
        "1\t2\t2n\tf\tIt rains.\tIt snows.\tx\tcontradiction",
    ],
    "qnli": ["0\tWho?\tAnn did.\tentailment", "1\tWho?\tIn May.\tnot_entailment"],
    "rte": ["0\tAnn ran.\tAnn moved.\tentailment", "1\tAnn ran.\tBob ran.\tnot_entailment"],
}
WANTED = {
    "cola": [("Our \"friends won't buy it.", 1), ("They drank the pub.", 0)],
    "sst2": [("a fine film", 1), ("dull", 0)],
    "mrpc": [(joined("He said so .", "So he said ."), 1), (joined("He said so .", "She left ."), 0)],
    "qqp": [(joined("Who is it?", "Who is that?"), 1), (joined("Who is it?", "Where?"), 0)],
    "stsb": [(joined("A plane.", "A jet."), [4.2]), (joined("A cat.", "A jet."), [0.0])],
    "mnli": [(joined("It rains.", "It is wet."), 0), (joined("It rains.", "It snows."), 2)],
    "qnli": [(joined("Who?", "Ann did."), 0), (joined("Who?", "In May."), 1)],
    "rte": [(joined("Ann ran.", "Ann moved."), 0), (joined("Ann ran.", "Bob ran."), 1)],
}


def write_task(root: Path, name: str, *more: str, ending: str = "\n") -> None:
    """Write a task's files, all with the same rows."""
    lines = [*([HEADERS[name]] if name in HEADERS else []), *ROWS[name], *more]
    content = "".join(line + ending for line in lines).encode()
    write(root, {f"{TASKS[name].folder}/{file}": content for file in TASKS[name].files.values()})


@pytest.mark.parametrize("name", TASKS)
def test_each_task_is_read(tmp_path: Path, name: str) -> None:
    write_task(tmp_path / "src", name)
    found = prepared(tmp_path, "glue", task=name)
    number = name == "stsb"
    assert found.manifest.name == f"glue_{name}" and not found.rejected
    assert found.samples == {"train": 2, "test": 2} | ({"mismatched": 2} if name == "mnli" else {})
    rows = [(row["text"], row["target" if number else "label"]) for row in found.rows["test"].values()]
    assert sorted(rows) == sorted(WANTED[name])
    second = found.manifest.features["target" if number else "label"]
    assert found.manifest.features["text"] == TextFeature()
    assert isinstance(second, TargetFeature if number else LabelFeature)


def test_small_shards_have_each_row_once(tmp_path: Path) -> None:
    """Ranges of bytes, which begin within rows; lines that end as on Windows."""
    more = [f"{n}\tAnn ran {n} miles.\tAnn moved.\tentailment" for n in range(2, 40)]
    write_task(tmp_path / "src", "rte", *more, ending="\r\n")
    found = prepared(tmp_path, "glue", task="rte")
    assert found.samples == {"train": 40, "test": 40}
    assert len({row["text"] for row in found.rows["train"].values()}) == 40


def test_rows_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    write_task(tmp_path / "src", "rte", "2\tAnn ran.\tBob.", "3\tAnn ran.\t \tentailment", "4\ta\tb\tneutral")
    found = prepared(tmp_path, "glue", bad=0.7, task="rte")
    assert sorted(found.rejected.values()) == sorted(
        ["3 columns, wanted 4", "an empty sentence", "an unknown label"] * 2
    )


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"RTE/train.tsv": b"x"}, {}, "needs --option task=TASK: wanted one of cola, sst2"),
        ({"RTE/train.tsv": b"x"}, {"task": "wnli"}, "option task=wnli: wanted one of cola"),
        ({"RTE/train.tsv": b"x"}, {"task": "cola"}, "CoLA/train.tsv does not exist"),
        ({"RTE/train.tsv": b"a\tb\n"}, {"task": "rte"}, "train.tsv has no column sentence1, sentence2, label; it has"),
        ({"RTE/train.tsv": "index\tsentence1".encode("utf-16")}, {"task": "rte"}, "UTF-16, wanted UTF-8"),
        ({"RTE/train.tsv": b"x"}, {"held_out": "0.1"}, "unknown option 'held_out'"),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, files: dict[str, bytes], options: dict[str, str], message: str
) -> None:
    write(tmp_path / "src", files)
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, "glue", **options)
