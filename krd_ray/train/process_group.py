"""Answers which network card the workers of a student talk through: the one with the node's Ray address.

Does not train. Gloo, left alone, looks up the machine's own name, which on many a Linux is a loopback address (Debian
writes 127.0.1.1 into /etc/hosts): workers on two nodes then wait for each other until they give up.
"""

from __future__ import annotations

import os

import psutil  # type: ignore[import-untyped]
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.backend import BackendConfig
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend  # TorchConfig's own; Ray names it nowhere else
from ray.util import get_node_ip_address

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


class NodeProcessGroup(TorchConfig):
    """A TorchConfig whose workers talk through their nodes' Ray addresses; a node's own GLOO_SOCKET_IFNAME wins."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _NodeBackend


class _NodeBackend(_TorchBackend):
    def on_start(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)  # type: ignore[arg-type]  # narrower there than in Backend


def choose_interface() -> None:
    """Tells gloo in this process the card of the node's address; behind NAT no card has it, and gloo looks itself."""
    name = interface_of(get_node_ip_address())
    if name is not None:
        os.environ.setdefault(GLOO_INTERFACE, name)


def interface_of(address: str) -> str | None:
    """Returns the name of the network card that has an IP address; None: no card has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            return str(name)
    return None
