"""The pre-training run: epochs of updates, evaluations and checkpoints."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather
from rich.console import Console
from torch import nn

from ubgen.core.config import to_dict
from ubgen.core.console import progress
from ubgen.core.errors import UserError, memory_errors
from ubgen.core.metrics import METRICS_FILE, TENSORBOARD, MetricsLog
from ubgen.core.stage import Stage
from ubgen.loading.decode import BrokenSample, EvaluationTransform
from ubgen.loading.imageset import ImageSet, matched, open_image_set, require_class_count
from ubgen.loading.loader import Batch, batches_by_threads, training_batches
from ubgen.pretrain.config import PretrainConfig, passes
from ubgen.pretrain.outputs import CARD, CONFIG, CURVE, WEIGHTS, save_weights, write_reports
from ubgen.pretrain.state import build_state, model_options, restore_checkpoint, save_checkpoint, update

CHECKPOINT = "checkpoint.pt"
SKIPPED = "skipped.txt"
_OWN = (CHECKPOINT, SKIPPED, METRICS_FILE, TENSORBOARD, CURVE, CARD, CONFIG, *WEIGHTS.values())
_LOG_EVERY = 10  # updates
# may change on the way: no update depends on them
_FREE = ("threads", "evaluate_every", "checkpoint_every", "num_classes", "classes")


@dataclass(frozen=True)
class Inputs:
    """What a run reads."""

    training: ImageSet
    validation: ImageSet | None
    recipe: str = ""
    """Its name, for the card."""


def open_inputs(
    config: PretrainConfig, data: str | Path, validation: str | Path | None, recipe: str
) -> Inputs:
    training = open_image_set(data, config.classes)
    require_class_count(training, config.num_classes)
    if validation is None:
        return Inputs(training, None, recipe)
    return Inputs(training, matched(open_image_set(validation, config.classes), training), recipe)


def run_pretraining(
    config: PretrainConfig, inputs: Inputs, out: Path, overwrite: bool, stop_after: int | None
) -> bool:
    """`ubgen.pretrain.pretrain`, once its arguments are known to be right."""
    # without `cpu`, processes on the CPU do not find each other
    process = PartialState(cpu=config.device == "cpu" or not torch.cuda.is_available())
    console = Console(stderr=True, quiet=not process.is_main_process, markup=False, soft_wrap=True)
    stage = None
    if process.is_main_process:
        stage = _stage(config, inputs, out, process.num_processes, overwrite)
    with stage.hold() if stage is not None else nullcontext():
        finished = torch.tensor([int(stage is not None and stage.state == "finished")], device=process.device)
        if broadcast(finished).item():
            console.print(f"{out}: finished already; nothing to do")
            return True
        with memory_errors(memory_advice(config)):
            run = Run(config, inputs, out, process, console)
            if stage is not None:
                stage.begin()
            process.wait_for_everyone()
            run.restore()
            done = run.play(stop_after)
        process.wait_for_everyone()
        if done and stage is not None:
            run.finish(stage)
        console.print(f"{out}: {'finished' if done else 'stopped; the same command continues'}")
        return done


def _stage(config: PretrainConfig, inputs: Inputs, out: Path, processes: int, overwrite: bool) -> Stage:
    options = {**to_dict(config), "processes": processes}
    identity = {name: value for name, value in options.items() if name not in _FREE}
    identity["data"] = inputs.training.fingerprint()
    identity["validation"] = inputs.validation.fingerprint() if inputs.validation else None
    return Stage(
        out,
        "pretrain",
        identity,
        config=options,
        owns=_OWN,
        has_work=lambda store: store.size(CHECKPOINT) is not None,
        overwrite=overwrite,
    )


def memory_advice(config: PretrainConfig) -> str:
    """Which options take less memory."""
    return (
        f"lower --micro-batch (at most {config.micro_batch} images at once), which keeps the batch size by "
        "accumulation, or --image-size"
    )


class Run:
    """One process's part in a run. `done` counts updates."""

    def __init__(
        self, config: PretrainConfig, inputs: Inputs, out: Path, process: PartialState, console: Console
    ) -> None:
        self.config, self.inputs, self.out, self.process, self.console = config, inputs, out, process, console
        self.accumulation, self.micro_batch = passes(config, process.num_processes)
        count = len(inputs.training)
        self.updates_per_epoch = count // config.batch_size  # the last, smaller batch is dropped
        if self.updates_per_epoch == 0:
            raise UserError(
                f"{inputs.training.store} has {count} images, fewer than one batch; "
                f"lower --batch-size ({config.batch_size})"
            )
        self.total = self.updates_per_epoch * config.epochs
        classes = len(inputs.training.class_ids)
        self.state = build_state(
            config, classes, self.updates_per_epoch, process.device, process.num_processes
        )
        self.done = 0
        self.skipped: set[str] = set()

    def restore(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if (path := self.out / CHECKPOINT).exists():
            self.done = restore_checkpoint(path, self.state)
        everywhere = gather(torch.tensor([self.done], device=self.process.device)).tolist()
        if len(set(everywhere)) > 1:
            raise UserError(
                f"--out {self.out}: the processes found checkpoints of different updates ({everywhere}); "
                "it must be one directory that all of them share"
            )
        if (path := self.out / SKIPPED).exists():
            self.skipped = set(path.read_text(encoding="utf-8").splitlines())

    def play(self, stop_after: int | None) -> bool:
        """Do the updates that are left, at most `stop_after` of them; returns whether none is left."""
        end = self.total if stop_after is None else min(self.total, self.done + stop_after)
        self._announce()
        log = MetricsLog(self.out, self.done) if self.process.is_main_process else None
        try:
            with progress(self.console, "pre-training", "images") as report:
                report(self.done * self.config.batch_size, self.total * self.config.batch_size)
                while self.done < end:
                    self._epoch(end, log, report)
        finally:
            if log is not None:
                log.close()
        return self.done == self.total

    def _epoch(self, end: int, log: MetricsLog | None, report: Any) -> None:
        """From where the run stands to the end of the epoch, or to update `end`."""
        epoch, begun = divmod(self.done, self.updates_per_epoch)
        last = min(end, (epoch + 1) * self.updates_per_epoch)
        clock = _Clock(self.config.batch_size, self.process.device)
        with closing(self._batches(epoch, begun * self.accumulation)) as batches:
            while self.done < last:
                with clock.waiting():
                    parts = [self._usable(batch) for batch in islice(batches, self.accumulation)]
                clock.add(update(self.state, parts, self.done, self.process.process_index))
                self.done += 1
                if self.done % _LOG_EVERY == 0 or self.done == last:
                    metrics = self._finite(clock.read())
                    metrics["lr"] = self.state.optimizer.param_groups[0]["lr"]
                    metrics["epoch"] = self.done / self.updates_per_epoch
                    if log is not None:
                        log.write(self.done, "train", metrics)
                    report(
                        self.done * self.config.batch_size,
                        self.total * self.config.batch_size,
                        _note(metrics),
                    )
                if self.done % self.config.checkpoint_every == 0 and self.done < last:
                    self._checkpoint()
        if self.done % self.updates_per_epoch == 0:
            self._evaluate(self.done // self.updates_per_epoch, log)
        self._checkpoint()

    def _batches(self, epoch: int, start: int) -> Any:
        config, process = self.config, self.process
        return training_batches(
            self.inputs.training,
            batch_size=self.micro_batch,
            image_size=config.image_size,
            seed=config.seed,
            epoch=epoch,
            rank=process.process_index,
            ranks=process.num_processes,
            loader=config.loader,
            augmentation=config.augmentation,
            threads=config.threads,
            start=start,
            on_broken=self._skip if config.skip_broken else None,
            device=str(process.device),
        )

    def _usable(self, batch: Batch) -> Batch:
        if len(batch["labels"]) < 2:
            raise UserError("a batch has fewer than 2 images that can be decoded; is this the right dataset?")
        return batch

    def _skip(self, error: BrokenSample) -> None:
        if str(error) not in self.skipped:
            self.skipped.add(str(error))
            with (self.out / SKIPPED).open("a", encoding="utf-8") as file:
                file.write(f"{error}\n")

    def _finite(self, metrics: dict[str, float]) -> dict[str, float]:
        if not np.isfinite(metrics["loss"]):
            raise UserError(
                f"update {self.done}: the loss is not finite; {self.out / CHECKPOINT} is the last good state. "
                "Start again with --overwrite and a lower --lr, or another --precision"
            )
        if self.skipped:
            metrics["skipped"] = len(self.skipped)
        return metrics

    def _evaluate(self, epoch: int, log: MetricsLog | None) -> None:
        validation, config = self.inputs.validation, self.config
        if validation is None or (epoch % config.evaluate_every and epoch != config.epochs):
            return
        raw = self.measure(self.state.model, validation)
        average = {
            f"ema_{name}": value for name, value in self.measure(self.state.average.model, validation).items()
        }
        if log is not None:
            log.write(self.done, "eval", {"epoch": epoch, **raw, **average})
        self.console.print(f"epoch {epoch}: top-1 {raw['top1']:.2f} %, EMA {average['ema_top1']:.2f} %")

    @torch.inference_mode()
    def measure(self, model: nn.Module, validation: ImageSet) -> dict[str, float]:
        """Top-1 and top-5 in percent, over all processes."""
        process, config = self.process, self.config
        order = np.arange(process.process_index, len(validation), process.num_processes)
        transform = EvaluationTransform(config.image_size, config.crop_ratio)
        skip = self._skip if config.skip_broken else None
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        with closing(
            batches_by_threads(
                validation, order, transform, self.micro_batch, lambda i: i, config.threads, skip
            )
        ) as batches:
            for batch in batches:
                with self.state.autocast():
                    logits = model(self.state.on_device(batch["images"])).float().cpu()
                best = logits.topk(min(5, logits.shape[1])).indices == batch["labels"][:, None]
                sums += torch.tensor([best[:, 0].sum(), best.sum(), len(best)], dtype=torch.float64)
        if process.num_processes > 1:
            sums = sums.to(process.device)
            torch.distributed.all_reduce(sums)
        top1, top5, count = sums.tolist()
        return {"top1": 100 * top1 / max(count, 1), "top5": 100 * top5 / max(count, 1)}

    def _checkpoint(self) -> None:
        if self.process.is_main_process:
            save_checkpoint(self.out / CHECKPOINT, self.state, self.done)
        self.process.wait_for_everyone()

    def finish(self, stage: Stage) -> None:
        """Weights and reports; the checkpoint goes, as nothing is left to do."""
        config, training = self.config, self.inputs.training
        options = model_options(config, len(training.class_ids))
        models = (self.state.model, self.state.average.model)
        for name, model in zip(WEIGHTS.values(), models, strict=True):
            save_weights(self.out / name, model)
        if (path := self.out / SKIPPED).exists():
            self.skipped = set(path.read_text(encoding="utf-8").splitlines())  # of all processes
        write_reports(self.out, config, options, training, self.inputs.recipe, len(self.skipped))
        sets = {"data": training, "validation": self.inputs.validation}
        read = {
            name: {"path": str(found.store), "hash": found.fingerprint()}
            for name, found in sets.items()
            if found
        }
        stage.finish({}, datasets=read, updates=self.done, images_seen=self.done * config.batch_size)
        (self.out / CHECKPOINT).unlink(missing_ok=True)

    def _announce(self) -> None:
        config, training = self.config, self.inputs.training
        updates = f"{config.epochs} epochs of {self.updates_per_epoch} updates"
        batch = f"{self.process.num_processes} process(es) x {self.accumulation} step(s) x {self.micro_batch}"
        self.console.print(
            f"{config.model}: {len(training):,} images of {len(training.class_ids):,} classes, {updates} of "
            f"{config.batch_size} images ({batch}), {self.process.device.type}, precision {config.precision}"
        )
        if self.done:
            self.console.print(f"continuing after {self.done} of {self.total} updates")


class _Clock:
    """Loss, speed and the share of time spent waiting for data, since the last reading."""

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self._batch_size, self._device = batch_size, device
        self._reset()

    def _reset(self) -> None:
        self._begun, self._waited, self._losses = time.perf_counter(), 0.0, list[torch.Tensor]()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begun

    def add(self, loss: torch.Tensor) -> None:
        self._losses.append(loss)

    def read(self) -> dict[str, float]:
        loss = torch.stack(self._losses).mean().item()  # waits for the device
        seconds = max(time.perf_counter() - self._begun, 1e-9)
        images = len(self._losses) * self._batch_size
        metrics = {"loss": loss, "images_per_second": images / seconds, "data_wait": self._waited / seconds}
        if self._device.type == "cuda":
            metrics["gpu_memory_gb"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        self._reset()
        return metrics


def _note(metrics: dict[str, float]) -> str:
    shown = [f"loss {metrics['loss']:.3f}", f"{metrics['data_wait']:.0%} waiting for data"]
    if "gpu_memory_gb" in metrics:
        shown.append(f"{metrics['gpu_memory_gb']:.1f} GB")
    return ", ".join(shown)
