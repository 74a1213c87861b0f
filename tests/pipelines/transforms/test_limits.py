"""Media that would take much memory, start a program or open other files are bad samples before they are decoded."""

import io
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from pipelines.transforms import BadSample
from pipelines.transforms.audio import MOST_CHANNELS, open_sound
from pipelines.transforms.decode import FORMATS, MAX_BYTES, decode_image
from pipelines.transforms.media import open_media
from pipelines.transforms.mesh import load_mesh


def png(width: int, height: int, bits: int, colours: int) -> bytes:
    """Return a PNG of zeros, which is a thousandth of its pixels' size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = bytes(1 + (width * bits * {0: 1, 2: 3, 6: 4}[colours] + 7) // 8)
    packer = zlib.compressobj(1)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def tiled(width: int, height: int) -> bytes:
    """Return a TIFF of 16 x 16 pixels in one tile of this size, 240 bytes."""
    facts = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, width), (323, height), (324, 200)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*facts, (325, 20)])
    return (b"II*\0" + struct.pack("<IH", 8, len(facts) + 1) + entries + bytes(4)).ljust(240, b"\0")


@pytest.mark.parametrize(
    "encoded",
    [
        png(10_000, 10_000, 1, 0),
        png(8_000, 8_000, 8, 6),
        saved(Image.new("F", (8_000, 8_000)), "TIFF", compression="tiff_adobe_deflate"),
        saved(Image.new("P", (9_000, 9_000)), "GIF", save_all=True, append_images=[Image.new("P", (9_000, 9_000), 1)]),
        tiled(46_336, 46_336),
        tiled(1 << 30, 16),
    ],
    ids=["1 bit", "RGBA", "float TIFF", "GIF of two frames", "large tile", "wide tile"],
)
def test_an_image_that_would_take_much_memory_is_refused_by_its_header(encoded: bytes) -> None:
    with pytest.raises(BadSample, match=f"more than {MAX_BYTES >> 20} MiB"):
        decode_image(encoded, 3)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_the_documented_formats_are_decoded(form: str) -> None:
    assert form in FORMATS
    assert decode_image(saved(Image.new("RGB", (8, 6), "red"), form), 3).shape == (6, 8, 3)


@pytest.mark.parametrize("form", ["EPS", "ICO", "TGA", "PCX", "ICNS", "JPEG2000", "PDF", "SGI", "IM", "DDS"])
def test_other_formats_of_pillow_are_not_opened(form: str) -> None:
    with pytest.raises(BadSample, match="cannot identify image file"):
        decode_image(saved(Image.new("RGB", (16, 16), "red"), form), 3)


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{file}\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{file}'\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        '<?xml version="1.0"?><MPD><Period><AdaptationSet><BaseURL>{file}</BaseURL></AdaptationSet></Period></MPD>',
    ],
    ids=["m3u8", "m3u8 with a URL", "ffconcat", "sdp", "dash"],
)
def test_a_playlist_opens_no_other_file(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.mkv"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mjpeg", rate=25, options={})
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuvj420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8))))
        container.mux(stream.encode(None))
    assert open_media(file.read_bytes(), video=True, audio=False, max_seconds=10, max_pixels=1000).width == 16
    with pytest.raises(BadSample, match="undecodable media"):
        open_media(text.format(file=file).encode(), video=True, audio=False, max_seconds=10, max_pixels=1000)


def test_giant_frames_are_refused_without_decoding_one() -> None:
    sink = io.BytesIO()
    with av.open(sink, "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 9000, 8000, "yuvj420p"
        container.mux(stream.encode(av.VideoFrame(9000, 8000, "yuvj420p")))
        container.mux(stream.encode(None))
    with pytest.raises(BadSample, match="are not 1 to 10000000 pixels"):
        open_media(sink.getvalue(), video=True, audio=False, max_seconds=10, max_pixels=10_000_000)


def test_sound_of_many_channels_is_refused() -> None:
    sink = io.BytesIO()
    soundfile.write(sink, np.zeros((10, MOST_CHANNELS + 1), np.int16), 8000, format="WAV")
    with pytest.raises(BadSample, match=f"{MOST_CHANNELS + 1} channels"):
        open_sound(sink.getvalue(), 10)
    with pytest.raises(BadSample, match=f"{MOST_CHANNELS + 1} channels|undecodable"):
        open_media(sink.getvalue(), video=False, audio=True, max_seconds=10)


def test_a_recording_whose_header_announces_hours_is_refused() -> None:
    sink = io.BytesIO()
    soundfile.write(sink, np.zeros(80, np.int16), 8000, format="WAV")
    long = bytearray(sink.getvalue())
    long[40:44], long[4:8] = struct.pack("<I", 2_000_000_000), struct.pack("<I", 2_000_000_036)
    with pytest.raises(BadSample, match=r"longer than|truncated"):
        open_sound(bytes(long), 3600)


@pytest.mark.parametrize("counts", ["5000001 1", "3 5000001", "99999999999999999999 1", "4999999 4999999"])
def test_a_mesh_that_announces_more_than_it_has_is_refused(counts: str) -> None:
    with pytest.raises(BadSample, match="in the header|unreadable off mesh"):
        load_mesh(f"OFF\n{counts} 0\n0 0 0\n".encode(), "off")


def test_a_mesh_that_names_a_texture_is_read_without_it(caplog: pytest.LogCaptureFixture) -> None:
    form = "format ascii 1.0\ncomment TextureFile ../secret.png\nelement vertex 3\n"
    form += "".join(f"property float {axis}\n" for axis in "xyz")
    form += "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    mesh = load_mesh(f"ply\n{form}0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n".encode(), "ply")
    assert mesh.area == 0.5 and not caplog.records
