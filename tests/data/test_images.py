import http.server
import io
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hierarchical_diffusion_rlhf_caption_refinement.data.images import CROPS, ImageError, fetch_image, find_images, load_image, look

RED, GREY = (255, 0, 0), (128, 128, 128)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def first_pixel(image: Image.Image) -> tuple[int, ...]:
    pixel = image.getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return pixel


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (4, 8)


def test_damaged_exif_does_not_cost_the_picture() -> None:
    assert first_pixel(load_image(encoded(Image.new("RGB", (8, 4), RED), exif=b"Exif\0\0nonsense"))) == RED


@pytest.mark.parametrize(
    ("mode", "values", "grey"),
    [
        ("I;16", [0, 32896, 65535], [0, 128, 255]),
        ("I", [0, 32896, 65535], [0, 128, 255]),
        ("I", [0, 128, 200], [0, 128, 200]),
        ("F", [0, 0.5, 1], [0, 128, 255]),
        ("F", [0, 128, 200], [0, 128, 200]),
        ("F", [-1, 0, 1], [0, 128, 255]),
    ],
)
def test_deep_greys_are_scaled_not_saturated(mode: str, values: list[float], grey: list[int]) -> None:
    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    image = load_image(encoded(Image.fromarray(np.array([values], dtype=dtype)), "TIFF"))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image)[0, :, 0].astype(int) - grey).max() <= 1


@pytest.mark.parametrize(
    ("image", "format", "pixel"),
    [
        (Image.new("L", (4, 4), 128), "PNG", GREY),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("LA", (4, 4), (0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGB", (4, 4), RED).convert("P", palette=Image.Palette.ADAPTIVE), "PNG", RED),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF", RED),
        (Image.new("1", (4, 4), 1), "PNG", (255, 255, 255)),
    ],
    ids=lambda x: x.mode if isinstance(x, Image.Image) else None,
)
def test_every_mode_becomes_rgb(image: Image.Image, format: str, pixel: tuple[int, ...]) -> None:
    assert first_pixel(load_image(encoded(image, format))) == pixel


def test_first_frame_of_an_animation() -> None:
    data = encoded(Image.new("RGB", (4, 4), RED), "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), GREY)])
    assert first_pixel(load_image(data)) == RED


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_wide_image_is_reduced(format: str) -> None:
    image = load_image(encoded(Image.new("L", (20_000, 200), 128), format))
    assert image.width == 4096 and image.height in (40, 41)
    assert first_pixel(image) == GREY


def test_bomb_is_refused(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    data = b"".join(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks)
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    with pytest.raises(ImageError, match=r"bomb\.png: too many pixels"):
        load_image(tmp_path / "bomb.png")


def test_unreadable_files_name_the_reason(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    files = {"cut.jpg": encoded(Image.fromarray(noise), "JPEG")[:2000], "page.jpg": b"<html>404</html>", "empty.png": b""}
    files["script.eps"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    reasons = {"cut.jpg": "truncated", "page.jpg": "not an image", "empty.png": "empty file", "script.eps": "not an image"}
    for name, reason in (reasons | {"missing.png": "no such file", "": "a folder"}).items():
        with pytest.raises(ImageError, match=reason) as error:
            load_image(tmp_path / name)
        assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)
    with pytest.raises(ImageError, match="upload: not an image"):
        load_image(b"plain text", "upload")


@pytest.fixture
def server() -> Iterator[str]:
    pages = {"/red.png": encoded(Image.new("RGB", (4, 4), RED)), "/page": b"<html></html>", "/big": b"x" * 5000}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in pages else 404)
            self.end_headers()
            self.wfile.write(pages.get(self.path, b""))

        def log_message(self, format: str, *args: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_fetch_image(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_pixel(fetch_image(server + "/red.png")) == RED
    monkeypatch.setattr("hierarchical_diffusion_rlhf_caption_refinement.data.images.MAX_BYTES", 1000)
    reasons = {"/page": "not an image", "/big": "larger than 1000 bytes", "/none": "404"}
    for path, reason in reasons.items():
        with pytest.raises(ImageError, match=reason) as error:
            fetch_image(server + path)
        assert str(error.value).startswith(server + path)
    with pytest.raises(ImageError, match="not an http"):
        fetch_image("file:///etc/hostname")


def test_find_images(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.JPG", "a.png", "notes.txt", ".hidden.png", "deep/c.webp"):
        (tmp_path / name).touch()
    assert [p.name for p in find_images(tmp_path)] == ["a.png", "b.JPG"]
    assert [p.name for p in find_images(tmp_path, recursive=True)] == ["a.png", "b.JPG", "c.webp"]
    with pytest.raises(ImageError, match="nowhere: no such folder"):
        find_images(tmp_path / "nowhere")


def test_linked_folders_are_followed_once_and_hidden_ones_left_out(tmp_path: Path) -> None:
    for name in ("in/z/a.png", "in/.thumbs/b.png", "in/z/.deep/c.png", "in/z/.d.png", "out/e.png", "out/more/f.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    links = {"in/linked": "out", "in/again": "out", "in/a": "in/z", "in/z/up": "in", "out/more/back": "out", "in/.hidden": "out"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    found = find_images(tmp_path / "in", recursive=True)
    assert [p.relative_to(tmp_path).as_posix() for p in found] == ["in/again/e.png", "in/again/more/f.png", "in/z/a.png"]
    (tmp_path / ".named").symlink_to("out")  # what is asked for by name may be hidden, and a link
    assert find_images(tmp_path / ".named", recursive=True) == [tmp_path / ".named" / name for name in ("e.png", "more/f.png")]


def test_links_to_nowhere_and_closed_folders_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("open", "shut", "folder.png"):
        (tmp_path / name).mkdir()
    (tmp_path / "open/a.png").touch()
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    real = os.scandir

    def scandir(path: str):
        if os.path.basename(path) == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert find_images(tmp_path, recursive=True) == [tmp_path / name for name in ("gone.png", "loop.jpg", "open/a.png", "shut")]
    for name, reason in {"gone.png": "no such file", "loop.jpg": "Too many levels of symbolic links"}.items():
        with pytest.raises(ImageError, match=reason):
            load_image(tmp_path / name)


def test_looks_are_corners_and_the_middle_mirrored_first() -> None:
    ramp = np.add.outer(np.arange(10), 20 * np.arange(10)).astype(np.uint8)  # the row, and 20 times the column
    image = Image.fromarray(np.repeat(ramp[..., None], 3, -1))
    assert look(image, None, False) is image and np.array_equal(look(image, None, True), np.asarray(image)[:, ::-1])
    found = {place: np.asarray(look(image, place, False)) for place in CROPS}
    assert all(crop.shape == (8, 8, 3) for crop in found.values())
    assert [int(crop[0, 0, 0]) for crop in found.values()] == [0, 42, 40, 2, 21]
    assert np.array_equal(look(image, (0.0, 0.0), True), np.asarray(image)[:8, 9:1:-1])
    assert look(image.crop((0, 0, 1, 1)), (0.5, 0.5), False).size == (1, 1)
