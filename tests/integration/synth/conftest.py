"""Stand-ins for the networks, and an engine directory that names none."""

import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import s3fs
from moto.server import ThreadedMotoServer

from ubgen.synth import SynthConfig


@pytest.fixture(scope="session")
def stand_ins() -> ModuleType:
    """The script of the killed runs as a module: `FromIdentities`."""
    spec = importlib.util.spec_from_file_location("killed_runs", Path(__file__).with_name("killed_runs.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def settings(stand_ins: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SynthConfig]:
    """60 images of 5 classes in shards of 16, some of them drawn again."""
    root = tmp_path_factory.mktemp("stage")
    engine, classes = stand_ins.no_engine(root), root / "classes.txt"
    classes.write_text("ant\nbee\ncrane\nduck\neel", encoding="utf-8")

    def make(out: object, **changes: object) -> SynthConfig:
        given = {
            "classes": str(classes),
            "per_class": 12,
            "shard_size": 16,
            "min_similarity": -0.5,
            **changes,
        }
        return SynthConfig(engine, out=str(out), **given)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def url(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty place in a bucket of a real S3-protocol server."""
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_MAX_ATTEMPTS", "1"),
        ("AWS_ENDPOINT_URL", server),
    ):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    if not system.exists("datasets"):
        system.mkdir("datasets")
    yield f"s3://datasets/{re.sub('[^a-z0-9]+', '-', request.node.name)}"
    s3fs.S3FileSystem.clear_instance_cache()
