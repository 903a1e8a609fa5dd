"""Answers whether the parts of training do what they say on their own: objective, student, sums, files, displays.

Does not start Ray or train.
"""

from __future__ import annotations

import io
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from krd_ray.config import Resources, RunConfig, TrainConfig
from krd_ray.config_loss import LossConfig
from krd_ray.config_io import dump_config, parse_config
from krd_ray.data.shard_options import ShardOptions
from krd_ray.data.shards import write_shards
from krd_ray.data.sources import SourceSpec, open_source
from krd_ray.errors import ConfigError, DataError, ResourceError, RunError, TeacherError
from krd_ray.maths.rectify import Rectifier
from krd_ray.models.registry import build_model, describe_model
from krd_ray.teacher.weights import ModelCard, save_weights
from krd_ray.train import students
from krd_ray.train.cluster import Demand, check_resources, demands_of
from krd_ray.train.ledger import build_ledger
from krd_ray.train.live import COLUMNS, Progress
from krd_ray.train.loop import WorkerSpec
from krd_ray.train.objective import StepTargets, objective_terms, rectifier_for
from krd_ray.train.prepare import prepare
from krd_ray.train.reduce import all_finite, coverage, sum_over_ranks
from krd_ray.train.rundir import MetricsLog, RunDir, StudentDir, environment, read_json, write_json
from krd_ray.train.student import build_optimizer, build_student, lr_factor
from krd_ray.train.students import summarise

CPU = torch.device("cpu")


def loss_config(**parts: Any) -> LossConfig:
    return LossConfig.model_validate(parts)


# objective


def log_softmax(z: np.ndarray) -> np.ndarray:
    shifted = z - z.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def test_loss_is_the_weighted_sum_of_its_terms_by_hand() -> None:
    rng = np.random.default_rng(0)
    z_s, z_t = rng.standard_normal((6, 4)), rng.standard_normal((6, 4)) * 2
    f_s, f_t = rng.standard_normal((6, 3)), rng.standard_normal((6, 3))
    f_t /= np.linalg.norm(f_t, axis=1, keepdims=True)
    labels, counts = np.array([0, 1, 2, 3, 0, 1]), np.array([50, 20, 5, 1])
    loss = loss_config(
        classification={"name": "balanced_softmax", "weight": 0.5},
        rrd={"weight": 2.0},
        lrd={"weight": 0.25, "temperature": 3.0},
    )
    terms = objective_terms(
        loss,
        student_logits=torch.tensor(z_s),
        projected=torch.tensor(f_s),
        labels=torch.tensor(labels),
        class_counts=torch.tensor(counts),
        targets=StepTargets(torch.tensor(z_t), torch.tensor(f_t)),
    )
    classification = -log_softmax(z_s + np.log(counts))[np.arange(6), labels].mean()
    log_t, log_s = log_softmax(z_t / 3), log_softmax(z_s / 3)
    lrd = 9 * (np.exp(log_t) * (log_t - log_s)).sum(axis=1).mean()
    rrd = (1 - (f_s * f_t).sum(axis=1) / np.linalg.norm(f_s, axis=1)).mean()
    expected = {"classification": classification, "rrd": rrd, "lrd": lrd}
    expected["loss"] = 0.5 * classification + 2 * rrd + 0.25 * lrd
    assert set(terms) == set(expected)
    for name, value in terms.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected[name], rel=1e-5), name


def test_plain_distillation_and_no_teacher_have_only_their_own_terms() -> None:
    given_: dict[str, Any] = {
        "student_logits": torch.tensor([[1.0, 0.0]]),
        "projected": None,
        "labels": torch.tensor([0]),
        "class_counts": torch.tensor([3, 1]),
    }
    alone = objective_terms(loss_config(), **given_, targets=None)
    assert set(alone) == {"loss", "classification"}
    assert alone["loss"].item() == pytest.approx(math.log(1 + math.exp(-1)))
    targets = StepTargets(torch.tensor([[1.0, 0.0]]), None)
    taught = objective_terms(loss_config(kd={"weight": 5.0}), **given_, targets=targets)
    assert set(taught) == {"loss", "classification", "kd"}
    assert taught["kd"].item() == pytest.approx(0.0, abs=1e-7), "student and teacher agree"


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({}, None),
        ({"kd": {"weight": 1}}, Rectifier(tau_prior=0.0, exchange=False, features="off", send_logits=True)),
        ({"lrd": {"weight": 1, "tau_prior": 0.5}}, Rectifier(tau_prior=0.5, exchange=True)),
        ({"lrd": {"weight": 1, "exchange": False}}, Rectifier(tau_prior=1.0)),
        ({"rrd": {"weight": 1}}, Rectifier(features="balanced", send_logits=False)),
        (
            {
                "rrd": {"weight": 1, "target": "mix", "gate": "by_count", "gate_strength": 0.5},
                "kd": {"weight": 1},
            },
            Rectifier(features="mix", gate="by_count", gate_strength=0.5),
        ),
    ],
)
def test_objective_asks_for_exactly_the_targets_it_uses(
    parts: dict[str, Any], expected: Rectifier | None
) -> None:
    assert rectifier_for(loss_config(**parts)) == expected


def test_temperatures_do_not_change_what_is_asked_for() -> None:
    forms = {
        rectifier_for(loss_config(lrd={"weight": w, "temperature": t})) for w in (0.1, 2) for t in (1, 4)
    }
    assert len(forms) == 1


# student


@given(
    schedule=st.sampled_from(["cosine", "step", "constant"]),
    epochs=st.integers(1, 50),
    warmup=st.floats(0, 60),
    share=st.floats(0, 1),
)
@settings(max_examples=50, deadline=None)
def test_learning_rate_never_exceeds_its_setting(
    schedule: Any, epochs: int, warmup: float, share: float
) -> None:
    factor = lr_factor(
        TrainConfig(epochs=epochs, schedule=schedule, warmup_epochs=warmup, milestones=(epochs // 2,))
    )
    assert 0 <= factor(share * epochs) <= 1


def test_schedules_by_hand() -> None:
    warm = lr_factor(TrainConfig(epochs=12, warmup_epochs=2))
    assert [warm(epoch) for epoch in (0.0, 1.0, 2.0, 7.0, 12.0)] == pytest.approx(
        [0.0005, 0.5005, 1.0, 0.5, 0.0]
    )
    steps = lr_factor(TrainConfig(epochs=9, schedule="step", milestones=(6, 3), gamma=0.5))
    assert [steps(epoch) for epoch in (0.0, 2.999, 3.0, 5.9, 6.0, 8.9)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert lr_factor(TrainConfig(schedule="constant"))(57.0) == 1.0


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_biases_and_normalisation_are_not_decayed(name: Any) -> None:
    student = build_student("resnet8", num_classes=4, side=8, seed=0, teacher_dim=6)
    optimizer = build_optimizer(student, TrainConfig(optimizer=name, weight_decay=0.1))
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay_of) == len(list(student.parameters()))
    for parameter_name, parameter in student.named_parameters():
        one_dimensional = "bn" in parameter_name or "bias" in parameter_name or parameter.ndim == 1
        assert decay_of[id(parameter)] == (0.0 if one_dimensional else 0.1), parameter_name
    assert type(optimizer).__name__.lower() == name


def test_training_without_momentum_is_plain_gradient_descent() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    optimizer = build_optimizer(layer, TrainConfig(momentum=0, nesterov=False, weight_decay=0, lr=0.5))
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before - 0.5)


def test_student_is_a_function_of_its_seed_and_leaves_the_global_generator_alone() -> None:
    settings_: dict[str, Any] = {"num_classes": 4, "side": 8, "teacher_dim": 6}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build_student("digits_net_4", seed=3, **settings_).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = build_student("digits_net_4", seed=3, **settings_).state_dict()
    other = build_student("digits_net_4", seed=4, **settings_).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["projector.weight"], other["projector.weight"])
    assert not torch.equal(first["net.head.weight"], other["net.head.weight"])


def test_projector_gives_the_teachers_width_and_is_left_out_without_one() -> None:
    view = torch.zeros(2, 3, 8, 8)
    logits, projected = build_student("digits_net_4", num_classes=4, side=8, seed=0, teacher_dim=6)(view)
    assert (tuple(logits.shape), tuple(projected.shape)) == ((2, 4), (2, 6))
    alone = build_student("digits_net_4", num_classes=4, side=8, seed=0, teacher_dim=None)
    assert alone(view)[1] is None
    assert not [name for name in alone.state_dict() if "projector" in name]


# reduce


def test_coverage_counts_seen_missed_doubled_and_left_out() -> None:
    ids = np.array([2, 4, 6, 8, 10, 12])
    once = np.ones(6, np.int64)
    whole = coverage(ids, once - (ids == 10), [np.array([12, 2]), np.array([4, 6, 8])], [10], CPU)
    assert whole == {"seen": 5, "missed": 0, "doubled": 0, "left_out": 1, "left_out_ids": [10]}
    expected = once - np.isin(ids, [8, 10])
    torn = coverage(ids, expected, [np.array([2, 2, 4]), np.array([10])], [10, 8], CPU)
    assert torn == {"seen": 3, "missed": 2, "doubled": 2, "left_out": 2, "left_out_ids": [8, 10]}
    assert coverage(ids, once, [], [], CPU)["missed"] == 6


def test_coverage_is_counted_against_the_copies_that_the_plan_wants() -> None:
    ids, expected = np.array([2, 4, 6]), np.array([3, 0, 1])
    assert coverage(ids, expected, [np.array([2, 6, 2]), np.array([2])], [], CPU) == {
        "seen": 2, "missed": 0, "doubled": 0, "left_out": 0, "left_out_ids": [],
    }  # fmt: skip
    torn = coverage(ids, expected, [np.array([2, 4]), np.array([4, 6, 6])], [2, 2], CPU)
    assert torn == {"seen": 3, "missed": 2, "doubled": 3, "left_out": 2, "left_out_ids": [2, 2]}


def test_one_worker_alone_is_its_own_sum() -> None:
    assert sum_over_ranks(torch.tensor([1.0, 2.0]), CPU).tolist() == [1.0, 2.0]
    assert all_finite([1.0, -2.0], CPU)
    assert not all_finite([1.0, math.nan], CPU)
    assert not all_finite([math.inf], CPU)


# run directory


def test_run_directory_that_was_used_is_refused(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(RunError, match=r"is not a run directory: it has no config\.yaml"):
        run.require()
    run.create()
    run.create()  # nothing has been written yet
    run.config.write_text("name: x\n")
    with pytest.raises(RunError, match="holds a run already; continue it with `krd distill --resume"):
        run.create()
    run.require()


def test_json_is_whole_or_old_and_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}

    def power_cut(*_: object) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", power_cut)
        with pytest.raises(OSError, match="power cut"):
            write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}
    write_json(path, {"a": 3})
    assert read_json(path) == {"a": 3}
    assert [entry.name for entry in path.parent.iterdir()] == ["result.json"]


def test_half_a_line_of_a_killed_writer_is_left_out_and_cut_off(tmp_path: Path) -> None:
    folder = StudentDir(tmp_path / "s")
    assert (folder.rows(), folder.next_attempt()) == ([], 0)
    MetricsLog(folder, "s", 0).write("train", 0, 5, loss=1.5)
    with folder.metrics.open("a") as file:
        file.write('{"time": 3, "stud')
    assert [row["loss"] for row in folder.rows()] == [1.5]
    assert folder.next_attempt() == 1
    MetricsLog(folder, "s", 1).write("val", 0, 5, many=0.5)
    lines = folder.metrics.read_text().splitlines()
    assert [json.loads(line)["split"] for line in lines] == ["train", "val"]
    assert folder.rows()[1] | {"time": 0} == {
        "time": 0, "student": "s", "attempt": 1, "epoch": 0, "step": 5, "split": "val", "many": 0.5,
    }  # fmt: skip


def test_environment_names_versions() -> None:
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["numpy"] == np.__version__


# ledger


def train_row(epoch: int, **more: float) -> dict[str, Any]:
    """A `train` row of 100 samples: 4 s, of which 1 s waiting, 2 CPU seconds of steps, 3 in all."""
    sums = {"compute_s": 3.0, "wait_targets_s": 0.75, "wait_data_s": 0.25, "cpu_s": 3.0, "step_cpu_s": 2.0}
    counts = {"requests": 5, "retries": 1, "bytes_received": 1000}
    speed = {"loss": 1.25, "images_per_s": 25.0 + epoch}
    return {"num_samples": 100, **sums, **counts, **speed, **more}


def write_student(run: RunDir, name: str, *, epochs: int, attempts: int = 1, val: float = 0.5) -> None:
    for attempt in range(attempts):
        log = MetricsLog(run.student(name), name, attempt)
        log.write(
            "start", 0, 0, session=max(attempt - 1, 0)
        )  # the second start is a restart, the third a resume
        for epoch in range(epochs):
            log.write("train", epoch, 7, **train_row(epoch))
            log.write("val", epoch, 7, many=val, medium=None, few=0.25)
            log.write("coverage", epoch, 7, seen=99, missed=0, doubled=0, left_out=1, left_out_ids=[3])


def stats_row(replica: int, incarnation: int, **more: Any) -> dict[str, Any]:
    summed = dict.fromkeys(
        ["requests", "rows", "hits", "joined", "forward_calls", "padded_rows", "bytes_in", "bytes_out"], 10
    )
    seconds = {"busy_s": 1.0, "cpu_s": 8.0, "process_cpu_s": 10.0, "idle_s": 2.0}
    peaks = {"store_memory_bytes": 7, "store_disk_bytes": 0, "queue_peak_rows": 9, "calibration_forwards": 50}
    names = {"replica": replica, "incarnation": incarnation, "restarted": incarnation > 0}
    return {**names, **summed, **seconds, **peaks, "forwards": 100, "unique_views": 100, **more}


def write_stats(run: RunDir, replica: int, rows: list[dict[str, Any]], tail: str = "") -> None:
    run.teacher.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows) + tail
    (run.teacher / f"stats-{replica}.jsonl").write_text(text)


def test_ledger_figures_by_hand(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_student(run, "a", epochs=2)
    write_student(run, "b", epochs=2)
    write_student(run, "alone", epochs=1)
    early = stats_row(0, 0, forwards=1, cpu_s=0.1, queue_peak_rows=20)
    write_stats(run, 0, [early, stats_row(0, 0)], tail='{"half')
    write_stats(run, 1, [stats_row(1, 0), stats_row(1, 1, unique_views=50)])
    ledger = build_ledger(
        run, ["a", "b", "alone"], taught=["a", "b"], driver_bytes={"pixels": 0}, on_cpu=True
    )

    teacher = ledger["teacher"]
    assert (teacher["forwards"], teacher["unique_views"], teacher["rows"]) == (300, 250, 30)
    assert (teacher["replicas"], teacher["restarts"], teacher["queue_peak_rows"]) == (2, 1, 18)
    assert ledger["forwards_per_unique_view"] == pytest.approx(1.2)
    a = ledger["students"]["a"]
    assert (a["samples"], a["compute_s"], a["wait_targets_s"], a["retries"]) == (200, 6.0, 1.5, 2)
    assert (a["epochs"], a["left_out"], a["restarts"]) == (2, 2, 0)

    c_t, c_i = 24 / 300, 4 / 200
    assert ledger["cost_teacher_s_per_sample"] == pytest.approx(c_t)
    assert ledger["cost_student_s_per_sample"] == pytest.approx({"a": c_i, "b": c_i, "alone": c_i})
    gain = 2 * 200 * (c_t + c_i) / (30 + 2 * 6)
    best = 400 * (c_t + c_i) / (250 * c_t + 400 * c_i)
    assert (ledger["A"], ledger["A_star"]) == (pytest.approx(gain), pytest.approx(best))
    assert ledger["eta"] == pytest.approx(gain / best)
    assert ledger["driver_bytes"] == {"pixels": 0}
    on_gpu = build_ledger(run, ["a", "b"], taught=["a", "b"], driver_bytes={}, on_cpu=False)
    assert (on_gpu["A"], on_gpu["A_star"], on_gpu["eta"]) == (None, None, None)


def test_repeated_epochs_count_as_trained_but_their_coverage_counts_once(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_student(run, "a", epochs=2, attempts=3)
    entry = build_ledger(run, ["a"], taught=[], driver_bytes={}, on_cpu=True)["students"]["a"]
    assert (entry["samples"], entry["epochs"], entry["left_out"]) == (600, 2, 2)
    assert (entry["restarts"], entry["sessions"]) == (1, 2)


def test_ledger_without_teacher_or_samples_claims_no_gain(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    ledger = build_ledger(run, ["a"], taught=[], driver_bytes={}, on_cpu=True)
    assert (ledger["teacher"], ledger["A"], ledger["eta"]) == (None, None, None)
    assert ledger["cost_student_s_per_sample"] == {"a": None}
    write_stats(run, 0, [stats_row(0, 0)])
    assert build_ledger(run, ["a"], taught=["a"], driver_bytes={}, on_cpu=True)["A"] is None


# cluster


def raw_run(folder: Path | str = "shards", **more: Any) -> dict[str, Any]:
    students = [{"name": "s", "model": "digits_net_4", "resources": {"num_cpus": 0.5}}]
    return {"name": "run", "data": {"dir": str(folder)}, "students": students, **more}


def test_every_process_of_a_run_is_demanded() -> None:
    config = parse_config(
        raw_run(teacher={"weights": "w", "replicas": 2, "resources": {"num_cpus": 1, "num_gpus": 0.5}})
        | {
            "students": [
                {"name": "s", "model": "m", "workers": 3, "loss": {"kd": {"weight": 1}}},
                {"name": "t", "model": "m"},
            ]
        }
    )
    taught, alone = config.students
    demands = demands_of(config, config.students, streams=False)
    assert [demand.who for demand in demands] == [
        "teacher replica 0", "teacher replica 1",
        "student s worker 0", "student s worker 1", "student s worker 2", "student t worker 0",
    ]  # fmt: skip
    assert demands[0].resources == {"CPU": 1.0, "GPU": 0.5}
    assert [demand.who for demand in demands_of(config, [alone], streams=False)] == ["student t worker 0"]
    streamed = demands_of(config, [taught, alone], streams=True)
    assert len(streamed) == 7
    assert 0 < streamed[-1].resources["CPU"] < 1


def demands(*resources: dict[str, float]) -> list[Demand]:
    return [Demand(f"process {index}", amounts) for index, amounts in enumerate(resources)]


@pytest.mark.parametrize(
    ("wanted", "nodes"),
    [
        ([{"CPU": 0.25}] * 8, [{"CPU": 2.0}]),
        ([{"CPU": 0.1}] * 10, [{"CPU": 1.0}]),
        ([{"CPU": 1.0}, {"CPU": 3.0}, {"CPU": 2.0}], [{"CPU": 3.0}, {"CPU": 3.0}]),
        ([{"CPU": 3.0}, {"CPU": 1.0}], [{"CPU": 3.0}, {"CPU": 1.0}]),
        ([{"CPU": 1.0}, {"CPU": 3.0}], [{"CPU": 3.0}, {"CPU": 1.0}]),
        ([{"CPU": 4.0}, {"CPU": 1.0, "GPU": 1.0}], [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0}]),
        ([{"CPU": 2.0}, {"CPU": 2.0, "disk": 1.0}], [{"CPU": 2.0, "disk": 1.0}, {"CPU": 2.0}]),
        ([{}], [{"CPU": 1.0}]),
    ],
)
def test_run_that_fits_is_accepted(wanted: list[dict[str, float]], nodes: list[dict[str, float]]) -> None:
    before = [dict(node) for node in nodes]
    check_resources(demands(*wanted), nodes)
    assert nodes == before


@pytest.mark.parametrize(
    ("wanted", "nodes", "expected"),
    [
        (
            [{"CPU": 1.0}] * 3,
            [{"CPU": 2.0, "memory": 5e9}],
            "the run needs 3 CPU in 3 processes, the cluster has 2 CPU",
        ),
        ([{"CPU": 2.0}] * 2, [{"CPU": 3.0}, {"CPU": 1.0}], "the cluster has 4 CPU on 2 node(s)"),
        ([{"CPU": 1.0, "GPU": 1.0}], [{"CPU": 8.0}], "process 0 needs 1 CPU, 1 GPU and finds no place"),
        ([{"CPU": 1.0}], [], "the cluster has nothing on 0 node(s)"),
    ],
)
def test_run_that_does_not_fit_is_refused_with_both_sides(
    wanted: list[dict[str, float]], nodes: list[dict[str, float]], expected: str
) -> None:
    with pytest.raises(ResourceError) as caught:
        check_resources(demands(*wanted), nodes)
    assert expected in caught.value.message
    assert "students.*.resources" in caught.value.message


# live


def test_elsewhere_than_in_a_terminal_each_epoch_is_one_line(tmp_path: Path) -> None:
    run, out = RunDir(tmp_path), io.StringIO()
    with Progress(run, {"a": 3, "b": 3}, Console(file=out, width=40)) as progress:
        progress.refresh({"a": "training"})
        assert out.getvalue() == ""
        write_student(run, "a", epochs=1)
        progress.refresh({"a": "training"})
        progress.refresh({"a": "training"})
        progress.say("step [14] failed: [red]")
    lines = out.getvalue().splitlines()
    assert lines == [
        "student a | state training | epoch 1/3 | loss 1.250 | val many 50.0% | medium - | few 25.0% | "
        "images/s 25 | waiting 25%",
        "step [14] failed: [red]",
    ]


def test_in_a_terminal_there_is_a_table_of_all_students(tmp_path: Path) -> None:
    run, out = RunDir(tmp_path), io.StringIO()
    write_student(run, "a", epochs=2)
    with Progress(run, {"a": 2, "b": 5}, Console(file=out, force_terminal=True, width=120)) as progress:
        progress.refresh({"a": "finished"})
    text = out.getvalue()
    assert all(column in text for column in COLUMNS)
    assert "finished" in text
    assert "2/2" in text
    assert "waiting" in text
    assert "0/5" in text


# result.json


def worker_spec(run: RunDir, name: str) -> WorkerSpec:
    """Only what `summarise` reads is real."""
    view: Any = type("View", (), {"side": 8})()
    nothing: Any = None
    return WorkerSpec(
        student=name, model="digits_net_4", train=TrainConfig(), loss=loss_config(rrd={"weight": 1}), view=view,
        cycle=None, train_shards=nothing, val_shards=None, class_counts=(5, 4, 3), seed=0, shuffle_seed=0,
        window_rows=1, folder=str(run.student(name).root), session=0, dataset_hash="", num_threads=1, teacher=None,
    )  # fmt: skip


def test_result_sums_up_the_rows_of_a_student(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_student(run, "a", epochs=3, attempts=2)
    result = summarise(worker_spec(run, "a"), "finished", None)
    info = describe_model("digits_net_4", num_classes=3, image_size=8)
    assert (
        0 <= result.pop("seconds") <= sum(b["time"] - a["time"] for a, b in pairwise(run.student("a").rows()))
    )
    assert result == {
        "student": "a", "model": "digits_net_4", "loss_name": "cross_entropy+rrd", "status": "finished",
        "error": None, "epochs_done": 3, "num_params": info.num_params, "num_flops": info.num_flops,
        "restarts": 1, "images_per_s": 26.0, "wait_frac": 0.25,
    }  # fmt: skip


def test_student_fails_with_whatever_ray_train_raises_and_with_an_end_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trainer:
        def __init__(self, error: Exception | None) -> None:
            self.error = error

        def fit(self) -> None:
            if self.error is not None:
                raise self.error

    for name, error, said in (("gone", OSError("storage is gone"), "OSError: storage is gone"),
                              ("empty", None, "training ended without weights")):  # fmt: skip
        monkeypatch.setattr(students, "_trainer", lambda *_, error=error: Trainer(error))
        student = students.StudentRun(worker_spec(RunDir(tmp_path), name), 1, Resources(), 0)
        student.start()
        assert student.finish()["error"] == said
        assert student.state == "failed"


def test_student_that_never_began_has_a_result_too(tmp_path: Path) -> None:
    result = summarise(worker_spec(RunDir(tmp_path), "a"), "failed", "no place")
    assert (result["status"], result["error"], result["epochs_done"]) == ("failed", "no place", 0)
    assert (result["seconds"], result["images_per_s"], result["wait_frac"]) == (0.0, None, None)


# prepare


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long-tailed digits, raw 8 px, in small shards."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    options = ShardOptions(
        imbalance_ratio=10, n_max=40, val_per_class=2, store="raw", image_size=8, rows_per_shard=128,
        row_group_rows=32,
    )  # fmt: skip
    write_shards(open_source(SourceSpec(kind="digits")), folder, options)
    return folder


def config_of(folder: Path, **more: Any) -> RunConfig:
    return parse_config(raw_run(folder, **more))


def test_prepared_config_has_nothing_left_to_resolve_and_repeats_itself(digits: Path, tmp_path: Path) -> None:
    weights = tmp_path / "t.safetensors"
    net = build_model("digits_net_4", num_classes=10, image_size=8, seed=0)
    save_weights(net.state_dict(), ModelCard("digits_net_4", 10, 8, (0, 0, 0), (1, 1, 1), ""), weights)
    prepared = prepare(
        config_of(digits, seed=7, teacher={"weights": str(weights)}, loss={"kd": {"weight": 1}})
    )
    config = prepared.config
    assert (config.views.recipe, config.views.side, config.views.pad, config.views.seed) == (
        "pad_crop",
        8,
        1,
        7,
    )
    assert (config.data.image_size, config.data.dir) == (8, str(digits))
    student = config.students[0]
    assert (config.train_of(student).precision, config.train_of(student).channels_last) == ("fp32", False)
    assert config.teacher is not None
    assert config.teacher.precision == "fp32"

    again = prepare(config)
    assert (again.config, again.view, again.train, again.val) == (
        config, prepared.view, prepared.train, prepared.val,
    )  # fmt: skip
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    assert len(prepared.class_counts) == 10
    assert prepared.class_counts[0] == 40
    assert prepared.train.num_rows == sum(prepared.class_counts)
    assert prepared.val is not None
    assert prepared.val.num_rows == 20


def test_settings_given_are_kept(digits: Path) -> None:
    views = {"recipe": "none", "side": 12, "pad": 0, "seed": 3}
    config = prepare(config_of(digits, seed=7, views=views, train={"channels_last": True})).config
    assert (config.views.recipe, config.views.side, config.views.pad, config.views.seed) == ("none", 12, 0, 3)
    assert config.train_of(config.students[0]).channels_last is True


def test_gpu_decides_precision_and_layout(digits: Path) -> None:
    raw = raw_run(digits)
    raw["students"][0]["resources"] = {"num_gpus": 1}
    config = prepare(parse_config(raw)).config
    train = config.train_of(config.students[0])
    assert (train.precision, train.channels_last) == ("bf16", True)


@pytest.mark.parametrize(
    ("more", "error", "expected"),
    [
        ({"loss": {"rrd": {"weight": 1}}}, ConfigError, "students.s: cross_entropy+rrd needs soft targets"),
        ({"train": {"precision": "fp16"}}, ConfigError, "students.s: train.precision fp16 needs a GPU"),
        ({"teacher": {"weights": "no.safetensors"}}, TeacherError, "no.safetensors does not exist"),
        ({"views": {"recipe": "random_resized_crop", "scale": [0.9, 0.1]}}, ConfigError, "views.scale"),
    ],
)
def test_run_that_contradicts_itself_is_refused_before_a_cluster_is_asked(
    digits: Path, more: dict[str, Any], error: type[Exception], expected: str
) -> None:
    with pytest.raises(error) as caught:
        prepare(config_of(digits, **more))
    assert expected in str(caught.value)


def test_unknown_model_is_refused_with_the_nearest_name(digits: Path) -> None:
    raw = raw_run(digits)
    raw["students"][0]["model"] = "resnet21"
    with pytest.raises(ConfigError, match="resnet20"):
        prepare(parse_config(raw))


def test_workers_may_not_share_a_gpu(digits: Path) -> None:
    raw = raw_run(digits)
    raw["students"][0] |= {"workers": 2, "resources": Resources(num_gpus=0.5).model_dump()}
    with pytest.raises(ConfigError, match="two NCCL ranks must not share a GPU"):
        prepare(parse_config(raw))


def test_shards_that_are_missing_or_of_another_size_are_refused(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="krd shards"):
        prepare(config_of(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"data\.image_size is 16, but the raw shards"):
        prepare(parse_config(raw_run() | {"data": {"dir": str(digits), "image_size": 16}}))
