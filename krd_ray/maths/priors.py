"""Answers where each class would sit if no class were favoured: balanced category priors.

Does not compute class means, keep what it found (`calibration.py` does) or rectify anything (`rectify.py` does).
Runs once per teacher and kind, float64, CPU.

Shapes: C classes, D feature dimensions.
"""

from __future__ import annotations

import logging
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from krd_ray.errors import ConfigError, DataError, ShapeError

Array = NDArray[np.float64]
PriorKind = Literal["auto", "simplex", "sphere", "class_mean"]
TSC_TEMPERATURE = 0.07  # as in arXiv:2111.13998
DESCENTS = ((0.5, 30), (0.2, 30), (TSC_TEMPERATURE, 140))  # (temperature, at most so many steps)
MAX_MATCHING_ROUNDS = 20
RELATIVE_TOLERANCE = 1e-6
START_NOISE = 1e-3
SMALLEST_MEAN_FRAC = 1e-6  # of the longest mean; below it float32 has rounded the direction away

_log = logging.getLogger(__name__)


def resolve_prior(kind: PriorKind, num_classes: int, num_dims: int) -> PriorKind:
    """Which priors `kind` means here: "auto" is "simplex" where D >= C - 1, else "sphere".

    Args:
        kind: "auto" or a kind by name.
        num_classes: C >= 2.
        num_dims: D >= 1, of the teacher's features.
    Returns:
        "simplex", "sphere" or "class_mean".
    Raises:
        ConfigError: the kind is unknown, or a simplex of C classes does not fit into D dimensions.
    Example:
        >>> resolve_prior("auto", 10, 64), resolve_prior("auto", 100, 64)
        ('simplex', 'sphere')
    """
    if kind not in get_args(PriorKind):
        raise ConfigError(f"rectifier.prior must be one of {', '.join(get_args(PriorKind))}, got {kind!r}")
    fits = num_dims >= num_classes - 1
    if kind == "simplex" and not fits:
        raise ConfigError(
            f"rectifier.prior is simplex: equal angles between {num_classes} classes need at least "
            f"{num_classes - 1} feature dimensions, and this teacher has {num_dims}. Set loss.rrd.prior to "
            "auto or sphere (as far apart as the dimensions allow), or take a teacher with wider features."
        )
    if kind == "auto":
        return "simplex" if fits else "sphere"
    return kind


def balanced_priors(class_means: Tensor, kind: PriorKind = "auto", seed: int = 0) -> Tensor:
    """Unit vectors, one per class: as far apart as C classes allow, turned towards the teacher's own class means.

    simplex (needs D >= C - 1): the simplex equiangular tight frame, all cosines -1 / (C - 1), that is nearest
    to the means M,

        argmax_U trace(M U^T)  over  U U^T = C / (C - 1) (I - 11^T / C)
        U = sqrt(C / (C - 1)) B polar(B^T M),   B [C, C - 1] an orthonormal basis of the complement of 1.

    sphere (any D): a minimum of `uniformity_loss`, found from the means' own directions, then matched to the
    means (Hungarian) and rotated onto them (Procrustes) in turn until neither helps. Where D >= C - 1 that
    minimum is the simplex, to the search's tolerance; below, equal angles are impossible. Bounded: 1000 classes
    in 64 dimensions take about 3 s on one core.

    class_mean (any D): u_c = mu_c / |mu_c|, the ablation: equal norms at the teacher's own angles.

    auto: simplex where D >= C - 1, else sphere.

    Rotating the means rotates the simplex with them, exactly, as long as the means span C - 1 dimensions. If they
    do not, the missing directions are an arbitrary, deterministic completion.

    Args:
        class_means: [C, D], C >= 2, centred by their own mean; any float dtype and scale.
        kind: "auto", "simplex", "sphere" or "class_mean".
        seed: of the noise that separates coinciding means at the start, sphere only.
    Returns:
        [C, D] float32 on the means' device, unit norm.
    Raises:
        ShapeError: not [C, D] with C >= 2 and D >= 1.
        DataError: a mean is not finite, or (class_mean) has no direction.
        ConfigError: the kind is unknown, or a simplex does not fit.
    Source: simplex frame: Papyan et al. 2020 (arXiv:2008.08186). Uniform targets: TSC
        (arXiv:2111.13998); deviation: TSC starts at random and assigns targets while it trains,
        here both come from the means once, and the temperature falls to 0.07 in three descents (the same
        loss; mean cosine to 1000 clustered means in 64 dimensions 0.54 instead of 0.42).
    Example:
        >>> u = balanced_priors(torch.tensor([[3.0, 0.0], [-1.0, 1.0], [-2.0, -1.0]]))
        >>> torch.allclose(u @ u.T, 1.5 * torch.eye(3) - 0.5, atol=1e-6)
        True
    """
    if class_means.ndim != 2 or class_means.shape[0] < 2 or class_means.shape[1] < 1:
        raise ShapeError(
            f"class_means must be [C, D] with C >= 2 and D >= 1, got {tuple(class_means.shape)}: "
            "one mean feature vector per class."
        )
    kind = resolve_prior(kind, *class_means.shape)
    means = class_means.detach().cpu().to(torch.float64).numpy()
    _refuse_non_finite(means)
    if kind == "simplex":
        u = _nearest_simplex(means)
    elif kind == "sphere":
        u = _spread_on_sphere(means, seed)
    else:
        u = _own_directions(means)
    return torch.from_numpy(u).to(class_means.device, torch.float32)


def uniformity_loss(points: Array, temperature: float = TSC_TEMPERATURE) -> float:
    """How crowded unit vectors are: (1 / C) sum_i log sum_{j != i} exp(u_i . u_j / t); lower is better.

    Args:
        points: [C, D] float64, unit norm.
        temperature: t > 0.
    Returns:
        Mean over classes, nats.
    Source: TSC (arXiv:2111.13998). Deviation: j != i, so that a point does not repel itself.
    """
    return _loss_and_gradient(points, temperature)[0]


def _refuse_non_finite(means: Array) -> None:
    bad = np.flatnonzero(~np.isfinite(means).all(axis=1))
    if bad.size:
        raise DataError(
            f"the class means of {bad.size} classes are not finite (first: class {bad[0]}). Check the "
            "teacher's features of that class, and that every class has at least one training sample."
        )


# ---- simplex


def _nearest_simplex(means: Array) -> Array:
    """[C, D] the simplex frame with the largest trace(M U^T)."""
    num_classes = means.shape[0]
    basis = _complement_of_ones(num_classes)
    frame: Array = np.sqrt(num_classes / (num_classes - 1)) * basis @ _polar(basis.T @ means)
    return frame


def _complement_of_ones(num_classes: int) -> Array:
    """[C, C - 1] orthonormal columns that sum to zero (Helmert)."""
    columns = np.triu(np.ones((num_classes, num_classes - 1)))
    steps = np.arange(1, num_classes)
    columns[steps, steps - 1] = -steps
    return columns / np.sqrt(steps * (steps + 1.0))


def _polar(matrix: Array) -> Array:
    """The semi-orthogonal matrix nearest to `matrix` (its polar factor)."""
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    factor: Array = left @ right
    return factor


# ---- class_mean


def _own_directions(means: Array) -> Array:
    """[C, D] mu_c / |mu_c|."""
    norms = np.linalg.norm(means, axis=1)
    lost = np.flatnonzero(norms <= SMALLEST_MEAN_FRAC * norms.max())
    if lost.size:
        raise DataError(
            f"rectifier.prior is class_mean, but the mean features of {lost.size} classes (first: class {lost[0]}) "
            "coincide with the centre of all classes and have no direction. Set loss.rrd.prior to auto."
        )
    return _unit(means)


# ---- sphere


def _spread_on_sphere(means: Array, seed: int) -> Array:
    """[C, D] the search; more than C dimensions are left out of it, as C means cannot span them."""
    num_classes, num_dims = means.shape
    if num_dims <= num_classes:
        return _match_and_rotate(_spread_points(means, seed), means)
    span, _ = np.linalg.qr(means.T)  # [D, C], orthonormal columns
    inside = means @ span
    spread: Array = _match_and_rotate(_spread_points(inside, seed), inside) @ span.T
    return spread


def _spread_points(means: Array, seed: int) -> Array:
    """[C, D] unit vectors at a local minimum of `uniformity_loss`, reached from the means' own directions.

    At t = 0.07 two points on one spot can be a local minimum, so the descent begins at higher temperatures,
    where they push each other away; a little seeded noise before each descent separates exact ties.
    """
    from scipy.optimize import minimize  # slow to import, and only the teacher comes here

    noise = np.random.default_rng(seed)
    points = _unit(means)
    for temperature, max_steps in DESCENTS:
        start = _unit(points + START_NOISE * noise.standard_normal(means.shape))
        result = minimize(
            _free_loss_and_gradient,
            start.ravel(),
            args=(means.shape, temperature),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": max_steps, "ftol": RELATIVE_TOLERANCE},
        )
        points = _unit(result.x.reshape(means.shape))
        _log.info(
            "balanced priors: t %.2f, %d steps, loss %.4f", temperature, result.nit, result.fun / len(means)
        )
    return points


def _free_loss_and_gradient(flat: Array, shape: tuple[int, int], temperature: float) -> tuple[float, Array]:
    """C times `uniformity_loss` of points / |points|, as a function on flat space for the optimiser."""
    points = flat.reshape(shape)
    norm = np.linalg.norm(points, axis=1, keepdims=True)
    unit = points / norm
    loss, gradient = _loss_and_gradient(unit, temperature)
    along = (gradient * unit).sum(axis=1, keepdims=True)
    return loss * shape[0], ((gradient - along * unit) / norm).ravel() * shape[0]


def _loss_and_gradient(points: Array, temperature: float) -> tuple[float, Array]:
    """`uniformity_loss` and its gradient [C, D] in the points (not projected on the sphere)."""
    scaled = points @ points.T / temperature
    np.fill_diagonal(scaled, -np.inf)
    largest = scaled.max(axis=1, keepdims=True)
    share = np.exp(scaled - largest)
    total = share.sum(axis=1, keepdims=True)
    share /= total
    loss = float((np.log(total) + largest).mean())
    return loss, (share @ points + share.T @ points) / (len(points) * temperature)


def _match_and_rotate(points: Array, means: Array) -> Array:
    """Give each class one point, then turn all points, in turn, while trace(M U^T) grows."""
    from scipy.optimize import linear_sum_assignment  # slow to import, and only the teacher comes here

    alignment = -np.inf
    for _ in range(MAX_MATCHING_ROUNDS):
        _, chosen = linear_sum_assignment(means @ points.T, maximize=True)
        points = points[chosen] @ _polar(points[chosen].T @ means)
        previous, alignment = alignment, float((points * means).sum())
        if alignment - previous <= RELATIVE_TOLERANCE * abs(alignment):
            break
    return _unit(points)


def _unit(points: Array) -> Array:
    unit: Array = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    return unit
