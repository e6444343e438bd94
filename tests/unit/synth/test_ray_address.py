"""The address of a Ray cluster is tried before Ray is."""

import socket
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from ubgen.core.errors import UserError
from ubgen.synth import ray_cluster
from ubgen.synth.ray_cluster import _probe


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1", "localhost:99999"])
def test_where_nothing_listens(address: str) -> None:
    with pytest.raises(UserError, match=r"--ray-address .*: nothing answers there .* `ray start` printed"):
        _probe(address)


def test_where_something_else_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A web server, and one that never says a word."""
    monkeypatch.setattr(ray_cluster, "_ANSWER", 0.3)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as web:
        Thread(target=web.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match="what listens there is not Ray; give the address"):
            _probe(f"127.0.0.1:{web.server_port}")
        web.shutdown()
    silent = socket.create_server(("127.0.0.1", 0))
    with silent, pytest.raises(UserError, match="what listens there is not Ray"):
        _probe(f"127.0.0.1:{silent.getsockname()[1]}")


def test_a_grpc_server_and_names_that_only_ray_knows() -> None:
    grpc = pytest.importorskip("grpc")
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", None, "auto", "local"):
        _probe(address)
    server.stop(None)
