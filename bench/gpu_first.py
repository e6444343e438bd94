"""The parts of bench/gpu_first.sh, each in a process with a time limit: one that is late is cut, and the rest goes on.

Every result is a line of OUT_DIR/results.jsonl at once. `--device cpu --small` tries the script itself out.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 540  # seconds
BATCH = 32
GRAPHS = (23, 20)  # opsets
CONFIGS: dict[str, dict[str, Any]] = {  # Stable Diffusion 1.5's sizes, and what tries the script out
    "unet": {
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "small unet": {
        "block_out_channels": (32,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    },
    "vae": {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
    },
    "small vae": {"block_out_channels": (32,), "latent_channels": 4},
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a part runs, and where its results go."""

    out: Path
    device: str = "cuda"
    small: bool = False

    def write(self, part: str, **result: Any) -> None:
        """One line, on the disk at once."""
        line = json.dumps({"part": part, "at": round(time.time(), 1), **result}, default=str)
        print(line, flush=True)
        with (self.out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
            file.flush()
            os.fsync(file.fileno())


Part = Callable[[Place], None]


def machine(place: Place) -> None:
    """Versions, what can run, and the ceilings of matrix products and copies."""
    import torch

    from ubgen.benchmark import compare, machine_record
    from ubgen.core.probes import all_probes

    place.write("machine", **machine_record(place.device))
    place.write("doctor", probes=[dataclasses.asdict(probe) for probe in all_probes()])
    side, dtypes = (256, (torch.float32,)) if place.small else (8192, (torch.float16, torch.bfloat16))
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=place.device, dtype=dtype) for _ in range(2))
        sides = {"product": partial(torch.mm, a, b), "copy": partial(a.copy_, b)}
        times = compare(sides, place.device, seconds=0.1 if place.small else 3)
        tflops = 2 * side**3 / times["product"].median / 1e9
        gbytes = 2 * a.numel() * a.element_size() / times["copy"].median / 1e6
        place.write("ceiling", dtype=str(dtype), tflops=tflops, copy_gb_per_s=gbytes)


def kernels(place: Place) -> None:
    """Our own kernels, and one guided step to the last bit."""
    import torch

    from ubgen.ops import cuda_status, guided_step, native_status
    from ubgen.ops.step import guided_step_reference

    available, detail = native_status() if place.device == "cpu" else cuda_status()
    x, uncond, cond, *history = (torch.randn(2, 4, 64, 64) for _ in range(6))
    rest = (1.1189641, -0.11945176, 2.0, [55 / 24, -59 / 24, 37 / 24, -9 / 24])
    wanted = guided_step_reference(x, uncond, cond, history, *rest)
    x, uncond, cond, *history = (tensor.to(place.device) for tensor in (x, uncond, cond, *history))
    got = guided_step(x, uncond, cond, history, *rest)
    same = all(torch.equal(one.cpu(), other) for one, other in zip(got, wanted, strict=True))
    place.write("kernels", native=available, detail=detail, same_bits=same)
    run_tests(place, "kernels", "tests/gpu/test_guided_step.py")


def run_tests(place: Place, part: str, *arguments: str) -> None:
    """Tests that need a GPU, a line for each as it ends."""
    if place.device == "cpu":
        place.write(part, tests=arguments, skipped="no GPU")
        return
    command = [sys.executable, "-um", "pytest", "-m", "gpu", "-vv", "-p", "no:cacheprovider", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            words = line.split()
            if len(words) > 1 and words[1] in ("PASSED", "FAILED", "ERROR", "SKIPPED"):
                place.write(part, test=words[0], outcome=words[1])
            elif line.startswith("E "):
                place.write(part, error=line.strip()[:300])


def tensorrt(place: Place) -> None:
    """Tiny builds of one attention each, with and without the leave to split it; bytes in and out; a replayed graph."""
    import torch

    from ubgen.core import probes

    place.write("tensorrt", **dataclasses.asdict(probes.tensorrt()))
    cases = [(torch.float16, 40, False), (torch.float16, 160, False), (torch.float16, 512, False)]
    cases += [(torch.float32, 8, False), (torch.float16, 40, True)]
    for dtype, width, masked in cases[:1] if place.small else cases:
        for split in (True, False):
            case = {"dtype": str(dtype), "width": width, "masked": masked, "split": split}
            attempt(place, "tensorrt", case, partial(_attention, place, dtype, width, masked, split))
    run_tests(
        place,
        "tensorrt",
        "tests/gpu/test_backends.py",
        "-k",
        "equals_pytorch and tensorrt and not torch_tensorrt",
    )


def attempt(place: Place, part: str, case: Mapping[str, Any], work: Callable[[], Mapping[str, Any]]) -> None:
    """A line with what `work` finds, or with why it fails."""
    start = time.perf_counter()
    try:
        found = work()
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    place.write(part, **case, **found, seconds=round(time.perf_counter() - start, 2))


def _attention(place: Place, dtype: Any, width: int, masked: bool, split: bool) -> Mapping[str, Any]:
    """8-bit pixels to 8-bit pixels through an attention of that width."""
    import onnx
    import torch
    from torch import Tensor, nn

    from ubgen.core import probes
    from ubgen.export.compilers.onnx import SPLIT, tensorrt_graph
    from ubgen.export.exportable import Exportable
    from ubgen.export.spec import BatchRange, NetworkSpec, Options

    class Attention(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            rows = (pixels.float() / 255).to(dtype).unflatten(2, (2, width)).transpose(1, 2)
            mask = torch.ones(rows.shape[2], rows.shape[2], dtype=torch.bool).tril() if masked else None
            mixed = nn.functional.scaled_dot_product_attention(rows, rows, rows, attn_mask=mask)
            return (mixed.transpose(1, 2).flatten(2).float() * 255).round().to(torch.uint8)

    pixels = torch.randint(0, 256, (2, 128, 2 * width), dtype=torch.uint8)
    network = Exportable(Attention().eval(), [{"pixels": pixels}], "out")
    graphs = Options(cuda_graphs=True)
    spec = NetworkSpec(BatchRange(1, 2, 4), 1e-2, "tensorrt", "float16", opset=23, options=graphs)
    with tempfile.TemporaryDirectory() as scratch, tensorrt_graph(network, spec, Path(scratch, "a")) as graph:
        model = onnx.load(graph)
        nodes = [node for node in model.graph.node if node.op_type == "Attention"]
        if not split:
            for node in nodes:
                node.attribute.remove(next(own for own in node.attribute if own.name == SPLIT))
            onnx.save(model, graph)
        if not probes.tensorrt().available:
            return {"attentions": len(nodes), "not_built": "no TensorRT"}
        from ubgen.export.compilers.tensorrt import build
        from ubgen.runtime.tensorrt import TensorRtNetwork

        plan, signature = Path(scratch, "a.plan"), network.signature(spec.batch)
        build(graph, signature.inputs, spec, place.device, lambda line: None, plan)
        engine = TensorRtNetwork("a", plan, signature, place.device, 1, {"cuda_graphs": True})
        outs = [
            engine.run({"pixels": pixels.to(place.device)})["out"].cpu() for _ in range(3)
        ]  # the last are replays
    wanted = network.reference({"pixels": pixels})
    return {"levels_off": [int((out.int() - wanted.int()).abs().max()) for out in outs]}


def unet_network(place: Place, device: str) -> Any:
    """Stable Diffusion 1.5's UNet with guidance, weights from a seed, in float16; on a CPU for trials in float32."""
    import torch
    from diffusers import UNet2DConditionModel

    from ubgen.export.exportable import Exportable
    from ubgen.export.mixed_precision import lower
    from ubgen.export.networks import UNet

    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, **CONFIGS["small unet" if place.small else "unet"]).eval()
    for parameter in unet.requires_grad_(False).parameters():
        if parameter.ndim == 1:  # equal tensors would be stored once
            parameter.add_(torch.randn(parameter.shape), alpha=0.05)
    rows, side, width = (2, 8, 24) if place.small else (BATCH, 64, 768)
    inputs = {
        "latents": torch.randn(rows, 4, side, side),
        "timestep": torch.full((rows,), 501.0),
        "cond": torch.randn(rows, 77, width),
        "uncond": torch.randn(1, 77, width),
        "guidance": torch.tensor([2.0]),
    }
    module = lower(UNet(unet).eval(), "float32" if place.small else "float16", device=device)
    moved = {name: tensor.to(device) for name, tensor in inputs.items()}
    return Exportable(module, [moved], "noise", frozenset({"uncond", "guidance"}))


def unet_spec(place: Place, compiler: str, opset: int = 23) -> Any:
    from ubgen.export.spec import BatchRange, NetworkSpec, Options

    rows, precision = (2, "float32") if place.small else (BATCH, "float16")
    graphs = Options(cuda_graphs=place.device != "cpu", provider="cpu")
    return NetworkSpec(BatchRange(1, rows, rows), 2e-2, compiler, precision, opset, options=graphs)  # type: ignore[arg-type]


def unet(variant: str, place: Place) -> None:
    """The UNet alone on the device: compiled first, then timed; its error is from PyTorch in float32."""
    import torch

    from ubgen.benchmark import compare
    from ubgen.export.cost import count_flops
    from ubgen.export.parity import row_errors
    from ubgen.runtime.cuda_graphs import TorchGraph
    from ubgen.runtime.network import exact_float32

    compiled = variant not in ("eager", "graph")
    network = unet_network(place, "cpu" if variant.startswith("tensorrt") else place.device)
    inputs = {name: tensor.to(place.device) for name, tensor in network.inputs[0].items()}
    start = time.perf_counter()
    call: Callable[[], Any] = partial(network.reference, inputs)
    if compiled:
        engine = _compiled(place, variant, network)
        call = partial(lambda: engine.run(inputs)["noise"])
    elif variant == "graph":
        replay = TorchGraph(lambda given: {"noise": network.reference(given)}, inputs)
        call = partial(lambda: replay(inputs)["noise"])
    found = call()
    place.write("unet", variant=variant, ready_seconds=round(time.perf_counter() - start, 1))
    timing = compare({variant: call}, place.device, seconds=0.1 if place.small else 8)[variant]
    flops = count_flops(network.module, network.rows(inputs, 0, 1))[""] * len(found)
    tflops = flops / timing.median / 1e9
    place.write(
        "unet",
        variant=variant,
        ms=timing.median,
        q1=timing.q1,
        q3=timing.q3,
        tflops=tflops,
        share_of_ceiling=tflops / ceiling if (ceiling := _ceiling(place)) else None,
    )
    exact = network.module.to(place.device).float()
    for part in exact.modules():  # without the casts of low precision
        part._forward_pre_hooks.clear()
    with exact_float32(), torch.no_grad():
        wanted = exact(**network.rows(inputs, 0, 2))
    place.write("unet", variant=variant, error=float(row_errors(found[:2].cpu(), wanted.cpu()).max()))


def _ceiling(place: Place) -> float | None:
    lines = (json.loads(line) for line in (place.out / "results.jsonl").read_text().splitlines())
    return max((line["tflops"] for line in lines if line["part"] == "ceiling"), default=None)


def _compiled(place: Place, variant: str, network: Any) -> Any:
    """By TensorRT from the graph that was prepared, if it was; by AOTInductor in this process's layout."""
    from ubgen.core.config import to_dict
    from ubgen.export.compilers import compile_network
    from ubgen.runtime.backends import backend

    compiler, _, opset = variant.partition("-")
    spec = unet_spec(place, compiler, int(opset) if opset.isdigit() else 23)
    path = place.out / variant
    prepared = place.out / f"unet-{opset}.onnx"
    if compiler == "tensorrt" and prepared.exists():
        from ubgen.export.compilers.tensorrt import build

        if prepared.with_suffix(".json").exists():
            fill(prepared, network.module)
        file = path.with_suffix(".plan")
        build(prepared, network.input_specs(spec.batch), spec, place.device, lambda line: None, file)
    else:
        file = compile_network(network, spec, path, place.device, lambda line: None)[0]
    options = to_dict(spec.options)
    signature = network.signature(spec.batch, network.inputs[0]["latents"])  # the noise is like them
    return backend(compiler).load("unet", file, signature, place.device, 1, options)


def prepare(place: Place) -> None:
    """The UNet's graphs for TensorRT, to be carried to a GPU: without weights, which a seed gives there."""
    import shutil

    from ubgen.export.compilers.onnx import tensorrt_graph

    network = unet_network(place, "cpu")
    for opset in GRAPHS[:1] if place.small else GRAPHS:
        spec = unet_spec(place, "tensorrt", opset)
        with tensorrt_graph(network, spec, place.out / f"unet-{opset}") as graph:
            target = place.out / f"unet-{opset}.onnx"
            shutil.copyfile(graph, target)
            size = (
                strip(graph, target, network.module) if graph.with_name(f"{graph.name}.data").exists() else 0
            )
        place.write("prepare", opset=opset, graph_bytes=target.stat().st_size, weight_bytes=size)


def strip(graph: Path, target: Path, module: Any) -> int:
    """Write beside `target` where each weight in `graph`'s data file comes from; what is none of `module`'s, whole."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo

    known = dict(_weights(module))
    data, places = graph.with_name(f"{graph.name}.data"), []
    with data.open("rb") as file:
        for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                info = ExternalDataInfo(tensor)
                file.seek(info.offset or 0)
                content = file.read(info.length)
                source = known.get(hashlib.sha256(content).hexdigest())
                places.append([info.offset or 0, *(source or ("", content.hex()))])
    recipe = {"file": data.name, "size": data.stat().st_size, "weights": places}
    target.with_suffix(".json").write_text(json.dumps(recipe), encoding="utf-8")
    return data.stat().st_size


def _weights(module: Any) -> Iterator[tuple[str, tuple[str, str]]]:
    """(hash of the bytes, (name, "" or "turned")) of every weight, and of every matrix turned."""
    for name, tensor in module.named_parameters():
        for turned, values in (("", tensor), ("turned", tensor.t() if tensor.ndim == 2 else None)):
            if values is not None:
                yield hashlib.sha256(_bytes(values)).hexdigest(), (name, turned)


def _bytes(tensor: Any) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def fill(graph: Path, module: Any) -> None:
    """Write the data file that `strip` left out."""
    recipe, named = json.loads(graph.with_suffix(".json").read_text()), dict(module.named_parameters())
    with graph.with_name(recipe["file"]).open("wb") as file:
        file.truncate(recipe["size"])
        for offset, name, how in recipe["weights"]:
            file.seek(offset)
            tensor = named.get(name)
            file.write(bytes.fromhex(how) if tensor is None else _bytes(tensor.t() if how else tensor))


def scorer_and_decoder(place: Place) -> None:
    """Q-Align whole and folded, and the decoder at two sizes, in PyTorch."""
    import torch

    from ubgen.benchmark import compare, peak_memory
    from ubgen.core.config import resolve_path
    from ubgen.export.networks import VaeDecoder
    from ubgen.export.qalign_graph import QAlignScorer
    from ubgen.rewards import QAlign

    torch.manual_seed(0)
    rows, side, seconds, least = (1, 64, 0.1, 1) if place.small else (16, 512, 4, 3)
    pixels = torch.randint(0, 256, (rows, side, side, 3), dtype=torch.uint8, device=place.device)
    with torch.no_grad():
        if place.small:
            qalign = QAlign.load(resolve_path("ubgen:miniature/weights/qalign"))
        else:
            with torch.device(place.device):  # 32 GB, and half of them soon
                qalign = QAlign(json.loads((ROOT / "bench/qalign-7b.json").read_text())).eval()
            qalign = qalign.to(place.device, torch.float16)  # its constants were on the CPU
        images, folded = pixels.permute(0, 3, 1, 2).float() / 255, QAlignScorer(qalign).eval()
        for name, call in {"whole": partial(qalign.score, images), "folded": partial(folded, pixels)}.items():
            with peak_memory(place.device) as peak:
                timing = compare({name: call}, place.device, seconds=seconds, least=least)[name]
            place.write("qalign", variant=name, batch=rows, ms=timing.median, extra_bytes=peak.extra)
        del qalign, folded
        decoder = _decoder(place, VaeDecoder)
        for batch in (1,) if place.small else (8, 16):
            latents = torch.randn(batch, 4, side // 8, side // 8, device=place.device)
            timing = compare(
                {"decoder": partial(decoder, latents)}, place.device, seconds=seconds, least=least
            )["decoder"]
            place.write("decoder", batch=batch, ms=timing.median)


def _decoder(place: Place, wrap: Any) -> Any:
    from diffusers import AutoencoderKL

    from ubgen.export.mixed_precision import lower

    vae = AutoencoderKL(**CONFIGS["small vae" if place.small else "vae"]).eval().requires_grad_(False)
    return lower(wrap(vae).eval(), "float32" if place.small else "float16", device=place.device)


def synthesis(place: Place) -> None:
    """Streams, pinned copies and nvjpeg, with stand-ins for the networks."""
    run_tests(place, "synthesis", "tests/integration/synth/test_gpu.py")


def training(place: Place) -> None:
    """One update in float16 and one in bfloat16: the miniature's, with Q-Align at its full width and two layers."""
    from ubgen.core.config import resolve_path
    from ubgen.rewards import QAlign

    with tempfile.TemporaryDirectory() as scratch:
        qalign = resolve_path("ubgen:miniature/weights/qalign")
        if not place.small:
            config = json.loads((ROOT / "bench/qalign-7b.json").read_text()) | {"num_hidden_layers": 2}
            qalign = Path(scratch, "qalign")
            QAlign.from_config(config).half().save(qalign)
        for precision in ("bf16",) if place.small else ("fp16", "bf16"):
            case, out = {"precision": precision}, Path(scratch, precision)
            attempt(place, "training", case, partial(update, qalign, precision, out, place.small))


def update(qalign: Path, precision: str, out: Path, small: bool) -> Mapping[str, Any]:
    """What the log says of the first update of the generator."""
    options: dict[str, Any] = {
        "--precision": precision,
        "--networks.qalign": qalign,
        "--out": out,
        "--stop-after": 2,
    }
    options["--discriminator.warmup-updates"] = 1
    # the paper's adversary; the class-level terms, which the recipe has, need a longer warm-up
    options |= {"--losses.entire": 1, "--losses.class-mean": 0, "--losses.class-spread": 0}
    if small:
        options |= {"--device": "cpu", "--batch-size": 2, "--rollout.steps": 2, "--rollout.grad-steps": 1}
    words = [str(word) for option in options.items() for word in option]
    command = [sys.executable, "-m", "ubgen.cli.train", *words]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(answer.stderr.strip()[-300:])
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])


UNETS = ("eager", "graph", "tensorrt-23", "tensorrt-20", "aotinductor", "aotinductor-nchw")
PARTS: dict[str, tuple[int, Part]] = {  # name -> (most seconds, work), in this order
    "machine": (30, machine),
    "kernels": (50, kernels),
    "tensorrt": (60, tensorrt),
    **{f"unet-{name}": (35 if name in UNETS[:2] else 105, partial(unet, name)) for name in UNETS},
    "qalign": (60, scorer_and_decoder),
    "synthesis": (30, synthesis),
    "training": (120, training),
}


def chosen_parts() -> list[str]:
    """AOTInductor's UNets stand in for TensorRT's where there is none: four variants at most."""
    from ubgen.core import probes

    left_out = "aotinductor" if probes.tensorrt().available else "tensorrt-"
    return [name for name in PARTS if not name.startswith(f"unet-{left_out}")]


def run_parts(
    place: Place, commands: Mapping[str, tuple[float, Sequence[str]]], total: float = TOTAL
) -> None:
    """Each command after the other; one that is late is ended with all that it started."""
    end = time.monotonic() + total
    for name, (limit, command) in commands.items():
        left = min(limit, end - time.monotonic())
        if left <= 0:
            place.write(name, skipped="no time left")
            continue
        layout = {"TORCHINDUCTOR_LAYOUT_OPTIMIZATION": "0"} if name.endswith("-nchw") else {}
        with (place.out / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **layout},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                code = process.wait(left)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                place.write(name, late=round(left, 1))
                continue
        lines = (place.out / f"{name}.log").read_text(errors="replace").splitlines()
        place.write(name, **({"ended": True} if code == 0 else {"failed": code, "last": lines[-1:]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument(
        "--prepare", action="store_true", help="on a CPU: write the graphs that TensorRT is to build"
    )
    parser.add_argument("--part", choices=PARTS, help="this one alone, in this process")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    place = Place(options.out.resolve(), options.device, options.small)
    if options.prepare:
        prepare(place)
    elif options.part:
        PARTS[options.part][1](place)
    else:
        again = [
            sys.executable,
            __file__,
            str(place.out),
            "--device",
            place.device,
            *["--small"] * place.small,
        ]
        run_parts(place, {name: (PARTS[name][0], [*again, "--part", name]) for name in chosen_parts()})


if __name__ == "__main__":
    main()
