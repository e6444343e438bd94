"""ubgen-synth: make an annotated dataset with an engine."""

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from ubgen.cli._run import run
from ubgen.synth import SynthConfig, Synthesised, synthesise


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.2f} images/s", style="progress.data.speed")


def synth(config: SynthConfig) -> None:
    """Synthesise a dataset: N images of every class, each with its class, identity and scores."""
    console = Console()
    columns = (TextColumn("synthesis"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    with Bar(*columns, console=console, speed_estimate_period=120) as bar:
        task = bar.add_task("synthesis", total=None)
        result = synthesise(config, lambda done, total: bar.update(task, completed=done, total=total))
    _report(console, result)


def _report(console: Console, result: Synthesised) -> None:
    similarity, quality = (result.stats[name]["mean"] for name in ("clip_similarity", "quality"))
    console.print(
        f"{result.images} images in {result.path} ({result.made} made now, {result.images_per_second:.2f}/s)"
    )
    console.print(f"mean CLIP similarity {similarity:.4f}, mean Q-Align score {quality:.3f}")
    console.print(f"look at {result.sheet}")


def main() -> None:
    run(lambda: synth(tyro.cli(SynthConfig, prog="ubgen-synth")))
