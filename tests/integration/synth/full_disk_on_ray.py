"""A command on a Ray cluster whose disk is full after the first shard, and once more: `full_disk_on_ray.py ROOT`.

Both runs use one cluster, as starting it takes longest. Prints one JSON list: the exit status of each run, and the
finished shards after it. ROOT holds the engine's directory.
"""

import errno
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from killed_runs import FromIdentities, config
from ray.cluster_utils import Cluster

from ubgen.core.errors import run
from ubgen.dataset import finished_shards
from ubgen.synth.synthesise import synthesise

ROOT = Path(sys.argv[1])
OUT, SPACE = ROOT / "out", ROOT / "space"


def source(*_: object) -> FromIdentities:
    """Called in the worker: from now on writing fails there as it does on a network file system, where the full disk
    shows when the file is flushed."""
    flush = os.fsync

    def full(descriptor: int) -> None:
        if not SPACE.exists() and list(OUT.glob("shard-*.json")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    os.fsync = full
    return FromIdentities()


def command(address: str) -> dict[str, object]:
    settings = replace(config(OUT, ROOT / "engine"), executor="ray", workers=2, ray_address=address)
    status: object = 0
    try:
        run(lambda: synthesise(settings, open_source=source))
    except SystemExit as end:
        status = end.code
    return {"status": status, "finished": list(finished_shards(OUT))}


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        full = command(cluster.address)
        SPACE.touch()
        print(json.dumps([full, command(cluster.address)]))
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
