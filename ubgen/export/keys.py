"""What an engine is made from, the weights and the LoRA, and the content keys that follow from their bytes."""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ubgen.core.config import require_directory, resolve_path, to_dict
from ubgen.core.errors import UserError
from ubgen.core.stage import MANIFEST, Stage, content_hash, library_versions, read_manifest
from ubgen.diffusion import check_stable_diffusion, find_lora, stable_diffusion_files
from ubgen.export.spec import EngineSpec, NetworkSpec
from ubgen.rewards.clip_files import clip_files, find_clip
from ubgen.rewards.qalign_weights import check_weight_files, qalign_files
from ubgen.runtime.engine import json_hash, key_parts

HashOf = Callable[[Path, Iterable[Path] | None], str]
"""`content_hash` of a file, or of some of a directory's files."""

FAMILY = {
    "text_encoder": "stable_diffusion",
    "unet": "stable_diffusion",
    "vae_decoder": "stable_diffusion",
    "clip_image": "clip",
    "clip_text": "clip",
    "qalign": "qalign",
}
"""Network name -> the weights that it comes from."""

_PART = {"text_encoder": "text_encoder", "unet": "unet", "vae_decoder": "vae"}
"""Network name -> the directory of its own inside those weights."""

_READ = {"stable_diffusion": stable_diffusion_files, "clip": clip_files, "qalign": qalign_files}
"""Weights -> the files of their directory that are read."""

_FILES = {
    "stable_diffusion": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    "clip": (),
    "qalign": ("config.json",),
}


def find_inputs(spec: EngineSpec, lora: str | Path | None) -> dict[str, Path]:
    """The directories of all weights, and the file of the LoRA, looked at without loading them.

    UserError naming the option for one that is missing, and the file for one that is damaged or does not fit.
    """
    found = {}
    for name, files in _FILES.items():
        option, path = f"--{name.replace('_', '-')}", getattr(spec.weights, name)
        if path is None:
            raise UserError(f"{option}: this spec names no weights of its own; give their directory")
        found[name] = require_directory(path, option, *files)
    check_stable_diffusion(found["stable_diffusion"])
    find_clip(found["clip"], "--clip")
    check_weight_files(found["qalign"])
    return found if lora is None else {**found, "lora": _lora_file(resolve_path(lora))}


def _lora_file(path: Path) -> Path:
    """The LoRA's file, given itself or by its directory; UserError when that is of an unfinished training run."""
    if (path / ".lock").exists():  # made by a stage of ours, which may have been stopped
        read_manifest(path, "train")
    try:
        return find_lora(path)
    except UserError as error:
        raise UserError(f"--lora: {error}") from None


def require_own_directory(out: Path, inputs: Mapping[str, Path]) -> None:
    """UserError unless `out` is new, empty or an engine's, and apart from all `inputs`; changes nothing.

    An export replaces and removes files, so weights must lie neither in `out` nor around it.
    """
    where = out.resolve()
    for name, path in inputs.items():
        if path.resolve().is_relative_to(where) or where.is_relative_to(path.resolve()):
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"--out: {out} and {option} ({path}) overlap; choose a directory of its own")
    Stage(out, "export", {}, overwrite=True).look()


def engine_parts(spec: EngineSpec, inputs: Mapping[str, Path], hash_of: HashOf) -> dict[str, Any]:
    """All that the engine's key depends on; `inputs` are the weights and the LoRA."""
    hashes = {
        name: hash_of(path, _READ[name](path) if name in _READ else None) for name, path in inputs.items()
    }
    lora = hashes.pop("lora", None)
    _check_base(inputs, hashes["stable_diffusion"])
    compilers: set[str] = {network.compiler for _, network in spec.networks.items()}
    return key_parts(hashes, lora, spec.content(), compilers, spec.device)


def network_keys(
    name: str,
    spec: EngineSpec,
    parts: Mapping[str, Any],
    inputs: Mapping[str, Path],
    hash_of: HashOf,
) -> tuple[str, str]:
    """The key of one compiled network, and the key of its graph alone, whatever the weights in it.

    With them an interrupted or changed export finds what it has already.
    """
    network: NetworkSpec = getattr(spec.networks, name)
    settings = to_dict(network)
    del settings["tolerance"]  # is checked again
    family = FAMILY[name]
    own = inputs[family] / _PART.get(name, "")
    weights = {
        "weights": hash_of(own, [f for f in _READ[family](inputs[family]) if f.is_relative_to(own)]),
        "lora": parts["lora"] if name == "unet" else None,
    }
    graph = {
        "format": parts["format"],
        "network": name,
        "spec": settings,
        "image_size": spec.image_size,
        "compiler": parts["compilers"][network.compiler],
        "architecture": parts["architecture"],
        "versions": library_versions(),
        "exporter": exporter(),
    }
    return json_hash(graph | weights), json_hash(graph)


@cache
def exporter() -> str:
    """Hash of this package's code, which decides what is in the files. No part of an engine's key: older ones run."""
    code = {file.name: content_hash(file) for file in sorted(Path(__file__).parent.rglob("*.py"))}
    return json_hash(code)


def _check_base(inputs: Mapping[str, Path], base: str) -> None:
    """A LoRA of ours says which generator it was trained on; merged into another, it would make noise."""
    if "lora" not in inputs or not (inputs["lora"].parent / MANIFEST).exists():
        return
    trained_on = read_manifest(inputs["lora"].parent, "train")["inputs"].get("stable_diffusion", {})
    if trained_on.get("hash", base) == base:
        return
    path, given = Path(trained_on["path"]), inputs["stable_diffusion"]
    if path.resolve() == given.resolve():
        raise UserError(
            f"--lora: files in {given} have changed since {inputs['lora'].parent} was trained on it"
        )
    raise UserError(f"--lora: {inputs['lora'].parent} was trained on {path}, not on the weights in {given}")
