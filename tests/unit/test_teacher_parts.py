"""Answers whether the teacher's parts keep their promises: homes, messages, weights, forward, calibration.

Does not start Ray; engine and store have files of their own.
"""

from __future__ import annotations

import copy
import json
import pickle
import random
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from krd_ray.data.shard_set import Batch
from krd_ray.errors import ConfigError, TeacherError
from krd_ray.maths.rectify import Rectifier
from krd_ray.maths.views import ViewSpec, eval_view, train_view
from krd_ray.models.registry import build_model
from krd_ray.teacher.calibrate import (
    ClassSums,
    calibration_from,
    load_calibration,
    save_calibration,
    sum_classes,
)
from krd_ray.teacher.forward import TeacherForward
from krd_ray.teacher.homes import home_of
from krd_ray.teacher.messages import RECEIVED_BYTES, Pixels, SoftTargets, TargetRequest
from krd_ray.teacher.weights import ModelCard, hash_state, load_model, read_weights, save_weights

CLASSES, SIDE, MODEL = 5, 8, "digits_net_8"
CARD = ModelCard(MODEL, CLASSES, SIDE, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), "d" * 64, 0.91)
VIEW = ViewSpec("pad_crop", SIDE, 3, (0.5,) * 3, (0.25,) * 3, pad=1, flip=True, brightness=0.2)


def small_net(seed: int = 0) -> nn.Module:
    return build_model(MODEL, num_classes=CLASSES, image_size=SIDE, seed=seed).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "teacher.safetensors"
    save_weights(small_net().state_dict(), CARD, path)
    return path


def load(path: Path, **more: Any) -> tuple[nn.Module, ModelCard | None]:
    return load_model(path, **{"model": None, "num_classes": CLASSES, "image_size": SIDE, **more})


# homes


@given(ids=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20), replicas=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_home_is_the_published_hash_of_the_id_alone(ids: list[int], replicas: int) -> None:
    expected = [(((value * 0x9E3779B97F4A7C15) % 2**64) >> 32) % replicas for value in ids]
    assert home_of(np.array(ids, np.int64), replicas).tolist() == expected


def test_homes_share_consecutive_ids_evenly() -> None:
    for replicas in (2, 3, 7):
        counts = np.bincount(home_of(np.arange(10_000), replicas), minlength=replicas)
        assert counts.min() > 0.95 * 10_000 / replicas


# messages


def test_unpickled_payload_is_counted_where_it_arrives() -> None:
    before = dict(RECEIVED_BYTES)
    pixels = Pixels(np.zeros((3, 8, 8, 3), np.uint8))
    targets = SoftTargets(
        np.arange(3), np.ones((3, 5), np.float16), np.ones((3, 7), np.float16), Rectifier(), "h", 2
    )
    assert before == RECEIVED_BYTES, "making a message is not receiving one"
    back = pickle.loads(pickle.dumps((pixels, targets, replace(targets, features=None))))  # noqa: S301
    assert RECEIVED_BYTES["pixels"] - before["pixels"] == 3 * 8 * 8 * 3
    assert RECEIVED_BYTES["targets"] - before["targets"] == 3 * 5 * 2 + 3 * 7 * 2 + 3 * 5 * 2
    np.testing.assert_array_equal(back[0].images_BHWC, pixels.images_BHWC)
    np.testing.assert_array_equal(back[1].features, targets.features)
    assert back[2].features is None
    assert (back[1].rectifier, back[1].teacher_hash, back[1].incarnation) == (Rectifier(), "h", 2)


def test_request_survives_pickling() -> None:
    rectifier = Rectifier(tau_prior=1.0, exchange=True, features="balanced")
    request = TargetRequest(
        "s", "h", np.arange(2), np.zeros(2, np.int64), np.array([4, 5]), None, np.arange(2), rectifier
    )
    back = pickle.loads(pickle.dumps(request))  # noqa: S301
    assert (back.student, back.view_index.tolist(), back.rectifier) == ("s", [4, 5], rectifier)


# weights


def test_saved_weights_load_with_their_card(saved: Path) -> None:
    state, card = read_weights(saved)
    assert card == CARD
    wanted = small_net().state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    net, _ = load(saved)
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert [path.name for path in saved.parent.iterdir()] == [saved.name], "no partial file is left"


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dict_files_load_wrapped_or_not(tmp_path: Path, wrap: str | None, prefix: str) -> None:
    state = OrderedDict((prefix + name, value) for name, value in small_net().state_dict().items())
    torch.save({wrap: state, "epoch": 3} if wrap else state, tmp_path / "t.pt")
    net, card = load(tmp_path / "t.pt", model=MODEL)
    assert card is None
    assert hash_state(net.state_dict()) == hash_state(small_net().state_dict())


class Bomb:
    """Would create a file if it were unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("plain", [False, True])
def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path, plain: bool) -> None:
    path, trace = tmp_path / "t.pt", tmp_path / "trace"
    if plain:
        path.write_bytes(pickle.dumps({"w": Bomb(trace)}, protocol=2))
    else:
        torch.save({"w": Bomb(trace)}, path)
    with pytest.raises(TeacherError, match="never pickled objects"):
        read_weights(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes()) if plain else torch.load(path, weights_only=False)  # noqa: S301
    assert trace.exists(), "the file would have done harm"


@pytest.mark.parametrize("content", [{"w": 3}, [torch.zeros(2)], {"state_dict": {"w": "text"}}])
def test_file_that_holds_no_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "t.pt")
    with pytest.raises(TeacherError, match="holds no state_dict"):
        read_weights(tmp_path / "t.pt")


def test_any_damage_to_a_file_is_a_teacher_error_or_does_no_harm(tmp_path: Path, saved: Path) -> None:
    torch.save({"w": torch.zeros(4)}, tmp_path / "new.pt")
    torch.save({"w": torch.zeros(4)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    rng, refused = random.Random(0), 0
    for name in ("new.pt", "old.pt", saved.name):
        whole = (tmp_path / name).read_bytes()
        damaged = [whole[: rng.randrange(len(whole))] for _ in range(20)] + [
            b"",
            b"\x80",
            b"abc",
            b"PK\x03\x04",
        ]
        damaged += [rng.randbytes(rng.randrange(60)) for _ in range(20)]
        for _ in range(60):
            place = rng.randrange(min(len(whole), 700))
            damaged.append(whole[:place] + rng.randbytes(1) + whole[place + 1 :])
        for content in damaged:
            (tmp_path / name).write_bytes(content)
            try:
                read_weights(tmp_path / name)
            except TeacherError as error:
                refused += name in error.message
    assert refused > 150


def test_card_of_another_version_is_refused(tmp_path: Path) -> None:
    for card in ("{", json.dumps({"model": MODEL}), json.dumps({"mean": 1, "std": 2})):
        save_file({"w": torch.zeros(1)}, tmp_path / "t.safetensors", metadata={"krd_ray": card})
        with pytest.raises(TeacherError, match="header is not one this version writes"):
            read_weights(tmp_path / "t.safetensors")


def test_missing_weights_say_how_to_make_some(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"does not exist; train one with `krd teacher CONFIG`"):
        read_weights(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"num_classes": 7}, "was trained for 5 classes, the dataset has 7"),
        ({"image_size": 16}, "was trained on 8 px views, this run makes 16 px views; set views.side to 8"),
        ({"model": "digits_net_16"}, "does not fit model 'digits_net_16'"),
    ],
)
def test_weights_that_do_not_fit_the_run_are_refused(
    saved: Path, more: dict[str, Any], expected: str
) -> None:
    with pytest.raises(TeacherError) as caught:
        load(saved, **more)
    assert expected in caught.value.message


def test_unknown_model_is_refused_with_the_nearest_name(saved: Path) -> None:
    with pytest.raises(ConfigError, match="resnet8"):
        load(saved, model="resnet88")


def test_missing_extra_and_misshapen_tensors_are_counted_and_named(tmp_path: Path) -> None:
    state = dict(small_net().state_dict())
    state["surplus"] = torch.zeros(1)
    del state["head.bias"]
    state["head.weight"] = torch.zeros(CLASSES, 3)
    save_file(state, tmp_path / "t.safetensors")
    with pytest.raises(TeacherError) as caught:
        load(tmp_path / "t.safetensors", model=MODEL)
    assert "1 tensors missing (first: head.bias)" in caught.value.message
    assert "1 unknown (first: surplus)" in caught.value.message
    assert "head.weight is (5, 3), needs (5, 32)" in caught.value.message


def test_weights_without_a_card_need_a_model_name(tmp_path: Path) -> None:
    save_file(small_net().state_dict(), tmp_path / "t.safetensors")
    with pytest.raises(TeacherError, match=r"set teacher\.model"):
        load(tmp_path / "t.safetensors")


def test_hash_names_weights_and_whatever_else_decides_the_outputs() -> None:
    state = small_net().state_dict()
    first = hash_state(state, "view", "fp32")
    assert first == hash_state(dict(reversed(state.items())), "view", "fp32")
    bent = {name: value.clone() for name, value in state.items()}
    bent["head.bias"][0] += 1e-6
    others = [
        hash_state(bent, "view", "fp32"),
        hash_state(state, "view", "bf16"),
        hash_state(state, "viewfp32"),
    ]
    others += [hash_state({**state, "more": torch.zeros(0)}, "view", "fp32")]
    assert len({first, *others}) == 5


# forward


def make_forward(net: nn.Module | None = None, *, micro_batch: int = 8, **more: Any) -> TeacherForward:
    settings = {"device": torch.device("cpu"), "bf16": False, **more}
    return TeacherForward(net or small_net(), CARD, VIEW, micro_batch=micro_batch, **settings)


def images_of(num_images: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_images, SIDE, SIDE, 3), np.uint8)


def test_served_rows_are_what_an_independent_forward_gives() -> None:
    images, ids, index = images_of(20), np.arange(20) * 5, np.arange(20) % 3
    served = make_forward()(images, ids, index)
    assert served.dtype == np.float16
    view = replace(VIEW, mean=CARD.mean, std=CARD.std)  # the card's normalisation wins
    with torch.no_grad():
        for row in range(20):  # one at a time: another batch composition
            one = train_view(torch.from_numpy(images[row : row + 1]), torch.tensor([row * 5]), row % 3, view)
            logits, features = small_net()(one)
            expected = torch.cat([logits, features], dim=1)[0].to(torch.float16).numpy()
            np.testing.assert_array_max_ulp(served[row], expected, maxulp=1)


@pytest.fixture(scope="module")
def warm() -> tuple[TeacherForward, np.ndarray]:
    """A forward and its rows for 20 images asked for together."""
    forward = make_forward()
    return forward, forward(images_of(20), np.arange(20) * 5, np.arange(20) % 3)


@given(rows=st.lists(st.integers(0, 19), min_size=1, max_size=20, unique=True))
@example(rows=[13])
@settings(max_examples=25, deadline=None)
def test_row_does_not_depend_on_what_else_is_asked_for(
    warm: tuple[TeacherForward, np.ndarray], rows: list[int]
) -> None:
    forward, together = warm
    chosen = np.array(rows)
    part = forward(images_of(20)[chosen], chosen * 5, chosen % 3)
    assert part.tobytes() == together[chosen].tobytes()


def test_every_forward_has_the_same_shape() -> None:
    shapes: list[tuple[int, ...]] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, view_BCHW: torch.Tensor) -> Any:
            shapes.append(tuple(view_BCHW.shape))
            return self.net(view_BCHW)

    forward = make_forward(Spy())
    for num_images in (1, 8, 19):
        forward(images_of(num_images), np.arange(num_images), np.zeros(num_images, np.int64))
    assert shapes == [(8, 3, SIDE, SIDE)] * (1 + 1 + 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 70_000.0])
def test_output_that_float16_cannot_hold_names_its_sample(value: float) -> None:
    class Broken(nn.Module):
        def forward(self, view_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = torch.zeros(len(view_BCHW), CLASSES)
            logits[2, 1] = value
            return logits, torch.zeros(len(view_BCHW), 3)

    with pytest.raises(TeacherError, match="output for sample 107 is not finite in float16"):
        make_forward(Broken())(images_of(4), np.array([101, 103, 107, 109]), np.zeros(4, np.int64))


def test_images_given_are_not_changed_and_may_be_read_only() -> None:
    images = images_of(4)
    before = images.copy()
    images.flags.writeable = False
    make_forward()(images, np.arange(4), np.zeros(4, np.int64))
    make_forward().on_eval_view(images)
    np.testing.assert_array_equal(images, before)


# calibration


def test_class_means_are_those_of_an_independent_pass() -> None:
    images, labels = images_of(40), np.random.default_rng(1).integers(0, CLASSES, 40)
    counts = np.bincount(labels, minlength=CLASSES)
    batches = [
        Batch(np.arange(40)[part], labels[part], images[part], np.zeros(len(part), np.int64))
        for part in np.split(np.arange(40), [7, 20])
    ]
    forward = make_forward()
    parts = [sum_classes(forward, batches[:2], CLASSES, 32), sum_classes(forward, batches[2:], CLASSES, 32)]
    calibration, accuracy = calibration_from(parts, counts.tolist())

    net = copy.deepcopy(small_net()).double()
    view = eval_view(torch.from_numpy(images), replace(VIEW, mean=CARD.mean, std=CARD.std)).double()
    with torch.no_grad():
        logits, features = (part.numpy() for part in net(view))
    means = np.stack([features[labels == label].mean(axis=0) for label in range(CLASSES)])
    right = [(logits[labels == label].argmax(axis=1) == label).mean() for label in range(CLASSES)]
    np.testing.assert_allclose(calibration.class_means.numpy(), means, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(calibration.centre.numpy(), means.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(calibration.priors.norm(dim=1).numpy(), 1.0, atol=1e-5)
    assert calibration.class_counts.tolist() == counts.tolist()
    assert accuracy == pytest.approx(np.mean(right))


def test_samples_that_the_manifest_does_not_promise_are_refused() -> None:
    sums = ClassSums(np.ones((3, 4)), np.array([5, 2, 1]), np.array([1, 1, 1]))
    with pytest.raises(TeacherError, match=r"saw 2 images of class 1, dataset\.json says 3"):
        calibration_from([sums], [5, 3, 1])


def test_saved_calibration_is_found_by_exactly_its_teacher(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sums = ClassSums(rng.standard_normal((3, 4)), np.array([5, 2, 1]), np.array([1, 1, 1]))
    calibration, accuracy = calibration_from([sums], [5, 2, 1])
    path = tmp_path / "calibration.safetensors"
    assert load_calibration(path, "mine") is None
    save_calibration(calibration, "mine", accuracy, path)
    assert load_calibration(path, "other") is None
    found = load_calibration(path, "mine")
    assert found is not None
    assert found[1] == accuracy == pytest.approx((1 / 5 + 1 / 2 + 1) / 3)
    for name, value in calibration.to_dict().items():
        assert torch.equal(found[0].to_dict()[name], value)
    assert torch.equal(found[0].centre, calibration.centre)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_card_may_not_choose_which_code_runs(saved: Path, tmp_path: Path) -> None:
    state, _ = read_weights(saved)
    path = tmp_path / "named.safetensors"
    save_weights(state, replace(CARD, model="this:s"), path)
    with pytest.raises(TeacherError, match="names code as its model"):
        load_model(path, model=None, num_classes=CLASSES, image_size=SIDE)
