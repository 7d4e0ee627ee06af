"""Image files, bytes and URLs -> 8-bit RGB, by one loader for every path: upright, first frame, over white, of bounded size."""

import contextlib
import http.client
import io
import os
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = frozenset([".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm"])
MAX_SIDE = 4096
"""Pixels; larger images are reduced to it. Pillow refuses more than 179 million pixels as a decompression bomb."""
TIMEOUT_S, MAX_BYTES = 10.0, 20_000_000
"""Limits of an image that is fetched."""
USER_AGENT = "hierarchical-diffusion-rlhf-caption-refinement (image captioning)"

_REASONS: dict[type[Exception], str] = {
    UnidentifiedImageError: "not an image",
    Image.DecompressionBombError: "too many pixels, refused as a decompression bomb",
    FileNotFoundError: "no such file",
    IsADirectoryError: "a folder, not an image",
}

CROPS = ((0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5))
"""Where in the image its crops lie, of the way from left to right and from top to bottom: the corners, then the middle."""
CROP = 0.8
"""A crop's sides, in those of the image."""


class ImageError(ValueError):
    """An image that cannot be read; the message is one line with its name and the reason."""


def _to_8bit(image: Image.Image) -> Image.Image:
    """Grey levels of 16 or 32 bits, by the smallest usual range that holds them all; others from darkest to brightest."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    low, high = float(values.min()), float(values.max())
    tops = {"F": (1.0, 255.0, 65535.0), "I": (255.0, 65535.0)}.get(image.mode, (65535.0,))
    if low >= 0 and high <= tops[-1]:
        low, high = 0.0, next(top for top in tops if high <= top)
    return Image.fromarray(np.round((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _to_8bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def look(image: Image.Image, place: tuple[float, float] | None, mirrored: bool) -> Image.Image:
    """The image, mirrored if asked, and then CROP of its sides at a place of CROPS, if there is one."""
    image = ImageOps.mirror(image) if mirrored else image
    if place is None:
        return image
    width, height = (max(round(CROP * side), 1) for side in image.size)
    left, top = round(place[0] * (image.width - width)), round(place[1] * (image.height - height))
    return image.crop((left, top, left + width, top + height))


def _decode(file: Path | io.BytesIO) -> Image.Image:
    Image.init()
    formats = [name for name in Image.ID if name != "EPS"]  # Pillow hands EPS to Ghostscript
    with warnings.catch_warnings(action="ignore"), Image.open(file, formats=formats) as image:
        if max(image.size) > MAX_SIDE:
            image.draft(None, (MAX_SIDE, MAX_SIDE))  # JPEG decodes at a fraction of its size
        return _upright(image)


def _upright(image: Image.Image) -> Image.Image:
    """Over white, RGB, of bounded size; a copy."""
    image.load()
    with contextlib.suppress(Exception):  # an unreadable EXIF block must not cost the picture
        image = ImageOps.exif_transpose(image)
    rgb = _to_rgb(image)
    rgb.thumbnail((MAX_SIDE, MAX_SIDE))
    return rgb


def prepared(picture: Image.Image) -> Image.Image:
    """A picture as `load_image` would have read its file; a copy. Raises ImageError."""
    try:
        return _upright(picture)
    except Exception as error:  # decoders raise whatever a damaged file makes them trip over
        raise image_error("picture", error) from None


def image_error(name: str, error: Exception) -> ImageError:
    return ImageError(f"{name}: {_REASONS.get(type(error)) or ' '.join(str(error).split()) or type(error).__name__}")


def load_image(source: str | Path | bytes, name: str = "image data") -> Image.Image:
    """RGB image of a file, or of bytes that errors call `name`. Raises ImageError."""
    if not isinstance(source, bytes):
        source, name = Path(source), str(source)
    if source == b"" or (isinstance(source, Path) and source.is_file() and source.stat().st_size == 0):
        raise ImageError(f"{name}: empty file, not an image")
    try:
        return _decode(io.BytesIO(source) if isinstance(source, bytes) else source)
    except Exception as error:  # decoders raise whatever a damaged file makes them trip over
        raise image_error(name, error) from None


def fetch_bytes(url: str) -> bytes:
    """Body behind an http(s) address, whole, within TIMEOUT_S seconds and MAX_BYTES.

    Raises ValueError if it can never be had; else whatever urllib, http.client, ssl and socket raise.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise ValueError("not an http(s) address")
    deadline, data = time.monotonic() + TIMEOUT_S, bytearray()
    request = urllib.request.Request(urllib.parse.quote(url, safe="%/:?#[]@!$&'()*+,;=~"), headers={"User-Agent": USER_AGENT})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        promised = response.length or 0
        while promised <= MAX_BYTES and (chunk := response.read1(1 << 16)):
            data += chunk
            if len(data) > MAX_BYTES:
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"not complete after {TIMEOUT_S:g} s")
    if max(promised, len(data)) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes")
    if len(data) < promised:
        raise http.client.IncompleteRead(bytes(data), promised - len(data))
    return bytes(data)


def fetch_image(url: str) -> Image.Image:
    """RGB image behind an http(s) address, within TIMEOUT_S seconds and MAX_BYTES. Raises ImageError."""
    try:
        data = fetch_bytes(url)
    except Exception as error:  # urllib, http.client, ssl and socket share no narrower class
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the response
        raise image_error(url, error) from None
    return load_image(data, url)


def find_images(folder: str | Path, recursive: bool = False) -> list[Path]:
    """Image files of a folder by suffix, sorted; `recursive` looks into the folders in it, too, and follows links to folders.

    Hidden files and folders are left out; a folder in it that cannot be read stands for its images.

    Raises ImageError if there is no such folder.
    """
    folder, closed = Path(folder), list[OSError]()
    if not folder.is_dir():
        raise ImageError(f"{folder}: no such folder")
    images = [p for p in (_tree(folder, closed.append) if recursive else folder.iterdir()) if is_image(p) and not p.name.startswith(".")]
    return sorted([*images, *(Path(error.filename) for error in closed)])


def _tree(folder: Path, onerror: Callable[[OSError], object]) -> Iterator[Path]:
    """Files of a folder and of those in it, hidden folders aside; each folder once, by the way without links if there is one."""
    tops, seen = deque([folder]), set[str]()
    while tops:
        for root, folders, names in os.walk(tops.popleft(), onerror=onerror):
            real = os.path.realpath(root)
            folders[:] = sorted(name for name in folders if real not in seen and not name.startswith("."))
            tops += [Path(root, name) for name in folders if os.path.islink(Path(root, name))]
            yield from (Path(root, name) for name in names if real not in seen)
            seen.add(real)


def is_image(path: Path) -> bool:
    """By its name; a link to nowhere is one, too, so that it is missed."""
    return path.suffix.lower() in SUFFIXES and (os.path.isfile(path) or not os.path.exists(path))
