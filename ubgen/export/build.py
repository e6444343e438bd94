"""Build an engine directory: merge, export, compile, compare, and only then finish."""

import shutil
from collections.abc import Callable, Iterator, Mapping
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
from ubgen.core.stage import held_directory, read_manifest
from ubgen.diffusion import StableDiffusion, load_stable_diffusion, merge_lora
from ubgen.export.chain import ChainRow, Images, compare_chains, run_chain
from ubgen.export.gate import Candidate, open_network, pass_gate
from ubgen.export.hashes import CACHE, Hashes
from ubgen.export.inputs import exact_float32, expected_outputs, real_inputs
from ubgen.export.machine import require_machine
from ubgen.export.networks import Exportable, clip_networks, qalign_networks, stable_diffusion_networks
from ubgen.export.parity import ParityRow
from ubgen.export.place import mark, require_place
from ubgen.export.plan import require_memory
from ubgen.export.report import write_report
from ubgen.export.sources import engine_parts, exporter, lora_file, network_keys, weight_directories
from ubgen.export.spec import EngineSpec, NetworkSpec
from ubgen.export.store import Built, Store
from ubgen.rewards import Clip, QAlign
from ubgen.runtime import Signature
from ubgen.runtime.key import first_difference, json_hash
from ubgen.runtime.pipeline import Pipeline

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".msgpack", ".h5"}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """`built` is False when the directory already held this very engine and no work was done.

    `outdated`: that engine was made by another version of the exporter.
    """

    path: Path
    key: str
    parity: list[ParityRow]
    chain: ChainRow
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
    depend on has changed. A finished engine made by another version of this package stays unless `overwrite` is given.

    UserError when an input is missing, this machine can't build the spec, `out` overlaps an input or holds anything but
    an engine, it is finished with another one and `overwrite` is not given, or the engines are further from PyTorch
    than the spec allows; `out` then stays unfinished.
    """
    out = Path(out)
    load_classes(spec.parity.classes)
    inputs = weight_directories(spec)
    if lora is not None:
        inputs["lora"] = lora_file(lora)
    require_place(out, inputs)
    require_machine(spec)
    hashes = Hashes(out / CACHE)
    parts = engine_parts(spec, inputs, hashes)
    key = json_hash(parts)
    finished = _finished(Store(out, hashes), key)
    if finished and not (finished.outdated and overwrite):
        hashes.save()
        return finished
    if not overwrite:
        _require_no_other(out, parts)
    require_memory(spec, inputs)
    config = {"spec": spec.content(), "weights": {name: str(path) for name, path in inputs.items()}}
    with held_directory(out, "export", config, overwrite=overwrite) as stage:
        mark(out, config)  # before the manifest of the engine that is replaced goes
        stage.begin()
        build = _Build(spec, inputs, parts, Store(out, hashes), say)
        with exact_float32():
            exported = build.run(key)
        same_bits = build.same_bits()
        engine = {
            "key": key,
            "parts": parts,
            "exporter": exporter(),
            "networks": build.entries,
            "extras": {file.relative_to(out).as_posix(): hashes(file) for file in _extras(out)},
        }
        parity = [row.to_dict() for row in exported.parity]
        stage.finish(
            inputs, engine=engine, parity=parity, chain=exported.chain.to_dict(), same_bits=same_bits
        )
        hashes.save()
    return exported


def _finished(store: Store, key: str) -> Exported | None:
    """What was exported, when the directory already holds the same engine whole."""
    if (manifest := store.finished(key)) is None:
        return None
    rows = [ParityRow.from_dict(row) for row in manifest["parity"]]
    outdated = manifest["engine"].get("exporter") != exporter()
    return Exported(
        store.out, key, rows, ChainRow.from_dict(manifest["chain"]), built=False, outdated=outdated
    )


def _require_no_other(out: Path, parts: Mapping[str, Any]) -> None:
    """UserError naming what differs when `out` is finished with another engine."""
    try:
        there = read_manifest(out, "export")["engine"]["parts"]
    except (UserError, KeyError, TypeError):  # nothing, or nothing of ours: the stage directory says it
        return
    if difference := first_difference(there, parts):
        raise UserError(
            f"{out} holds another engine: {difference}; choose another --out, or pass --overwrite"
        )


class _Build:
    """One export, from its parts to the report; `entries` are those of the manifest."""

    def __init__(
        self, spec: EngineSpec, inputs: Mapping[str, Path], parts: Mapping[str, Any], store: Store, say: Say
    ) -> None:
        self.spec, self.inputs, self.parts, self.store, self.say = spec, inputs, parts, store, say
        self.entries: dict[str, Mapping[str, Any]] = {}
        self._expected: dict[str, Tensor] = {}  # PyTorch's first output of each network, for the chain

    def run(self, key: str) -> Exported:
        rows = [self._network(name, network) for name, network in self._families()]
        _copy_extras(self.inputs, self.store.out)
        chain, ours, reference = self._chain()
        title = f"{self.spec.device}, {self.spec.image_size} px"
        write_report(self.store.out, title, rows, chain, ours, reference)
        if not chain.passed:
            raise UserError(
                f"the engines' images differ from PyTorch's: {chain.misses[0]}; see {self.store.out}"
            )
        return Exported(self.store.out, key, rows, chain, built=True)

    def _families(self) -> Iterator[tuple[str, Exportable]]:
        """All networks in float32 on the CPU; one model family is in memory at a time."""
        self.say("sampling real inputs with PyTorch")
        sd = self._stable_diffusion()
        with _enough_memory("unet", "lower image_size"):
            real = self._real = real_inputs(sd, self.spec)
        yield from stable_diffusion_networks(sd, real).items()
        del sd
        clip = clip_networks(Clip.load(self.inputs["clip"]), real)
        yield from clip.items()
        del clip
        yield from qalign_networks(QAlign.load(self.inputs["qalign"]), real).items()

    def _stable_diffusion(self) -> StableDiffusion:
        sd = load_stable_diffusion(self.inputs["stable_diffusion"])
        if "lora" in self.inputs:
            merge_lora(sd.unet, self.inputs["lora"])
            sd.unet.eval().requires_grad_(False)
        return sd

    def _network(self, name: str, network: Exportable) -> ParityRow:
        """Found or compiled, and proven."""
        with _enough_memory(name, f"lower networks.{name}.batch.max"):
            return self._proven(name, network)

    def _proven(self, name: str, network: Exportable) -> ParityRow:
        spec = getattr(self.spec.networks, name)
        self.say(f"{name}: running PyTorch")
        expected = expected_outputs(name, network, self.spec.device, self.say)
        self._expected[name] = expected[0]
        candidate = Candidate(name, network, expected, spec, self.spec.device)
        keys = network_keys(name, self.spec, self.parts, self.inputs, self.store.hash_of)
        built = self.store.find(name, keys[0])
        if built and _mended_in_vain(built, spec):
            built = None
        row = self._check_again(candidate, built) if built else None
        if built is None or row is None or not row.passed:
            built, row = self._compile(candidate, *keys)
        self.entries[name] = built.entry
        return row

    def _check_again(self, candidate: Candidate, built: Built) -> ParityRow:
        self.say(f"{candidate.name}: is here; comparing with PyTorch")
        row = candidate.check(self.store.out / built.entry["file"])
        return replace(row, kept_float32=built.kept_float32, error_without=built.error_without)

    def _compile(self, candidate: Candidate, key: str, graph: str) -> tuple[Built, ParityRow]:
        name, spec, signature = candidate.name, candidate.spec, candidate.signature
        base = None
        relative = self.store.relative(name, graph) if spec.options.refit else None
        if relative and not _mended_in_vain(relative, spec):
            base = self.store.out / relative.entry["file"]
            candidate = replace(candidate, spec=replace(spec, keep_float32=relative.kept_float32))
        with self.store.staging() as staging:
            try:
                row, files = pass_gate(candidate, staging, self.say, base)
            except UserError as error:
                raise UserError(f"{error}; {self.store.out} stays unfinished") from error
            built = Built(key, graph, _entry(spec, signature), row.kept_float32, row.error_without)
            return self.store.add(name, built, files), row

    def _chain(self) -> tuple[ChainRow, Images, Images]:
        self.say("comparing the finished chain with PyTorch's")
        with _enough_memory("all networks together", "lower their batch.max"):
            ours = run_chain(self._pipeline, self._real)
        expected = self._expected
        reference = Images.of(
            self._real.pixels, expected["clip_image"], expected["clip_text"], expected["qalign"]
        )
        return compare_chains(ours, reference, self.spec.parity), ours, reference

    def same_bits(self) -> dict[str, Any]:
        """For the manifest: see `Pipeline.same_bits`."""
        self.say("looking whether an image depends on its place in a batch")
        with _enough_memory("all networks together", "lower their batch.best"):
            return self._pipeline.same_bits(self._real.names)

    @cached_property
    def _pipeline(self) -> Pipeline:
        specs, parity = dict(self.spec.networks.items()), self.spec.parity
        engines = {
            name: open_network(
                name,
                self.store.out / entry["file"],
                Signature.from_dict(entry["signature"]),
                specs[name],
                self.spec.device,
            )
            for name, entry in self.entries.items()
        }
        return Pipeline(engines, self.store.out, steps=parity.steps, guidance=parity.guidance)


@contextmanager
def _enough_memory(what: str, advice: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{what}: the GPU has too little memory; {advice}, or free what other programs hold there"
        ) from error


def _mended_in_vain(built: Built, spec: NetworkSpec) -> bool:
    """Whether its layers in float32, which cost speed, are there for a tighter tolerance than the spec's."""
    return built.error_without is not None and built.error_without <= spec.tolerance


def _entry(spec: NetworkSpec, signature: Signature) -> dict[str, Any]:
    return {
        "compiler": spec.compiler,
        "precision": spec.precision,
        "options": to_dict(spec.options),
        "signature": signature.to_dict(),
    }


def _copy_extras(inputs: Mapping[str, Path], out: Path) -> None:
    """What synthesis needs besides networks: both tokenizers and the scheduler's settings."""
    sd = inputs["stable_diffusion"]
    for source, target in (
        (sd / "tokenizer", "tokenizer"),
        (sd / "scheduler", "scheduler"),
        (inputs["clip"], "clip"),
    ):
        shutil.rmtree(out / target, ignore_errors=True)
        (out / target).mkdir()
        for file in sorted(source.iterdir()):
            if file.is_file() and not _is_weights(file):
                shutil.copyfile(file, out / target / file.name)


def _is_weights(file: Path) -> bool:
    return file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json")


def _extras(out: Path) -> list[Path]:
    return [file for name in ("tokenizer", "scheduler", "clip") for file in sorted((out / name).iterdir())]
