"""Balanced category priors: equal angles, nearest to the means, the search on the sphere, the plain class means."""

from __future__ import annotations

import functools
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import numpy as np
import pytest
import torch
from scipy.linalg import polar
from scipy.stats import ortho_group
from threadpoolctl import threadpool_limits
from torch import Tensor

from krd_ray.errors import ConfigError, DataError, ShapeError
from krd_ray.maths import priors
from krd_ray.maths.priors import PriorKind, balanced_priors, resolve_prior, uniformity_loss

KINDS = get_args(PriorKind)


def _means(num_classes: int, num_dims: int, seed: int = 0) -> Tensor:
    """Centred, with groups of similar classes and unequal norms, as real class means."""
    rng = np.random.default_rng(seed)
    groups = rng.standard_normal((max(2, num_classes // 4), num_dims))
    means = groups[np.arange(num_classes) % len(groups)] + 0.5 * rng.standard_normal((num_classes, num_dims))
    means *= rng.uniform(0.5, 3, (num_classes, 1))
    return torch.from_numpy(means - means.mean(axis=0))


@pytest.mark.parametrize(
    ("num_classes", "num_dims"), [(2, 1), (2, 5), (3, 2), (10, 9), (10, 10), (10, 64), (100, 99), (100, 128)]
)
def test_simplex_has_equal_cosines(num_classes: int, num_dims: int) -> None:
    u = balanced_priors(_means(num_classes, num_dims), "simplex")
    assert u.dtype == torch.float32
    assert u.shape == (num_classes, num_dims)
    want = torch.full((num_classes, num_classes), -1 / (num_classes - 1)).fill_diagonal_(1.0)
    assert (u.double() @ u.double().T - want).abs().max() < 5e-7  # what rounding to float32 leaves
    assert torch.equal(balanced_priors(_means(num_classes, num_dims)), u)


@pytest.mark.parametrize(
    ("num_classes", "num_dims"), [(2, 1), (2, 5), (3, 2), (10, 9), (10, 64), (100, 99), (100, 128)]
)
def test_simplex_meets_the_condition_of_the_nearest_frame(num_classes: int, num_dims: int) -> None:
    """trace(M U^T) is largest over all frames if and only if B^T M U^T B is symmetric with no eigenvalue < 0."""
    means = _means(num_classes, num_dims).numpy()
    u = balanced_priors(torch.from_numpy(means), "simplex").double().numpy()
    centre = np.eye(num_classes) - 1 / num_classes
    product = centre @ means @ u.T @ centre
    scale = np.linalg.norm(product, 2)
    assert np.abs(product - product.T).max() < 1e-6 * scale
    assert np.linalg.eigvalsh((product + product.T) / 2).min() > -1e-6 * scale


@pytest.mark.parametrize(("num_classes", "num_dims"), [(2, 5), (10, 9), (10, 64), (40, 45)])
def test_simplex_equals_the_polar_factor_of_the_means_seen_from_any_simplex(
    num_classes: int, num_dims: int
) -> None:
    """Reference: take one regular simplex S and turn it onto the means, U = S polar(S^T M), SciPy's factor."""
    means = _means(num_classes, num_dims).numpy()
    corners = np.sqrt(num_classes / (num_classes - 1)) * (np.eye(num_classes) - 1 / num_classes)
    basis = np.linalg.svd(corners)[2][: num_classes - 1].T  # the plane the corners lie in
    simplex = corners @ basis
    want = simplex @ polar(simplex.T @ means)[0]
    got = balanced_priors(torch.from_numpy(means), "simplex")
    np.testing.assert_allclose(got.numpy(), want, atol=1e-6)


@pytest.mark.parametrize(("num_classes", "num_dims"), [(4, 3), (6, 8)])
def test_simplex_is_aligned_better_than_any_rotation_tried(num_classes: int, num_dims: int) -> None:
    means = _means(num_classes, num_dims).numpy()
    u = balanced_priors(torch.from_numpy(means)).double().numpy()
    best = (u * means).sum()
    near = [np.linalg.qr(np.eye(num_dims) + 0.05 * g)[0] for g in _gaussians(100, num_dims)]
    for rotation in [*ortho_group.rvs(num_dims, size=200, random_state=0), *near]:
        assert ((u @ rotation) * means).sum() <= best + 1e-6


def _gaussians(num: int, num_dims: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((num, num_dims, num_dims))


def test_simplex_recovers_means_that_are_already_balanced() -> None:
    u = balanced_priors(_means(7, 12))
    assert torch.allclose(balanced_priors(4.2 * u), u, atol=1e-5)


@pytest.mark.parametrize(("num_classes", "num_dims"), [(5, 4), (5, 9), (20, 30)])
def test_rotating_the_means_rotates_the_simplex(num_classes: int, num_dims: int) -> None:
    means = _means(num_classes, num_dims)
    rotation = torch.from_numpy(ortho_group.rvs(num_dims, random_state=1))
    rotated = balanced_priors(means @ rotation)
    assert torch.allclose(rotated, (balanced_priors(means).double() @ rotation).float(), atol=1e-5)


def test_relabelling_the_classes_relabels_the_simplex() -> None:
    means, order = _means(9, 16), torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(balanced_priors(means[order]), balanced_priors(means)[order], atol=1e-5)


def test_coinciding_means_still_get_an_exact_simplex() -> None:
    means = _means(8, 16)
    means[1] = means[0]
    for degenerate in (means - means.mean(dim=0), torch.zeros(8, 16)):
        u = balanced_priors(degenerate)
        assert (u @ u.T - (8 / 7 * torch.eye(8) - 1 / 7)).abs().max() < 1e-5


@pytest.mark.parametrize(("num_classes", "num_dims"), [(4, 2), (7, 2), (10, 3), (50, 16)])
def test_too_few_dimensions_give_well_spread_unit_vectors(num_classes: int, num_dims: int) -> None:
    means = _means(num_classes, num_dims)
    u = balanced_priors(means)
    assert (u.norm(dim=1) - 1).abs().max() < 1e-5
    found = uniformity_loss(u.double().numpy())
    rng = np.random.default_rng(0)
    random = [rng.standard_normal((num_classes, num_dims)) for _ in range(50)]
    losses = [uniformity_loss(points / np.linalg.norm(points, axis=1, keepdims=True)) for points in random]
    assert found < min(losses)
    assert found < np.mean(losses) - 0.5


def test_four_points_on_a_circle_form_a_square() -> None:
    angles = torch.tensor([0.1, 0.9, 2.0, 4.0])
    u = balanced_priors(torch.stack([angles.cos(), angles.sin()], dim=1))
    gaps = torch.atan2(u[:, 1], u[:, 0]).sort().values.diff()
    assert (gaps - torch.pi / 2).abs().max() < 0.01
    order = torch.atan2(u[:, 1], u[:, 0]) - torch.atan2(u[0, 1], u[0, 0])
    assert (order % (2 * torch.pi)).diff().min() > 0  # neighbours on the circle stay neighbours


def test_too_few_dimensions_keep_each_class_near_its_own_mean() -> None:
    means = _means(40, 12)
    u = balanced_priors(means).double().numpy()
    unit = (means / means.norm(dim=1, keepdim=True)).numpy()
    own = (u * unit).sum(axis=1).mean()
    assert own > 0.4
    best = (u * means.numpy()).sum()
    rng = np.random.default_rng(0)
    assert all((u[rng.permutation(40)] * means.numpy()).sum() < best for _ in range(50))
    near = [np.linalg.qr(np.eye(12) + 0.02 * g)[0] for g in _gaussians(50, 12)]
    for rotation in [*ortho_group.rvs(12, size=50, random_state=0), *near, *(r.T for r in near)]:
        assert ((u @ rotation) * means.numpy()).sum() < best


@pytest.mark.parametrize(("num_classes", "num_dims"), [(2, 5), (3, 2), (10, 9), (10, 10), (10, 64), (60, 80)])
def test_sphere_finds_the_simplex_where_one_fits(num_classes: int, num_dims: int) -> None:
    means = _means(num_classes, num_dims)
    sphere = balanced_priors(means, "sphere").double()
    simplex = balanced_priors(means, "simplex").double()
    want = torch.full((num_classes, num_classes), -1 / (num_classes - 1)).fill_diagonal_(1.0)
    assert (sphere @ sphere.T - want).abs().max() < 1e-3
    gap = uniformity_loss(sphere.numpy()) - uniformity_loss(simplex.numpy())
    assert -1e-6 < gap < 1e-5  # no points are less crowded than the simplex
    alignment = (sphere * means).sum() / (simplex * means).sum()
    assert abs(alignment - 1) < 1e-3
    assert (sphere - simplex).abs().max() < 1e-3


def test_sphere_needs_no_more_dimensions_than_classes() -> None:
    means, num_dims = _means(8, 12), 700
    into = torch.from_numpy(np.linalg.qr(np.random.default_rng(0).standard_normal((num_dims, 12)))[0])
    wide = balanced_priors(means @ into.T, "sphere").double()
    assert (wide.norm(dim=1) - 1).abs().max() < 1e-6
    assert torch.linalg.svdvals(torch.cat([wide, means @ into.T]))[8:].max() < 1e-6
    assert (wide @ into - balanced_priors(means, "sphere").double()).abs().max() < 1e-3


def test_class_mean_priors_are_the_means_own_directions() -> None:
    means = _means(12, 5)
    u = balanced_priors(means, "class_mean")
    rows = [[value / np.sqrt(sum(v * v for v in row)) for value in row] for row in means.tolist()]
    np.testing.assert_allclose(u.numpy(), rows, atol=1e-7)
    assert torch.allclose(balanced_priors(1e-3 * means, "class_mean"), u)
    assert balanced_priors(means.half(), "class_mean").dtype == torch.float32


def test_class_mean_without_a_direction_is_refused_by_class() -> None:
    means = _means(5, 6)
    means[3] = 1e-9 * means[3]
    with pytest.raises(DataError, match=r"1 classes \(first: class 3\).*loss\.rrd\.prior to auto"):
        balanced_priors(means, "class_mean")
    with pytest.raises(DataError, match="first: class 0"):
        balanced_priors(torch.zeros(4, 4), "class_mean")
    assert balanced_priors(means, "simplex").isfinite().all()


def test_uniformity_loss_equals_a_plain_sum() -> None:
    points = balanced_priors(_means(6, 4)).double().numpy()
    rows = [np.log(sum(np.exp(points[i] @ points[j] / 0.3) for j in range(6) if j != i)) for i in range(6)]
    assert uniformity_loss(points, 0.3) == pytest.approx(np.mean(rows), rel=1e-12)


def test_matching_undoes_a_shuffle_and_a_turn() -> None:
    rng = np.random.default_rng(0)
    targets = rng.standard_normal((12, 4))
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)
    turn = np.linalg.qr(np.eye(4) + 0.1 * rng.standard_normal((4, 4)))[0]
    turn *= np.sign(np.diag(turn))
    scrambled = (targets @ turn)[rng.permutation(12)]
    assert np.abs(scrambled - targets).max() > 0.5
    np.testing.assert_allclose(priors._match_and_rotate(scrambled, 3 * targets), targets, atol=1e-9)


def test_search_follows_the_true_gradient() -> None:
    points = np.random.default_rng(0).standard_normal((6, 3)).ravel()
    objective = functools.partial(priors._free_loss_and_gradient, shape=(6, 3), temperature=0.5)
    _, gradient = objective(points)
    for index in range(18):
        step = 1e-6 * np.eye(18)[index]
        numeric = (objective(points + step)[0] - objective(points - step)[0]) / 2e-6
        assert gradient[index] == pytest.approx(numeric, abs=1e-6)


@pytest.mark.parametrize(
    ("num_dims", "kind"), [(12, "sphere"), (12, "class_mean"), *((32, kind) for kind in KINDS)]
)
def test_same_means_give_the_same_priors_in_any_thread(num_dims: int, kind: PriorKind) -> None:
    means = _means(30, num_dims)
    here = balanced_priors(means, kind)
    torch.manual_seed(5)
    with ThreadPoolExecutor(1) as other:
        assert torch.equal(other.submit(balanced_priors, means.clone(), kind).result(), here)


def test_seed_matters_to_the_search_alone() -> None:
    means = _means(12, 4)
    assert not torch.equal(balanced_priors(means, "sphere", 1), balanced_priors(means, "sphere", 2))
    assert torch.equal(balanced_priors(means, "sphere", 0), balanced_priors(means, "sphere"))
    assert torch.equal(balanced_priors(_means(5, 8), seed=1), balanced_priors(_means(5, 8), seed=2))


def test_identical_means_in_too_few_dimensions_are_separated() -> None:
    u = balanced_priors(torch.zeros(6, 2))
    assert (u @ u.T).fill_diagonal_(-1).max() < 0.6  # a hexagon has 0.5


def test_a_thousand_classes_take_seconds() -> None:
    means, started_s = _means(1000, 64), time.process_time()
    with threadpool_limits(1):  # threads that wait for each other on a busy machine count as processor time
        u = balanced_priors(means)
    assert time.process_time() - started_s < 30  # of processor time, about 3 on an idle core
    assert (u.norm(dim=1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(1, 4), (4,), (4, 0), (2, 3, 4)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"class_means must be \[C, D\]"):
        balanced_priors(torch.zeros(shape))


def test_a_mean_that_is_not_finite_is_refused_by_class() -> None:
    means = _means(5, 6)
    means[3, 2] = float("nan")
    with pytest.raises(DataError, match="first: class 3"):
        balanced_priors(means)


@pytest.mark.parametrize(
    ("kind", "num_classes", "num_dims", "want"),
    [
        ("auto", 10, 9, "simplex"),
        ("auto", 11, 9, "sphere"),
        ("simplex", 10, 9, "simplex"),
        ("sphere", 10, 512, "sphere"),
        ("class_mean", 10, 1, "class_mean"),
    ],
)
def test_kind_that_is_meant(kind: PriorKind, num_classes: int, num_dims: int, want: str) -> None:
    assert resolve_prior(kind, num_classes, num_dims) == want


def test_simplex_that_does_not_fit_is_refused_with_what_to_choose() -> None:
    with pytest.raises(
        ConfigError, match=r"between 12 classes need at least 11 .* has 10\..* auto or sphere"
    ):
        balanced_priors(_means(12, 10), "simplex")


def test_unknown_kind_is_refused_with_the_known_ones() -> None:
    unknown: Any = "etf"
    with pytest.raises(ConfigError, match="one of auto, simplex, sphere, class_mean, got 'etf'"):
        balanced_priors(_means(4, 4), unknown)
