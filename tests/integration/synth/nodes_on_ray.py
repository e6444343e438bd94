"""A machine that joins a Ray cluster in the middle of a run, and is taken away again: `nodes_on_ray.py ROOT`.

The machines are Ray's own nodes for tests: a raylet each, on this machine. The run begins on one, with nobody else
there. Prints one JSON object, last: what was said, and how many shards were there when the second came and at the
end. ROOT holds the engine's directory.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from killed_runs import FromIdentities, config
from ray.cluster_utils import Cluster

from ubgen.dataset import finished_shards
from ubgen.synth import Watch, synthesise
from ubgen.synth.plan import Item

ROOT = Path(sys.argv[1])
OUT, FIRST, WAITS, LEFT = (ROOT / name for name in ("out", "first", "waits", "left"))
PATIENCE = 100.0
MACHINE = {"num_cpus": 1, "include_dashboard": False}


def shards() -> int:
    return len(list(OUT.glob("shard-*.json")))


class OnFirstMachine(FromIdentities):
    """Leaves the rest to do when one shard is finished, until the other machine has come and gone."""

    def denoise(self, items: Sequence[Item]) -> torch.Tensor:
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
            time.sleep(PATIENCE)
        return super().denoise(items)


def chain(*_: object) -> FromIdentities:
    here = ray.get_runtime_context().get_node_id()
    return OnFirstMachine() if here == FIRST.read_text() else OnSecondMachine()


class Machines:
    """Called when the run has got on: the second machine comes when a shard is finished, and goes when it waits."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._second: Any = None
        self.alone = 0

    def __call__(self, done: int, total: int) -> None:
        if self._second is None and shards():
            self.alone = shards()
            self._second = self._cluster.add_node(**MACHINE)
        elif WAITS.exists() and not LEFT.exists():
            self._cluster.remove_node(self._second, allow_graceful=False)
            LEFT.touch()


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args=MACHINE)
    FIRST.write_text(cluster.head_node.node_id)
    said: list[str] = []
    machines = Machines(cluster)
    try:
        settings = replace(config(OUT, ROOT / "engine"), shard_size=8)
        synthesise(
            replace(settings, executor="ray", ray_address=cluster.address),
            Watch(machines, said.append),
            chain,
        )
        print(json.dumps({"said": said, "shards": [machines.alone, len(list(finished_shards(OUT)))]}))
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
