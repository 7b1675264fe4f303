import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from pipelines.augment import Augmentation, ViewParameters, evaluation_views, training_views

DRAWS = 20_000


def draw(
    augmentation: Augmentation, height: int, width: int, seed: int = 0, views: int = 1
) -> ViewParameters:
    sizes = np.ones(DRAWS, np.int32)
    return training_views(
        augmentation, np.arange(DRAWS), height * sizes, width * sizes, seed=seed, epoch=0, views=views
    )


def quantiles(values: np.ndarray) -> np.ndarray:
    return np.quantile(values, np.linspace(0.05, 0.95, 10))


@pytest.mark.parametrize(
    ("height", "width"), [(32, 32), (375, 500), (500, 333), (60, 400), (400, 60), (1, 1), (2, 9)]
)
def test_crops_follow_torchvision(height: int, width: int) -> None:
    torch.manual_seed(0)
    augmentation = Augmentation()
    image = torch.empty(3, height, width)
    ranges = (list(augmentation.crop_scale), list(augmentation.crop_ratio))
    reference = np.array([v2.RandomResizedCrop.get_params(image, *ranges) for _ in range(3000)], float)
    ours = draw(augmentation, height, width)
    boxes = np.stack([ours.top, ours.left, ours.height, ours.width])[..., 0].astype(float)
    assert (boxes[:2] >= 0).all()
    assert (boxes[2:] >= 1).all()
    assert (boxes[0] + boxes[2] <= height).all()
    assert (boxes[1] + boxes[3] <= width).all()
    size = max(height, width)
    for expected, got in zip(reference.T, boxes, strict=True):
        assert abs(expected.mean() - got.mean()) < 0.02 * size
        assert abs(expected.std() - got.std()) < 0.02 * size
        np.testing.assert_allclose(quantiles(got), quantiles(expected), atol=0.04 * size)
    area, expected_area = boxes[2] * boxes[3], reference[:, 2] * reference[:, 3]
    np.testing.assert_allclose(quantiles(area), quantiles(expected_area), atol=0.04 * height * width)
    aspect, expected_aspect = np.log(boxes[3] / boxes[2]), np.log(reference[:, 3] / reference[:, 2])
    np.testing.assert_allclose(quantiles(aspect), quantiles(expected_aspect), atol=0.04)


def test_color_factors_are_uniform_in_torchvisions_ranges() -> None:
    augmentation = Augmentation(
        brightness=0.4, contrast=0.3, saturation=1.5, hue=0.1, grayscale_probability=0
    )
    ours = draw(augmentation, 32, 32)
    reference = v2.ColorJitter(0.4, 0.3, 1.5, 0.1)
    for name, scale in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 360)):
        low, high = (scale * bound for bound in getattr(reference, name))
        values = getattr(ours, name)[:, 0]
        assert values.dtype == np.float32
        assert values.min() >= np.float32(low)
        assert values.max() <= np.float32(high)
        np.testing.assert_allclose(
            quantiles(values), low + np.linspace(0.05, 0.95, 10) * (high - low), atol=0.02 * (high - low)
        )


def test_probabilities() -> None:
    augmentation = Augmentation(jitter_probability=0.8, grayscale_probability=0.2, flip_probability=0.3)
    views = draw(augmentation, 32, 32)
    assert abs(views.flip.mean() - 0.3) < 0.02
    assert abs((views.saturation == 0).mean() - 0.2) < 0.02
    assert abs((views.hue == 0).mean() - 0.2) < 0.02
    neutral = views.hue == 0
    assert (views.brightness[neutral] == 1).all()
    assert (views.contrast[neutral] == 1).all()
    assert set(views.saturation[neutral].tolist()) == {0.0, 1.0}


def test_draws_are_independent_of_each_other() -> None:
    views = draw(Augmentation(grayscale_probability=0.0, jitter_probability=1.0), 1000, 1000, views=2)
    columns = np.concatenate([np.asarray(values, float).T for values in views])
    free = np.ones((len(columns), len(columns)), bool)
    for one, other in (
        (0, 2),
        (1, 3),
        (2, 3),
    ):  # a position depends on the size, height and width on the area
        for v in range(2):
            free[2 * one + v, 2 * other + v] = free[2 * other + v, 2 * one + v] = False
    for v in range(2):  # and so do top and left, through height and width
        for pair in ((0, 1), (0, 3), (1, 2)):
            free[2 * pair[0] + v, 2 * pair[1] + v] = free[2 * pair[1] + v, 2 * pair[0] + v] = False
    np.fill_diagonal(free, val=False)
    assert np.abs(np.corrcoef(columns)[free]).max() < 0.035  # five standard errors


def test_a_view_depends_on_seed_epoch_row_view_and_nothing_else() -> None:
    augmentation = Augmentation()
    rows = np.array([5, 900, 2**40])
    sizes = np.array([64, 100, 300], np.int32)

    def views(pick: slice, **changed: int) -> ViewParameters:
        keys = {"seed": 3, "epoch": 1, "views": 2} | changed
        return training_views(augmentation, rows[pick], sizes[pick], sizes[pick], **keys)

    everything = views(slice(None))
    for name, values in everything._asdict().items():
        assert values.shape == (3, 2)
        np.testing.assert_array_equal(getattr(views(slice(1, 2)), name), values[1:2])
        np.testing.assert_array_equal(getattr(views(slice(None), views=1), name), values[:, :1])
    hues = [everything.hue, views(slice(None), seed=4).hue, views(slice(None), epoch=2).hue]
    assert len(np.unique(np.stack(hues))) == 18


def test_evaluation_is_the_center_square() -> None:
    heights, widths = (
        np.array([32, 400, 256, 1, 300000], np.int32),
        np.array([32, 300, 512, 9, 300000], np.int32),
    )
    small = evaluation_views(Augmentation(image_size=32), heights, widths)
    np.testing.assert_array_equal(small.height[:, 0], [32, 300, 256, 1, 300000])
    large = evaluation_views(Augmentation(image_size=224), heights, widths)
    np.testing.assert_array_equal(large.height, large.width)
    np.testing.assert_array_equal(large.height[:, 0], [28, 262, 224, 1, 262500])
    np.testing.assert_array_equal(large.top[:, 0], [2, 69, 16, 0, 18750])
    np.testing.assert_array_equal(large.left[:, 0], [2, 19, 144, 4, 18750])
    assert not large.flip.any()
    assert (large.saturation == 1).all()
    assert (large.hue == 0).all()
    for ours, drawn in zip(large, draw(Augmentation(), 8, 8), strict=True):
        assert ours.dtype == drawn.dtype


def test_strengths_of_zero_leave_the_image_alone() -> None:
    still = Augmentation(
        crop_scale=(1.0, 1.0),
        brightness=0,
        contrast=0,
        saturation=0,
        hue=0,
        grayscale_probability=0,
        flip_probability=0,
    )
    assert not still.changes_color
    assert Augmentation().changes_color
    assert not Augmentation(jitter_probability=0, grayscale_probability=0).changes_color
    views = draw(still, 32, 32)
    for values, neutral in zip(views[4:], (1, 1, 1, 0, 0), strict=True):
        assert (values == neutral).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 0},
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.5, 0.2)},
        {"crop_scale": (0.5, 1.5)},
        {"crop_ratio": (2.0, 1.0)},
        {"brightness": -0.1},
        {"saturation": float("nan")},
        {"hue": 0.6},
        {"flip_probability": 1.1},
        {"std": (1.0, 0.0, 1.0)},
        {"mean": (float("nan"), 0.0, 0.0)},
    ],
)
def test_wrong_settings_are_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Augmentation(**wrong)


def test_crops_of_squashed_images_have_their_shape() -> None:
    """As a crop of 227 of an image that was resized to 256 by 256."""
    side = 227 / 256
    augmentation = Augmentation(image_size=227, crop_scale=(side**2, side**2), crop_ratio=(1, 1), squash=True)
    ours = draw(augmentation, 512, 1024)
    assert (ours.height == 454).all()
    assert (ours.width == 908).all()
    for start, room in ((ours.top, 512 - 454), (ours.left, 1024 - 908)):
        assert (start.min(), start.max()) == (0, room)
        assert abs(start.mean() - room / 2) < 0.02 * room
    fixed = evaluation_views(augmentation, np.array([512]), np.array([1024]))
    assert (fixed.top[0, 0], fixed.left[0, 0], fixed.height[0, 0], fixed.width[0, 0]) == (32, 64, 448, 896)
    free = draw(Augmentation(squash=True), 200, 800)
    ratios = free.width / free.height / 4
    assert 0.74 < ratios.min() < 0.77 < 1.3 < ratios.max() < 1.36
