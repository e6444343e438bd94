"""ubgen-synth: make an annotated dataset with an engine."""

from typing import TYPE_CHECKING

import tyro
from rich.console import Console

from ubgen.core.classes import load_classes
from ubgen.core.console import progress
from ubgen.core.errors import run
from ubgen.core.stage import read_manifest
from ubgen.synth import SynthConfig

if TYPE_CHECKING:
    from ubgen.synth.synthesise import Synthesised


def synth(config: SynthConfig) -> None:
    """Synthesise a dataset: N images of every class, each with its class, identity and scores."""
    read_manifest(config.engine, "export")  # wrong names are answered before PyTorch is imported
    load_classes(config.classes)
    from ubgen.synth.synthesise import synthesise

    console = Console()
    with progress(console, "synthesis", "images") as report:
        result = synthesise(
            config, report, lambda line: console.print(line, soft_wrap=True, highlight=False, markup=False)
        )
    for line in _report(result):
        console.print(line, soft_wrap=True, markup=False)


def _report(result: "Synthesised") -> list[str]:
    speed = f"{result.made} made now, {result.images_per_second:.2f}/s"
    if result.found:
        speed = f"finished already, made at {result.images_per_second:.2f}/s"
    lines = [f"time went to: {result.waits(6)}"] if result.made else []
    if not result.complete:
        return [
            *lines,
            f"this part is done ({speed}); the part that ends last finishes the dataset in {result.path}",
        ]
    lines.append(f"{result.images} images in {result.path} ({speed})")
    similarity, quality = (result.stats[name]["mean"] for name in ("clip_similarity", "quality"))
    lines.append(f"mean CLIP similarity {similarity:.4f}, mean Q-Align score {quality:.3f}")
    rejected, flagged = sum(result.stats["rejected"].values()), result.stats["flagged"]
    if rejected or flagged:
        lines.append(f"{rejected} rejected draws (rejections.jsonl), {flagged} kept with a flag")
    return [*lines, f"look at {result.path}/contact-sheet.png"]


def main() -> None:
    run(lambda: synth(tyro.cli(SynthConfig, prog="ubgen-synth")))


if __name__ == "__main__":
    main()
