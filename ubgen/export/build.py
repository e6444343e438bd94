"""Build an engine directory: merge, compile, compare, and only then finish."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ubgen.core.classes import load_classes
from ubgen.core.config import to_dict
from ubgen.core.errors import UserError
from ubgen.core.stage import Stage
from ubgen.diffusion import StableDiffusion, load_stable_diffusion, merge_lora, with_sampler
from ubgen.export.compilers import compile_network
from ubgen.export.directory import Built, EngineDirectory
from ubgen.export.exportable import Exportable, Say
from ubgen.export.inputs import expected_outputs, real_inputs
from ubgen.export.keys import engine_parts, exporter, find_inputs, network_keys, require_own_directory
from ubgen.export.mixed_precision import layers_to_keep, lower, lowered_pixels, record_calls
from ubgen.export.networks import clip_networks, qalign_networks, stable_diffusion_networks
from ubgen.export.parity import (
    Images,
    ParityRow,
    PipelineRow,
    check_parity,
    compare_images,
    pipeline_images,
    scored,
    write_report,
)
from ubgen.export.plan import machine_problem, memory_problem, plan_networks
from ubgen.export.spec import EngineSpec, NetworkSpec
from ubgen.rewards import Clip, QAlign
from ubgen.runtime import Network, Signature
from ubgen.runtime.backends import backend
from ubgen.runtime.engine import json_hash
from ubgen.runtime.network import exact_float32
from ubgen.runtime.pipeline import Pipeline


@dataclass(frozen=True)
class Exported:
    """`built` is False when the directory already held this very engine and no work was done.

    `outdated`: that engine was made by another version of the exporter.
    """

    path: Path
    key: str
    parity: list[ParityRow]
    pipeline: PipelineRow
    built: bool
    outdated: bool = False


def export_engine(
    spec: EngineSpec,
    out: str | Path,
    lora: str | Path | None = None,
    *,
    overwrite: bool = False,
    say: Say = lambda line: None,
) -> Exported:
    """Compile the networks of `spec`, with the LoRA at `lora` merged into the UNet, into the directory `out`.

    A network that misses its tolerance in low precision is compiled again with the layers that cause it in float32.
    Networks that an interrupted export, or an engine that is replaced, left in `out` are kept where nothing that they
    depend on has changed. `overwrite` replaces a finished engine; the very same one is built anew.

    UserError when an input is missing, this machine can't build the spec, `out` overlaps an input or holds anything but
    an engine, it is finished with another one and `overwrite` is not given, or the engines are further from PyTorch
    than the spec allows; `out` then stays unfinished.
    """
    out = Path(out)
    load_classes(spec.parity.classes)
    inputs = find_inputs(spec, lora)
    require_own_directory(out, inputs)
    if problem := machine_problem(spec):
        raise UserError(f"this machine can't build the spec: {problem}")
    directory = EngineDirectory(out)
    parts = engine_parts(spec, inputs, directory.hashes)
    finished = _finished(directory, json_hash(parts))
    if finished and not overwrite:
        directory.hashes.save()
        return finished
    config = {"spec": spec.content(), "weights": {name: str(path) for name, path in inputs.items()}}
    # each network has a key of its own and is kept under it: nothing is cleared, and any engine may be continued
    stage = Stage(out, "export", parts, config, has_work=lambda store: False, overwrite=overwrite)
    stage.look()
    if problem := memory_problem(spec, plan_networks(spec, inputs)):
        raise UserError(problem)
    with stage.hold():
        stage.begin()
        if (
            finished and not finished.outdated
        ):  # of another version, the networks' keys tell which are built anew
            directory.forget(name for name, _ in spec.networks.items())
        return _Build(spec, inputs, parts, directory, say).run(stage)


def _finished(directory: EngineDirectory, key: str) -> Exported | None:
    """What was exported, when the directory already holds the same engine whole."""
    if (manifest := directory.finished(key)) is None:
        return None
    rows = [ParityRow.from_dict(row) for row in manifest["parity"]]
    outdated = manifest["engine"].get("exporter") != exporter()
    return Exported(directory.path, key, rows, PipelineRow.from_dict(manifest["chain"]), False, outdated)


@dataclass(frozen=True)
class Candidate:
    """A network (float32, on the CPU) to be compiled; `expected` is its output for each real input."""

    name: str
    network: Exportable
    expected: Sequence[Tensor]
    spec: NetworkSpec
    device: str

    @property
    def signature(self) -> Signature:
        return self.network.signature(self.spec.batch, self.expected[0])

    def check(self, file: Path) -> ParityRow:
        """How far the compiled `file` is from PyTorch."""
        engine = open_network(self.name, file, self.signature, self.spec, self.device)
        return check_parity(self.name, engine, self.network, self.expected, self.spec)


def open_network(name: str, file: Path, signature: Signature, spec: NetworkSpec, device: str) -> Network:
    load = backend(spec.compiler).load
    return load(name, file, signature, device, torch.get_num_threads(), to_dict(spec.options))


class _Build:
    """One export, from its parts to the manifest."""

    def __init__(
        self,
        spec: EngineSpec,
        inputs: Mapping[str, Path],
        parts: Mapping[str, Any],
        directory: EngineDirectory,
        say: Say,
    ) -> None:
        self.spec, self.inputs, self.parts, self.directory, self.say = spec, inputs, parts, directory, say
        self._entries: dict[str, Mapping[str, Any]] = {}  # of the manifest
        self._kept: dict[str, tuple[str, ...]] = {}  # modules in float32
        self._expected: dict[str, Tensor] = {}  # PyTorch's first output of each network, for the images

    def run(self, stage: Stage) -> Exported:
        key, out = json_hash(self.parts), self.directory.path
        with exact_float32():
            rows = [self._network(name, network) for name, network in self._families()]
            extras = self.directory.add_extras(self.inputs)
            pipeline, ours, reference = self._images()
        write_report(out, f"{self.spec.device}, {self.spec.image_size} px", rows, pipeline, ours, reference)
        if not pipeline.passed:
            raise UserError(f"the engines' images differ from PyTorch's: {pipeline.misses[0]}; see {out}")
        engine: dict[str, Any] = {"key": key, "parts": self.parts, "exporter": exporter()}
        engine["networks"] = self._entries
        if self.spec.device != "cpu":
            engine["tf32"] = False  # float32 is computed exactly, here and by `Network.run`
        stage.finish(
            self.inputs,
            engine={**engine, "extras": extras},
            parity=[row.to_dict() for row in rows],
            chain=pipeline.to_dict(),
            same_bits=self._same_bits(),
        )
        self.directory.hashes.save()
        return Exported(out, key, rows, pipeline, built=True)

    def _families(self) -> Iterator[tuple[str, Exportable]]:
        """All networks in float32 on the CPU; one model family is in memory at a time."""
        self.say("sampling real inputs with PyTorch")
        sd = self._stable_diffusion()
        with _enough_memory("unet", "lower image_size"):
            real = self._real = real_inputs(sd, self.spec)
        networks = stable_diffusion_networks(sd, real.input_ids, real.unet_calls, real.latents)
        yield from networks.items()
        self._lowered = self._lowered_pixels(networks, with_sampler(sd.scheduler, "pndm"))
        del sd, networks
        clip = Clip.load(self.inputs["clip"])
        tokens = clip.tokenizer([f"photo of {name}" for name in real.names])
        yield from clip_networks(clip, real.pixels, tokens).items()
        del clip
        yield from qalign_networks(QAlign.load(self.inputs["qalign"]), real.pixels).items()

    def _lowered_pixels(self, networks: Mapping[str, Exportable], scheduler: Any) -> Tensor | None:
        self.say("sampling with PyTorch in the engines' precisions")
        with _enough_memory("unet", "lower image_size"):
            return lowered_pixels(networks, self._kept, self._real, self.spec, scheduler)

    def _stable_diffusion(self) -> StableDiffusion:
        sd = load_stable_diffusion(self.inputs["stable_diffusion"])
        if "lora" in self.inputs:
            merge_lora(sd.unet, self.inputs["lora"])
            sd.unet.eval().requires_grad_(False)
        return sd

    def _network(self, name: str, network: Exportable) -> ParityRow:
        """Found or compiled, and compared with PyTorch."""
        with _enough_memory(name, f"lower networks.{name}.batch.max"):
            spec = getattr(self.spec.networks, name)
            self.say(f"{name}: running PyTorch")
            expected = expected_outputs(name, network, self.spec.device, self.say)
            self._expected[name] = expected[0]
            candidate = Candidate(name, network, expected, spec, self.spec.device)
            key, graph = network_keys(name, self.spec, self.parts, self.inputs, self.directory.hashes)
            built = self.directory.find(name, key=key)
            row = self._check_again(candidate, built) if built and not _kept_in_vain(built, spec) else None
            if built is None or row is None or not row.passed:
                built, row = self._compile(candidate, key, graph)
        self._entries[name], self._kept[name] = built.entry, row.kept_float32
        return row

    def _check_again(self, candidate: Candidate, built: Built) -> ParityRow:
        self.say(f"{candidate.name}: already built; comparing with PyTorch")
        row = candidate.check(self.directory.path / built.entry["file"])
        return replace(row, kept_float32=built.kept_float32, error_without=built.error_without)

    def _compile(self, candidate: Candidate, key: str, graph: str) -> tuple[Built, ParityRow]:
        name, spec, base = candidate.name, candidate.spec, None
        relative = self.directory.find(name, graph=graph) if spec.options.refit else None
        if relative and not _kept_in_vain(relative, spec):
            base = self.directory.path / relative.entry["file"]
            candidate = replace(candidate, spec=replace(spec, keep_float32=relative.kept_float32))
        with self.directory.staging() as staging:
            try:
                row, files = compile_within_tolerance(candidate, staging, self.say, base)
            except UserError as error:
                raise UserError(f"{error}; {self.directory.path} stays unfinished") from error
            entry = {
                "compiler": spec.compiler,
                "precision": spec.precision,
                "options": to_dict(spec.options),
                "signature": candidate.signature.to_dict(),
            }
            built = Built(key, graph, entry, row.kept_float32, row.error_without)
            return self.directory.add(name, built, files), row

    def _images(self) -> tuple[PipelineRow, Images, Images]:
        self.say("comparing the images of all engines together with PyTorch's")
        with _enough_memory("all networks together", "lower their batch.max"):
            ours = pipeline_images(self._pipeline, self._real)
            low = None if self._lowered is None else scored(self._pipeline, self._real, self._lowered)
        expected = self._expected
        reference = Images.of(
            self._real.pixels, expected["clip_image"], expected["clip_text"], expected["qalign"]
        )
        return compare_images(ours, reference, self.spec.parity, low), ours, reference

    def _same_bits(self) -> dict[str, Any]:
        """See `Pipeline.same_bits`."""
        self.say("looking whether an image depends on its place in a batch")
        with _enough_memory("all networks together", "lower their batch.best"):
            return self._pipeline.same_bits(self._real.names)

    @cached_property
    def _pipeline(self) -> Pipeline:
        specs, parity = dict(self.spec.networks.items()), self.spec.parity
        networks = {
            name: open_network(
                name,
                self.directory.path / entry["file"],
                Signature.from_dict(entry["signature"]),
                specs[name],
                self.spec.device,
            )
            for name, entry in self._entries.items()
        }
        return Pipeline(networks, self.directory.path, steps=parity.steps, guidance=parity.guidance)


@contextmanager
def _enough_memory(what: str, advice: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{what}: the GPU has too little memory; {advice}, or free what other programs hold there"
        ) from error


def _kept_in_vain(built: Built, spec: NetworkSpec) -> bool:
    """Whether its layers in float32, which cost speed, are there for a tighter tolerance than the spec's."""
    return built.error_without is not None and built.error_without <= spec.tolerance


def compile_within_tolerance(
    candidate: Candidate, directory: Path, say: Say, base: Path | None = None
) -> tuple[ParityRow, list[Path]]:
    """Compile into `directory` until PyTorch is met within the tolerance; the report's row, and the files.

    In low precision a second attempt leaves those layers in float32 that cause the error. `base`: see
    `compile_network`. UserError when the network still misses its tolerance.
    """
    name, spec = candidate.name, candidate.spec
    row, files = _attempt(candidate, spec.keep_float32, directory, say, base)
    if not row.passed and spec.precision != "float32":
        say(f"{name}: error {row.error:.1e} in {spec.precision}; looking for the layers that cause it")
        more = layers_to_keep(candidate.network, candidate.expected, spec, candidate.device, say)
        if more:
            without = row.error
            row, files = _attempt(candidate, (*spec.keep_float32, *more), directory, say)
            row = replace(row, error_without=without)
    if not row.passed:
        kept = f" even with {', '.join(row.kept_float32)} in float32" if row.kept_float32 else ""
        raise UserError(
            f"{name}: the engine differs from PyTorch by {row.error:.2e}{kept}, more than the spec's tolerance "
            f"{row.tolerance:.2e}"
        )
    return row, files


def _attempt(
    candidate: Candidate, keep: tuple[str, ...], directory: Path, say: Say, base: Path | None = None
) -> tuple[ParityRow, list[Path]]:
    name, network, device = candidate.name, candidate.network, candidate.device
    spec = replace(candidate.spec, keep_float32=keep)
    say(f"{name}: compiling with {spec.compiler} in {spec.precision}")
    calls = record_calls(network.module, network.example(spec.batch)) if keep else None
    traced_on = "cpu" if backend(spec.compiler).from_onnx else device
    lowered = lower(network.module, spec.precision, keep, calls, traced_on)
    inputs = [{n: t.to(traced_on) for n, t in given.items()} for given in network.inputs]
    exportable = replace(network, module=lowered, inputs=inputs)
    files = compile_network(exportable, spec, directory / name, device, say, base)
    del lowered, inputs, exportable
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
    say(f"{name}: comparing with PyTorch")
    return replace(candidate.check(files[0]), kept_float32=keep), files
