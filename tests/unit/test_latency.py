"""Answers whether latency is measured as its docstring says: in turns, one thread, median, within a budget."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from krd_ray.models import model_cost
from krd_ray.models.model_cost import (
    BUDGET_S,
    FORWARDS,
    ROUNDS,
    WARM_UPS,
    latency_conditions,
    measure_latency_ms,
)
from krd_ray.train import evaluate


class Clock:
    """A clock that only models move."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


class Timed(nn.Module):
    """A model whose forwards take the given seconds in turn, and that notes what it sees."""

    def __init__(self, name: str, took_s: Iterator[float], clock: Clock, calls: list[str]) -> None:
        super().__init__()
        self.name, self.took_s, self.clock, self.calls = name, took_s, clock, calls
        self.seen: list[tuple[Any, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append(self.name)
        self.seen.append((tuple(images.shape), torch.get_num_threads(), self.training, images.requires_grad))
        self.seen[-1] += (torch.is_inference_mode_enabled(),)
        self.clock.now_s += next(self.took_s)
        return images


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(model_cost, "time", clock)
    return clock


def forever(*seconds: float) -> Iterator[float]:
    while True:
        yield from seconds


def test_latency_is_the_median_of_what_the_forwards_after_warming_up_took(clock: Clock) -> None:
    warm_ups, timed = [9.0] * WARM_UPS, [0.001 * (index % 7) for index in range(ROUNDS * FORWARDS)]
    model = Timed("m", iter(warm_ups + timed), clock, [])
    middle = sorted(timed)[len(timed) // 2 - 1 : len(timed) // 2 + 1]
    assert measure_latency_ms({"m": model}, image_size=8, budget_s=1e9)["m"] == pytest.approx(
        500 * sum(middle)
    )
    assert len(model.seen) == WARM_UPS + ROUNDS * FORWARDS


def test_models_take_turns(clock: Clock) -> None:
    calls: list[str] = []
    models = {name: Timed(name, forever(0.001), clock, calls) for name in "abc"}
    measure_latency_ms(models, image_size=8)
    assert calls == list("abc") * WARM_UPS + list("aaabbbccc") * ROUNDS


def test_one_image_one_thread_evaluation_mode_no_gradients(clock: Clock) -> None:
    model = Timed("m", forever(0.001), clock, []).train()
    before = torch.get_num_threads()
    measure_latency_ms({"m": model}, image_size=12)
    assert set(model.seen) == {((1, 3, 12, 12), 1, False, False, True)}
    assert model.training
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("took_s", "num_rounds"), [(0.5, 3), (4.0, 1), (100.0, 1)])
def test_slow_models_end_when_the_budget_does_but_always_have_a_round(
    clock: Clock, took_s: float, num_rounds: int
) -> None:
    model = Timed("m", forever(took_s), clock, [])
    found = measure_latency_ms({"m": model}, image_size=8, budget_s=BUDGET_S)
    num_warm_ups = len(model.seen) - num_rounds * FORWARDS
    assert found["m"] == pytest.approx(1e3 * took_s)
    assert 1 <= num_warm_ups <= WARM_UPS
    assert clock.now_s <= max(BUDGET_S, (1 + FORWARDS) * took_s) + FORWARDS * took_s


def test_threads_and_modes_come_back_after_an_error() -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise ValueError(f"no {len(images)}")

    fine, broken = nn.Conv2d(3, 4, 1).train(), Broken().train()
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="no"):
        measure_latency_ms({"fine": fine, "broken": broken}, image_size=8)
    assert torch.get_num_threads() == before
    assert fine.training
    assert broken.training


def test_more_work_takes_more_time() -> None:
    small, large = nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3))
    started = time.perf_counter()
    took_ms = measure_latency_ms({"large": large, "small": small}, image_size=48)
    assert took_ms["large"] > 3 * took_ms["small"] > 0
    assert time.perf_counter() - started < BUDGET_S + 2


def test_conditions_name_the_processor_and_torch() -> None:
    conditions = latency_conditions()
    assert conditions["batch_size"] == conditions["num_threads"] == 1
    assert conditions["torch"] == torch.__version__
    assert conditions["cpu"]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and "model name" in cpuinfo.read_text():
        assert conditions["cpu"] in cpuinfo.read_text()


def test_each_kind_of_model_is_timed_once_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = {
        name: {"model": model, "role": "student", "metrics": {}}
        for name, model in (("a", "digits_net_4"), ("b", "digits_net_8"), ("c", "digits_net_4"))
    }
    passes: list[list[str]] = []

    def measured(models: dict[str, nn.Module], *, image_size: int) -> dict[str, float]:
        passes.append(list(models))
        return {name: float(len(name) + image_size) for name in models}

    monkeypatch.setattr(evaluate, "evaluate_models", lambda *_, **__: evaluated)
    monkeypatch.setattr(evaluate, "measure_latency_ms", measured)
    view: Any = type("View", (), {"side": 8})
    found = evaluate.evaluate_and_time({}, None, view, (10, 5), teacher=None, device="cpu")  # type: ignore[arg-type]
    assert passes == [["digits_net_4", "digits_net_8"]]
    assert {name: entry["latency_ms"] for name, entry in found["models"].items()} == dict.fromkeys(
        "abc", 20.0
    )
    assert found["latency"] == latency_conditions()
    assert all(entry.items() <= found["models"][name].items() for name, entry in evaluated.items())
