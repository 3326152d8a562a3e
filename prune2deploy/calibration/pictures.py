"""From a picture to a model's input: resize, crop or letterbox, normalise.

In: a file, or an array of bytes. Out: a float32 array of shape (channels, height, width). The
steps are those of torchvision's evaluation presets (shorter side, centre crop) and of
ultralytics' letterbox (bilinear without antialiasing, grey 114), to the pixel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from prune2deploy.calibration.preprocessing import Preprocessing
from prune2deploy.errors import ConfigError, MissingBackend

GREY = 114.0
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
Pixels = npt.NDArray[np.float32]


def pillow() -> Any:
    """Return Pillow's ``Image``; raises MissingBackend, with the line that installs it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingBackend(
            f"reading pictures needs Pillow, which cannot be imported ({error}); install it "
            "with: pip install 'prune2deploy[images]'"
        ) from error
    return Image


def read(path: Path, how: Preprocessing) -> Pixels:
    """Read and preprocess one picture file.

    Raises:
        ConfigError: The file is missing, corrupt, not a picture, or of 32 bits per pixel; names it.
    """
    image = pillow()
    unreadable = (OSError, ValueError, SyntaxError, image.DecompressionBombError)
    try:
        with image.open(path) as picture:
            turned = upright(picture) if how.upright else picture
            loaded = _eight_bits(turned).convert("L" if how.channel_order == "gray" else "RGB")
    except (*unreadable, ImportError) as error:  # ultralytics' open imports decoders for the rest
        raise ConfigError(
            f"{path}: cannot be read as a picture ({error}); remove the file or replace it"
        ) from error
    return prepare(loaded, how)


def upright(picture: Any) -> Any:
    """A picture turned as the camera noted (EXIF), as most viewers and OpenCV show it."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(picture)


def _eight_bits(picture: Any) -> Any:
    """A grey picture of 16 bits by its upper eight, as Pillow reads colours; of 8 bits as it is.

    Raises:
        ValueError: It has 32 bits per pixel, whose range nothing tells.
    """
    if picture.mode in ("I", "F"):
        raise ValueError(f"mode {picture.mode!r}, 32 bits per pixel; save it with 8 or 16")
    if not picture.mode.startswith("I;16"):
        return picture
    return pillow().fromarray((np.asarray(picture) >> 8).astype(np.uint8))


def from_bytes(pixels: npt.NDArray[np.uint8], how: Preprocessing) -> Pixels:
    """Preprocess a grey picture of shape (height, width), values 0..255."""
    picture = pillow().fromarray(pixels)
    return prepare(picture.convert("L" if how.channel_order == "gray" else "RGB"), how)


def prepare(picture: Any, how: Preprocessing) -> Pixels:
    """Preprocess a Pillow picture in mode L or RGB into (channels, height, width)."""
    if how.letterbox:
        pixels = _letterboxed(_planes(picture), how.size)
    else:
        pixels = _planes(_cropped(picture, how))
    if how.channel_order == "bgr":
        pixels = pixels[::-1]
    mean = np.asarray(how.mean, np.float32).reshape(-1, 1, 1)
    std = np.asarray(how.std, np.float32).reshape(-1, 1, 1)
    return np.ascontiguousarray((pixels / np.float32(255) - mean) / std, np.float32)


def _planes(picture: Any) -> Pixels:
    pixels = np.asarray(picture, np.float32)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _cropped(picture: Any, how: Preprocessing) -> Any:
    """Resize the shorter side and cut out the centre; or resize straight to the size."""
    resampling = getattr(pillow().Resampling, how.interpolation.upper())
    height, width = how.size
    if how.resize is None:
        return picture.resize((width, height), resampling)
    short = min(picture.size)
    across, down = (
        how.resize if side == short else int(how.resize * side / short) for side in picture.size
    )
    picture = picture.resize((across, down), resampling)
    left = round((across - width) / 2)
    top = round((down - height) / 2)
    return picture.crop((left, top, left + width, top + height))  # black where it juts out


def _letterboxed(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Fit (channels, h, w) into ``size``, keeping its proportions, centred on grey."""
    height, width = size
    channels, old_height, old_width = pixels.shape
    ratio = min(height / old_height, width / old_width)
    inner = (max(round(old_height * ratio), 1), max(round(old_width * ratio), 1))
    if inner != (old_height, old_width):
        scaled = F.interpolate(
            torch.from_numpy(pixels.copy())[None], inner, mode="bilinear", align_corners=False
        )
        pixels = scaled[0].round().clamp(0, 255).numpy()
    out = np.full((channels, height, width), GREY, np.float32)
    top = round((height - inner[0]) / 2 - 0.1)
    left = round((width - inner[1]) / 2 - 0.1)
    out[:, top : top + inner[0], left : left + inner[1]] = pixels
    return out
