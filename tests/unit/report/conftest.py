"""Finished stage directories, small, written by the project's own writers; some names are hostile."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ubgen.core.stage import Stage
from ubgen.dataset import ShardWriter, dataset_stats, open_dataset, write_classes, write_pictures
from ubgen.evaluate.jobs import Job, run_jobs
from ubgen.evaluate.results import Figure, Result
from ubgen.evaluate.tables import write_tables
from ubgen.report.page import write_report

HOSTILE = "<script>harmed = true</script>"
NAMES = [HOSTILE, '"><img src=x onerror="harmed=true">', "=HYPERLINK(1)", "x" * 150]


def _write_dataset(
    out: Path, names: Sequence[str], *, lora: str = "", seed: int = 0, images: int = 4
) -> Path:
    """`images` of each class, of one colour: grey without a LoRA, red with one."""
    identity = {"engine key": lora, "class ids": list(names), "prompts": list(names), "--seed": seed}
    stage = Stage(out, "synth", identity, config={"seed": seed})
    with stage.hold():
        stage.begin()
        write_classes(out, names, names, names)
        with ShardWriter(out, 0) as writer:
            for position in range(images * len(names)):
                image_index, label = divmod(position, len(names))
                attempt = int(position == len(names) and bool(lora))  # class 0, image 1
                place = {"seed": seed, "class_index": label, "image_index": image_index, "attempt": attempt}
                writer.write(
                    position,
                    image=Image.new("RGB", (32, 32), "red" if lora else "grey"),
                    class_index=label,
                    meta={"class_id": names[label], "prompt": names[label], "identity": place},
                    scores={"clip_similarity": position / 100, "quality": 1 + position % 4},
                    flag=None,
                )
            writer.reject({"class_index": 0, "image_index": 1, "attempt": 0, "reason": "<b>blank</b>"})
        dataset = open_dataset(out, partial=True)
        stats = dataset_stats(dataset)
        (out / "rejections.jsonl").write_text('{"class_index": 0, "attempt": 0, "reason": "<b>blank</b>"}\n')
        write_pictures(dataset, out, stats=stats, sheets=0)
        speed = {
            "images_per_second": 2.5,
            "throughput": [[0, 0], [2, 4], [4, 16]],
            "busy_seconds": {"decode": 3.0},
        }
        stage.finish({}, stats=stats, speed=speed, lora_hash=lora, dataset={"images": 16, "shards": 1})
    return out


def _write_stage(out: Path, name: str, files: dict[str, str | Image.Image], **manifest: Any) -> Path:
    stage = Stage(out, name, {"seed": 1}, config={"rollout": {"steps": 25}, "classes": HOSTILE})
    with stage.hold():
        stage.begin()
        for file, content in files.items():
            (out / file).parent.mkdir(exist_ok=True)
            if isinstance(content, str):
                (out / file).write_text(content)
            else:
                content.save(out / file)
        stage.finish({}, **manifest)
    return out


def _write_evaluation(out: Path, accuracy: float) -> Path:
    correct = np.arange(20) < accuracy / 5

    figures = {"top-1": Figure(accuracy, accuracy - 3, accuracy + 3)}
    columns = {"sample": [f"{i}" for i in range(20)], "label": ["a"] * 20, "predicted": ["a"] * 20}
    shares = [(share, seed) for share in (0.1, 1.0) for seed in (0, 1)]
    runs = [{"fraction": share, "seed": seed, "top-1": accuracy * share + seed} for share, seed in shares]

    def transfer(report: Any) -> Result:
        predictions = {**columns, "correct": correct}
        return Result("transfer", "aircraft", figures, {"test": 20}, predictions=predictions)

    def fewshot(report: Any) -> Result:
        predictions = {**columns, "correct": correct, "fraction": [1.0] * 20}
        return Result("fewshot", "aircraft", figures, details={"runs": runs}, predictions=predictions)

    backbone = {"name": HOSTILE, "identity": f"sha256:{accuracy}", "precision": "no", "model": "resnet10t"}
    run_jobs(
        [Job("transfer", "aircraft", {}, transfer), Job("fewshot", "aircraft", {}, fewshot)],
        out,
        backbone,
        write_tables=lambda path, results: write_tables(path / "results.md", {path.name: results}),
    )
    return out


@pytest.fixture(scope="session")
def write_dataset() -> Callable[..., Path]:
    """write_dataset(out, names, lora="", seed=0, images=4): a finished dataset."""
    return _write_dataset


@pytest.fixture(scope="session")
def page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on all of `runs`, with a hostile title."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report(sorted(runs.iterdir()), out, f"About {HOSTILE}")
    return out


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one of each stage, a base and a tuned dataset, two evaluations, and stats.json."""
    root = tmp_path_factory.mktemp("runs")
    lines = [
        {"step": s, "phase": "train", "loss": 6 - s / 10, "clip_similarity": s / 50, "lr": 1e-4}
        for s in range(1, 41)
    ]
    metrics = "".join(
        json.dumps(line) + "\n" for line in [*lines, {"step": 40, "top1": 55.5, "ema_top1": None}]
    )
    grid = Image.new("RGB", (640, 128), "green")
    samples = {"samples/000000.png": grid, "samples/000020.png": grid, "samples/000040.png": grid}
    _write_stage(root / "train", "train", {"metrics.jsonl": metrics, **samples})
    parity = {
        "network": "unet",
        "compiler": "onnxruntime",
        "precision": "float32",
        "rows": 68,
        "error": 1.6e-6,
    }
    chain = {"images": 16, "psnr": 86.3, "passed": True}
    _write_stage(root / "engine", "export", {"parity.png": grid}, parity=[parity], chain=chain)
    _write_dataset(root / "base", NAMES)
    _write_dataset(root / "tuned", NAMES, lora="sha256:" + "a" * 64)
    _write_stage(root / "backbone", "pretrain", {"metrics.jsonl": metrics})
    _write_evaluation(root / "eval-base", 40)
    _write_evaluation(root / "eval-tuned", 60)
    (root / "measures").mkdir()
    cluster = {"near": "<b>bird</b>", "share": 0.25, "prompt_line": "crane\tcrane, similar to bird"}
    entry = {"index": 0, "id": "c", "name": HOSTILE, "images": 4, "rke": [2.0, 1.5, 2.5], "agreement": 0.5}
    found = {
        "diversity": {"rke": [3.25, 3.0, 3.5]},
        "two_meanings": [{"index": 0, "name": HOSTILE, "clusters": [cluster]}],
        "classes": [entry],
    }
    grid.save(root / "measures/two-meanings.png")
    measures = {"quality": {"mean": 2.5}, "images": 16, "measures": found, "class_counts": [4, 4, 4]}
    (root / "measures/stats.json").write_text(json.dumps(measures))
    return root
