"""ubgen-synth: make an annotated dataset with an engine."""

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from ubgen.cli._run import run
from ubgen.synth import SynthConfig, Synthesised, Watch, synthesise


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.2f} images/s", style="progress.data.speed")


def synth(config: SynthConfig) -> None:
    """Synthesise a dataset: N images of every class, each with its class, identity and scores."""
    console = Console()
    columns = (
        TextColumn("synthesis"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[waits]}"),
    )
    with Bar(*columns, console=console, speed_estimate_period=120) as bar:
        task = bar.add_task("synthesis", total=None, waits="")

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        def bottlenecks(shares: dict[str, float]) -> None:
            bar.update(task, waits=f"waits for {_shares(shares, 2)}")

        result = synthesise(config, Watch(progress, bar.console.print, bottlenecks))
    _report(console, result)


def _shares(shares: dict[str, float], most: int) -> str:
    """ "denoise 93 %, decode 5 %" """
    top = sorted(shares.items(), key=lambda item: -item[1])[:most]
    return ", ".join(f"{name} {share:.0%}".replace("%", " %") for name, share in top if share > 0)


def _report(console: Console, result: Synthesised) -> None:
    speed = f"{result.made} made now, {result.images_per_second:.2f}/s"
    if result.made:
        console.print(f"time went to: {_shares(result.bottlenecks, 6)}")
    if not result.complete:
        console.print(
            f"this part is done ({speed}); the part that ends last finishes the dataset in {result.path}"
        )
        return
    console.print(f"{result.images} images in {result.path} ({speed})")
    similarity, quality = (result.stats[name]["mean"] for name in ("clip_similarity", "quality"))
    console.print(f"mean CLIP similarity {similarity:.4f}, mean Q-Align score {quality:.3f}")
    rejected = sum(result.stats["rejected"].values())
    if rejected or result.stats["flagged"]:
        console.print(
            f"{rejected} rejected draws (rejections.jsonl), {result.stats['flagged']} kept with a flag"
        )
    console.print(f"look at {result.path}/contact-sheet.png")


def main() -> None:
    run(lambda: synth(tyro.cli(SynthConfig, prog="ubgen-synth")))
