"""The address of a Ray cluster is tried before Ray is."""

import socket

import pytest

from ubgen.errors import UserError
from ubgen.synth.executors.ray_cluster import _probe


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1", "localhost:99999"])
def test_where_nothing_listens(address: str) -> None:
    with pytest.raises(UserError, match=r"--ray-address .*: nothing answers there .* `ray start` printed"):
        _probe(address)


def test_where_something_does_and_names_that_only_ray_knows() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        _probe(f"127.0.0.1:{server.getsockname()[1]}")
    for address in (None, "auto", "local"):
        _probe(address)
