"""Conversions, checks and pictures where the dataset lies in object storage (a real S3-protocol server)."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3fs
from moto.server import ThreadedMotoServer

from ubgen.dataset import dataset_stats, open_dataset, open_store, write_pictures
from ubgen.dataset.tools.convert import Format, convert
from ubgen.dataset.tools.diff import diff
from ubgen.dataset.tools.verify import repair, verify


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "user")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("ubgen-tools")
        yield "s3://ubgen-tools"
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_there_and_back(bucket: str, datasets_by_extension: Callable[[str], Path], tmp_path: Path) -> None:
    local, remote = datasets_by_extension("jpg"), f"{bucket}/shards"
    convert(local, remote, "webdataset", 8)
    assert verify(remote).problems == []
    assert diff(local, remote).agrees(1.0)
    written: dict[Format, str] = {"folder": f"{bucket}/folder", "parquet": f"{bucket}/parquet"}
    for to, out in written.items():
        assert convert(remote, out, to, 10) == (24, True)
        straight = tmp_path / to
        convert(local, straight, to, 10)
        fetched = tmp_path / f"{to}-fetched"
        s3fs.S3FileSystem().get(out, str(fetched), recursive=True)
        left_out = {"manifest.json", "run.json", ".lock"}
        files = [
            {
                str(p.relative_to(top)): p.read_bytes()
                for p in top.rglob("*")
                if p.is_file() and p.name not in left_out
            }
            for top in (straight, fetched)
        ]
        assert files[0] == files[1]


def test_damage_and_pictures(bucket: str, datasets_by_extension: Callable[[str], Path]) -> None:
    remote = f"{bucket}/damaged"
    convert(datasets_by_extension("jpg"), remote, "webdataset", 8)
    names = write_pictures(
        open_dataset(remote), remote, [(0, 0), (5, 24)], dataset_stats(open_dataset(remote))
    )
    assert all(s3fs.S3FileSystem().size(f"{remote}/{name}") > 500 for name in names)
    store = open_store(remote)
    store.write("shard-000002.idx", "v1.2 0\n")
    result = verify(remote)
    assert result.damaged == [2]
    assert repair(remote, result) == ["manifest.json", "shard-000002.json"]
    assert "shard-000002.json" not in store.names()
