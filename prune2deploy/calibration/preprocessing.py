"""What a model expects of its images: the facts, apart from any library that does the work.

In: nothing. Out: :class:`Preprocessing`, which loaders fill in and recipes may override.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the model's input.

    Attributes:
        size: Height and width of the input, in pixels.
        resize: Length of the shorter side before the centre crop to ``size``; ``None`` resizes
            straight to ``size`` and crops nothing. Unused when ``letterbox`` is set.
        letterbox: Fit the whole picture inside ``size`` and fill the rest with grey (114).
        mean: Per channel, on values in 0..1; subtracted.
        std: Per channel, on values in 0..1; divided by.
        channel_order: ``"rgb"``, ``"bgr"`` or ``"gray"``.
        interpolation: ``"nearest"``, ``"bilinear"`` or ``"bicubic"``.
        upright: Turn pictures as the camera noted (EXIF). OpenCV does, and ultralytics by it;
            Pillow does not, nor torchvision and timm by it.
    """

    size: tuple[int, int]
    resize: int | None = None
    letterbox: bool = False
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    channel_order: str = "rgb"
    interpolation: str = "bilinear"
    upright: bool = False
