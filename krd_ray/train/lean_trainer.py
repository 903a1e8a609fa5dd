"""Answers how a student's Ray Train run starts without processes that it has no use for.

Does not change how training goes. Every idle Ray process wakes a hundred times a second; what all of them take from a
machine whose cores compute stands below the table of `benchmarks/speed`.
"""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer

# Ray has no public switch for these two; they are named here and nowhere else.
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback


class LeanTrainer(TorchTrainer):
    """A TorchTrainer without the actor that hands out Ray Train's own data sets: plans say who reads what.

    Args:
        outlives_driver: the cluster goes on when the driver dies. If not, there is no actor either that frees the
            placement groups of a controller that has died: they go with the cluster.
        arguments: of TorchTrainer.
    """

    def __init__(self, *, outlives_driver: bool, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._unused = (
            (DatasetsCallback,) if outlives_driver else (DatasetsCallback, PlacementGroupCleanerCallback)
        )

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        return [each for each in callbacks if not isinstance(each, self._unused)]
