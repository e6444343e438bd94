"""The ways to run the denoising network that are measured against each other."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu_suite.ceilings import DTYPES
from bench.gpu_suite.networks import random_unet
from bench.gpu_suite.suite import Settings
from bench.gpu_suite.tuned import TunedUNet, Tuning
from ubgen.core.config import to_dict
from ubgen.diffusion import sample_guided
from ubgen.export.networks import UNet

GUIDANCE = 2.0
SHARED = frozenset({"uncond", "guidance"})


@dataclass(frozen=True)
class Variant:
    """`tuning` None: diffusers' module as it is. `attention`: SDPA's kernel of first choice, "" for PyTorch's own.

    `compile`: arguments of torch.compile. `engine`: a compiler of `ubgen.export`, in place of everything else.
    `headline`: only measured at the most important batch.
    """

    name: str
    about: str
    dtype: str = "bfloat16"
    channels_last: bool = False
    benchmark: bool = True
    tuning: Tuning | None = None
    attention: str = ""
    compile: Mapping[str, Any] | None = None
    graph: bool = False
    engine: str = ""
    headline: bool = False


_INDUCTOR = {"conv_1x1_as_mm": True}
_TUNED = Variant("", "", channels_last=True, tuning=Tuning(), graph=True)
_COMPILED = replace(_TUNED, compile={"fullgraph": True, "options": _INDUCTOR}, headline=True)
_AUTOTUNED = replace(_COMPILED, compile={"fullgraph": True, "options": {**_INDUCTOR, "max_autotune": True}})

ON_GPU = (
    Variant("eager", "diffusers as it comes", benchmark=False),
    Variant("channels-last", "diffusers, channels last, cuDNN chooses by measuring", channels_last=True),
    Variant("compile", "the same through torch.compile", channels_last=True, compile={"fullgraph": True}),
    replace(_TUNED, name="graph", about="tuned UNet, one CUDA graph"),
    replace(_TUNED, name="graph-cudnn", about="graph, attention by cuDNN", attention="cudnn"),
    replace(
        _TUNED,
        name="graph-native",
        about="graph-cudnn, native GroupNorm + SiLU",
        attention="cudnn",
        tuning=Tuning(native_norm=True),
    ),
    replace(_COMPILED, name="tuned", about="tuned UNet, torch.compile, one CUDA graph"),
    replace(_COMPILED, name="tuned-cudnn", about="tuned, attention by cuDNN", attention="cudnn"),
    replace(
        _COMPILED,
        name="tuned-plain",
        about="tuned-cudnn without shared start and phases",
        attention="cudnn",
        tuning=Tuning(shared_start=False, phases=False),
    ),
    replace(_AUTOTUNED, name="autotuned", about="tuned-cudnn, max_autotune", attention="cudnn"),
    Variant("aotinductor", "the engine of ubgen-export, one CUDA graph", engine="aotinductor", graph=True),
    Variant(
        "tensorrt", "the engine of ubgen-export, one CUDA graph", "float16", engine="tensorrt", graph=True
    ),
    Variant("eager-fp16", "diffusers as it comes", "float16", benchmark=False, headline=True),
    replace(
        _TUNED,
        name="graph-cudnn-fp16",
        about="as in bfloat16",
        dtype="float16",
        attention="cudnn",
        headline=True,
    ),
    replace(_COMPILED, name="tuned-cudnn-fp16", about="as in bfloat16", dtype="float16", attention="cudnn"),
)
"""In the order of the table. "eager" and "compile" are the peers that the others are compared with."""

ON_CPU = (
    Variant("eager", "diffusers as it comes", "float32", benchmark=False),
    Variant("channels-last", "diffusers, channels last", "float32", channels_last=True),
    Variant(
        "compile",
        "traced by torch.compile, run eagerly",
        "float32",
        compile={"backend": "aot_eager"},
        headline=True,
    ),
    replace(_TUNED, name="graph", about="tuned UNet", dtype="float32", graph=False),
    replace(
        _TUNED,
        name="graph-native",
        about="native GroupNorm + SiLU",
        dtype="bfloat16",
        tuning=Tuning(native_norm=True),
        graph=False,
    ),
    replace(
        _COMPILED,
        name="tuned",
        about="tuned UNet, traced",
        dtype="float32",
        compile={"fullgraph": True, "backend": "aot_eager"},
    ),
    Variant("onnxruntime", "the engine of ubgen-export", "float32", engine="onnxruntime"),
)


def chosen(settings: Settings) -> list[Variant]:
    """Those that this run asks for: all, unless some are named; the peers are always there."""
    known = ON_CPU if settings.small else ON_GPU
    wanted = {*settings.variants, "eager"} if settings.variants else {variant.name for variant in known}
    return [variant for variant in known if variant.name in wanted]


class Denoiser:
    """One variant, built. `bind` fixes the batch and the prompts; a call is one guided denoising step."""

    def __init__(self, variant: Variant, settings: Settings) -> None:
        self.variant, self.settings = variant, settings
        self._dtype = DTYPES[variant.dtype]
        self._prompts: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}  # what a call takes besides latents and timestep
        self._graph: Any = None
        self._tuned: TunedUNet | None = None
        self._unet: Any = None  # diffusers', for its own pipeline
        unet = random_unet(settings.sizes.unet, settings.device)
        with self.context():
            self._run = self._engine(unet) if variant.engine else self._module(unet)

    @torch.no_grad()
    def bind(self, latents: Tensor, timestep: Tensor, cond: Tensor, uncond: Tensor) -> None:
        guidance = torch.tensor([GUIDANCE], device=latents.device)
        self._graph, self._prompts = None, {"cond": cond, "uncond": uncond}
        if self._unet is not None:
            self._inputs = {"context": torch.cat([uncond.expand_as(cond), cond]).to(self._dtype)}
        elif self.variant.engine:
            self._inputs = {**self._prompts, "guidance": guidance}
        if self._tuned is not None:
            self._tuned.set_prompts(cond, uncond)
        if self.variant.graph and latents.is_cuda and not self.variant.engine:
            from ubgen.runtime.cuda_graphs import TorchGraph

            def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
                return {"noise": self._run(**inputs)}

            with self.context():
                for _ in range(2):  # compiled, and its kernels chosen, before the capture
                    self._run(latents, timestep, **self._inputs)
                self._graph = TorchGraph(run, {"latents": latents, "timestep": timestep, **self._inputs})

    @torch.no_grad()
    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Guided noise (B,C,h,w) float32."""
        if self._graph is not None:
            return self._graph({"latents": latents, "timestep": timestep})["noise"]
        with self.context():
            return self._run(latents, timestep, **self._inputs)

    @torch.no_grad()
    def sample(self, latents: Tensor) -> Tensor:
        """The whole PNDM loop on the prompts of `bind`: diffusers' pipeline for its own module, else ours."""
        if self._unet is None:
            return sample_guided(self, "pndm", latents, steps=self.settings.sizes.steps)
        cond, uncond = (self._prompts[name].to(self._dtype) for name in ("cond", "uncond"))
        with self.context():
            return self._pipeline()(
                prompt_embeds=cond,
                negative_prompt_embeds=uncond.expand_as(cond),
                latents=latents.to(self._dtype),
                num_inference_steps=self.settings.sizes.steps,
                guidance_scale=GUIDANCE,
                output_type="latent",
            ).images

    def _pipeline(self) -> Any:
        from diffusers import PNDMScheduler, StableDiffusionPipeline

        from ubgen.diffusion.schedule import SD15

        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        scheduler = PNDMScheduler.from_config(SD15)
        pipeline = StableDiffusionPipeline(
            **parts, unet=self._unet, scheduler=scheduler, requires_safety_checker=False
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @contextmanager
    def context(self) -> Iterator[None]:
        """What must hold while the variant is compiled, captured or called."""
        benchmark = self.variant.benchmark and self.settings.device != "cpu"
        with (
            torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, allow_tf32=True),
            _attention(self.variant),
        ):
            yield

    def _module(self, unet: Any) -> Any:
        variant, dtype = self.variant, self._dtype
        if variant.tuning is None:
            unet = unet.to(dtype)
            if variant.channels_last:
                unet = unet.to(memory_format=torch.channels_last)
            self._unet = unet if variant.compile is None else torch.compile(unet, **variant.compile)
            return self._plain
        tuned = TunedUNet(unet, variant.tuning, GUIDANCE).to_precision(dtype)
        if variant.channels_last:
            tuned = tuned.to(memory_format=torch.channels_last)
        self._tuned = tuned
        return tuned if variant.compile is None else torch.compile(tuned, **variant.compile)

    def _plain(self, latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """The UNet with guidance around it, called just as diffusers' pipeline does."""
        noise = self._unet(
            torch.cat([latents.to(self._dtype)] * 2),
            timestep[0].long(),
            encoder_hidden_states=context,
            timestep_cond=None,
            cross_attention_kwargs=None,
            added_cond_kwargs=None,
            return_dict=False,
        )[0]
        e_uncond, e_cond = noise.chunk(2)
        return (e_uncond + GUIDANCE * (e_cond - e_uncond)).float()

    def _engine(self, unet: Any) -> Any:
        """What ubgen-export would make of this UNet, and ubgen.runtime runs."""
        network = build_engine(unet, self.variant, self.settings)
        return lambda latents, timestep, **prompts: network.run(
            {"latents": latents, "timestep": timestep, **prompts}
        )["noise"]


def build_engine(unet: Any, variant: Variant, settings: Settings) -> Any:
    """Compile `unet` (float32) with the compiler of `variant` and open the result. UserError where it can't be."""
    from ubgen.core.errors import UserError
    from ubgen.export.compilers import COMPILERS
    from ubgen.export.networks import Exportable
    from ubgen.export.precision import lower
    from ubgen.export.spec import BatchRange, NetworkSpec, Options
    from ubgen.runtime.backends import backend

    device, sizes = settings.device, settings.sizes
    probe = backend(variant.engine).probe(device)
    if not probe.available:
        raise UserError(f"{probe.name}: {probe.detail}")
    inputs = inputs_of(settings, 2)
    spec = NetworkSpec(
        BatchRange(1, sizes.batches[0], max(sizes.batches)),
        tolerance=1.0,
        compiler=variant.engine,  # type: ignore[arg-type]
        precision=variant.dtype,  # type: ignore[arg-type]
        options=Options(cuda_graphs=variant.graph),
    )
    module = lower(UNet(unet).eval(), spec.precision, device=device)
    exportable = Exportable(module, [inputs], "noise", SHARED)
    path = settings.work / f"engine-{variant.name}"
    path.mkdir(exist_ok=True)
    files = COMPILERS[variant.engine](exportable, spec, path / "unet", device, print).files
    signature, options = exportable.signature(spec.batch), to_dict(spec.options)
    return backend(variant.engine).load("unet", files[0], signature, device, torch.get_num_threads(), options)


def inputs_of(settings: Settings, batch: int) -> dict[str, Tensor]:
    """Latents, timestep, prompts and guidance of `batch` images; the first rows are the same for every batch."""
    from bench.gpu_suite.networks import random_prompts

    most = max(settings.sizes.batches)
    generator = torch.Generator(settings.device).manual_seed(5)
    latents = torch.randn((most, *settings.sizes.latent), device=settings.device, generator=generator)
    cond, uncond = random_prompts(settings.sizes, most, settings.device)
    return {
        "latents": latents[:batch].clone(),
        "timestep": torch.full((batch,), 501.0, device=settings.device),
        "cond": cond[:batch].clone(),
        "uncond": uncond,
        "guidance": torch.tensor([GUIDANCE], device=settings.device),
    }


def reference_noise(settings: Settings, rows: int) -> np.ndarray:
    """What diffusers computes in float32 for the first `rows` images."""
    from ubgen.export.inputs import exact_float32

    unet = UNet(random_unet(settings.sizes.unet, settings.device))
    with exact_float32(), torch.no_grad():
        return unet(**inputs_of(settings, rows)).cpu().numpy()


def _attention(variant: Variant) -> Any:
    order = {
        "": [],
        "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION],
    }[variant.attention]
    if not order:
        from contextlib import nullcontext

        return nullcontext()
    return sdpa_kernel([*order, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True)
