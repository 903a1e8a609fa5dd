"""Answers whether targets come faster to a student on the same GPU by Ray's device-to-device transport.

`python -m benchmarks.device_transport` needs a GPU. Two actors share it; one makes a batch of float16 targets there,
the other adds them up there. By host: an array of the object store or of the reply, copied to the device as a student
does. By device: CUDA IPC, Ray's transport for processes on one card.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import ray
import torch
import typer

from benchmarks.entry import run_command
from krd_ray.config import RayConfig
from krd_ray.errors import ResourceError
from krd_ray.maths.transfer import on_device
from krd_ray.train.cluster import connected
from krd_ray.train.rundir import environment, write_json

RESULT = Path(__file__).parent / "results" / "device_transport.json"
SHAPES = ((128, 1034), (256, 3048), (1024, 3048))  # rows, classes and features
WARM_UP, REPEATS = 5, 40


@ray.remote(num_cpus=1, num_gpus=0.3)
class Teacher:
    def __init__(self) -> None:
        self._targets = {shape: torch.randn(shape, device="cuda", dtype=torch.float16) for shape in SHAPES}

    def by_host(self, shape: tuple[int, int]) -> Any:
        return (self._targets[shape] + 1).cpu().numpy()

    @ray.method(tensor_transport="cuda_ipc")
    def by_device(self, shape: tuple[int, int]) -> Any:
        return self._targets[shape] + 1


@ray.remote(num_cpus=1, num_gpus=0.3, enable_tensor_transport=True)  # type: ignore[call-overload]
class Student:
    def add_up(self, targets: Any) -> float:
        on_card = targets if isinstance(targets, torch.Tensor) else on_device(targets, torch.device("cuda"))
        return float(on_card.float().sum())


def main(result: Annotated[Path, typer.Option(help="JSON file of all figures")] = RESULT) -> None:
    """Measure milliseconds from one actor's device memory to the sum in the other's; the two ways take turns."""
    if not torch.cuda.is_available():
        raise ResourceError("this benchmark needs a GPU, and torch finds none here")
    found = []
    with connected(RayConfig(num_cpus=4)):
        teacher, student = Teacher.remote(), Student.remote()
        ways = {"host": teacher.by_host, "device": teacher.by_device}
        for shape in SHAPES:
            took_ms: dict[str, list[float]] = {way: [] for way in ways}
            for number in range(WARM_UP + REPEATS):
                for way, targets in ways.items():
                    started = time.perf_counter()
                    ray.get(student.add_up.remote(targets.remote(shape)))
                    if number == 0:
                        typer.echo(f"by {way}: the first answer took {time.perf_counter() - started:.2f} s")
                    if number >= WARM_UP:
                        took_ms[way].append((time.perf_counter() - started) * 1e3)
            medians = {way: round(median(each), 2) for way, each in took_ms.items()}
            found.append({"shape": shape, "ms": medians, "all_ms": took_ms})
            typer.echo(f"{shape[0]} rows of {shape[1]} values: {medians} ms")
    write_json(result, {"found": found, "environment": environment()})


if __name__ == "__main__":
    run_command(main)
