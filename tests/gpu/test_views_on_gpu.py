"""The gpu tier: what must be the same on a CUDA device. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from krd_ray.maths.views import ViewSpec, counter_uniform, train_view

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
IDS = torch.arange(64) * 977
IMAGES = torch.randint(0, 256, (64, 40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_draws_are_the_same_on_the_gpu() -> None:
    views = torch.arange(64) % 3
    expected = counter_uniform(1, IDS, views, 2)
    assert torch.equal(counter_uniform(1, IDS.cuda(), views.cuda(), 2).cpu(), expected)


@pytest.mark.parametrize("recipe", ["none", "pad_crop", "random_resized_crop"])
def test_views_are_the_same_to_the_bit_on_the_gpu(recipe: str) -> None:
    spec = ViewSpec(
        recipe,  # type: ignore[arg-type]
        32 if recipe == "random_resized_crop" else 40,
        0,
        (0.5, 0.4, 0.3),
        (0.2, 0.3, 0.4),
        pad=4,
        flip=True,
        scale=(0.2, 1.0),
        ratio=(0.75, 1.33),
        brightness=0.4,
        contrast=0.4,
        saturation=0.4,
    )
    on_gpu = train_view(IMAGES.cuda(), IDS.cuda(), 5, spec).cpu()
    assert torch.equal(on_gpu, train_view(IMAGES, IDS, 5, spec))
