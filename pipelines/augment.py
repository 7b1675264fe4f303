"""What is done to each image, as numbers both loaders share: crop box, color factors, flip.

All randomness of the augmentation is drawn here, as a pure function of (seed, epoch, row, view). A batch
therefore does not depend on the world size, the number of threads, the decoder, prefetching or a restart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.hashing import hash_words, uniform
from pipelines.settings import check_range

_CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
_CROP_DRAWS = 2 * _CROP_ATTEMPTS + 2
_NUM_DRAWS = _CROP_DRAWS + 7
_SMALL_IMAGE = 64  # pixels; below, images fill their frame and evaluation crops nothing off
_EVALUATION_CROP = 0.875  # the usual 224 of 256

Integers = npt.NDArray[np.integer]
Reals = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training images are varied, and how all images are sized and normalized.

    The distributions are those of torchvision's `RandomResizedCrop`, `ColorJitter`, `RandomGrayscale`
    and `RandomHorizontalFlip`; a strength of 0 switches its part off.
    """

    image_size: int = 224
    """Side of the square images the network sees, in pixels."""
    training_size: int | None = None
    """Side of the random views of training, if other than `image_size`. Smaller ones cost less, and as random crops
    enlarge objects, these then look alike in training and evaluation (Touvron et al. 2019, arXiv 1906.06423)."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of the random crop, as a fraction of the image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio (width / height) of the random crop."""
    squash: bool = False
    """Squash images to a square first, as if they had been resized without keeping their shape: crops, in training and
    evaluation, then have the shape of the image where `crop_ratio` is 1."""
    brightness: float = 0.4
    """Brightness factors are drawn from [max(0, 1 - brightness), 1 + brightness]."""
    contrast: float = 0.4
    """Contrast factors are drawn from [max(0, 1 - contrast), 1 + contrast]."""
    saturation: float = 0.4
    """Saturation factors are drawn from [max(0, 1 - saturation), 1 + saturation]."""
    hue: float = 0.4
    """Hue is turned by an angle from [-hue, hue], in full turns, at most 0.5."""
    jitter_probability: float = 1.0
    """Fraction of the views whose brightness, contrast, saturation and hue are changed."""
    grayscale_probability: float = 0.2
    """Fraction of the views that lose their color."""
    flip_probability: float = 0.5
    """Fraction of the views that are mirrored left to right."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the red, green and blue channel that is subtracted, for pixels in [0, 1]."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation per channel that is divided by, for pixels in [0, 1]."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: If a field lies outside its range.
        """
        check_range(self, "image_size", "training_size", at_least=1, at_most=8192)
        check_range(self, "brightness", "contrast", "saturation", at_least=0)
        check_range(self, "hue", at_least=0, at_most=0.5)
        check_range(
            self, "jitter_probability", "grayscale_probability", "flip_probability", at_least=0, at_most=1
        )
        check_range(self, "mean")
        if not all(0 < value < np.inf for value in self.std):
            raise ValueError(f"std is {self.std}, expected finite and above 0")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale is {self.crop_scale}, expected 0 < smallest <= largest <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1] < np.inf:
            raise ValueError(f"crop_ratio is {self.crop_ratio}, expected 0 < smallest <= largest")

    @property
    def changes_color(self) -> bool:
        """Whether training views can differ from the image in color."""
        jitters = max(self.brightness, self.contrast, self.saturation, self.hue) > 0
        return (jitters and self.jitter_probability > 0) or self.grayscale_probability > 0


class ViewParameters(NamedTuple):
    """What to do to each of V views of B images; every array has shape (B, V).

    The crop box comes first, in pixels of the stored image, and is resized to the square; then color, then
    flip.
    """

    top: npt.NDArray[np.int32]
    left: npt.NDArray[np.int32]
    height: npt.NDArray[np.int32]
    width: npt.NDArray[np.int32]
    brightness: npt.NDArray[np.float32]  # factor, 1 changes nothing
    contrast: npt.NDArray[np.float32]  # factor, 1 changes nothing
    saturation: npt.NDArray[np.float32]  # factor, 1 changes nothing, 0 is grayscale
    hue: npt.NDArray[np.float32]  # degrees
    flip: npt.NDArray[np.bool_]


def training_views(
    augmentation: Augmentation,
    rows: Integers,
    heights: Integers,
    widths: Integers,
    *,
    seed: int,
    epoch: int,
    views: int,
) -> ViewParameters:
    """Draw the random views of a batch.

    Args:
        augmentation: The distributions to draw from.
        rows: (B,), instance ids.
        heights: (B,), heights of the stored images in pixels.
        widths: (B,), their widths.
        seed: Key of the draws.
        epoch: Epoch; each has draws of its own.
        views: Views per image, V.

    Returns:
        The parameters (B, V); a view's depend on (seed, epoch, row, view) and its image's size alone.
    """
    streams = hash_words(seed, epoch, rows[:, None], np.arange(views))
    draws = np.moveaxis(uniform(hash_words(streams[..., None], np.arange(_NUM_DRAWS))), -1, 0)
    crop_draws, (jitter, brightness, contrast, saturation, hue, gray, flip) = np.split(draws, [_CROP_DRAWS])
    jittered = jitter < augmentation.jitter_probability

    def factor(draw: Reals, strength: float) -> Reals:
        low, high = max(0.0, 1 - strength), 1 + strength
        return np.where(jittered, low + draw * (high - low), 1.0)

    colored = gray >= augmentation.grayscale_probability
    top, left, height, width = _crop_boxes(augmentation, crop_draws, heights[:, None], widths[:, None])
    return ViewParameters(
        top=top.astype(np.int32),
        left=left.astype(np.int32),
        height=height.astype(np.int32),
        width=width.astype(np.int32),
        brightness=factor(brightness, augmentation.brightness).astype(np.float32),
        contrast=factor(contrast, augmentation.contrast).astype(np.float32),
        saturation=(factor(saturation, augmentation.saturation) * colored).astype(np.float32),
        hue=np.where(jittered, (2 * hue - 1) * augmentation.hue * 360, 0.0).astype(np.float32),
        flip=flip < augmentation.flip_probability,
    )


def evaluation_views(augmentation: Augmentation, heights: Integers, widths: Integers) -> ViewParameters:
    """Return the one fixed view of each image: a centered square, neutral colors, no flip.

    Args:
        augmentation: Only `image_size` and `squash` matter: above 64 pixels the square's side is 0.875 of the image's
            shorter one (the usual 224 of 256), else all of it; squashed, so much of both sides.
        heights: (B,), heights of the stored images in pixels.
        widths: (B,), their widths.

    Returns:
        The parameters (B, 1).
    """
    ratio = _EVALUATION_CROP if augmentation.image_size > _SMALL_IMAGE else 1.0
    shorter = np.minimum(heights, widths)
    whole = (heights, widths) if augmentation.squash else (shorter, shorter)
    height, width = (np.maximum(1, np.rint(side * ratio)).astype(np.int32)[:, None] for side in whole)
    neutral = np.ones(height.shape, dtype=np.float32)
    return ViewParameters(
        top=((heights[:, None] - height) // 2).astype(np.int32),
        left=((widths[:, None] - width) // 2).astype(np.int32),
        height=height,
        width=width,
        brightness=neutral,
        contrast=neutral,
        saturation=neutral,
        hue=np.zeros_like(neutral),
        flip=np.zeros(height.shape, dtype=np.bool_),
    )


def _crop_boxes(
    augmentation: Augmentation, draws: Reals, heights: Integers, widths: Integers
) -> tuple[Reals, Reals, Reals, Reals]:
    """Choose crops as torchvision does: the first attempt that fits, else the largest allowed center.

    Args:
        augmentation: The ranges of area and aspect ratio.
        draws: (_CROP_DRAWS, B, V), uniform in [0, 1): areas, aspect ratios, vertical and horizontal position.
        heights: (B, 1), heights of the images in pixels.
        widths: (B, 1), their widths.

    Returns:
        Top, left, height and width, whole numbers (B, V).
    """
    areas, ratios, (vertical, horizontal) = np.split(draws, [_CROP_ATTEMPTS, 2 * _CROP_ATTEMPTS])
    scale_low, scale_high = augmentation.crop_scale
    log_low, log_high = np.log(augmentation.crop_ratio)
    # Of a squashed image a square has its shape; areas keep their share whatever the shape.
    shape: Reals | float = widths / heights if augmentation.squash else 1.0
    target = (scale_low + areas * (scale_high - scale_low)) * heights * widths
    aspect = np.exp(log_low + ratios * (log_high - log_low)) * shape
    attempts = np.rint(np.sqrt([target / aspect, target * aspect]))
    crop_heights, crop_widths = attempts
    fits = (crop_heights > 0) & (crop_heights <= heights) & (crop_widths > 0) & (crop_widths <= widths)
    first = np.argmax(fits, axis=0)
    crop_height, crop_width = np.take_along_axis(attempts, first[None, None], axis=1)[:, 0]
    top = np.floor(vertical * (heights - crop_height + 1))
    left = np.floor(horizontal * (widths - crop_width + 1))

    ratio_low, ratio_high = augmentation.crop_ratio
    closest = np.clip(widths / heights, ratio_low * shape, ratio_high * shape)
    center_height = np.clip(np.rint(widths / closest), 1, heights)
    center_width = np.clip(np.rint(heights * closest), 1, widths)
    fitted = fits.any(axis=0)
    return (
        np.where(fitted, top, (heights - center_height) // 2),
        np.where(fitted, left, (widths - center_width) // 2),
        np.where(fitted, crop_height, center_height),
        np.where(fitted, crop_width, center_width),
    )
