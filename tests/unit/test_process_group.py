"""Workers of a student talk through the card that has the node's Ray address, whatever its own name means."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from krd_ray.train import process_group
from krd_ray.train.process_group import GLOO_INTERFACE, NodeProcessGroup, choose_interface, interface_of

CARDS = {"lo": ["127.0.0.1", "::1"], "eth0": ["02:fc:00:00:00:01", "10.0.0.5"], "docker0": ["172.17.0.1"]}


@pytest.fixture(autouse=True)
def _node(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = {name: [SimpleNamespace(address=each) for each in addresses] for name, addresses in CARDS.items()}
    monkeypatch.setattr("psutil.net_if_addrs", lambda: cards)
    monkeypatch.setattr(process_group, "get_node_ip_address", lambda: "10.0.0.5")
    monkeypatch.setenv(GLOO_INTERFACE, "")  # so that it is taken back afterwards
    monkeypatch.delenv(GLOO_INTERFACE)


@pytest.mark.parametrize(
    ("address", "name"), [("10.0.0.5", "eth0"), ("127.0.0.1", "lo"), ("10.0.0.50", None)]
)
def test_card_is_the_one_with_exactly_this_address(address: str, name: str | None) -> None:
    assert interface_of(address) == name


def test_gloo_is_told_the_card_of_the_nodes_address() -> None:
    choose_interface()
    assert os.environ[GLOO_INTERFACE] == "eth0"


def test_a_choice_of_the_nodes_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GLOO_INTERFACE, "docker0")
    choose_interface()
    assert os.environ[GLOO_INTERFACE] == "docker0"


def test_gloo_looks_itself_where_no_card_has_the_nodes_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "get_node_ip_address", lambda: "203.0.113.9")
    choose_interface()
    assert GLOO_INTERFACE not in os.environ


def test_the_card_is_chosen_before_the_process_group_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    config = NodeProcessGroup(backend="gloo")
    backend = config.backend_cls()
    monkeypatch.setattr(process_group._TorchBackend, "on_start", lambda *_: done.append("group"))
    backend.on_start(SimpleNamespace(execute=done.append), config)
    assert done == [choose_interface, "group"]
