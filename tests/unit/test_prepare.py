"""Answers whether a run that cannot work is refused before anything starts, and what stands for `auto`.

Does not start Ray.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from krd_ray.config import Resources, RunConfig
from krd_ray.config_io import dump_config, parse_config
from krd_ray.data.shard_options import ShardOptions
from krd_ray.data.shards import write_shards
from krd_ray.data.sources import SourceSpec, open_source
from krd_ray.errors import ConfigError, DataError, TeacherError
from krd_ray.models.registry import build_model
from krd_ray.teacher.weights import ModelCard, save_weights
from krd_ray.train.prepare import prepare
from tests.unit.run_builders import raw_run

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


def weights_in(folder: Path) -> str:
    path = folder / "t.safetensors"
    net = build_model("digits_net_4", num_classes=10, image_size=8, seed=0)
    save_weights(net.state_dict(), ModelCard("digits_net_4", 10, 8, (0, 0, 0), (1, 1, 1), ""), path)
    return str(path)


def test_prepared_config_has_nothing_left_to_resolve_and_repeats_itself(digits: Path, tmp_path: Path) -> None:
    teacher = {"weights": weights_in(tmp_path)}
    prepared = prepare(config_of(digits, seed=7, teacher=teacher, loss={"kd": {"weight": 1}}))
    config = prepared.config
    assert (config.views.recipe, config.views.side, config.views.pad, config.views.seed) == (
        "pad_crop",
        8,
        1,
        7,
    )
    assert (config.data.image_size, config.data.dir) == (8, str(digits))
    student = config.students[0]
    assert (config.train_of(student).precision, config.train_of(student).channels_last) == ("fp32", True)
    assert config.teacher is not None
    assert (config.teacher.precision, config.teacher.compile) == ("fp32", "off")

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
    config = prepare(config_of(digits, seed=7, views=views, train={"channels_last": False})).config
    assert (config.views.recipe, config.views.side, config.views.pad, config.views.seed) == ("none", 12, 0, 3)
    assert config.train_of(config.students[0]).channels_last is False


def test_gpu_decides_precision_and_compilation(digits: Path, tmp_path: Path) -> None:
    raw = raw_run(digits, teacher={"weights": weights_in(tmp_path), "resources": {"num_gpus": 1}})
    raw["students"][0]["resources"] = {"num_gpus": 1}
    config = prepare(parse_config(raw)).config
    assert config.train_of(config.students[0]).precision == "bf16"
    assert config.teacher is not None
    assert (config.teacher.precision, config.teacher.compile) == ("bf16", "cuda_graph")


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
