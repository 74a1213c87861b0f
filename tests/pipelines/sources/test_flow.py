"""Optical flow: files of the public data sets are read to the last bit, views keep frames and flow together."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perceiver.config import UserError
from perceiver.factory import build_model, model_config
from perceiver.tasks.optical_flow import FlowConfig
from pipelines.features.base import ViewConfig
from pipelines.features.flow import FlowFeature
from pipelines.feed.ingest import DataConfig, EvalShare, TrainShare, eval_batches, train_batches
from pipelines.prepare import PrepareConfig, prepare
from pipelines.shards.manifest import Manifest, load_manifest
from pipelines.sources import moving_photos
from pipelines.transforms import BadSample
from pipelines.transforms.optical_flow import FlowViewConfig, Pair, pack, read_flo, read_kitti, training_view
from tests.pipelines.raw import flo, kitti, png16, write
from tests.pipelines.test_prepare import rows_of
from tests.pipelines.toys import png

RNG = np.random.default_rng(0)
MOTION = (3, -2)
"""Pixels right and down that the toy scenes move by."""


def scene(height: int = 40, width: int = 56) -> tuple[bytes, bytes, np.ndarray]:
    """Return two frames of noise that moved by `MOTION`, and the flow (H, W, 2)."""
    big = RNG.integers(0, 256, (height + 8, width + 8, 3), dtype=np.uint8)
    first, second = big[4:-4, 4:-4], big[4 - MOTION[1] : 4 - MOTION[1] + height, 4 - MOTION[0] : 4 - MOTION[0] + width]
    return png(first), png(second), np.broadcast_to(np.array(MOTION, np.float32), (height, width, 2))


def chairs(count: int) -> dict[str, bytes]:
    """Write the files of that many pairs as FlyingChairs names them."""
    files: dict[str, bytes] = {}
    for i in range(count):
        first, second, flow = scene()
        pair = {"img1.png": first, "img2.png": second, "flow.flo": flo(flow)}
        files |= {f"data/{i:05d}_{name}": content for name, content in pair.items()}
    return files


def prepared(src: Path, out: Path, **options: str) -> Manifest:
    """Prepare in this process."""
    return prepare("flow", str(src), str(out), PrepareConfig(parallel="off", options=options))


def keys(out: Path, manifest: Manifest) -> dict[str, list[str]]:
    """Return the samples of each split."""
    return {split: sorted(row["key"] for row in rows_of(out, manifest, split)) for split in manifest.splits}


def test_flow_files_are_read_as_they_were_written() -> None:
    field = RNG.normal(scale=20, size=(7, 11, 2)).astype(np.float32)
    field[2, 3], field[4, 5, 0] = 1e10, np.nan
    flow, valid = read_flo(flo(field), 1000)
    assert not valid[2, 3] and not valid[4, 5] and valid.sum() == 75
    assert np.array_equal(flow[:, valid], field.transpose(2, 0, 1)[:, valid])
    known = RNG.random((7, 11)) < 0.5
    field = np.round(RNG.uniform(-400, 400, (7, 11, 2)) * 64) / 64
    flow, valid = read_kitti(kitti(field, known), 1000)
    assert np.array_equal(valid, known) and np.array_equal(flow[:, valid], field.transpose(2, 0, 1)[:, valid])


@pytest.mark.parametrize(
    "flow, kind, reason",
    [
        (b"", "flo", "not a .flo file"),
        (flo(np.zeros((4, 4, 2)))[:-9], "flo", "truncated .flo"),
        (
            flo(np.zeros((1, 1, 2))).replace(b"\1\0\0\0\1\0\0\0", b"\0\0\1\0\0\0\1\0"),
            "flo",
            "65536x65536: wanted up to",
        ),
        (flo(np.zeros((3, 4, 2))), "flo", "different sizes: 56x40, 56x40, 4x3"),
        (png(np.zeros((40, 56, 3), np.uint8)), "png", "16-bit RGB"),
        (kitti(np.zeros((40, 56, 2)), np.ones((40, 56)))[:80], "png", "damaged|different sizes"),
        (png16(np.zeros((1, 1, 3))).replace(b"\0\0\0\1\0\0\0\1", b"\0\1\0\0\0\1\0\0"), "png", "65536x65536: wanted"),
    ],
)
def test_bad_flows_are_named(flow: bytes, kind: str, reason: str) -> None:
    first, second, _ = scene()
    with pytest.raises(BadSample, match=reason):
        FlowFeature().decode(pack([first, second, flow], kind), ViewConfig(), 0)
    with pytest.raises(BadSample, match="not two frames and a flow"):
        FlowFeature().decode(first, ViewConfig(), 0)


@pytest.mark.parametrize(
    "config, sparse",
    [
        ({}, False),
        ({"flip": True}, False),
        ({"scale": [2, 2]}, True),
        ({"scale": [2, 2], "flip": True}, False),
    ],
)
def test_frames_and_flow_stay_together(config: dict, sparse: bool) -> None:
    """For any crop: the second frame at pixel + flow is the first frame at the pixel."""
    first, second, field = scene()
    valid = np.ones((40, 56), bool)
    valid[::7] = not sparse
    images = [np.asarray(Image.open(io.BytesIO(part)).resize((56, 40))) for part in (first, second)]
    pair = Pair(images[0], images[1], field.transpose(2, 0, 1).copy(), valid)
    for seed in range(8):
        frames, flow, known = training_view(
            pair, (24, 32), FlowViewConfig.model_validate(config), np.random.default_rng(seed)
        )
        assert frames.shape == (2, 3, 24, 32) and flow.shape == (2, 24, 32) and known.shape == (24, 32)
        factor = config.get("scale", [1])[0]
        assert np.allclose(np.abs(flow[:, known]), np.abs(np.array(MOTION)[:, None]) * factor)
        assert known.mean() == 1 if not sparse else 0.7 < known.mean() < 1
        right, down = (int(part) for part in flow[:, known][:, 0])
        here, there = frames[0, :, 8:16, 8:24], frames[1, :, 8 + down : 16 + down, 8 + right : 24 + right]
        assert np.abs(here.astype(int) - there).mean() < (1 if factor == 1 else 12)


def test_autoflow_is_read_by_table(tmp_path: Path) -> None:
    """Whole tables are held out, wherever their parts lie; a flow without its frames is rejected."""
    first, second, field = scene()
    files: dict[str, bytes] = {}
    for table in range(5):
        for batch in range(2):
            place = f"static_40k_png_{batch + 1}_of_4/table_{table}_batch_{batch}"
            shown = {"im0.png": first, "im1.png": second, "forward.flo": flo(field)}
            files |= {f"{place}/{name}": content for name, content in shown.items()}
    del files["static_40k_png_1_of_4/table_0_batch_0/im1.png"]
    manifest = prepared(write(tmp_path / "auto", files), tmp_path / "out")
    found = keys(tmp_path / "out", manifest)
    assert sorted(map(len, found.values()))[0] in (1, 2) and sum(map(len, found.values())) == 9
    tables = {split: {key.split("table_")[1][0] for key in names} for split, names in found.items()}
    assert not tables["train"] & tables["test"]
    assert manifest.rejected == 1


def test_evaluations_may_have_larger_frames(tmp_path: Path) -> None:
    """Training has crops of the model's size; what exceeds the frames of an evaluation has no known flow."""
    src = write(tmp_path / "chairs", chairs(5) | {"FlyingChairs_train_val.txt": b"1\n2\n1\n1\n1\n"})
    prepared(src, tmp_path / "out")
    view = FlowViewConfig(eval_size=(44, 56))
    data = DataConfig(url=str(tmp_path / "out"), executor="inline", image_size=(24, 32), flow=view)
    manifest = load_manifest(data.url)
    share = TrainShare(seed=0, rank=0, world=1, global_batch=4, micro_batch=4, start_step=0, stop_step=1)
    assert next(train_batches(data, manifest, share, "cpu"))["video"].shape == (4, 2, 3, 24, 32)
    batch = next(eval_batches(data, manifest, EvalShare("test", 1), "cpu"))
    assert batch["video"].shape == (1, 2, 3, 44, 56) and batch["flow"].shape == (1, 2, 44, 56)
    assert batch["flow_valid"][0, :40].all() and not batch["flow_valid"][0, 40:].any()


def test_chairs_follow_their_list_and_train_the_task(tmp_path: Path) -> None:
    src = write(tmp_path / "chairs", chairs(5) | {"FlyingChairs_train_val.txt": b"1\n2\n1\n1\n1\n"})
    manifest = prepared(src, tmp_path / "out")
    assert keys(tmp_path / "out", manifest)["test"] == ["data/00001_flow.flo"]
    data = DataConfig(url=str(tmp_path / "out"), executor="inline", image_size=(24, 32), flow=FlowViewConfig(flip=True))
    share = TrainShare(seed=0, rank=0, world=1, global_batch=4, micro_batch=4, start_step=0, stop_step=1)
    batch = next(train_batches(data, load_manifest(data.url), share, "cpu"))
    positions = {"kind": "fourier", "bands": 2, "max_resolution": [24, 32]}
    model = build_model(
        model_config(
            {
                "kind": "perceiver_io",
                "latents": 4,
                "latent_channels": 8,
                "blocks": 1,
                "self_attends_per_block": 1,
                "heads": 1,
                "query_residual": False,
                "decoder": {"kind": "flow", "scale": 0.2},
                "inputs": {"kind": "flow_frames", "size": [24, 32], "positions": positions, "front_end_channels": 8},
            }
        )
    )
    task = FlowConfig().build(classes=0)
    out = task.loss(model, batch)
    assert float(task.count(batch)) == 4 * 24 * 32
    assert float(out.loss_sum.detach()) / (4 * 24 * 32) == pytest.approx(np.hypot(*MOTION), abs=0.1)


def test_sintel_holds_out_whole_scenes(tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for name in ("alley", "bamboo", "cave", "market", "shaman"):
        for i in range(1, 4):
            first, _, flow = scene()
            files[f"training/clean/{name}/frame_{i:04d}.png"] = first
            files[f"training/final/{name}/frame_{i:04d}.png"] = first[:100]
            if i < 3:
                files[f"training/flow/{name}/frame_{i:04d}.flo"] = flo(flow)
    src = write(tmp_path / "sintel", files)
    found = keys(tmp_path / "out", prepared(src, tmp_path / "out"))
    assert [len(found[split]) for split in ("train", "test")] == [8, 2]
    assert len({key.split("/")[2] for key in found["test"]}) == 1
    whole = prepared(src, tmp_path / "final", split="test", **{"pass": "final"})
    assert set(whole.splits) == {"test"}
    row = rows_of(tmp_path / "final", whole, "test")[0]
    with pytest.raises(BadSample, match="undecodable image"):
        FlowFeature().decode(row["flow"], ViewConfig(), 0)


def test_kitti_is_evaluated_where_its_flow_is_known(tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    known = np.zeros((40, 56), bool)
    known[10:30, 20:50] = True
    for i in range(3):
        first, second, flow = scene()
        files |= {
            f"training/image_2/{i:06d}_10.png": first,
            f"training/image_2/{i:06d}_11.png": second,
            f"training/flow_occ/{i:06d}_10.png": kitti(flow, known),
        }
    src = write(tmp_path / "kitti", files)
    manifest = prepared(src, tmp_path / "out", split="test")
    data = DataConfig(url=str(tmp_path / "out"), executor="inline", image_size=(64, 48))
    [batch] = eval_batches(data, manifest, EvalShare("test", 3), "cpu")
    valid = batch["flow_valid"]
    assert valid[:, 40:].sum() == 0 and valid.sum() == 3 * known[:, 4:52].sum()
    assert batch["flow"][:, 0][valid].eq(MOTION[0]).all() and batch["flow"][:, 1][valid].eq(MOTION[1]).all()


def test_other_folders_and_wrong_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        prepared(write(tmp_path / "a", {"x/y.png": b""}), tmp_path / "out")
    src = write(tmp_path / "b", chairs(2) | {"FlyingChairs_train_val.txt": b"1\n"})
    with pytest.raises(UserError, match="1 lines .*2 pairs"):
        prepared(src, tmp_path / "out")


def test_synthetic_motion_of_photographs_is_exact(tmp_path: Path) -> None:
    """On a photograph of straight ramps, which interpolation keeps, the second frame at pixel + flow is the first."""
    ramp = np.stack(np.meshgrid(np.arange(320) * 0.7, np.arange(240) * 0.9), axis=2)
    photo = np.concatenate([ramp, ramp[..., :1]], axis=2).astype(np.uint8)
    (tmp_path / "src").mkdir()
    for name in moving_photos.PHOTOS:
        Image.fromarray(photo).save(tmp_path / "src" / f"{Path(name).stem}.png")
        (tmp_path / "src" / f"{Path(name).stem}.png").rename(tmp_path / "src" / name)
    options = {"pairs": "12", "held_out": "4"}
    manifest = prepare(
        "moving_photos", str(tmp_path / "src"), str(tmp_path / "out"), PrepareConfig(parallel="off", options=options)
    )
    assert {split: found.samples for split, found in manifest.splits.items()} == {"train": 12, "test": 4}
    height, width = moving_photos.SIZE
    for split in ("train", "test"):
        for row in rows_of(tmp_path / "out", manifest, split):
            pair = FlowFeature().decode(row["flow"], ViewConfig(), 0)
            first, second = (np.asarray(image, float)[..., :2] for image in (pair.first, pair.second))
            assert (first[..., 0].min() >= 0.75 * 320 * 0.7 - 1) == (split == "test")
            y, x = np.mgrid[8 : height - 8, 12 : width - 12]
            right, down = pair.flow[:, 8 : height - 8, 12 : width - 12]
            seen = second[np.round(y + down).astype(int), np.round(x + right).astype(int)]
            assert np.abs(seen - first[8 : height - 8, 12 : width - 12]).max() <= 3
            assert 0 < np.abs(pair.flow).max() < 10 and pair.valid.all()
