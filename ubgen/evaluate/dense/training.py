"""The training loop of both tasks: resumable, in one or several processes, with figures and pictures on the way."""

import hashlib
import io
import random
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from functools import partial
from itertools import islice
from os import sched_getaffinity
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from rich.console import Console
from safetensors.torch import save
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ubgen.core.console import Report
from ubgen.core.errors import UserError, first_line, memory_errors
from ubgen.core.files import atomic_write, replacing
from ubgen.core.metrics import METRICS_FILE, TENSORBOARD, MetricsLog
from ubgen.core.stage import Stage, read_manifest
from ubgen.evaluate.backbone import Backbone
from ubgen.evaluate.dense.settings import updates_per_epoch
from ubgen.evaluate.dense.tasks import Task

CHECKPOINT, WEIGHTS, PICTURES = "checkpoint.pt", "model.safetensors", "pictures"
_OWN = (CHECKPOINT, WEIGHTS, PICTURES, METRICS_FILE, TENSORBOARD)
_LOG_EVERY = 10  # updates
_MEMORY = (
    "lower --batch-size (the learning rate follows it), or use more processes, --precision bf16, or a lower "
    "--short-side"
)
_AHEAD = 3  # batches that are in work while one is used
_PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Stopped(Exception):
    """The updates that were asked for are done, and others are left."""


def train(
    task: Task,
    backbone: Backbone,
    out: Path,
    identity: Mapping[str, Any],
    *,
    seed: int,
    process: PartialState,
    threads: int = 0,
    overwrite: bool = False,
    stop_after: int | None = None,
    report: Report = lambda done, total, note="": None,
    console: Console | None = None,
) -> dict[str, float]:
    """Train to the end, or go on with what is in `out`; the figures on the validation images, on process 0.

    Every process calls this. On the CPU, with one process, a continued training ends with the same bits as an
    uninterrupted one. Stopped after `stop_after` updates, if others are left. UserError for another training in `out`.
    """
    main = process.is_main_process
    stage = None
    if main:
        stage = Stage(
            out,
            "eval training",
            identity,
            owns=_OWN,
            has_work=lambda store: store.size(CHECKPOINT) is not None,
            overwrite=overwrite,
        )
    with stage.hold() if stage is not None else nullcontext():
        finished = torch.tensor([int(stage is not None and stage.state == "finished")], device=process.device)
        if broadcast(finished).item():
            return dict(read_manifest(out)["figures"]) if main else {}
        if stage is not None:
            stage.begin()
        process.wait_for_everyone()
        with memory_errors(_MEMORY):
            run = _Run(task, backbone, out, seed, process, threads, console or Console(quiet=True))
            figures = run.play(report, stop_after)
        if stage is not None:
            tensors = {name: value.cpu().contiguous() for name, value in run.model.state_dict().items()}
            atomic_write(out / WEIGHTS, save(tensors))
            stage.finish({}, figures=figures, updates=run.done)
            (out / CHECKPOINT).unlink(missing_ok=True)
        process.wait_for_everyone()
        return figures


class _Run:
    """One process's part. `done` counts updates."""

    def __init__(
        self,
        task: Task,
        backbone: Backbone,
        out: Path,
        seed: int,
        process: PartialState,
        threads: int,
        console: Console,
    ) -> None:
        self.task, self.out, self.seed, self.process, self.console = task, out, seed, process, console
        self.settings, self.threads = task.settings, threads or len(sched_getaffinity(0))
        _require_batches(task, process)
        torch.manual_seed(seed)  # of the heads
        self.model = task.build(backbone).to(process.device)
        self.network: nn.Module = self.model
        if process.num_processes > 1:
            gpu = process.device.type == "cuda"
            if gpu and task.evaluation == "segment":
                self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
            self.network = DistributedDataParallel(self.model, device_ids=[process.device] if gpu else None)
        self.optimizer = task.optimizer(self.model)
        self.highest_lr = self.optimizer.param_groups[0]["lr"]
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=self.settings.precision == "fp16")
        self.epoch_updates = updates_per_epoch(len(task.chosen), self.settings)
        self.total = task.updates
        self.done = self._restored()

    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}

    def _restored(self) -> int:
        path = self.out / CHECKPOINT
        if not path.exists():
            return 0
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in self._parts().items():
                part.load_state_dict(saved[name])
            return int(saved["done"])
        except OSError:
            raise
        except Exception as error:  # of the zip, the pickle and the networks, of many kinds
            raise UserError(
                f"{path}: damaged checkpoint ({first_line(error)}); remove it to train from the beginning"
            ) from error

    def _checkpoint(self) -> None:
        if self.process.is_main_process:
            buffer = io.BytesIO()
            states = {name: part.state_dict() for name, part in self._parts().items()}
            torch.save({"done": self.done, **states}, buffer)
            atomic_write(self.out / CHECKPOINT, buffer.getvalue())
        self.process.wait_for_everyone()

    def play(self, report: Report, stop_after: int | None) -> dict[str, float]:
        """The updates that are left; the last evaluation's figures."""
        end = self.total if stop_after is None else min(self.total, self.done + stop_after)
        self._announce()
        log = MetricsLog(self.out, self.done) if self.process.is_main_process else None
        figures: dict[str, float] | None = None
        try:
            report(self.done, self.total)
            while self.done < end:
                self._epoch(end, report, log)
                if self.done % self.epoch_updates == 0 or self.done == self.total:
                    figures = self._judge(log)
                self._checkpoint()
            if self.done == self.total and figures is None:  # stopped between the last update and the end
                figures = self._judge(log)
        finally:
            if log is not None:
                log.close()
        if self.done < self.total:
            raise Stopped
        return figures or {}

    def _epoch(self, end: int, report: Report, log: MetricsLog | None) -> None:
        """From where the run stands to the end of the epoch, or to update `end`."""
        epoch, begun = divmod(self.done, self.epoch_updates)
        last = min(end, (epoch + 1) * self.epoch_updates)
        batches = batch_plan(
            len(self.task.chosen), self.settings.batch_size, self.seed, epoch, self.task.wide
        )
        mine = [batch[self.process.process_index :: self.process.num_processes] for batch in batches]
        losses: list[dict[str, torch.Tensor]] = []
        with closing(loaded_batches(self.task, mine[begun:], self.seed, epoch, self.threads)) as samples:
            for batch in islice(samples, last - self.done):
                losses.append(self._update(batch))
                self.done += 1
                checkpoint = self.done % self.settings.checkpoint_every == 0
                if self.done % _LOG_EVERY == 0 or self.done == last or checkpoint:
                    metrics = self._finite(losses)
                    losses = []
                    if log is not None:
                        log.write(self.done, "train", metrics)
                    note = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if name != "lr")
                    report(self.done, self.total, note)
                if checkpoint and self.done < last:
                    self._checkpoint()

    def _update(self, samples: list[Any]) -> dict[str, torch.Tensor]:
        seed_everything(self.seed, self.done, self.process.process_index)
        for group in self.optimizer.param_groups:
            group["lr"] = self.task.lr(self.done)
        self.network.train()
        with self._autocast():
            losses = self.task.losses(self.network, samples, self.process.device)
        self.scaler.scale(torch.stack(list(losses.values())).sum()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return {name: loss.detach() for name, loss in losses.items()}

    def _autocast(self) -> Any:
        kind = self.settings.precision
        return torch.autocast(self.process.device.type, _PRECISIONS[kind], enabled=kind != "no")

    def _finite(self, losses: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        means = {name: torch.stack([each[name] for each in losses]).mean().item() for name in losses[0]}
        metrics = {"loss": sum(means.values()), **means, "lr": self.optimizer.param_groups[0]["lr"]}
        if not np.isfinite(metrics["loss"]):
            raise UserError(
                f"update {self.done}: the loss is not finite; {self.out / CHECKPOINT} is the last good state. "
                "Start again with --overwrite and a lower --lr, or another --precision"
            )
        return metrics

    @torch.no_grad()
    def _judge(self, log: MetricsLog | None) -> dict[str, float]:
        """Pictures after every epoch; figures as often as is asked for, and at the end."""
        epoch = -(-self.done // self.epoch_updates)
        device = self.process.device
        self.model.eval()
        if self.process.num_processes > 1:
            for buffer in self.model.buffers():  # where batch normalisation is not synchronised, they differ
                torch.distributed.broadcast(buffer, 0)
        figures: dict[str, float] = {}
        with self._autocast():
            if self.process.is_main_process:
                (self.out / PICTURES).mkdir(exist_ok=True)
                with replacing(self.out / PICTURES / f"epoch-{epoch:04}.png") as file:
                    self.task.draw(self.model, device).save(file, "PNG")
            if epoch % self.settings.evaluate_every == 0 or self.done == self.total:
                part = self.process.process_index, self.process.num_processes
                loaded = partial(loaded_ahead, threads=self.threads, ahead=4 * self.threads)
                figures = self.task.measure(self.model, device, part, loaded)
        if log is not None and figures:
            log.write(self.done, "eval", {"epoch": epoch, **figures})
            shown = ", ".join(f"{name} {value:.2f}" for name, value in figures.items() if _is_main(name))
            self.console.print(f"epoch {epoch}: {shown}")
        return figures

    def _announce(self) -> None:
        task, settings = self.task, self.settings
        where = f"{self.process.num_processes} process(es), {self.process.device.type}"
        self.console.print(
            f"{task.evaluation} on {task.dataset}, seed {self.seed}: {len(task.chosen):,} of {len(task.training):,} "
            f"images, {self.total:,} updates of {settings.batch_size} images ({where}), highest learning rate "
            f"{self.highest_lr:g}, precision {settings.precision}"
        )
        if self.done:
            self.console.print(f"continuing after {self.done} of {self.total} updates")


def _require_batches(task: Task, process: PartialState) -> None:
    size, processes = task.settings.batch_size, process.num_processes
    if size % processes:
        raise UserError(f"--batch-size {size} is not a multiple of {processes} processes")
    together = processes > 1 and process.device.type == "cuda"  # synchronised batch normalisation
    if task.evaluation == "segment" and not together and size // processes < 2:
        raise UserError(
            f"--batch-size {size} on {processes} process(es): UPerNet's batch normalisation needs 2 images or more each"
        )


def _is_main(name: str) -> bool:
    return name in ("box AP", "mask AP", "mIoU")


def batch_plan(
    count: int, size: int, seed: int, epoch: int, wide: np.ndarray | None = None
) -> list[np.ndarray]:
    """An epoch's batches, ceil(count / size) of them: every index once, and a few again where the last is filled up.

    With `wide`, a batch holds images of one kind alone, but for the last ones, as in MMDetection.
    """
    order = np.random.default_rng([seed, epoch, 0xBA7C]).permutation(count)
    groups = [order] if wide is None else [order[wide[order]], order[~wide[order]]]
    whole = [group[i : i + size] for group in groups for i in range(0, len(group) - size + 1, size)]
    if wide is not None:
        turn = np.random.default_rng([seed, epoch, 0x7C4E]).permutation(len(whole))
        whole = [whole[i] for i in turn]
    left = np.concatenate([group[len(group) - len(group) % size :] for group in groups])
    rest = [left[i : i + size] for i in range(0, len(left), size)]
    if rest:
        rest[-1] = np.concatenate([rest[-1], np.resize(order, size - len(rest[-1]))])
    return [*whole, *rest]


def loaded_batches(
    task: Task, batches: Sequence[np.ndarray], seed: int, epoch: int, threads: int
) -> Generator[list[Any], None, None]:
    """The samples of each batch of positions in `task.chosen`, by threads that work ahead.

    A sample's random numbers come from the seed, the epoch and the image alone.
    """

    def load(position: int) -> Any:
        index = int(task.chosen[position])
        return task.sample(index, np.random.default_rng([seed, epoch, index]))

    with closing(
        loaded_ahead(load, np.concatenate(batches).tolist(), threads, _AHEAD * len(batches[0]))
    ) as one:
        for batch in batches:
            yield list(islice(one, len(batch)))


def loaded_ahead(
    load: Callable[[int], Any], items: Iterable[int], threads: int, ahead: int
) -> Generator[Any, None, None]:
    """`load` of each item, in order; at most `ahead` are in work or waiting."""
    rest = iter(items)
    pool = ThreadPoolExecutor(threads, "ubgen-dense")
    waiting = deque[Future[Any]]()
    try:
        waiting.extend(pool.submit(load, item) for item in islice(rest, ahead))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(load, item) for item in islice(rest, 1))
            yield result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def seed_everything(seed: int, update: int, rank: int) -> None:
    """Sampling of regions and dropout draw from the global generators: seeded so, an update needs no earlier one."""
    digest = hashlib.blake2b(f"dense {seed} {update} {rank}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "little")
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value % 2**63)
