"""A machine that joins a Ray cluster in the middle of a run, and is taken away again: `nodes_on_ray.py ROOT`.

The machines are Ray's own nodes for tests: a raylet each, on this machine. The run begins on one, with nobody else
there. Prints one JSON object: what was said, and how many shards were there when the second machine came, when its
worker had begun some, and at the end. ROOT holds the engine's directory.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import ray
import torch
from killed_runs import FromIdentities, config
from ray.cluster_utils import Cluster

from ubgen.dataset import finished_shards
from ubgen.synth import Watch, synthesise
from ubgen.synth.plan import Item

ROOT = Path(sys.argv[1])
OUT, FIRST, JOINED, LEFT = ROOT / "out", ROOT / "first", ROOT / "joined", ROOT / "left"
PATIENCE = 100.0
MACHINE = {"num_cpus": 1, "include_dashboard": False}


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.05)


def shards() -> int:
    return len(list(OUT.glob("shard-*.json")))


class OnFirstMachine(FromIdentities):
    """Leaves the rest to do when one shard is finished, until the other machine has come and gone."""

    def denoise(self, items: Sequence[Item]) -> torch.Tensor:
        if shards():
            until(LEFT.exists)
        return super().denoise(items)


class OnSecondMachine(FromIdentities):
    """Its machine is taken away when it has finished a shard and begun another."""

    def __init__(self) -> None:
        self._before = shards()

    def denoise(self, items: Sequence[Item]) -> torch.Tensor:
        if shards() > self._before:
            JOINED.touch()
            until(LEFT.exists)
        return super().denoise(items)


def chain(*_: object) -> FromIdentities:
    here = ray.get_runtime_context().get_node_id()
    return OnFirstMachine() if here == FIRST.read_text() else OnSecondMachine()


def come_and_go(cluster: Cluster, seen: dict[str, int]) -> None:
    until(shards)
    seen["alone"] = shards()
    second = cluster.add_node(**MACHINE)
    until(JOINED.exists)
    seen["together"] = shards()
    cluster.remove_node(second, allow_graceful=False)
    LEFT.touch()


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args=MACHINE)
    FIRST.write_text(cluster.head_node.node_id)
    said: list[str] = []
    seen: dict[str, int] = {}
    machines = threading.Thread(target=come_and_go, args=(cluster, seen), daemon=True)
    try:
        machines.start()
        settings = replace(config(OUT, ROOT / "engine"), shard_size=8)
        synthesise(
            replace(settings, executor="ray", ray_address=cluster.address), Watch(say=said.append), chain
        )
        machines.join()
        print(json.dumps({"said": said, "shards": [*seen.values(), len(list(finished_shards(OUT)))]}))
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
