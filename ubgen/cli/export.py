"""ubgen-export: compile the fine-tuned networks into an engine directory."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich.console import Console
from rich.table import Table

from ubgen.core.config import shipped_engine_specs
from ubgen.core.console import table
from ubgen.core.errors import UserError, run

if TYPE_CHECKING:
    from ubgen.export import EngineSpec, Exported, Planned


def export(
    spec: str | None = None,
    out: Path | None = None,
    lora: Path | None = None,
    stable_diffusion: str | None = None,
    clip: str | None = None,
    qalign: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    list_specs: bool = False,
) -> None:
    """Merge a LoRA, compile every network, and prove each equal to PyTorch on real inputs.

    Args:
        spec: Name of a shipped engine spec ("miniature"; --list-specs shows them) or the path of a TOML file.
        out: Directory of the engine.
        lora: Directory made by ubgen-train, or any with pytorch_lora_weights.safetensors; none: the base generator.
        stable_diffusion: Directory in diffusers layout, in place of the spec's.
        clip: CLIP as an open_clip or a transformers directory, in place of the spec's.
        qalign: Directory of the Q-Align checkpoint, in place of the spec's.
        overwrite: Replace a finished engine in the output directory. Networks that another engine has in common with
            it are kept; the very same engine is built anew.
        dry_run: Show what would be built, with sizes, and do nothing. Reads configs, tokenizers and the headers of
            weight files, and says what does not fit.
        list_specs: Show the shipped specs and whether this machine can build them, and do nothing.
    """
    from ubgen.export import export_engine, load_spec, plan_export

    console = Console()
    if list_specs:
        _print(console, _spec_lines())
        return
    if spec is None:
        raise UserError("--spec: name an engine spec; --list-specs shows those that come with ubgen")
    loaded = load_spec(spec, stable_diffusion=stable_diffusion, clip=clip, qalign=qalign)
    if dry_run:
        _print(console, _plan_lines(plan_export(loaded, out, lora)))
        return
    if out is None:
        raise UserError("--out: name the directory of the engine")
    with console.status("starting") as status:
        exported = export_engine(loaded, out, lora, overwrite=overwrite, say=status.update)
    console.print(_table(exported))
    _print(console, _pipeline_lines(exported))
    state = "written" if exported.built else "is already this engine; nothing was done"
    console.print(f"{exported.path} {state} (key {exported.key[:19]}…)")
    if exported.outdated:
        _print(console, ["another version of ubgen made it: --overwrite compiles it again with this one"])


def _print(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _spec_lines() -> Iterator[str]:
    from ubgen.export import load_spec, machine_problem

    for name, path in sorted(shipped_engine_specs().items()):
        spec = load_spec(path)
        reason = machine_problem(spec)
        yield f"{name}: {spec.description}"
        kinds = f"{_distinct(spec, 'compiler')} on {spec.device}, {_distinct(spec, 'precision')}"
        yield f"    {kinds}, {spec.image_size} px"
        ranges = (f"{n} {s.batch.min}..{s.batch.max} ({s.batch.best})" for n, s in spec.networks.items())
        yield f"    batch (best): {', '.join(ranges)}"
        yield f"    not on this machine: {reason}" if reason else "    this machine can build it"


def _distinct(spec: "EngineSpec", field: str) -> str:
    return ", ".join(dict.fromkeys(getattr(network, field) for _, network in spec.networks.items()))


def _plan_lines(planned: "Planned") -> Iterator[str]:
    from ubgen.export.parity import JSON, PICTURES, TABLE

    for network in planned.networks:
        spec, state = network.spec, "built" if network.name in planned.built else "to build"
        yield f"{network.name}: {spec.compiler}, {spec.precision}, {state}"
        yield (
            f"    {network.parameters / 1e6:,.1f} M parameters, {_size(network.weight_bytes)}; for each row "
            f"{network.flops() / 1e9:,.2f} GFLOP; activations at batch {spec.batch.max}: "
            f"{_size(network.activation_bytes)}"
        )
        yield from (f"    {tensor.name}: {tensor}" for tensor in network.signature.inputs)
        yield from (f"    -> {tensor.name}: {tensor}" for tensor in network.signature.outputs)
        yield f"    {' + '.join(network.files)} ({'external data' if len(network.files) > 1 else 'weights inside'})"
    weights = sum(network.weight_bytes for network in planned.networks)
    yield f"all weights: {_size(weights)}; beside the engines: tokenizer, scheduler, clip, {JSON}, {TABLE}, {PICTURES}"
    if planned.problem:
        yield f"would be refused: {planned.problem}"
    if planned.complete:
        yield "the engine is complete: nothing would be done"


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _table(exported: "Exported") -> Table:
    rows = [
        (
            row.network,
            row.precision,
            str(row.rows),
            f"{row.max_abs:.2e}",
            f"{row.error:.2e}",
            f"{row.tolerance:.0e}",
        )
        for row in exported.parity
    ]
    columns = ("network", "precision", "rows", "max |Δ|", "error", "tolerance")
    return table("Engines against PyTorch in float32 on real inputs", columns, rows, text_columns=2)


def _pipeline_lines(exported: "Exported") -> Iterator[str]:
    from ubgen.export.parity import lowered_line

    for row in exported.parity:
        if row.kept_float32:
            yield f"{row.network}: in float32 {', '.join(row.kept_float32)}"
    images = exported.pipeline
    yield (
        f"{images.images} images of the whole pipeline: PSNR {images.psnr:.1f} dB, "
        f"{images.within_one_level:.2%} within 1 level, "
        f"CLIP similarity |Δ| {images.clip_similarity:.1e}, quality |Δ| {images.quality:.1e}"
    )
    if images.lowered is not None:
        yield f"PyTorch itself in these precisions: {lowered_line(images)}"


def main() -> None:
    run(lambda: tyro.cli(export, prog="ubgen-export"))


if __name__ == "__main__":
    main()
