"""The network interface of several machines: the one that leads to the store."""

from __future__ import annotations

import socket

import pytest

from cosmos3_pipeline.distributed import interface
from cosmos3_pipeline.distributed.interface import use_interface_of_store

TWO_NODES = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}


def _own_address() -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        try:
            end.connect(("10.255.255.255", 1))
        except OSError:
            return None
        return str(end.getsockname()[0])


def test_it_is_the_one_from_which_the_store_is_reached() -> None:
    address = _own_address()
    if address is None:
        pytest.skip("this machine has no network")
    environ = TWO_NODES | {"MASTER_ADDR": address}
    use_interface_of_store(environ)
    names = [name for _, name in socket.if_nameindex()]
    assert environ["GLOO_SOCKET_IFNAME"] == environ["NCCL_SOCKET_IFNAME"] in names
    assert environ["GLOO_SOCKET_IFNAME"] != "lo"


@pytest.mark.parametrize(
    "environ",
    [
        {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"},
        TWO_NODES | {"MASTER_ADDR": "127.0.0.1"},
        TWO_NODES | {"MASTER_ADDR": "a.name.that.nobody.has.invalid"},
        TWO_NODES,
        {},
    ],
    ids=["one machine", "this machine by a name", "unknown", "no address", "no world"],
)
def test_where_it_is_unknown_or_needless_the_libraries_choose(environ: dict[str, str]) -> None:
    before = dict(environ)
    use_interface_of_store(environ)
    assert environ == before


def test_what_a_person_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "_interface_to", lambda host: "eth7")
    environ = TWO_NODES | {"MASTER_ADDR": "10.0.0.1", "GLOO_SOCKET_IFNAME": "ib0"}
    use_interface_of_store(environ)
    assert (environ["GLOO_SOCKET_IFNAME"], environ["NCCL_SOCKET_IFNAME"]) == ("ib0", "eth7")
