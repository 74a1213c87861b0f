"""The network interface that Gloo uses between machines."""

import os
import socket

import psutil
import pytest

from cluster.runtime import process_group


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "before")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")


def test_gloo_uses_the_interface_of_the_nodes_address_in_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, addresses in psutil.net_if_addrs().items():
        for address in [a.address for a in addresses if a.family == socket.AF_INET]:
            monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
            monkeypatch.setattr("ray.util.get_node_ip_address", lambda address=address: address)
            process_group.use_node_interface()
            assert os.environ["GLOO_SOCKET_IFNAME"] == name


@pytest.mark.parametrize("given", [None, "eth7"])
def test_an_unknown_address_and_a_user_setting_change_nothing(monkeypatch, given) -> None:
    if given:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", given)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.77" if given is None else "127.0.0.1")
    process_group.use_node_interface()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == given
