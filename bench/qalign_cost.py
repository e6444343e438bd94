"""What the compiled form of Q-Align saves: `python bench/qalign_cost.py [OUT_DIR]` (default bench/results).

Floating-point operations at 7B sizes, counted on shapes alone; then, with random weights at the full width but
with few layers, parity in PyTorch and in ONNX Runtime, sizes, memory and time; then the miniature in every
compiler. Writes qalign-cost.json and qalign-cost.md. Needs 8 GB of memory and some minutes; run it with
OMP_NUM_THREADS=1.
"""

import copy
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

from ubgen.benchmark import Table, compare, machine_record
from ubgen.benchmark.machine import describe, resident
from ubgen.core.config import resolve_path
from ubgen.export.compilers.onnx import export_onnx
from ubgen.export.cost import count_flops
from ubgen.export.exportable import Exportable
from ubgen.export.qalign_graph import QAlignScorer
from ubgen.export.spec import BatchRange, NetworkSpec
from ubgen.rewards import QAlign, qalign_preprocess

SEVEN_B: dict[str, Any] = json.loads(Path(__file__).with_name("qalign-7b.json").read_text(encoding="utf-8"))
PARTS = {  # part -> (path in FullForward, path in QAlignScorer)
    "vision tower": ("qalign.model.vision_model", "vision_model"),
    "abstractor": ("qalign.model.visual_abstractor", "visual_abstractor"),
    "decoder": ("qalign.model.layers", "layers"),
    "head": ("qalign.lm_head", "head"),
}
IMAGE = 512  # side of the generator's images, pixels
BATCH = BatchRange(1, 2, 8)


def shallow(layers: int, vision_layers: int) -> dict[str, Any]:
    """The 7B config with fewer layers, every width kept."""
    config = copy.deepcopy(SEVEN_B) | {"num_hidden_layers": layers}
    config["visual_config"]["visual_model"]["num_hidden_layers"] = vision_layers
    return config


class FullForward(nn.Module):
    """The naive pass: the whole prompt through every layer, the whole head at every position."""

    def __init__(self, qalign: QAlign) -> None:
        super().__init__()
        self.qalign = qalign

    def forward(self, pixels: Tensor) -> Tensor:
        model = self.qalign
        hidden = model.hidden_states(qalign_preprocess(to_images(pixels), model.image_size))
        logits = model.lm_head(model.model.norm(hidden))[:, -1, model.level_ids]
        return (logits.float().softmax(-1) * model.level_weights).sum(-1)


def to_images(pixels: Tensor) -> Tensor:
    return pixels.permute(0, 3, 1, 2).float() / 255


def cost(config: dict[str, Any], image: int = IMAGE) -> dict[str, Any]:
    """FLOPs of one image by part, {"full": ..., "folded": ...} each, and what the compiled form holds."""
    with torch.device("meta"):
        qalign = QAlign(config)
    scorer = QAlignScorer(qalign)
    pixels = {"pixels": torch.empty(1, image, image, 3, dtype=torch.uint8, device="meta")}
    full, folded = count_flops(FullForward(qalign), pixels), count_flops(scorer, pixels)
    parts = {part: {"full": full[a], "folded": folded[b]} for part, (a, b) in PARTS.items()}
    total = {"full": full[""], "folded": folded[""]}
    rest = {side: total[side] - sum(part[side] for part in parts.values()) for side in total}
    return {
        "parts": {"preprocessing": rest} | parts,
        "total": total,
        "ratio": total["folded"] / total["full"],
        "parameters": sum(p.numel() for p in scorer.parameters()),
        "constants": sum(b.numel() for b in scorer.buffers()),
    }


def time_over_full(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """CPU time of each side over that of "full": other work on the machine hardly changes it."""
    times = compare(sides, seconds=0.0, least=rounds)
    return {name: timing.cpu / times["full"].cpu for name, timing in times.items()}


def relative(ours: Tensor, reference: Tensor) -> float:
    return float(((ours - reference).abs() / reference.abs()).max())


def random_images(batch: int, side: int) -> Tensor:
    """Smooth ramps with noise, each of another colour and brightness: (B, side, side, 3) uint8."""
    ramp = torch.linspace(0, 1, side)[None, :, None, None] * torch.rand(batch, 1, 1, 3)
    noise = 0.3 * torch.rand(batch, side, side, 3) * torch.rand(batch, 1, 1, 1)
    return (255 * (ramp + noise).clamp(0, 1)).round().to(torch.uint8)


def onnx_session(file: Path) -> Callable[[Tensor], Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])


def full_width(directory: Path, layers: int = 2, vision_layers: int = 2, rounds: int = 7) -> dict[str, Any]:
    """Parity, time, size and memory with random float32 weights at 7B widths."""
    torch.manual_seed(0)
    config, pixels = shallow(layers, vision_layers), random_images(2, IMAGE)
    scorer, reference, times = in_torch(config, pixels, rounds)
    result: dict[str, Any] = {
        "layers": {"decoder": layers, "vision tower": vision_layers, "abstractor": 6},
        "scores": reference.tolist(),
        "error_torch": relative(scorer(pixels), reference),
        "flop_ratio": cost(config)["ratio"],
        "time_over_full": times,
    }
    gc.collect()
    start = time.perf_counter()
    network = Exportable(scorer, [{"pixels": pixels}], "score")
    files = export_onnx(network, NetworkSpec(BATCH, 1e-5), directory / "qalign.onnx")
    result |= {"export_seconds": time.perf_counter() - start, "export_peak_gb": resident() / 2**30}
    result["files"] = {file.name: file.stat().st_size for file in files}
    del scorer, network
    gc.collect()
    run = onnx_session(files[0])
    errors = {len(rows): relative(run(rows), reference[: len(rows)]) for rows in (pixels, pixels[:1])}
    return result | {"error_onnxruntime": max(errors.values()), "peak_gb": resident() / 2**30}


def in_torch(
    config: dict[str, Any], pixels: Tensor, rounds: int
) -> tuple[QAlignScorer, Tensor, dict[str, float]]:
    """The folded network, `QAlign.score` of the images, and the time of each side for the first image."""
    qalign = QAlign.from_config(config).eval().requires_grad_(False)
    scorer, full, one = QAlignScorer(qalign).eval(), FullForward(qalign), pixels[:1]
    sides = {
        "full": lambda: full(one),
        "QAlign.score": lambda: qalign.score(to_images(one)),
        "folded": lambda: scorer(one),
    }
    return scorer, qalign.score(to_images(pixels)), time_over_full(sides, rounds)


def miniature(directory: Path, rounds: int = 21) -> dict[str, Any]:
    """The miniature's parity (batch 1 to 8) and time in every form that the CPU runs."""
    qalign = QAlign.load(resolve_path("ubgen:miniature/weights/qalign"))
    scorer, full = QAlignScorer(qalign).eval(), FullForward(qalign)
    pixels = random_images(8, 64)
    network = Exportable(scorer, [{"pixels": pixels}], "score")
    exported = torch.export.export(
        scorer, (), {"pixels": pixels[:2]}, dynamic_shapes=network.dynamic_shapes(BATCH)
    )
    package = torch._inductor.aoti_compile_and_package(
        exported,
        package_path=str(directory / "qalign.pt2"),
        inductor_configs={"aot_inductor.check_lowerbound": False},
    )
    compiled = torch._inductor.aoti_load_package(package)
    sides: dict[str, Callable[[Tensor], Tensor]] = {
        "full": full,
        "QAlign.score": lambda p: qalign.score(to_images(p)),
        "folded": scorer,
        "AOTInductor": lambda p: compiled(pixels=p),
    }
    for opset in (20, 23):
        spec = NetworkSpec(BATCH, 1e-5, opset=opset)
        graph, *_ = export_onnx(network, spec, directory / f"opset{opset}.onnx")
        sides[f"ONNX Runtime, opset {opset}"] = onnx_session(graph)
    reference, calls = (
        qalign.score(to_images(pixels)),
        {n: partial(side, pixels) for n, side in sides.items()},
    )
    return {
        "error": {
            name: max(relative(side(pixels[:n]), reference[:n]) for n in (1, 2, 5, 8))
            for name, side in sides.items()
        },
        "time_over_full": time_over_full(calls, rounds),
        "flop_ratio": cost(qalign.config, 64)["ratio"],
    }


def operations_table(big: dict[str, Any]) -> Table:
    table = Table(
        "Operations for one image of 512 x 512 at 7B sizes, GFLOP",
        ("part", "full", "folded", "ratio"),
        text_columns=1,
    )
    for name, part in {**big["parts"], "all": big["total"]}.items():
        full, folded = part["full"], part["folded"]
        table.rows.append((name, f"{full / 1e9:.2f}", f"{folded / 1e9:.2f}", f"{folded / full:.4f}"))
    held = big["parameters"] + big["constants"]
    table.note = (
        f"The folded network holds {big['parameters']:,} parameters and {big['constants']:,} constants (position "
        f"tables, the prompt's keys and values): {2 * held / 1e9:.2f} GB at 2 bytes. Counted by `ubgen.export.cost`: "
        "two for a multiply-add, attention whole, elementwise work left out."
    )
    return table


def full_width_text(wide: dict[str, Any]) -> str:
    layers = ", ".join(f"{name} {count}" for name, count in wide["layers"].items())
    files = ", ".join(f"`{name}` {size / 1e6:,.1f} MB" for name, size in wide["files"].items())
    times = ", ".join(f"{name} {value:.3f}" for name, value in wide["time_over_full"].items())
    return f"""## Full width, few layers, random float32 weights

Layers: {layers}. Largest relative difference from `QAlign.score`: {wide["error_torch"]:.1e} in PyTorch,
{wide["error_onnxruntime"]:.1e} in ONNX Runtime (batch 1 and 2). Files: {files}. The export took
{wide["export_seconds"]:.0f} s; peak memory {wide["export_peak_gb"]:.1f} GB up to its end, {wide["peak_gb"]:.1f} GB with
ONNX Runtime's run after it.

Time over the full pass's, batch 1: {times}.
Operations of the folded one: {wide["flop_ratio"]:.3f}. Of two decoder layers the last one is half, of 32 it is little:
this is not the ratio of the 7B network.
"""


def miniature_table(small: dict[str, Any]) -> Table:
    columns = ("form", "time over full", "largest relative difference from `QAlign.score`")
    table = Table("Miniature, batch 8", columns, text_columns=1)
    for name, time_ratio in small["time_over_full"].items():
        table.rows.append((name, f"{time_ratio:.3f}", f"{small['error'][name]:.1e}"))
    ratio = f"{small['flop_ratio']:.3f} of the full pass's"
    table.note = f"Differences are the largest of batch 1, 2, 5 and 8. Operations: {ratio}."
    return table


def markdown(result: dict[str, Any]) -> str:
    head = f"""# Q-Align as it is compiled, against the full forward pass

`OMP_NUM_THREADS=1 python bench/qalign_cost.py`. Full: the whole prompt in every layer, the whole head at every
position. Folded: `ubgen.export.qalign_graph.QAlignScorer`. Both give the same score. Times are medians of CPU time, the
sides taking turns.

{describe(result["machine"])}.
"""
    big, wide, small = result["7B"], result["full width"], result["miniature"]
    parts = (operations_table(big).markdown(), full_width_text(wide), miniature_table(small).markdown())
    return "\n".join((head, *parts))


@torch.no_grad()
def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        result = {
            "machine": machine_record(),
            "7B": cost(SEVEN_B),
            "miniature": miniature(directory),
            "full width": full_width(directory),
        }
    (out / "qalign-cost.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (out / "qalign-cost.md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results")
