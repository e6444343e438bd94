"""A real S3-protocol server on loopback, and a way to it that can be cut."""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
import s3fs
from moto.server import ThreadedMotoServer


class Proxy:
    """Passes TCP connections on to `target`; cuts one after it has sent `limit` bytes, as a bad network does."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.limit = 10**9
        self.cuts = 0
        self.cuts_allowed = 10**9
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
            except OSError:
                return
            for pair in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(16384):
                passed += len(data)
                if counted and passed > self.limit and self.cuts < self.cuts_allowed:
                    self.cuts += 1
                    break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.fixture(scope="session")
def server() -> Iterator[tuple[str, int]]:
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture
def url(
    server: tuple[str, int], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[str]:
    """An empty place in a bucket, and the environment that leads to it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server))
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    if not system.exists("datasets"):
        system.mkdir("datasets")
    yield f"s3://datasets/{re.sub('[^a-z0-9]+', '-', request.node.name)}"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def proxy(url: str, server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What lies between the test and the server; it does no harm until it is given a limit."""
    proxy = Proxy(server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*proxy.address))
    s3fs.S3FileSystem.clear_instance_cache()
    yield proxy
    proxy.close()
