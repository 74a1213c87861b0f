"""The report: correct numbers, a self-contained page, and unusual data of each kind."""

import io
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from perceiver.report.attention import AttentionMaps, choose_latents, flat_map
from perceiver.report.figures import attention_map, learning_curves, picture, score_map, series, smooth
from perceiver.report.page import CardPart
from perceiver.report.run import (
    ReportData,
    average_precision,
    choose_examples,
    class_table,
    confused_pairs,
    confusion,
    multilabel_table,
    run_report,
)
from tests.perceiver.report.pages import Page


def headings(found: Page) -> list[str]:
    return [word for tag, word in found.texts if tag == "h2"]


def history(steps: int = 200) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        rows.append({"step": step, "train/loss": 2 / step, "train/lr": 1e-3, "train/samples_per_s": 300.0})
        if step % 20 == 0:
            rows.append({"step": step, "eval/loss": 2.5 / step, "eval/accuracy": 1 - 1 / step})
    return rows


def full(samples: int = 200, classes: int = 10, wrong: float = 0.1, seed: int = 0) -> ReportData:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, samples)
    predictions = np.where(generator.random(samples) < wrong, generator.integers(0, classes, samples), labels)
    logits = generator.random((samples, classes))
    logits[np.arange(samples), predictions] += 1
    ids = np.arange(samples) + 1000
    return ReportData(
        name="a run",
        history=history(),
        class_names=[f"class {index}" for index in range(classes)],
        sample_ids=ids,
        labels=labels,
        predictions=predictions,
        probabilities=logits / logits.sum(axis=1, keepdims=True),
        images={int(i): generator.integers(0, 255, (28, 28, 1)).astype(np.uint8) for i in ids},
        attention=attention({"image": (28, 28)}),
        recipe={"optim": {"lr": 1e-3}, "data": {"password": "hunter2", "url": "s3://id:hunter2@bucket"}},
        facts={"steps": 1200, "machine": "2 cores"},
        commands={"Open": "mlflow ui --backend-store-uri postgresql://u:hunter2@db/x"},
        checkpoints=[{"step": 100, "path": "a/b"}, {"step": 200, "path": "a/c", "best": True}],
    )


def attention(grids: dict[str, tuple[int, ...]]) -> AttentionMaps:
    """Return maps of two samples, two cross-attends and 16 latents."""
    generator = np.random.default_rng(0)
    weights = {name: generator.random((2, 2, 16, *grid)) for name, grid in grids.items()}
    return AttentionMaps([1000, 1001], [1, 8], {name: each - 0.5 for name, each in weights.items()}, weights)


def page(data: ReportData) -> Page:
    return Page(run_report(data)["index.html"].decode())


def test_a_full_report_is_self_contained_and_has_every_section() -> None:
    data = full()
    files = run_report(data)
    html = files["index.html"].decode()
    found = Page(html)
    assert len(headings(found)) == 8
    assert found.fetched() == [] and found.count("script") + found.count("link") + found.count("iframe") == 0
    assert "hunter2" not in html
    assert not re.search(r"""url\((?!#)|@import""", html)
    accuracy = float(np.mean(np.asarray(data.labels) == np.asarray(data.predictions)))
    assert f"{100 * accuracy:.1f} %" in found.words
    names = {name.removeprefix("figures/") for name in files if name.startswith("figures/")}
    assert {"loss.png", "accuracy.png", "learning-rate.png", "throughput.png", "confusion.png", "wrong.png"} <= names
    assert {"right.png", "calibration.png", "attention-1000.png", "attention-1001.png"} <= names
    for name in names:
        Image.open(io.BytesIO(files[f"figures/{name}"])).verify()
    assert len(files["per_class.csv"].decode().splitlines()) == 11


def test_examples_are_named_by_their_keys_and_may_be_of_any_kind() -> None:
    data = full(60)
    keys = {int(number): f"train/cats/{number}.png" for number in np.asarray(data.sample_ids)}
    found = page(replace(data, keys=keys))
    shown = [word for tag, word in found.texts if tag == "bdi"]
    assert shown and set(shown) <= set(keys.values()) and not [word for word in found.words if word.startswith("#")]
    assert {row["title"].split()[-1] for row in found.all("small") if row.get("class") == "key"} <= set(keys.values())

    parts = {number: [CardPart("text", "<b>a text</b>", "8 characters")] for number in keys}
    found = page(replace(data, images={}, attention=None, keys=keys, parts=parts, card_width=320))
    assert "<b>a text</b>" in found.words and found.count("script") == 0
    assert [row for row in found.all("div") if row.get("style") == "--card:320px"]
    sound = [CardPart("strip", "data:image/png;base64,"), CardPart("audio", "data:audio/flac;base64,")]
    found = page(replace(data, images={}, attention=None, parts=dict.fromkeys(keys, sound)))
    assert found.count("audio") and found.fetched() == []
    cloud = [CardPart("points", "AAAA")]
    assert page(replace(data, images={}, attention=None, parts=dict.fromkeys(keys, cloud))).count("script") == 1


@pytest.mark.parametrize(
    ("classes", "names", "wide", "tall"),
    [(8, "a long name", False, 8), (12, "a long name", True, 12), (10, "", True, 0)],
)
def test_a_confusion_matrix_of_many_classes_has_the_width_of_the_page(
    classes: int, names: str, wide: bool, tall: int
) -> None:
    """With 25 classes, the most of a table, rows of 34 pixels and a name of 9 em fit into 1,080."""
    found = page(replace(full(300, classes), class_names=[f"{names}{index}" for index in range(classes)]))
    assert bool([row for row in found.all("div") if row.get("style") == "--column:100%"]) == wide
    assert sum(row.get("class") == "tall" for row in found.all("th")) == tall


def test_only_a_name_and_a_history_are_needed() -> None:
    found = page(ReportData(name="bare", history=history(3)))
    assert headings(found) == ["Learning curves"]
    assert headings(page(ReportData(name="empty", history=[]))) == []


@pytest.mark.parametrize("missing", ["images", "attention", "probabilities", "sample_ids", "recipe", "facts"])
def test_every_part_may_be_missing(missing: str) -> None:
    empty: Any = {} if missing in ("images", "recipe", "facts") else None
    found = page(replace(full(60), history=[], **{missing: empty}))
    assert "Classes" in headings(found)


def test_values_that_are_not_finite_are_left_out_and_reported() -> None:
    rows = [{"step": step, "train/loss": math.nan if step % 3 else 1 / step} for step in range(1, 100)]
    rows += [{"step": 100, "train/loss": math.inf, "train/lr": math.nan}]
    found = page(ReportData(name="nan", history=rows))
    assert "67 of the recorded values are not finite and are left out." in found.words
    assert found.count("svg") == 1
    steps, values = series(rows, "train/loss")
    assert len(steps) == 100 and int(np.isfinite(values).sum()) == 33


def test_an_infinite_recorded_as_text_or_none_does_not_stop_the_report() -> None:
    rows = [{"step": 1, "train/loss": "inf"}, {"step": 2, "train/loss": None}, {"train/loss": 1.0}]
    assert learning_curves(rows) == []


def test_names_are_escaped() -> None:
    evil = "<script>alert(1)</script>"
    data = replace(full(50, 3), name=evil, class_names=[evil, 'a"b', "$x^2_{$"], facts={evil: evil})
    data = replace(data, recipe={evil: evil}, commands={evil: evil}, checkpoints=[{evil: evil}], headline=(evil, evil))
    found = page(data)
    assert found.count("script") == 0
    assert evil in found.words


def test_no_wrong_prediction() -> None:
    files = run_report(replace(full(50, wrong=0.0), history=[]))
    found = Page(files["index.html"].decode())
    assert "No wrong prediction among 50 samples." in found.words
    assert "100.0 %" in found.words
    assert "figures/wrong.png" not in files


def test_one_class_and_one_sample() -> None:
    assert "100.0 %" in page(full(1, 1)).words


def test_a_thousand_classes_fit() -> None:
    data = replace(full(5000, 1000), attention=None, history=[])
    files = run_report(data)
    found = Page(files["index.html"].decode())
    assert len(files["index.html"]) < 3e6
    assert found.count("td") < 1000
    assert any(word.startswith("The 20 classes with the lowest recall of 1,000") for word in found.words)
    assert len(files["per_class.csv"].decode().splitlines()) == 1001


def test_other_tasks_degrade() -> None:
    generator = np.random.default_rng(0)
    labels = (generator.random((100, 4)) < 0.3).astype(np.float32)
    tags = ReportData("tags", history(), task="multilabel", labels=labels, probabilities=generator.random((100, 4)))
    found = page(tags)
    assert headings(found) == ["Learning curves", "Classes"]
    assert "average precision" in found.words
    regression = ReportData("flow", history(), task="regression", labels=generator.random(100))
    assert headings(page(regression)) == ["Learning curves"]


def test_large_colour_images_and_coarse_maps() -> None:
    generator = np.random.default_rng(0)
    images = {1000 + i: generator.integers(0, 255, (500, 375, 3)).astype(np.uint8) for i in range(20)}
    data = replace(full(20), history=[], images=images, attention=attention({"image": (14, 14)}))
    assert page(data).count("img") > 16
    assert attention_map(np.ones((14, 14)), picture(images[1000])).size == (75, 100)
    assert np.max(attention_map(np.full((2, 2), np.nan))) < 10


def test_attention_to_video_and_sound_has_a_row_for_scores_and_weights_of_each() -> None:
    maps = attention({"audio": (40, 16), "video": (8, 6, 4), "wave": (30,)})
    maps.scores["audio"][0, 0, :, 20:] = np.nan
    strips = dict.fromkeys(maps.samples, [CardPart("strip", "data:image/png;base64,"), CardPart("text", "words")])
    data = replace(full(60), history=[], images={}, parts=strips, attention=maps)
    found = page(data)
    rows = [word for tag, word in found.texts if tag == "th" and word.startswith("cross-attend")]
    parts = ("audio", "video", "wave")
    assert rows == 2 * [f"cross-attend {n}, {p}: {k}" for n in (1, 8) for p in parts for k in ("scores", "weights")]
    assert len([image for image in found.all("img") if image["alt"] == "attention map"]) == 2 * 12 * 7
    frames = np.asarray(score_map(flat_map(np.arange(8 * 6 * 4.0).reshape(8, 6, 4))))
    assert frames.shape == (6 * 2 + 1, 4 * 2 + 1, 3) and not frames[6].any() and not frames[:, 4].any()
    assert frames[0, 0].tolist() != frames[-1, -1].tolist()


def test_the_report_is_the_same_twice() -> None:
    assert run_report(full()) == run_report(full())


def test_confusion_and_class_table_by_hand() -> None:
    labels, predictions = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    matrix = confusion(labels, predictions, 3)
    assert matrix.tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    rows = class_table(matrix, ["a", "b", "c"])
    assert rows[1] == {"name": "b", "precision": 2 / 3, "recall": 2 / 3, "F1": 2 / 3, "count": 3}
    assert rows[2] == {"name": "c", "precision": None, "recall": None, "F1": None, "count": 0}
    pairs = confused_pairs(matrix, ["a", "b", "c"])
    assert [(pair["label"], pair["prediction"], pair["count"]) for pair in pairs] == [("a", "b", 1), ("b", "a", 1)]


def test_average_precision_by_hand() -> None:
    truth, score = np.array([True, False, True, False]), np.array([0.9, 0.8, 0.7, 0.1])
    assert average_precision(truth, score) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.array([False]), np.array([0.5])) is None
    assert average_precision(np.array([True, False, True, False]), np.full(4, 0.5)) == pytest.approx(0.5), "ties"
    row = multilabel_table(truth[:, None].astype(np.float32), score[:, None], ["x"])[0]
    assert (row["precision"], row["recall"], row["count"]) == (pytest.approx(2 / 3), 1.0, 2)


@given(st.integers(1, 60), st.integers(1, 6), st.integers(0, 10))
def test_examples_are_the_surest_mistakes_and_right_ones_of_all_classes(samples: int, classes: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels, predictions = generator.integers(0, classes, samples), generator.integers(0, classes, samples)
    confidence = generator.random(samples)
    wrong, right = choose_examples(labels, predictions, confidence, wrong=5, right=classes)
    assert (labels[wrong] != predictions[wrong]).all() and (labels[right] == predictions[right]).all()
    assert (np.diff(confidence[wrong]) <= 0).all()
    left_out = np.setdiff1d(np.flatnonzero(labels != predictions), wrong)
    assert len(wrong) == 5 or len(left_out) == 0
    assert len(left_out) == 0 or confidence[left_out].max() <= confidence[wrong].min()
    assert set(labels[right]) == set(labels[labels == predictions])


def test_latents_that_differ_are_chosen() -> None:
    weights = np.full((1, 1, 6, 16), 0.01)
    weights[0, 0, 2, 0] = 1
    weights[0, 0, 5, 15] = 1
    assert set(choose_latents(weights, 3)) >= {2, 5}
    assert choose_latents(weights, 99) == list(range(6))


def test_smoothing_keeps_a_line_and_skips_gaps() -> None:
    assert smooth(np.full(90, 2.0)) == pytest.approx(np.full(90, 2.0))
    gap = np.full(90, 2.0)
    gap[40:42] = np.nan
    assert smooth(gap) == pytest.approx(np.full(90, 2.0))


def test_a_large_map_is_averaged_over_blocks() -> None:
    """Two of four weights of each block are 1, so that the map is as even as that of one block."""
    weights = np.tile([[0.0, 1.0], [1.0, 0.0]], (112, 112))
    shown = np.asarray(attention_map(weights))
    assert shown.shape == (112, 112, 3) and len(np.unique(shown.reshape(-1, 3), axis=0)) == 1
