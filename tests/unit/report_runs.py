"""Run directories as a run would write them, with made-up numbers: what the report's tests read.

Does not test anything.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from krd_ray.report import tables
from krd_ray.report.tables import group_of

NUM_CLASSES = 12
MODELS = {
    "resnet8": (80_000, 12_000_000),
    "resnet20": (270_000, 41_000_000),
    "resnet56": (860_000, 126_000_000),
}
LOSSES = {"krd": "balanced_softmax+rrd+lrd", "ce": "cross_entropy"}
GAINS = {"balanced_softmax+rrd+lrd": 0.05, "cross_entropy": -0.03, "balanced_softmax": 0.02}
ERROR = "step 14: loss is <NaN> in term 'lrd', ids 3, 9"


def write_run(
    folder: Path,
    *,
    models: tuple[str, ...] = ("resnet8", "resnet20"),
    num_classes: int = NUM_CLASSES,
    num_epochs: int = 3,
    teacher: bool = True,
    evaluated: bool = True,
    ledger: bool = True,
    val: bool = True,
    failed: str | None = None,
    seed: int = 0,
    methods: dict[str, str] | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    ratio: float = 100,
    latency: bool = True,
) -> Path:
    """Write a run directory as a run would, with made-up numbers; returns it.

    Args:
        failed: the student that did not finish.
        methods: of a comparison, name -> loss; each is trained with each model and each of `seeds`.
        ratio: head count over tail count, 500 over 5 for 100.
        latency: with the time of a forward in evaluation.json.
    """
    rng = np.random.default_rng(seed)
    counts = [max(3, round(500 * ratio ** (-index / (num_classes - 1)))) for index in range(num_classes)]
    entries_of = student_entries(models, methods, seeds)
    students = {entry["name"]: (entry["model"], loss) for entry, loss in entries_of}
    config = {
        "name": "demo-lt",
        "seed": seed,
        "teacher": {"weights": "teacher.safetensors", "model": "resnet110"} if teacher else None,
        "students": [entry for entry, _ in entries_of],
        "train": {"epochs": num_epochs, "lr": 0.1},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    write_json(folder / "environment.json", {"python": "3.11.2", "torch": "2.8.0", "device": "cpu, 2 cores"})
    splits = {name: split(rng, num_classes) for name in ("val", "test")}
    if not val:
        del splits["val"]
    write_json(
        folder / "dataset.json",
        {
            "name": "demo",
            "classes": [f"class {index}" for index in range(num_classes)],
            "num_classes": num_classes,
            "splits": {"train": {"num_rows": sum(counts), "class_counts": counts}, **splits},
            "long_tail": {"profile": "exponential", "imbalance_ratio": float(ratio)},
        },
    )
    entries: dict[str, Any] = {}
    if teacher:
        entries["teacher"] = model_entry(rng, counts, "teacher", "resnet110", 0.12)
    for name, (model, loss) in students.items():
        gain = 0.03 * list(MODELS).index(model) + GAINS.get(loss, 0.0)
        status = "failed" if name == failed else "finished"
        write_student(folder / "students" / name, name, model, loss, status, num_epochs, gain, val, rng)
        if status == "finished":
            entries[name] = model_entry(rng, counts, "student", model, gain, tail_gain=gain)
    if evaluated:
        conditions = {"batch_size": 1, "num_threads": 1, "cpu": "Abacus 5", "torch": "2.8.0"}
        for entry in entries.values() if latency else ():
            entry["latency_ms"] = entry["num_flops"] / 1e7
        timed = {"latency": conditions} if latency else {}
        test = {"split": "test", "num_samples": splits["test"]["num_rows"], **timed, "models": entries}
        write_json(folder / "evaluation.json", test)
    if ledger:
        write_json(folder / "ledger.json", ledger_entry(list(students), sum(counts) * num_epochs, teacher))
    return folder


def student_entries(
    models: tuple[str, ...], methods: dict[str, str] | None, seeds: tuple[int, ...]
) -> list[tuple[dict[str, Any], str]]:
    """The config's students, each with its loss."""
    if methods is None:
        plain = [(short, model, loss) for model in models for short, loss in LOSSES.items()]
        return [({"name": f"{short}-{model}", "model": model}, loss) for short, model, loss in plain]
    return [
        ({"name": f"{method}.{model}.s{seed}", "model": model, "method": method, "seed": seed}, loss)
        for seed in seeds
        for model in models
        for method, loss in methods.items()
    ]


def split(rng: np.random.Generator, num_classes: int) -> dict[str, Any]:
    per_class = int(rng.integers(20, 100))
    return {"num_rows": per_class * num_classes, "class_counts": [per_class] * num_classes}


def model_entry(
    rng: np.random.Generator, counts: list[int], role: str, model: str, gain: float, tail_gain: float = 0.0
) -> dict[str, Any]:
    log_share = np.log(np.asarray(counts) / counts[-1]) / np.log(counts[0] / counts[-1])
    mean = 0.30 + gain + tail_gain + (0.5 - tail_gain) * log_share
    accuracy = np.clip(mean + 0.07 * rng.standard_normal(len(counts)), 0.01, 0.99)
    pairs = list(zip(accuracy, map(group_of, counts), strict=True))
    groups = {name: [value for value, group in pairs if group == name] for name in tables.GROUPS}
    params, flops = MODELS.get(model, (1_730_000, 255_000_000))
    return {
        "role": role,
        "model": model,
        "num_params": params,
        "num_flops": flops,
        "metrics": {
            "top1": accuracy.mean(),
            **{name: float(np.mean(values)) if values else None for name, values in groups.items()},
            "balanced": accuracy.mean(),
            "worst_class": accuracy.min(),
            "harmonic_mean": len(counts) / (1 / accuracy).sum(),
            "ece": 0.05 + 0.1 * rng.random(),
            "agreement": 0.6 + 0.2 * rng.random() if role == "student" else None,
        },
        "per_class_accuracy": accuracy.tolist(),
    }


def write_student(
    folder: Path, name: str, model: str, loss: str, status: str, num_epochs: int, gain: float, val: bool,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    done = num_epochs if status == "finished" else 1
    rows: list[dict[str, Any]] = []
    for epoch in range(done):
        shared = {
            "time": 1.7e9 + epoch,
            "student": name,
            "attempt": 0,
            "epoch": epoch,
            "step": 12 * (epoch + 1),
        }
        level = 1 - np.exp(-3 * (epoch + 1) / num_epochs) + 0.02 * rng.standard_normal()
        rows.append({**shared, "split": "progress", "loss": 9.0, "images_per_s": 1.0})
        rows.append({**shared, "split": "train", "loss": 3.2 - 2.2 * level, "images_per_s": 812.0})
        if val:
            accuracy = max(0.0, (0.5 + gain) * level)
            rows.append(
                {
                    **shared,
                    "split": "val",
                    "loss": 2.0,
                    "top1": accuracy + 0.02,
                    "balanced": accuracy,
                    "many": accuracy + 0.1,
                    "medium": accuracy,
                    "few": accuracy / 2,
                    "ece": 0.1,
                }
            )
        rows.append({**shared, "split": "coverage", "seen": 400, "missed": 0, "doubled": 0, "left_out": 3})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    params, flops = MODELS[model]
    result = {
        "student": name, "model": model, "loss_name": loss, "status": status,
        "error": ERROR if status == "failed" else None, "epochs_done": done, "num_params": params,
        "num_flops": flops, "seconds": 340.5, "restarts": int(status == "failed"), "images_per_s": 812.0,
        "wait_frac": 0.08,
    }  # fmt: skip
    write_json(folder / "result.json", result)


def ledger_entry(names: list[str], num_samples: int, teacher: bool) -> dict[str, Any]:
    """A ledger whose figures agree with each other; each student's steps cost more than those of the one before."""
    cost, steps = 0.0021, {name: (0.003 + 0.0015 * index) * num_samples for index, name in enumerate(names)}
    protocol = {name: 0.04 * value + 0.1 for name, value in steps.items()}
    students = {
        name: {
            "samples": num_samples, "compute_s": 300.0 + 40 * index, "wait_targets_s": 25.0 - 2 * index % 20,
            "wait_data_s": 4.0 + index, "cpu_s": steps[name] + protocol[name], "step_cpu_s": steps[name],
            "teacher_cpu_s": 0.0, "marginal_cost": 1 + protocol[name] / steps[name], "requests": 120,
            "retries": index % 2, "restarts": 0, "private_bytes_peak": (300 + 50 * index) << 20,
            "private_bytes_per_epoch": 1536.0,
        }
        for index, name in enumerate(names)
    }  # fmt: skip
    cpu_s = cost * num_samples
    served = {
        "forwards": num_samples, "unique_views": num_samples, "hits": num_samples * (len(names) - 2),
        "joined": num_samples, "busy_s": 210.0, "idle_s": 190.0, "bytes_in": 3 << 26, "bytes_out": 5 << 24,
        "restarts": 1, "padded_rows": 96, "calibration_forwards": 2000, "store_memory_bytes": 7 << 20,
        "store_disk_bytes": 0, "replicas": 2, "rows": num_samples * len(names), "cpu_s": cpu_s,
        "process_cpu_s": 1.1 * cpu_s, "protocol_cpu_s": 0.1 * cpu_s, "private_bytes_peak": 900 << 20,
    }  # fmt: skip
    alone, ideal = len(names) * cpu_s + sum(steps.values()), cpu_s + sum(steps.values())
    measured = ideal + 0.1 * cpu_s + sum(protocol.values())
    found = {
        "forwards_per_unique_view": 1.0, "cost_teacher_s_per_sample": cost, "alone_cpu_s": alone,
        "measured_cpu_s": measured, "ideal_cpu_s": ideal, "A": alone / measured, "A_star": alone / ideal,
        "eta": ideal / measured,
        "eta_loss": {
            "teacher_protocol_s": 0.1 * cpu_s, "student_protocol_s": protocol, "repeated_forwards_s": 0.0,
        },
    }  # fmt: skip
    return {
        "students": students,
        "teacher": served if teacher else None,
        **(found if teacher else dict.fromkeys(found)),
        "cost_student_s_per_sample": {name: value / num_samples for name, value in steps.items()},
        "driver_bytes": {"pixels": 0, "targets": 0},
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def read_json(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded
