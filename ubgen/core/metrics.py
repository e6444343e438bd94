"""A training run's metrics: JSON lines, and TensorBoard."""

import json
import math
from pathlib import Path
from typing import Any

from ubgen.core.files import atomic_write

METRICS_FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class MetricsLog:
    """Appends one line per update to metrics.jsonl and mirrors it to TensorBoard.

    A continued run first drops the lines after its checkpoint: those updates are done again.
    """

    def __init__(self, out: Path, done: int) -> None:
        self.path = out / METRICS_FILE
        kept = [line for line in _complete_lines(self.path) if json.loads(line)["step"] <= done]
        atomic_write(self.path, "".join(line + "\n" for line in kept))
        from torch.utils.tensorboard import SummaryWriter  # only here: it brings PyTorch

        self.tensorboard = SummaryWriter(str(out / TENSORBOARD), purge_step=done + 1)

    def write(self, step: int, phase: str, metrics: dict[str, float]) -> None:
        """`step` counts all updates from 1, the warm-up's too."""
        # JSON has no inf (a norm that the loss scaler skipped)
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "phase": phase, **finite}) + "\n")
        for name, value in metrics.items():
            self.tensorboard.add_scalar(f"{phase}/{name}", value, step)

    def close(self) -> None:
        self.tensorboard.close()


def _complete_lines(path: Path) -> list[str]:
    """A killed process may have left half of a last line."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl."""
    return [json.loads(line) for line in _complete_lines(path)]
