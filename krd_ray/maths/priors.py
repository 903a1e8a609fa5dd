"""Answers where each class would sit if no class were favoured: balanced category priors.

Does not compute class means or rectify anything: see `rectify.py`. Runs once per teacher, float64, CPU.

Shapes: C classes, D feature dimensions.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from krd_ray.errors import DataError, ShapeError

Array = NDArray[np.float64]
TSC_TEMPERATURE = 0.07  # as in arXiv:2111.13998
DESCENTS = ((0.5, 30), (0.2, 30), (TSC_TEMPERATURE, 140))  # (temperature, at most so many steps)
MAX_MATCHING_ROUNDS = 20
RELATIVE_TOLERANCE = 1e-6
START_NOISE = 1e-3

_log = logging.getLogger(__name__)


def balanced_priors(class_means: Tensor, *, seed: int = 0) -> Tensor:
    """Unit vectors as far apart as C classes allow, turned towards the teacher's own class means.

    D >= C - 1: the simplex equiangular tight frame (all cosines -1 / (C - 1)) nearest to the means,

        argmax_U trace(M U^T)  over  U U^T = C / (C - 1) (I - 11^T / C)
        U = sqrt(C / (C - 1)) B polar(B^T M),   B [C, C - 1] an orthonormal basis of the complement of 1.

    D < C - 1: equal angles are impossible. A minimum of `uniformity_loss` on the sphere, found from the
    means' own directions, then matched to the means (Hungarian) and rotated onto them (Procrustes) in turn
    until neither helps. Bounded: 1000 classes in 64 dimensions take about 3 s on one core.

    Rotating the means rotates the simplex solution with them, exactly, as long as the means span C - 1
    dimensions. If they do not, the missing directions are an arbitrary, deterministic completion.

    Args:
        class_means: [C, D], C >= 2, centred by their own mean; any float dtype and scale.
        seed: of the noise that separates coinciding means at the start, D < C - 1 only.
    Returns:
        [C, D] float32 on the means' device, unit norm.
    Raises:
        ShapeError: not [C, D] with C >= 2 and D >= 1.
        DataError: a mean is not finite.
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
    means = class_means.detach().cpu().to(torch.float64).numpy()
    _refuse_non_finite(means)
    num_classes, num_dims = means.shape
    if num_dims >= num_classes - 1:
        u = _nearest_simplex(means)
    else:
        u = _match_and_rotate(_spread_points(means, seed), means)
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


# ---- D >= C - 1


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


# ---- D < C - 1


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
