"""What a fine-tuning run would need, from the networks' configs alone: memory by part, and time by counted FLOPs.

Every network is built on "meta" tensors, which have shapes and no values, and goes forward and backward once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ubgen.core.config import resolve_path
from ubgen.core.console import table
from ubgen.core.weights import read_json_object
from ubgen.diffusion import add_lora, decode
from ubgen.export.networks import meta_stable_diffusion, vae_scale
from ubgen.rewards import Clip, QAlign
from ubgen.rewards.clip_files import meta_clip_of_config
from ubgen.rewards.qalign_weights import read_config
from ubgen.train.batches import updates_for, warmup_updates
from ubgen.train.config import TrainConfig, accumulation, networks_needed

CARDS = {
    "RTX 4090, 24 GB": (24, 165),
    "L40S, 48 GB": (48, 362),
    "A100, 80 GB": (80, 312),
    "H100, 80 GB": (80, 989),
}
"""Memory in GiB, and peak TFLOP/s of dense float16 products with float32 sums, from NVIDIA's data sheets."""
UTILISATION = 0.4  # of that peak; an assumption
RESERVED = 1.5e9  # bytes: the CUDA context, cuBLAS and cuDNN, and what the allocator cannot use
HALF = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Cost:
    """Of one forward and backward pass: `kept` bytes between the two, at most `peak`."""

    flops: int
    kept: int
    peak: int


@dataclass(frozen=True)
class TrainPlan:
    """Bytes on each GPU, by part; `flops` of the whole run and all its GPUs."""

    weights: dict[str, int]
    working: dict[str, int]
    qalign_resident: int  # of Q-Align's weights, where its layers stay in the host's memory
    flops: dict[str, float]

    def peak(self, *, offload: bool) -> int:
        """The weights, the rollout's graph, and the largest of what is needed in turn."""
        weights = dict(self.weights)
        if offload and "Q-Align" in weights:
            weights["Q-Align"] = self.qalign_resident
        in_turn = [size for name, size in self.working.items() if name != GRAPH]
        return sum(weights.values()) + self.working[GRAPH] + max(in_turn) + int(RESERVED)

    def fits(self, gib: int, *, offload: bool) -> bool:
        return self.peak(offload=offload) <= 0.95 * gib * 2**30

    def gpu_hours(self, tflops: float) -> float:
        """Hours of one GPU at `UTILISATION` of its peak; several share them."""
        return sum(self.flops.values()) / (tflops * 1e12 * UTILISATION) / 3600


GRAPH = "rollout's graph"


def plan_training(config: TrainConfig, classes: int, processes: int = 1) -> TrainPlan:
    """The plan of a run on GPUs. UserError for a config file that is missing or not of such a network."""
    weights, working, per_batch, sampling = _generator(config)
    resident = 0
    for name in networks_needed(config.losses)[1:]:
        title, network, cost, rows = _clip(config) if name == "clip" else _qalign(config)
        weights[title] = _size(network)
        working[f"{title}, {rows} image(s) at a time"] = cost.peak
        per_batch[title] = cost.flops * ceil(config.batch_size / rows)
        if name == "qalign":
            layers = {
                n: _size(m) for n, m in network.named_modules() if n.rpartition(".")[0].endswith("layers")
            }
            resident = weights[title] - sum(layers.values()) + 2 * max(layers.values())
            weights[title] = resident if config.networks.qalign_offload else weights[title]
    together = config.batch_size * processes * accumulation(config, processes)
    updates = config.max_updates or updates_for(config.epochs, classes, together)
    batches = together / config.batch_size
    flops = {name: count * batches * updates for name, count in per_batch.items()}
    flops["warm-up"] = 2 * batches * warmup_updates(config, classes, together) * sampling
    return TrainPlan(weights, working, resident, flops)


def _generator(config: TrainConfig) -> tuple[dict[str, int], dict[str, int], dict[str, float], float]:
    """Weights; what is needed on the way; FLOPs of a batch; FLOPs of a batch of the warm-up, for each of its halves."""
    dtype, batch, settings, rollout = (
        HALF[config.precision],
        config.batch_size,
        config.generator,
        config.rollout,
    )
    sd = meta_stable_diffusion(resolve_path(config.networks.stable_diffusion))
    # nn.Module's, as diffusers' own warns of tensors without values
    unet, vae, text = (
        nn.Module.to(part, dtype).requires_grad_(False) for part in (sd.unet, sd.vae, sd.text_encoder)
    )
    weights = {"UNet": _size(unet), "VAE": _size(vae), "text encoder": _size(text)}
    lora = add_lora(unet, settings.lora_rank, settings.lora_alpha, 0, settings.lora_layers)
    # in float32: the weights, their gradient, AdamW's two moments
    weights["LoRA, its gradient and optimiser"] = 16 * sum(parameter.numel() for parameter in lora)
    for parameter in lora:
        parameter.data = parameter.data.to(dtype)  # as autocast does
    if rollout.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    shape, width = sd.latent_shape(), unet.config.cross_attention_dim
    context = torch.empty(2 * batch, text.config.max_position_embeddings, width, dtype=dtype, device="meta")

    def step() -> Tensor:
        time = torch.zeros(2 * batch, dtype=torch.int64, device="meta")
        return unet(_leaf(2 * batch, *shape, dtype=dtype), time, context).sample.float()

    part = min(rollout.score_batch or 1, batch)
    recompute = rollout.gradient_checkpointing or part < batch
    decoding = _cost(lambda: decode(vae, _leaf(part, *shape), recompute))
    trained, sampled = _cost(step), _cost(step, backward=False)
    calls = rollout.steps + (rollout.sampler == "pndm")
    working = {
        GRAPH: trained.kept * rollout.grad_steps,
        "a sampling step, backward": trained.peak - trained.kept,
        f"decoding, {part} image(s) at a time": decoding.peak,
    }
    per_batch = {
        "sampling without gradient": float(sampled.flops * (calls - rollout.grad_steps)),
        "sampling with gradient": float(trained.flops * rollout.grad_steps),
        "decoding": float(decoding.flops * ceil(batch / part)),
    }
    # forward, again in the backward pass, and backward through frozen weights cost the same each
    warmup = sampled.flops * calls + per_batch["decoding"] / (3 if recompute else 2)
    return weights, working, per_batch, warmup


def _images(config: TrainConfig, rows: int) -> Tensor:
    root = resolve_path(config.networks.stable_diffusion)
    unet, vae = (read_json_object(root / part / "config.json") for part in ("unet", "vae"))
    side = unet.get("sample_size", 64) * vae_scale(vae)
    return _leaf(rows, 3, side, side)


def _clip(config: TrainConfig) -> tuple[str, nn.Module, Cost, int]:
    rows = min(config.rollout.score_batch or 1, config.batch_size)
    network, size, dim = meta_clip_of_config(resolve_path(config.networks.clip))
    clip = Clip(network.to(HALF[config.precision]), None, size, dim)
    return "CLIP", network, _cost(lambda: clip.encode_image(_images(config, rows)).float()), rows


def _qalign(config: TrainConfig) -> tuple[str, nn.Module, Cost, int]:
    rows, recompute = config.batch_size, config.rollout.gradient_checkpointing
    with torch.device("meta"):
        network = QAlign(read_config(resolve_path(config.networks.qalign))).eval().requires_grad_(False)
    network = network.to("meta", HALF[config.precision])
    return "Q-Align", network, _cost(lambda: network.score(_images(config, rows), checkpoint=recompute)), rows


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def _size(module: nn.Module | list[nn.Parameter]) -> int:
    tensors = [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else module
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _cost(forward: Callable[[], Tensor], *, backward: bool = True) -> Cost:
    """FLOPs with attention as its two products; memory with attention as the fused kernel that a GPU has."""
    with torch.set_grad_enabled(backward):
        with FlopCounterMode(display=False) as counter:
            _there_and_back(forward, backward)
        if not backward:
            return Cost(counter.get_total_flops(), 0, 0)
        with _fused_attention(), _Live() as live:
            kept = _there_and_back(forward, backward, live)
    return Cost(counter.get_total_flops(), kept, live.peak)


def _there_and_back(forward: Callable[[], Tensor], backward: bool, live: "_Live | None" = None) -> int:
    output = forward()
    kept = live.now() if live is not None else 0
    if backward:
        output.backward(torch.empty_like(output))
    return kept


class _Live(TorchDispatchMode):
    """Bytes of the storages that were made under it and still live, and the most that there were at one moment."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._known: set[int] = set()
        self._sum = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_key(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and _key(leaf) not in given and _key(leaf) not in self._storages:
                storage = leaf.untyped_storage()
                self._storages[_key(leaf)] = (StorageWeakRef(storage), storage.nbytes())
                self._sum += storage.nbytes()
        if self._sum > 1.01 * self.peak:  # looking for what has gone takes time: the peak is right to 1 %
            self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        for key in [key for key, (reference, _) in self._storages.items() if reference.expired()]:
            self._sum -= self._storages.pop(key)[1]
        return self._sum


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def _fused_attention() -> Iterator[None]:
    """On "meta" attention would be taken apart, and its scores be counted; a GPU's kernels never hold them.

    No function mode: checkpoints compute again in a thread of the backward pass, which has none.
    """
    real = F.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Attention.apply(query, key, value)

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def plan_tables(plan: TrainPlan) -> list[Table]:
    """Memory by part, time by part, and which cards the run fits on."""
    gib = [(name, f"{size / 2**30:.2f}") for name, size in [*plan.weights.items(), *plan.working.items()]]
    gib.append(("CUDA and the allocator, assumed", f"{RESERVED / 2**30:.2f}"))
    peak = plan.peak(offload=False)
    gib.append(("together, the largest of what comes in turn", f"{peak / 2**30:.2f}"))
    cards = []
    for card, (memory, tflops) in CARDS.items():
        here, offloaded = (plan.fits(memory, offload=offload) for offload in (False, True))
        answer = "as it is" if here else "with --networks.qalign-offload" if offloaded else "no"
        cards.append((card, answer, f"{plan.gpu_hours(tflops):.2f}"))
    work = [(name, f"{flops / 1e15:,.1f}") for name, flops in plan.flops.items()]
    return [
        table("memory of each GPU", ["part", "GiB"], gib),
        table("work of all GPUs together", ["part", "PFLOP"], work),
        table(
            f"cards; hours at {UTILISATION:.0%} of the peak",
            ["card", "fits", "GPU hours"],
            cards,
            text_columns=2,
        ),
    ]
