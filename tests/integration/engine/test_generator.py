"""The real networks: whose bits depend on what, and images that are none."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from ubgen.core.classes import ClassList, load_classes
from ubgen.dataset import open_dataset
from ubgen.export import Exported
from ubgen.runtime import Network, load
from ubgen.runtime.pipeline import Pipeline
from ubgen.synth import SynthConfig
from ubgen.synth.generator import Generator
from ubgen.synth.plan import Item, Plan
from ubgen.synth.synthesise import synthesise


@pytest.fixture(scope="module")
def classes(class_file: str) -> ClassList:
    return load_classes(class_file)


@pytest.fixture(scope="module")
def config(exported: Exported, class_file: str) -> SynthConfig:
    return SynthConfig(exported.path, class_file, per_class=1, out="unused", batch=4, steps=2, format="png")


class Bent:
    """A network of which `bend` changes every output."""

    def __init__(self, network: Network, bend: Callable[[Tensor], Tensor]) -> None:
        self._network, self._bend = network, bend
        self.signature, self.device = network.signature, network.device

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._bend(tensor) for name, tensor in self._network.run(inputs).items()}


def next_up(rows: Tensor) -> Tensor:
    """The least that can differ."""
    return rows ^ 1 if rows.dtype == torch.uint8 else torch.nextafter(rows, torch.full_like(rows, torch.inf))


def by_position(rows: Tensor) -> Tensor:
    return torch.cat([next_up(rows[:1]), rows[1:]]) if len(rows) > 1 else next_up(rows)


def by_size(rows: Tensor) -> Tensor:
    return next_up(rows) if len(rows) == 1 else rows


@pytest.mark.parametrize("network", ["unet", "vae_decoder", "clip_image", "qalign"])
@pytest.mark.parametrize(("bend", "other"), [(by_position, "position"), (by_size, "size")])
def test_a_network_that_varies_with_its_batch_is_found_out(
    exported: Exported, classes: ClassList, network: str, bend: Callable[[Tensor], Tensor], other: str
) -> None:
    engines = load(exported.path)
    bent = {**engines, network: Bent(engines[network], bend)}
    found = Pipeline(bent, exported.path, steps=2, guidance=2.0).same_bits(classes.names)  # type: ignore[arg-type]
    assert {name: found[name] for name in ("position", "size")} == {
        name: name != other for name in ("position", "size")
    }


def test_warming_up_calls_every_network_on_images_twice(exported: Exported) -> None:
    """A second call of the same size is the one that captures a CUDA graph."""
    engines, calls = load(exported.path), list[tuple[str, int]]()

    def counted(name: str) -> Bent:
        return Bent(engines[name], lambda rows: (calls.append((name, len(rows))), rows)[1])

    networks = {name: counted(name) for name in engines}
    pipeline = Pipeline(networks, exported.path, steps=2, guidance=2.0)  # type: ignore[arg-type]
    calls.clear()
    pipeline.warm_up(4)
    assert sorted(calls) == sorted(
        2 * [(name, 4) for name in ("unet", "vae_decoder", "clip_image", "qalign")]
    )


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_bits_do_not_depend_on_the_number_of_threads(
    config: SynthConfig, classes: ClassList, threads: Callable[[int], None]
) -> None:
    """Which changes with the number of workers on a machine."""
    items = [Item(i, i % 5, i // 5) for i in range(4)]
    made = []
    for count in (1, 2):
        threads(count)
        with torch.inference_mode():
            made.append(Generator(load(config.engine, threads=count), classes, config).make(items))
    for one, two in zip(*made, strict=True):
        assert torch.equal(one.pixels, two.pixels)
        assert (one.clip_similarity, one.quality) == (two.clip_similarity, two.quality)


class Poisoned(Generator):
    """The first attempt at class 1 has a NaN in its latents, that at class 2 is of one colour."""

    _rows: ClassVar[dict[int, int]] = {}

    def denoise(self, items: Sequence[Item]) -> Tensor:
        self._rows = {i.class_index: row for row, i in enumerate(items) if i.attempt == 0}
        latents = super().denoise(items).clone()
        if (row := self._rows.get(1)) is not None:
            latents[row, 0, 0, 0] = torch.nan
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        pixels = super().decode(latents).clone()
        if (row := self._rows.get(2)) is not None:
            pixels[row] = 7
        return pixels


def test_images_that_are_none_are_rejected_with_their_reason(config: SynthConfig, tmp_path: Path) -> None:
    def source(config: SynthConfig, plan: Plan, device: str, threads: int) -> Poisoned:
        return Poisoned(load(config.engine, device=device), plan.classes, config, plan.prompts)

    out = tmp_path / "out"
    synthesise(replace(config, out=str(out)), open_source=source)
    ledger = [json.loads(line) for line in (out / "rejections.jsonl").read_text().splitlines()]
    assert [(line["class_index"], line["attempt"], line["reason"]) for line in ledger] == [
        (1, 0, "not finite"),
        (2, 0, "constant"),
    ]
    attempts = {s.label: s.meta["identity"]["attempt"] for s in open_dataset(out)}
    assert attempts == {0: 0, 1: 1, 2: 1, 3: 0, 4: 0}
