"""The page of samples: complete, self-contained, escaped; the pictures, points and texts are those that are stored."""

import base64
import errno
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from PIL import Image

from perceiver.cli.inspect import command
from perceiver.config import UserError
from perceiver.storage import open_folder
from pipelines.features import (
    AudioFeature,
    Feature,
    LabelFeature,
    MediaFeature,
    PointsFeature,
    SeriesFeature,
    TextFeature,
    VideoFeature,
)
from pipelines.inspect.inspection import describe, inspect
from pipelines.inspect.page import spread_places, write_page
from pipelines.inspect.samples import flow_colours
from pipelines.shards.arrow import ShardWriter
from pipelines.shards.manifest import Manifest, Split, arrow_schema, save_manifest
from pipelines.shards.quarantine import Problem, write_problems
from tests.perceiver.report.pages import Page
from tests.pipelines.recordings import media_file, ramp, real_video, sound_file, tone
from tests.pipelines.toys import numbered_image, write_images


def page_of(folder: Path, samples: int = 24) -> tuple[str, Page]:
    path = write_page(inspect(str(folder)), folder / "pages" / "page.html", samples=samples)
    text = path.read_text()
    return text, Page(text)


def write_samples(
    folder: Path, features: dict[str, Feature], rows: list[dict[str, Any]], classes: tuple[str, ...] = ("a", "b")
) -> None:
    """Write a prepared data set of one shard with these rows."""
    with ShardWriter(open_folder(str(folder)), "train.arrow", arrow_schema(features), 2) as writer:
        writer.write(rows)
        info = writer.close()
    assert info is not None
    save_manifest(
        Manifest(
            name="made",
            features=features,
            classes=classes,
            splits={"train": Split(shards=(info,))},
            licence="none",
            source="made up",
        ),
        open_folder(str(folder)),
    )


def test_places_are_spread_and_all_different() -> None:
    assert spread_places(3, 24) == [0, 1, 2]
    assert spread_places(100, 4) == [12, 37, 62, 87]
    assert len(set(spread_places(1_281_167, 1000))) == 1000


def test_pictures_are_the_stored_ones_and_damage_is_reported(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": [13, 7], "test": [3]}, bad=(15,), apart=True)
    text, page = page_of(tmp_path, samples=20)
    pictures = page.all("img")
    assert len(pictures) == 19 + 3
    raw = base64.b64decode(pictures[14]["src"].removeprefix("data:image/png;base64,"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(raw))), numbered_image(14))
    assert sum("damaged" in attrs.get("class", "").split() for attrs in page.all("figure")) == 1
    assert "1 samples that cannot be used" in page.text and "cannot identify image file" in page.text


def test_nothing_is_fetched(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": [5]})
    text, page = page_of(tmp_path)
    assert page.fetched() == []
    assert not re.search(r"url\(|@import|https?://|import\(|fetch\(", text)


def test_texts_are_escaped(tmp_path: Path) -> None:
    harm = "<script>alert(1)</script>"
    write_samples(
        tmp_path,
        {"text": TextFeature(), "label": LabelFeature()},
        [{"key": f'"><img src={harm}', "text": harm * 60, "label": 0}, {"key": "b", "text": "", "label": 1}],
        classes=(f"{harm}x", "b"),
    )
    text, page = page_of(tmp_path)
    assert len(page.all("script")) == 1 and harm not in text
    assert f"{harm}x" in page.text and f"{harm * 60}"[:600] + "…" in page.text
    assert "empty text" in page.text


def test_points_are_drawn_from_all_over_the_cloud(tmp_path: Path) -> None:
    cloud = np.random.default_rng(0).normal(size=(5000, 3)).astype("<f4")
    write_samples(
        tmp_path,
        {"points": PointsFeature(), "label": LabelFeature()},
        [{"key": "a", "points": cloud.tobytes(), "label": 0}],
    )
    _, page = page_of(tmp_path)
    (canvas,) = page.all("canvas")
    drawn = np.frombuffer(base64.b64decode(canvas["data-points"]), np.int8).reshape(-1, 3)
    assert drawn.shape == (2048, 3) and np.abs(drawn).max() == 127
    wanted = cloud[np.linspace(0, 4999, 2048).astype(int)]
    assert np.corrcoef(drawn[:, 0], wanted[:, 0])[0, 1] > 0.999
    assert "5,000 points" in page.text


def test_series_are_drawn_and_measured(tmp_path: Path) -> None:
    series = [np.arange(12, dtype="<f4").reshape(-1, 2), np.ones((1, 2), "<f4")]
    write_samples(
        tmp_path,
        {"series": SeriesFeature(channels=2), "label": LabelFeature()},
        [{"key": str(i), "series": steps.tobytes(), "label": i} for i, steps in enumerate(series)],
        classes=("a", "b"),
    )
    _, page = page_of(tmp_path)
    assert "6 × 2: 0, 1, 2, 3, 4, 5, 6, 7, …" in page.text and "1 × 2: 1, 1" in page.text
    assert any("largest: 1 to 11" in line for line in describe(inspect(str(tmp_path))))


def test_raw_items_that_were_left_out_are_listed(tmp_path: Path) -> None:
    manifest = write_images(tmp_path, {"train": [2]})
    write_problems(open_folder(str(tmp_path)), [Problem("train", -1, "raw/<b>.png", "0 bytes")])
    save_manifest(manifest.model_copy(update={"rejected": 1}), open_folder(str(tmp_path)))
    _, page = page_of(tmp_path)
    assert "train: raw/<b>.png: 0 bytes" in page.text
    assert "  1 raw items were left out:" in describe(inspect(str(tmp_path)))


def test_many_classes_are_an_outline(tmp_path: Path) -> None:
    rows = [{"key": str(i), "text": "x" * (i + 1), "label": min(i, 60)} for i in range(70)]
    write_samples(tmp_path, {"text": TextFeature(), "label": LabelFeature()}, rows, tuple(f"c{i}" for i in range(61)))
    _, page = page_of(tmp_path)
    bars = [attrs for attrs in page.all("i") if "height" in attrs.get("style", "")]
    assert len(bars) >= 61 and "Most: c60 10" in page.text


def test_a_faulty_file_does_not_hide_the_others(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": [4, 4]})
    (tmp_path / "train-0.arrow").unlink()
    _, page = page_of(tmp_path)
    assert len(page.all("img")) == 4 and "train-0.arrow: missing" in page.text


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": [9]})
    done = CliRunner().invoke(command, [str(tmp_path), "--html", str(tmp_path / "x.html"), "--show", "3"])
    assert done.exception is None and f"page {tmp_path / 'x.html'}" in done.output
    assert len(Page((tmp_path / "x.html").read_text()).all("img")) == 3


def test_a_page_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, {"train": [2]})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):  # not the user's mistake
        patched.setattr("pipelines.inspect.page.write_whole", full)
        write_page(inspect(str(tmp_path)), tmp_path / "page.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"page\.html.*--html"):
        write_page(inspect(str(tmp_path)), tmp_path / "file" / "page.html")


def picture_of(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")).astype(int)


def test_sound_is_seen_and_heard(tmp_path: Path) -> None:
    """A tone of 2 kHz at 16 kHz is at a quarter of the spectrogram's height; the player has its samples."""
    samples = tone(2000, 6.0, 16_000)
    write_samples(
        tmp_path,
        {"audio": AudioFeature(), "label": LabelFeature()},
        [{"key": "a", "audio": sound_file(samples, 16_000), "label": 0}],
    )
    _, page = page_of(tmp_path)
    ((image,), (player,)) = page.all("img"), page.all("audio")
    light = picture_of(image["src"]).sum(axis=(1, 2))
    assert 1 - light.argmax() / len(light) == pytest.approx(0.25, abs=0.03)
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(player["src"].removeprefix("data:audio/flac;base64,"))))
    assert rate == 16_000 and np.abs(heard - samples[: len(heard)]).max() < 1e-3
    assert "6 s at 16 kHz, 1 channel, the first 5 s here" in page.text
    assert inspect(str(tmp_path)).splits["train"].sizes["audio seconds"].most == pytest.approx(6.0)


def test_silence_and_shortest_sounds_are_drawn(tmp_path: Path) -> None:
    rows = [{"key": str(n), "audio": sound_file(np.zeros(n, np.float32), 8000), "label": 0} for n in (1, 8000)]
    write_samples(tmp_path, {"audio": AudioFeature(), "label": LabelFeature()}, rows)
    assert len(page_of(tmp_path)[1].all("audio")) == 2


def test_a_video_with_sound_is_shown_as_frames_in_order_and_heard(tmp_path: Path) -> None:
    film = media_file([100 * i for i in range(10)], [20 * i for i in range(10)], sound=ramp(1.0, 16_000))
    write_samples(
        tmp_path,
        {"media": MediaFeature(channels=1), "label": LabelFeature()},
        [{"key": "a", "media": film, "label": 0}],
    )
    _, page = page_of(tmp_path)
    frames, _ = (picture_of(image["src"]) for image in page.all("img"))
    greys = [int(frames[16, column, 0]) for column in range(16, frames.shape[1], 36)]
    assert len(greys) == 6 and greys == sorted(greys) and greys[0] < 40 and greys[-1] > 140
    assert len(page.all("audio")) == 1 and page.all("video") == []  # no browser plays this codec


def test_a_small_video_that_browsers_know_can_be_played(tmp_path: Path) -> None:
    film = real_video()
    write_samples(
        tmp_path, {"video": VideoFeature(), "label": LabelFeature()}, [{"key": "a", "video": film, "label": 0}]
    )
    _, page = page_of(tmp_path)
    played = [video["src"] for video in page.all("video")]
    assert played == ([f"data:video/mp4;base64,{base64.b64encode(film).decode()}"] if len(film) <= 1_000_000 else [])
    assert len(page.all("img")) == 1


def test_flow_has_the_usual_colours() -> None:
    flow = np.zeros((2, 2, 3), np.float32)
    flow[:, 0, 0], flow[:, 0, 1], flow[:, 1, 0], flow[:, 1, 1] = (4, 0), (-4, 0), (0, -4), (0, 4)
    flow[:, 1, 2] = np.inf
    valid = np.ones((2, 3), bool)
    colours = np.asarray(flow_colours(flow, valid)).astype(int)
    assert colours[0, 0].tolist() == [255, 0, 0] and colours[0, 2].tolist() == [255, 255, 255]  # right: red
    assert colours[0, 1, 0] == 0 and colours[0, 1, 2] == 255 and colours[0, 1, 1] > 150  # left: between cyan and blue
    assert colours[1, 0, 2] == 255 and colours[1, 0, 1] == 0  # up: between blue and magenta
    assert colours[1, 1, 0] == 255 and colours[1, 1, 1] > 200 and colours[1, 1, 2] == 0  # down: yellow
    assert colours[1, 2].tolist() == [127, 127, 127]  # unknown
    valid[0, 0] = False
    assert np.asarray(flow_colours(flow, valid))[0, 0].tolist() == [127, 127, 127]
    half = np.asarray(flow_colours(flow, longest=8)).astype(int)
    assert half[0, 0].tolist() == [255, 127, 127]
