"""The training run: discriminator warm-up, then generator and discriminator in turn."""

import time
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather
from rich.console import Console
from torch import Tensor

from ubgen.core.classes import ClassList
from ubgen.core.config import to_dict
from ubgen.core.console import progress
from ubgen.core.errors import UserError, warn
from ubgen.core.files import atomic_write
from ubgen.core.metrics import METRICS_FILE, TENSORBOARD, MetricsLog
from ubgen.core.stage import Stage, content_hash
from ubgen.diffusion import LORA_FILE
from ubgen.train.batches import Batch, draw_batch, updates_for, warmup_updates
from ubgen.train.checkpoint import (
    DISCRIMINATOR_FILE,
    list_checkpoints,
    remove_unfinished,
    restore_checkpoint,
    save_checkpoint,
    save_weights,
)
from ubgen.train.config import TrainConfig, accumulation, network_files, network_paths
from ubgen.train.logging import GridJudge, figures, save_grid
from ubgen.train.state import build_state
from ubgen.train.update import Diverged, Metrics, discriminator_update, generator_update, warmup_features

CHANCE = 0.6  # up to this accuracy the discriminator at the warm-up's end is taken to guess
CLASSES_FILE = "classes.txt"
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
_OWN = (CHECKPOINTS, SAMPLES, TENSORBOARD, CLASSES_FILE, METRICS_FILE, LORA_FILE, DISCRIMINATOR_FILE)


def run_training(
    config: TrainConfig,
    classes: ClassList,
    out: Path,
    overwrite: bool,
    stop_after: int | None,
    judge: GridJudge | None = None,
) -> bool:
    """`ubgen.train.train`, once its arguments are known to be right."""
    # without `cpu`, processes on the CPU do not find each other
    process = PartialState(cpu=config.device == "cpu" or not torch.cuda.is_available())
    console = Console(stderr=True, quiet=not process.is_main_process, markup=False, soft_wrap=True)
    stage = None
    if process.is_main_process:
        stage = _stage(config, classes, out, process.num_processes, overwrite)
    with stage.hold() if stage is not None else nullcontext():
        if _from_main_process(stage is not None and stage.state == "finished", process):
            console.print(f"{out}: finished already; nothing to do")
            return True
        run = Run(config, classes, out, process, console, judge)
        if stage is not None:
            stage.begin()
            atomic_write(out / CLASSES_FILE, "".join(f"{line}\n" for line in _lines(classes)))
            remove_unfinished(out / CHECKPOINTS)
        process.wait_for_everyone()
        run.restore()
        finished = run.play(stop_after)
        if finished and stage is not None:
            with run.state.averaged():
                save_weights(out, run.state)
            stage.finish(
                run.inputs(),
                stage.config["weights"],
                updates=run.updates,
                images_seen=run.updates * run.global_batch,
            )
        console.print(f"{out}: {'finished' if finished else 'stopped; the same command continues'}")
        return finished


def _stage(config: TrainConfig, classes: ClassList, out: Path, processes: int, overwrite: bool) -> Stage:
    """The output directory. Where networks and classes lie, and what no update sees, may change on the way."""
    files = network_files(config)
    weights = {name: content_hash(path, only=files[name]) for name, path in network_paths(config).items()}
    options = {**to_dict(config), "processes": processes, "weights": weights}
    fixed = {name: value for name, value in options.items() if name not in ("networks", "classes", "output")}
    return Stage(
        out,
        "train",
        {**fixed, "class list": _lines(classes)},
        config=options,
        owns=_OWN,
        has_work=lambda store: bool(list_checkpoints(out / CHECKPOINTS)),
        overwrite=overwrite,
    )


def _lines(classes: ClassList) -> list[str]:
    return [f"{i}\t{name}" for i, name in zip(classes.ids, classes.names, strict=True)]


def _from_main_process(value: bool, process: PartialState) -> bool:
    """Process 0's value, in every process."""
    return bool(broadcast(torch.tensor([int(value)], device=process.device)).item())


class Run:
    """One process's part in a run. `done` counts updates, the warm-up's `warmup` first, then the `updates`."""

    def __init__(
        self,
        config: TrainConfig,
        classes: ClassList,
        out: Path,
        process: PartialState,
        console: Console,
        judge: GridJudge | None,
    ) -> None:
        self.config, self.classes, self.out = config, classes, out
        self.process, self.console, self.judge = process, console, judge
        self.state = build_state(config, classes, process.device)
        self.accumulate = accumulation(config, process.num_processes)
        self.global_batch = config.batch_size * process.num_processes * self.accumulate
        count = len(classes)
        self.updates = config.max_updates or updates_for(config.epochs, count, self.global_batch)
        self.warmup = warmup_updates(config, count, self.global_batch)
        if config.losses.class_level and self.warmup * 2 * self.global_batch < 2 * count:
            raise UserError(
                "losses.class_mean and class_spread compare images of one class, but the warm-up has fewer than two of "
                "each; set --discriminator.warmup-epochs to 2 or more"
            )
        self.checkpoints = out / CHECKPOINTS
        self.done = 0

    def restore(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        if found := list_checkpoints(self.checkpoints):
            self.done, self.warmup = restore_checkpoint(found[-1], self.state)
        if self.process.is_main_process:
            # grids after the checkpoint: made by a killed run, and the log drops their measures
            for grid in (self.out / SAMPLES).glob("*.png"):
                if self.done == 0 or int(grid.stem) > max(0, self.done - self.warmup):
                    grid.unlink()
        everywhere = gather(torch.tensor([self.done], device=self.state.device)).tolist()
        if len(set(everywhere)) > 1:
            raise UserError(
                f"--out {self.out}: the processes found checkpoints of different updates ({everywhere}); "
                "it must be one directory that all of them share"
            )

    def play(self, stop_after: int | None) -> bool:
        """Do the updates that are left, at most `stop_after` of them; returns whether none is left."""
        last = None if stop_after is None else self.done + stop_after
        self._announce()
        log = MetricsLog(self.out, self.done) if self.process.is_main_process else None
        try:
            with progress(self.console, "fine-tuning", "updates") as report:
                report(self.done, self.total)
                shown = self._grid()  # of the base generator: into the first line of the log
                while self.done not in (last, self.total):
                    metrics = self._timed_update() | shown
                    if self.done == self.warmup:
                        metrics |= self._end_warmup()
                    metrics |= self._grid()
                    shown = {}
                    if log is not None:
                        phase = "train" if self.done > self.warmup else "warmup"
                        log.write(self.done, phase, metrics)
                    due = self.done % self.config.output.checkpoint_every == 0
                    if due or self.done in (last, self.total, self.warmup):
                        self._checkpoint()
                    report(self.done, self.total, figures(metrics))
        except Diverged as error:
            raise UserError(self._diverged(error)) from error
        finally:
            if log is not None:
                log.close()
        return self.done == self.total

    @property
    def total(self) -> int:
        """All updates, as far as is known: the warm-up may go on until the discriminator is good."""
        return self.warmup + self.updates

    def _end_warmup(self) -> Metrics:
        """After the last update of the warm-up: another one where `warmup_until` asks for it; else say how it went."""
        adversary, settings = self.state.adversary, self.config.discriminator
        if adversary is not None:
            accuracy, wanted = adversary.health.accuracy(), settings.warmup_until
            planned = warmup_updates(self.config, len(self.classes), self.global_batch)
            if wanted is not None and accuracy < wanted and self.warmup < planned * settings.warmup_limit:
                self.warmup += 1
                return {}
            if self.process.is_main_process and accuracy < CHANCE:
                warn(
                    f"after the warm-up the discriminator is right about {accuracy:.0%} of images and texts that it "
                    "has not been trained on, where guessing gives 50%: its loss will push the images where the seed "
                    "points. What helps: a longer warm-up (--discriminator.warmup-epochs, "
                    "--discriminator.warmup-until), or a higher --discriminator.lr"
                )
        if self.state.class_moments is None:
            return {}
        self.state.class_moments.fit()
        return {"class_variance_held": self.state.class_moments.held}

    def inputs(self) -> dict[str, Path | str]:
        """The directories that this run read, for the manifest."""
        return {**network_paths(self.config), "classes": self.out / CLASSES_FILE}

    def _timed_update(self) -> Metrics:
        start = time.perf_counter()
        warming = self.done < self.warmup
        metrics = self._warmup_update() if warming else self._train_update()
        self.done += 1
        seconds = time.perf_counter() - start
        images = self.global_batch * (2 if warming else 1)
        return {**metrics, "images_per_second": images / seconds}

    def _warmup_update(self) -> Metrics:
        batches = self._batches("warmup", self.done, 2 * self.config.batch_size)
        features, metrics = warmup_features(self.state, self.config, batches)
        if self.state.class_moments is not None:
            self.state.class_moments.collect(gather(features), self._classes(batches))
        return metrics | self._update_adversary(features, batches)

    def _train_update(self) -> Metrics:
        """The generator first, against the discriminator as it is; then the discriminator, on the same images."""
        batches = self._batches("train", self.done - self.warmup, self.config.batch_size)
        features, metrics = generator_update(self.state, self.config, batches)
        if metrics.get("overflows"):
            self.console.print(
                f"update {self.done + 1}: the gradient overflowed float16; repeated {metrics['overflows']:.0f} "
                f"time(s), down to a loss scale of {metrics['loss_scale']:g}"
            )
        metrics["generator_lr"] = self.config.generator.lr
        if self.state.average is not None:
            self.state.average.update()
        if features is None:
            return metrics
        if self.state.class_moments is not None:
            self.state.class_moments.push(gather(features), self._classes(batches))
        return metrics | self._update_adversary(features, batches)

    def _classes(self, batches: list[Batch]) -> Tensor:
        """Class indices of these batches' images, of all processes."""
        return gather(torch.cat([batch.classes_B for batch in batches]).to(self.state.device))

    def _update_adversary(self, features: Tensor, batches: list[Batch]) -> Metrics:
        if self.state.adversary is None:
            return {}
        negatives = torch.cat([batch.negatives_B for batch in batches])
        metrics = discriminator_update(self.state.adversary, self.config, features, negatives)
        return {**metrics, "discriminator_lr": self.config.discriminator.lr}

    def _batches(self, phase: str, update: int, size: int) -> list[Batch]:
        """Those of as many processes as there would be without accumulation: the run is theirs, to rounding."""
        shape, names, count = self.state.sd.latent_shape(), self.classes.names, self.accumulate
        processes, first = self.process.num_processes * count, self.process.process_index * count
        return [
            draw_batch(self.config, names, shape, phase, update, size, rank, processes)
            for rank in range(first, first + count)
        ]

    def _checkpoint(self) -> None:
        if self.process.is_main_process:
            keep = self.config.output.keep_checkpoints
            save_checkpoint(self.checkpoints, self.state, self.done, self.warmup, keep)
        self.process.wait_for_everyone()

    def _grid(self) -> Metrics:
        """At update 0 (the base generator), every so often, and at the end: a picture, and measures of it."""
        every, update = self.config.output.grid_every, max(0, self.done - self.warmup)
        if not every or not self.process.is_main_process:
            return {}
        path = self.out / SAMPLES / f"{update:06d}.png"
        if (update % every == 0 or update == self.updates) and not path.exists():
            with self.state.averaged():
                return save_grid(path, self.state, self.config, self.classes.names, self.judge)
        return {}

    def _announce(self) -> None:
        process, config = self.process, self.config
        self.console.print(self.state.attention)
        self.console.print(
            f"{len(self.classes)} classes, {self.warmup} warm-up and {self.updates} updates of "
            f"{self.global_batch} images; {process.num_processes} process(es) on {process.device.type}, "
            f"{self.accumulate} batch(es) of {config.batch_size} each; precision {config.precision}"
        )
        if self.done:
            self.console.print(f"continuing after {self.done} of {self.total} updates")

    def _diverged(self, error: Diverged) -> str:
        found = list_checkpoints(self.checkpoints)
        kept = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
        half = self.config.precision != "no"
        remedies = ["a lower generator.lr or discriminator.lr"] if self.done >= self.warmup else []
        remedies += ["another --precision, as a network may overflow in this one"] if half else []
        remedies = remedies or ["other weights, as the base generator's own images give this"]
        return (
            f"update {self.done + 1}: {error}; stopped before it reached the weights, {kept}. "
            f"Start again with --overwrite and {', or '.join(remedies)}"
        )
