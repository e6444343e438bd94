"""What an export would build, from the weights' config files alone: sizes, files, cost, memory."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ubgen.core.config import require_directory
from ubgen.core.errors import UserError
from ubgen.export.activations import peak_activations
from ubgen.export.flops import count_flops
from ubgen.export.hashes import CACHE, Hashes
from ubgen.export.inputs import vae_scale
from ubgen.export.machine import device_memory, host_memory, why_not
from ubgen.export.networks import ClipImage, ClipText, Exportable, TextEncoder, UNet, VaeDecoder
from ubgen.export.onnx import EMBED_LIMIT
from ubgen.export.place import require_place
from ubgen.export.precision import lower
from ubgen.export.qalign_graph import QAlignScorer
from ubgen.export.sources import FAMILY, engine_parts, lora_file, network_keys, weight_directories
from ubgen.export.spec import EngineSpec, NetworkSpec
from ubgen.export.store import Store
from ubgen.rewards import Clip, QAlign
from ubgen.runtime import Signature
from ubgen.runtime.key import json_hash

_SUFFIX = {"onnxruntime": ".onnx", "aotinductor": ".pt2", "tensorrt": ".plan", "torch_tensorrt": ".plan"}


@dataclass(frozen=True)
class NetworkPlan:
    """`weight_bytes` in the engine's precision, `float32_bytes` before; `activation_bytes` at the largest batch."""

    name: str
    spec: NetworkSpec
    parameters: int
    float32_bytes: int
    weight_bytes: int
    activation_bytes: int
    signature: Signature
    network: Exportable

    @property
    def files(self) -> list[str]:
        """Names of the files that the runtime will open; weights beside the graph lie in a file of their own."""
        name = f"{self.name}{_SUFFIX[self.spec.compiler]}"
        apart = self.spec.compiler == "onnxruntime" and self.weight_bytes > EMBED_LIMIT
        return [name, f"{name}.data"] if apart else [name]

    def flops(self) -> int:
        """Of one image, or one text."""
        shapes = self.network.rows(self.network.inputs[0], 0, 1)
        return count_flops(self.network.module, shapes)[""]


@dataclass(frozen=True)
class Planned:
    """`built` names the networks that the output directory holds already; `problems`: why this machine would refuse."""

    networks: list[NetworkPlan]
    built: list[str]
    complete: bool
    problems: list[str]


def plan_export(spec: EngineSpec, out: str | Path | None = None, lora: str | Path | None = None) -> Planned:
    """What `export_engine` would do with the same arguments. Reads no weights, but to compare those that built `out`.

    UserError when an input is missing, `out` is no place for it, or the image size does not fit the networks.
    """
    inputs = weight_directories(spec) | ({"lora": lora_file(lora)} if lora is not None else {})
    if out is not None:
        require_place(Path(out), inputs)
    plans = plan_engine(spec, inputs)
    if reason := why_not(spec):
        return Planned(plans, [], False, [reason])
    try:
        check_memory(spec, plans, host_memory(), device_memory(spec.device))
        problems = []
    except UserError as error:
        problems = [str(error)]
    if out is None or not any(Path(out).glob("*.json")):
        return Planned(plans, [], False, problems)
    hashes = Hashes(Path(out) / CACHE)
    parts, store = engine_parts(spec, inputs, hashes), Store(Path(out), hashes)
    keys = {plan.name: network_keys(plan.name, spec, parts, inputs, hashes) for plan in plans}
    built = [name for name, (key, _) in keys.items() if store.find(name, key)]
    complete = store.finished(json_hash(parts)) is not None
    return Planned(plans, [plan.name for plan in plans] if complete else built, complete, problems)


def plan_engine(spec: EngineSpec, inputs: Mapping[str, Path]) -> list[NetworkPlan]:
    """One entry for each network; no weight is read. UserError when the image size does not fit the networks."""
    networks = _meta_networks(spec, inputs)
    return [_plan(name, networks[name], network) for name, network in spec.networks.items()]


def require_memory(spec: EngineSpec, inputs: Mapping[str, Path]) -> None:
    """UserError when the engines of `spec`, or their export, need more memory than this machine has."""
    plans = plan_engine(spec, inputs)
    check_memory(spec, plans, host_memory(), device_memory(spec.device))


def check_memory(spec: EngineSpec, plans: list[NetworkPlan], host: int, device: int) -> None:
    """`require_memory` against `host` bytes for the export and `device` bytes for the engines together."""
    weights, largest = sum(plan.weight_bytes for plan in plans), max(plans, key=lambda p: p.activation_bytes)
    scratch = _scratch(plans)
    if (needed := weights + scratch) > device:
        raise UserError(
            f"networks.{largest.name} at batch.max = {largest.spec.batch.max} takes {_gib(largest.activation_bytes)}, "
            f"all networks {_gib(scratch)} beside {_gib(weights)} of weights, {_gib(needed)} together; "
            f"{spec.device} has {_gib(device)}: lower batch.max"
        )
    families = {family: [p for p in plans if FAMILY[p.name] == family] for family in FAMILY.values()}
    for family, members in families.items():
        # PyTorch's float32 weights, and a lowered copy that the compiler writes out
        copy = max(2 * plan.weight_bytes for plan in members)
        if (needed := sum(plan.float32_bytes for plan in members) + copy) > host:
            raise UserError(
                f"exporting the networks of --{family.replace('_', '-')} takes about {_gib(needed)} of memory; "
                f"this machine has {_gib(host)}"
            )


def _scratch(plans: list[NetworkPlan]) -> int:
    """Bytes beside the weights: engines keep them; AOTInductor borrows PyTorch's, but keeps those of CUDA graphs."""
    kept, given_back = [0], [0]
    for plan in plans:
        returns = plan.spec.compiler == "aotinductor" and not plan.spec.options.cuda_graphs
        (given_back if returns else kept).append(plan.activation_bytes)
    return sum(kept) + max(given_back)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _plan(name: str, network: Exportable, spec: NetworkSpec) -> NetworkPlan:
    lowered = lower(network.module, spec.precision, spec.keep_float32, device="meta")
    full = {
        n: _rows(t, spec.batch.max) if n not in network.constant else t for n, t in network.inputs[0].items()
    }
    peak, output = peak_activations(lowered, full)
    size = _size(lowered)
    return NetworkPlan(
        name,
        spec,
        parameters=sum(parameter.numel() for parameter in network.module.parameters()),
        float32_bytes=_size(network.module),
        weight_bytes=size // 2 if spec.precision == "float8" else size,  # the lowered copy is in float16
        activation_bytes=peak,
        signature=network.signature(spec.batch, output),
        network=network,
    )


def _size(module: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def _rows(tensor: Tensor, rows: int) -> Tensor:
    return tensor.new_empty(rows, *tensor.shape[1:])


def _meta_networks(spec: EngineSpec, inputs: Mapping[str, Path]) -> dict[str, Exportable]:
    """All networks without weights, with two rows of inputs without values."""
    sd, clip = _stable_diffusion(inputs["stable_diffusion"]), _clip(inputs["clip"])
    _check_image_size(spec.image_size, sd)
    unet, text = sd["unet"].config, sd["text_encoder"].config
    side = spec.image_size // vae_scale(sd["vae"].config)
    latents = _empty(unet["in_channels"], side, side)
    prompt = _empty(text.max_position_embeddings, unet["cross_attention_dim"])
    unet_inputs = {
        "latents": latents,
        "timestep": _empty(),
        "cond": prompt,
        "uncond": prompt[:1],
        "guidance": torch.empty(1, device="meta"),
    }
    ids = {"input_ids": _empty(text.max_position_embeddings, dtype=torch.int64)}
    pixels = {"pixels": _empty(spec.image_size, spec.image_size, 3, dtype=torch.uint8)}
    tokens = {"tokens": _empty(clip.model.context_length, dtype=torch.int64)}  # type: ignore[arg-type]
    qalign = _qalign(inputs["qalign"])
    return {
        "text_encoder": Exportable(TextEncoder(sd["text_encoder"]), [ids], "embeddings"),
        "unet": Exportable(UNet(sd["unet"]), [unet_inputs], "noise", frozenset({"uncond", "guidance"})),
        "vae_decoder": Exportable(VaeDecoder(sd["vae"]), [{"latents": latents}], "pixels"),
        "clip_image": Exportable(ClipImage(clip), [pixels], "features"),
        "clip_text": Exportable(ClipText(clip), [tokens], "features"),
        "qalign": Exportable(QAlignScorer(qalign), [pixels], "score"),
    }


def _empty(*row: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(2, *row, dtype=dtype, device="meta")


def _check_image_size(size: int, sd: Mapping[str, Any]) -> None:
    """The UNet halves the latents between its blocks, and each time the size must be even."""
    step = vae_scale(sd["vae"].config) * 2 ** (len(sd["unet"].config["block_out_channels"]) - 1)
    if size % step:
        raise UserError(
            f"image_size must be a multiple of {step} for these Stable Diffusion weights, not {size}"
        )


def _stable_diffusion(path: Path) -> dict[str, Any]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel.from_config(_json(path / "unet")).eval(),
            "vae": AutoencoderKL.from_config(_json(path / "vae")).eval(),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**_json(path / "text_encoder"))).eval(),
        }


def _json(directory: Path) -> dict[str, Any]:
    file = require_directory(directory, "--stable-diffusion", "config.json") / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{file} is not valid JSON") from None


def _clip(path: Path) -> Clip:
    import open_clip

    with torch.device("meta"), _without_warnings():  # it warns about weights that nobody asked it to load
        model = open_clip.create_model(f"local-dir:{path}", load_weights=False, device="meta")
    side = model.visual.image_size  # open_clip gives a pair for its transformers
    return Clip(model.eval(), None, side if isinstance(side, int) else side[0], 0)


@contextmanager
def _without_warnings() -> Iterator[None]:
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


def _qalign(path: Path) -> QAlign:
    from ubgen.rewards.qalign_weights import read_config

    with torch.device("meta"):
        model = QAlign(read_config(path))
    return model.to("meta").eval()
