"""A machine that joins a Ray cluster in the middle of a run, and is taken away again: `nodes_on_ray.py ROOT`.

The machines are Ray's own nodes for tests: a raylet each, on this machine. The run begins on one, with nobody else
there. Prints one JSON object, last: what was said, and how many shards were there when the second came and at the
end. ROOT holds the engine's directory.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import ray
import torch
from killed_runs import FromIdentities, config
from ray.cluster_utils import Cluster

from ubgen.dataset import finished_shards
from ubgen.synth.plan import Item
from ubgen.synth.synthesise import synthesise

ROOT = Path(sys.argv[1])
OUT, FIRST, WAITS, LEFT = (ROOT / name for name in ("out", "first", "waits", "left"))
MACHINE = {"num_cpus": 1, "include_dashboard": False}


def shards() -> int:
    return len(list(OUT.glob("shard-*.json")))


class OnFirstMachine(FromIdentities):
    """Leaves the rest to do when one shard is finished, until the other machine has come and gone."""

    def denoise(self, items: Sequence[Item]) -> torch.Tensor:
        time.sleep(0.1)  # there must be something left when the first shard is on the disk
        while shards() and not LEFT.exists():
            time.sleep(0.05)
        return super().denoise(items)


class OnSecondMachine(FromIdentities):
    """Makes three batches, and waits for its machine to be taken away."""

    def __init__(self) -> None:
        self._batches = 0

    def denoise(self, items: Sequence[Item]) -> torch.Tensor:
        self._batches += 1
        if self._batches > 3:
            WAITS.touch()
            time.sleep(100)
        return super().denoise(items)


def source(*_: object) -> FromIdentities:
    here = ray.get_runtime_context().get_node_id()
    return OnFirstMachine() if here == FIRST.read_text() else OnSecondMachine()


def until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, "the run ended before its time"
        time.sleep(0.05)


def run(address: str) -> None:
    """In a process of its own: Ray starts a node in a main thread only."""
    said: list[str] = []
    settings = replace(config(OUT, ROOT / "engine"), per_class=30, shard_size=8)
    synthesise(replace(settings, executor="ray", ray_address=address), say=said.append, open_source=source)
    print(json.dumps(said))


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args=MACHINE)
    FIRST.write_text(cluster.head_node.node_id)
    command = [sys.executable, __file__, str(ROOT), cluster.address]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        until(shards, process)
        alone = shards()
        second = cluster.add_node(**MACHINE)
        until(WAITS.exists, process)
        cluster.remove_node(second, allow_graceful=False)
        LEFT.touch()
        said = json.loads(process.communicate()[0].splitlines()[-1])
        print(json.dumps({"said": said, "shards": [alone, len(list(finished_shards(OUT)))]}))
    finally:
        process.kill()
        cluster.shutdown()


if __name__ == "__main__":
    run(*sys.argv[2:]) if sys.argv[2:] else main()
