"""Build an engine directory: merge, export, compile, compare, and only then finish."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ubgen.classes import load_classes
from ubgen.config import require_directory
from ubgen.diffusion import LORA_FILE, StableDiffusion, load_stable_diffusion, merge_lora
from ubgen.errors import UserError
from ubgen.export.inputs import RealInputs, real_inputs
from ubgen.export.networks import Exportable, clip_networks, qalign_networks, stable_diffusion_networks
from ubgen.export.onnx import export_onnx
from ubgen.export.parity import ParityRow, check_parity
from ubgen.export.spec import EngineSpec, NetworkSpec
from ubgen.manifest import MANIFEST, content_hash, read_manifest, stage_directory
from ubgen.rewards import Clip, QAlign
from ubgen.runtime.backends import backend
from ubgen.runtime.key import check_engine, json_hash, key_parts

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".msgpack", ".h5"}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """`built` is False when the directory already held this very engine and no work was done."""

    path: Path
    key: str
    parity: list[ParityRow]
    built: bool


def export_engine(
    spec: EngineSpec,
    out: str | Path,
    lora: str | Path | None = None,
    *,
    overwrite: bool = False,
    say: Say = lambda line: None,
) -> Exported:
    """Compile the networks of `spec`, with the LoRA at `lora` merged into the UNet, into the directory `out`.

    UserError when an input is missing, `out` is finished with another engine and `overwrite` is not given, or a
    network is further from PyTorch than its tolerance; `out` then stays unfinished.
    """
    out = Path(out)
    load_classes(spec.parity.classes)
    inputs = _inputs(spec, lora)
    parts = _parts(spec, inputs)
    _check_base(inputs, parts["weights"]["stable_diffusion"])
    key = json_hash(parts)
    if finished := _finished(out, key, spec):
        return Exported(out, key, finished, built=False)
    config = {"spec": spec.content(), "weights": {name: str(path) for name, path in inputs.items()}}
    with stage_directory(out, "export", config, overwrite=overwrite) as stage:
        entries, rows = _compile_all(spec, inputs, out, say)
        engine = {"key": key, "parts": parts, "networks": entries, "extras": _file_hashes(out, _extras(out))}
        stage.finish(inputs, engine=engine, parity=[row.to_dict() for row in rows])
    return Exported(out, key, rows, built=True)


def _inputs(spec: EngineSpec, lora: str | Path | None) -> dict[str, Path]:
    weights = spec.weights
    inputs = {
        "stable_diffusion": require_directory(weights.stable_diffusion, "--stable-diffusion", "unet", "vae"),
        "clip": require_directory(weights.clip, "--clip", "open_clip_config.json"),
        "qalign": require_directory(weights.qalign, "--qalign", "config.json"),
    }
    require_directory(
        inputs["stable_diffusion"], "--stable-diffusion", "text_encoder", "tokenizer", "scheduler"
    )
    if lora is not None:
        directory = require_directory(lora, "--lora")
        if (directory / ".lock").exists():  # made by a stage of ours, which may have been stopped
            read_manifest(directory, "train")
        inputs["lora"] = require_directory(directory, "--lora", LORA_FILE) / LORA_FILE
    return inputs


def _parts(spec: EngineSpec, inputs: Mapping[str, Path]) -> dict[str, Any]:
    hashes = {name: content_hash(path) for name, path in inputs.items()}
    lora = hashes.pop("lora", None)
    compilers = {network.compiler for _, network in spec.networks.items()}
    return key_parts(hashes, lora, spec.content(), compilers, spec.device)


def _check_base(inputs: Mapping[str, Path], base: str) -> None:
    """A LoRA of ours says which generator it was trained on; merged into another, it would make noise."""
    if "lora" not in inputs or not (inputs["lora"].parent / MANIFEST).exists():
        return
    trained_on = read_manifest(inputs["lora"].parent, "train")["inputs"].get("stable_diffusion", {})
    if trained_on.get("hash", base) != base:
        raise UserError(
            f"--lora: {inputs['lora'].parent} was trained on {trained_on['path']}, "
            f"not on the weights in {inputs['stable_diffusion']}"
        )


def _finished(out: Path, key: str, spec: EngineSpec) -> list[ParityRow] | None:
    """The parity rows of the same engine when `out` already holds it whole."""
    try:
        manifest = read_manifest(out, "export")
        if manifest["engine"]["key"] != key:
            return None
        check_engine(out, manifest["engine"], manifest["config"]["spec"], spec.device)
    except (UserError, KeyError, TypeError):
        return None
    return [ParityRow(**{k: v for k, v in row.items() if k != "passed"}) for row in manifest["parity"]]


def _compile_all(
    spec: EngineSpec, inputs: Mapping[str, Path], out: Path, say: Say
) -> tuple[dict[str, Any], list[ParityRow]]:
    """Manifest entries and parity rows of all networks; one model family is in memory at a time."""
    entries, rows = {}, []
    specs = dict(spec.networks.items())
    for name, network in _families(spec, inputs, say):
        say(f"{name}: exporting")
        entry, row = _compile(name, network, specs[name], out, spec.device)
        if not row.passed:
            raise UserError(
                f"{name}: the engine differs from PyTorch by {row.error:.2e}, more than the spec's tolerance "
                f"{row.tolerance:.2e}; {out} stays unfinished"
            )
        entries[name] = entry
        rows.append(row)
    _copy_extras(inputs, out)
    return entries, rows


def _families(spec: EngineSpec, inputs: Mapping[str, Path], say: Say) -> Iterator[tuple[str, Exportable]]:
    say("sampling real inputs with PyTorch")
    sd, real = _stable_diffusion(spec, inputs)
    yield from stable_diffusion_networks(sd, real).items()
    del sd
    yield from clip_networks(Clip.load(inputs["clip"]), real).items()
    yield from qalign_networks(QAlign.load(inputs["qalign"]), real).items()


def _stable_diffusion(spec: EngineSpec, inputs: Mapping[str, Path]) -> tuple[StableDiffusion, RealInputs]:
    sd = load_stable_diffusion(inputs["stable_diffusion"])
    if "lora" in inputs:
        merge_lora(sd.unet, inputs["lora"])
        sd.unet.eval().requires_grad_(False)
    return sd, real_inputs(sd, spec.parity)


def _compile(
    name: str, network: Exportable, spec: NetworkSpec, out: Path, device: str
) -> tuple[dict[str, Any], ParityRow]:
    files = export_onnx(network, spec, out / f"{name}.onnx")
    signature = network.signature(spec.batch)
    load = backend(spec.compiler).load
    engine = load(name, files[0], signature, device, torch.get_num_threads())
    entry = {
        "compiler": spec.compiler,
        "precision": spec.precision,
        "file": files[0].name,
        "files": _file_hashes(out, files),
        "signature": signature.to_dict(),
    }
    return entry, check_parity(name, engine, network, spec)


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


def _file_hashes(out: Path, files: list[Path]) -> dict[str, str]:
    return {file.relative_to(out).as_posix(): content_hash(file) for file in files}
