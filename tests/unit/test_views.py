"""Views: a counter-based draw, pixels that never depend on the batch, a per-sample reference."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from krd_ray.errors import ConfigError, DataError, ShapeError
from krd_ray.maths import view_pixels, views
from krd_ray.maths.views import ViewSpec, counter_uniform, eval_view, train_view

MEAN, STD = (0.49, 0.48, 0.45), (0.2, 0.25, 0.3)
COLOUR = {"brightness": 0.4, "contrast": 0.5, "saturation": 0.6}
BOX = {"scale": (0.08, 1.0), "ratio": (0.75, 4 / 3)}
SPECS = {
    "none": ViewSpec("none", 8, 1, MEAN, STD, flip=True),
    "none_resampled": ViewSpec("none", 5, 1, MEAN, STD, flip=True, **COLOUR),
    "pad_crop": ViewSpec("pad_crop", 8, 2, MEAN, STD, pad=2, flip=True),
    "pad_crop_colour": ViewSpec("pad_crop", 8, 3, MEAN, STD, pad=2, flip=True, **COLOUR),
    "boxes_up": ViewSpec("random_resized_crop", 13, 4, MEAN, STD, flip=True, **BOX),
    "boxes_down_colour": ViewSpec("random_resized_crop", 3, 5, MEAN, STD, flip=True, **BOX, **COLOUR),
}


def _images(num: int, height: int = 8, width: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, height, width, 3), dtype=torch.uint8, generator=generator)


def _ids(num: int) -> Tensor:
    return torch.arange(num) * 1_000_003 + 17


def _uniform_reference(seed: int, sample_id: int, view: int, draw: int) -> float:
    """The hash on Python integers, written from the formula."""
    state = 0
    for word in (seed, draw, sample_id, view):
        z = ((state ^ word) + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z // 2**30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z // 2**27) * 0x94D049BB133111EB % 2**64
        state = z ^ z // 2**31
    return (state // 2**11) / 2**53


# ---- draws


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    sample_id=st.integers(0, 2**63 - 1),
    view=st.integers(0, 10**6),
    draw=st.integers(0, 20),
)
def test_draw_equals_the_integer_reference(seed: int, sample_id: int, view: int, draw: int) -> None:
    got = counter_uniform(seed, torch.tensor([sample_id]), torch.tensor([view]), draw)
    assert got.item() == _uniform_reference(seed, sample_id, view, draw)


def test_first_mixing_step_is_splitmix64() -> None:
    assert views._mix_int(0) == 0xE220A8397B1DCDAF  # first output of splitmix64 seeded with 0
    assert views._mix_int(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4  # second


def test_draws_are_uniform_and_independent_along_every_coordinate() -> None:
    num = 20_000
    ids, zeros = torch.arange(num), torch.zeros(num, dtype=torch.int64)
    base = counter_uniform(9, ids, zeros, 0).numpy()
    others = {
        "next draw": counter_uniform(9, ids, zeros, 1),
        "next view": counter_uniform(9, ids, zeros + 1, 0),
        "next id": counter_uniform(9, ids + 1, zeros, 0),
        "next seed": counter_uniform(10, ids, zeros, 0),
        "views of one id": counter_uniform(9, zeros, ids, 0),
        "id and view swapped": counter_uniform(9, zeros, ids, 1),
    }
    assert stats.kstest(base, "uniform").pvalue > 1e-3
    for name, other in others.items():
        values = other.numpy()
        assert values.min() >= 0, name
        assert values.max() < 1, name
        assert stats.kstest(values, "uniform").pvalue > 1e-3, name
        assert abs(np.corrcoef(base, values)[0, 1]) < 4 / math.sqrt(num), name
        joint, _, _ = np.histogram2d(base, values, bins=8, range=[[0, 1], [0, 1]])
        assert stats.chisquare(joint.ravel()).pvalue > 1e-4, name


# ---- a sample's pixels are its own


@pytest.mark.parametrize("name", SPECS)
def test_pixels_are_bit_identical_whatever_the_batch(name: str) -> None:
    spec, num = SPECS[name], 37
    images, ids = _images(num), _ids(num)
    whole = train_view(images, ids, 3, spec)
    generator = torch.Generator().manual_seed(1)
    for size in [1, 1, 1, 2, 3, 5, 8, 16, 17, 31, 36, 37]:
        chosen = torch.randperm(num, generator=generator)[:size]
        assert torch.equal(train_view(images[chosen], ids[chosen], 3, spec), whole[chosen])
        assert torch.equal(eval_view(images[chosen], spec), eval_view(images, spec)[chosen])


@pytest.mark.parametrize("name", ["pad_crop_colour", "boxes_down_colour"])
def test_pixels_are_bit_identical_whatever_the_number_of_threads(name: str) -> None:
    images, ids, before = _images(200, 32, 32), _ids(200), torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(train_view(images, ids, 0, dataclasses.replace(SPECS[name], side=24)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", ["none_resampled", "boxes_up", "boxes_down_colour"])
def test_pixels_do_not_depend_on_how_many_images_are_resampled_at_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, ids = _images(11), _ids(11)
    at_once = train_view(images, ids, 0, SPECS[name])
    for num_values in (1, 3 * 8 * 8 * 4):  # one image, four images
        monkeypatch.setattr(view_pixels, "CACHE_VALUES", num_values)
        assert torch.equal(train_view(images, ids, 0, SPECS[name]), at_once)


@pytest.mark.parametrize("name", SPECS)
def test_views_differ_by_index_and_a_tensor_of_indices_means_one_each(name: str) -> None:
    spec, images, ids = SPECS[name], _images(24), _ids(24)
    first, second = train_view(images, ids, 0, spec), train_view(images, ids, 1, spec)
    assert not torch.equal(first, second)
    mixed = train_view(images, ids, torch.arange(24) % 2, spec)
    assert torch.equal(mixed[0::2], first[0::2])
    assert torch.equal(mixed[1::2], second[1::2])


@pytest.mark.parametrize("name", SPECS)
def test_output_is_float32_with_channels_last_in_memory_and_leaves_the_input_alone(name: str) -> None:
    images, spec = _images(4), SPECS[name]
    before = images.clone()
    for x in (train_view(images, _ids(4), 0, spec), eval_view(images, spec)):
        assert x.shape == (4, 3, spec.side, spec.side)
        assert x.dtype == torch.float32
        assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)
    strided = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(train_view(strided, _ids(4), 0, spec), train_view(images, _ids(4), 0, spec))
    assert train_view(images[:0], _ids(0), 0, spec).shape == (0, 3, spec.side, spec.side)


# ---- against plain per-sample references


def _normalised(x_HWC: np.ndarray) -> np.ndarray:
    return ((x_HWC.astype(np.float64) / 255 - np.array(MEAN)) / np.array(STD)).transpose(2, 0, 1)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 12)])
def test_pad_crop_equals_padding_then_slicing(height: int, width: int) -> None:
    spec, images, ids = SPECS["pad_crop"], _images(40, height, width), _ids(40)
    got = train_view(images, ids, 5, spec).numpy()
    offsets = set()
    for index in range(40):
        padded = np.pad(images[index].numpy(), ((2, 2), (2, 2), (0, 0)))
        sample_id = int(ids[index])
        top = math.floor(_uniform_reference(2, sample_id, 5, views.DRAW_TOP) * (height + 4 - 8 + 1))
        left = math.floor(_uniform_reference(2, sample_id, 5, views.DRAW_LEFT) * (width + 4 - 8 + 1))
        crop = padded[top : top + 8, left : left + 8]
        if _uniform_reference(2, sample_id, 5, views.DRAW_FLIP) < 0.5:
            crop = crop[:, ::-1]
        offsets.add((top, left))
        np.testing.assert_allclose(got[index], _normalised(crop), atol=2e-6)
    assert len(offsets) > 10


def _box_mean(image: np.ndarray, top: int, left: int, height: int, width: int, side: int) -> np.ndarray:
    """Average of a bilinear interpolant, one point at a time, in float64."""
    box = image[top : top + height, left : left + width].astype(np.float64)

    def weights(length: int, num_parts: int) -> np.ndarray:
        matrix = np.zeros((side, length))
        for out in range(side):
            for part in range(num_parts):
                point = (out + (part + 0.5) / num_parts) * length / side - 0.5
                hats = np.maximum(0, 1 - np.abs(np.arange(length) - min(max(point, 0), length - 1)))
                matrix[out] += hats / num_parts
        return matrix

    rows = weights(height, math.ceil(image.shape[0] / side))
    cols = weights(width, math.ceil(image.shape[1] / side))
    return np.einsum("ah,hwc,bw->abc", rows, box, cols)


@pytest.mark.parametrize("name", ["boxes_up", "boxes_down_colour"])
def test_random_boxes_equal_a_per_sample_reference(name: str) -> None:
    spec = dataclasses.replace(SPECS[name], brightness=0.0, contrast=0.0, saturation=0.0)
    height, width, num = 10, 14, 30
    images, ids = _images(num, height, width), _ids(num)
    got = train_view(images, ids, 2, spec).numpy()
    areas = []
    for index in range(num):

        def draw(number: int, sample_id: int = int(ids[index])) -> float:
            return _uniform_reference(spec.seed, sample_id, 2, number)

        area = height * width * (0.08 + 0.92 * draw(views.DRAW_AREA))
        step = (math.floor(draw(views.DRAW_RATIO) * 1024) + 0.5) / 1024
        ratio = math.exp(math.log(0.75) + step * (math.log(4 / 3) - math.log(0.75)))
        box_height = min(max(round(math.sqrt(area / ratio)), 1), height)
        box_width = min(max(round(math.sqrt(area * ratio)), 1), width)
        top = math.floor(draw(views.DRAW_TOP) * (height - box_height + 1))
        left = math.floor(draw(views.DRAW_LEFT) * (width - box_width + 1))
        want = _box_mean(images[index].numpy(), top, left, box_height, box_width, spec.side)
        if draw(views.DRAW_FLIP) < 0.5:
            want = want[:, ::-1]
        areas.append(box_height * box_width / (height * width))
        np.testing.assert_allclose(got[index], _normalised(want), atol=1e-5)
    assert min(areas) < 0.3
    assert max(areas) > 0.8


def test_colour_jitter_equals_a_per_sample_reference() -> None:
    spec, images, ids = SPECS["pad_crop_colour"], _images(20), _ids(20)
    plain = train_view(
        images, ids, 0, dataclasses.replace(spec, brightness=0.0, contrast=0.0, saturation=0.0)
    )
    got = train_view(images, ids, 0, spec).numpy()
    for index in range(20):
        x = (plain[index].double().numpy().transpose(1, 2, 0) * STD + MEAN) * 255

        def factor(number: int, strength: float, sample_id: int = int(ids[index])) -> float:
            return 1 - strength + 2 * strength * _uniform_reference(3, sample_id, 0, number)

        luma = np.array([0.299, 0.587, 0.114])
        x = np.clip(x * factor(views.DRAW_BRIGHTNESS, 0.4), 0, 255)
        level = np.rint(x @ luma).mean()
        x = np.clip(level + (x - level) * factor(views.DRAW_CONTRAST, 0.5), 0, 255)
        grey = (x @ luma)[..., None]
        x = np.clip(grey + (x - grey) * factor(views.DRAW_SATURATION, 0.6), 0, 255)
        # a grey level on the edge of rounding may fall to the other side: 1 level in one of 64 pixels
        np.testing.assert_allclose(got[index], _normalised(x), atol=0.03 / 255 / min(STD))


def test_eval_view_of_a_fitting_image_only_normalises() -> None:
    images = _images(3)
    want = np.stack([_normalised(image.numpy()) for image in images])
    for name in ("none", "pad_crop"):
        np.testing.assert_allclose(eval_view(images, SPECS[name]).numpy(), want, atol=2e-6)


def test_eval_view_of_a_larger_image_takes_the_centre() -> None:
    image = _images(1, 12, 16)
    native = eval_view(image, SPECS["pad_crop"])[0].numpy()
    np.testing.assert_allclose(native, _normalised(image[0, 2:10, 4:12].numpy()), atol=2e-6)
    resampled = eval_view(image, SPECS["none"])[0].numpy()
    assert resampled.shape == (3, 8, 8)
    np.testing.assert_allclose(resampled, _normalised(_box_mean_square(image[0].numpy())), atol=1e-5)


def _box_mean_square(image: np.ndarray) -> np.ndarray:
    return _box_mean(image, 0, 2, 12, 12, 8)


def test_shrinking_a_checkerboard_gives_grey_not_aliases() -> None:
    board = ((torch.arange(32)[:, None] + torch.arange(32)) % 2 * 255).to(torch.uint8)
    images = board[None, :, :, None].expand(1, 32, 32, 3)
    x = eval_view(images, ViewSpec("random_resized_crop", 8, 0, (0, 0, 0), (1, 1, 1)))
    assert (x - 0.5).abs().max() < 1e-6


# ---- the spec


def test_key_names_every_field_that_changes_pixels() -> None:
    base = SPECS["pad_crop"]
    changes = {
        "recipe": "none",
        "side": 7,
        "seed": 8,
        "mean": (0.0, 0.48, 0.45),
        "std": (1.0, 0.25, 0.3),
        "pad": 3,
        "flip": False,
        "scale": (0.5, 1.0),
        "ratio": (0.5, 1.0),
        "brightness": 0.1,
        "contrast": 0.1,
        "saturation": 0.1,
    }
    assert set(changes) == {field.name for field in dataclasses.fields(ViewSpec)}
    keys = {dataclasses.replace(base, **{name: value}).key() for name, value in changes.items()}
    assert len(keys | {base.key()}) == len(changes) + 1


def test_key_is_stable_across_processes_and_number_types() -> None:
    spec = ViewSpec("none", 4, 0, [0, 0, 0], [1, 1, 1])  # type: ignore[arg-type]
    assert spec == ViewSpec("none", 4, 0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert hash(spec) == hash(dataclasses.replace(spec))
    assert spec.key() == "7c465c511761482daca2569192db850bdb1e95c4df92c32dc86155f5e0b74980"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("recipe", "centre"),
        ("side", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("pad", -1),
        ("scale", (0.0, 1.0)),
        ("scale", (0.9, 0.5)),
        ("scale", (0.5, 1.1)),
        ("ratio", (2.0, 1.0)),
        ("ratio", (1.0,)),
        ("mean", (0.5, 0.5)),
        ("std", (0.5, 0.0, 0.5)),
        ("std", (0.5, math.nan, 0.5)),
        ("brightness", -0.1),
        ("contrast", math.inf),
        ("saturation", math.nan),
    ],
)
def test_spec_out_of_range_names_its_path(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"views\.{name} must be"):
        dataclasses.replace(SPECS["none"], **{name: value})


def test_wrong_inputs_are_refused_with_their_shapes() -> None:
    spec, images, ids = SPECS["pad_crop"], _images(4), _ids(4)
    with pytest.raises(ShapeError, match=r"\[B, H, W, 3\].*\(4, 3, 8, 8\)"):
        train_view(images.permute(0, 3, 1, 2), ids, 0, spec)
    with pytest.raises(ShapeError, match=r"sample_ids has shape \(3,\)"):
        train_view(images, ids[:3], 0, spec)
    with pytest.raises(ShapeError, match=r"view_index has shape \(2,\)"):
        train_view(images, ids, torch.zeros(2, dtype=torch.int64), spec)
    with pytest.raises(DataError, match="uint8"):
        eval_view(images.float(), spec)
    with pytest.raises(DataError, match="int64"):
        train_view(images, ids.float(), 0, spec)
    with pytest.raises(ShapeError, match=r"views\.pad"):
        train_view(_images(4, 3, 8), ids, 0, spec)
