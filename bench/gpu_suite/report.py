"""results.json and results.md: everything that the parts have written so far, and what follows from it."""

import json
from typing import Any

from bench.gpu_suite.suite import Settings
from ubgen.benchmark import Table
from ubgen.benchmark.machine import describe
from ubgen.benchmark.table import number
from ubgen.core.stage import atomic_write

Content = dict[str, Any]
GOAL_BATCH, GOAL_RATE, GOAL_EAGER, GOAL_COMPILE = 16, 0.60, 2.5, 1.4


def write_report(settings: Settings, names: list[str], seconds: float) -> None:
    parts: dict[str, Content] = {}
    for name in names:
        path = settings.work / f"{name}.json"
        if path.exists():
            parts[name] = json.loads(path.read_text(encoding="utf-8"))
    results = {"reduced": settings.small, "seconds": round(seconds, 1), "parts": parts}
    atomic_write(settings.out / "results.json", json.dumps(results, indent=1) + "\n")
    atomic_write(settings.out / "results.md", markdown(results))


def markdown(results: Content) -> str:
    parts: dict[str, Content] = results["parts"]
    rates = _rates(parts)
    machine = parts.get("ceilings", {}).get("facts", {}).get("machine")
    title = "# GPU suite" + (
        ", reduced run on a CPU: it proves that the suite runs, no speed" if results["reduced"] else ""
    )
    sections = [title, describe(machine) if machine else "The machine's own rates were not measured."]
    builders = {
        "tests": _tests,
        "ceilings": _ceilings,
        "kernels": _kernels,
        "denoise": _denoise,
        "decode": _networks,
        "score": _networks,
        "train": _training,
    }
    for name, build in builders.items():
        if name in parts and parts[name].get("rows"):
            sections += build(parts[name]["rows"], rates, name)
    sections.append(_missing(parts))
    sections.append(f"The whole run took {results['seconds']:.0f} s.")
    return "\n\n".join(section.strip() for section in sections if section) + "\n"


def _rates(parts: dict[str, Content]) -> dict[str, float]:
    """TFLOP/s of each dtype, and "copy" in GB/s, as measured on this machine."""
    rows = parts.get("ceilings", {}).get("rows", [])
    return {r.get("dtype", "copy"): r.get("tflops", r.get("gb_per_second")) for r in rows}


def _tests(rows: list[Content], rates: dict[str, float], name: str) -> list[str]:
    counts = {key: value for key, value in rows[0].items() if key != "exit_code"}
    said = ", ".join(f"{value} {key}" for key, value in counts.items()) or "no test ran"
    return [f"`pytest -m gpu`: {said}."]


def _ceilings(rows: list[Content], rates: dict[str, float], name: str) -> list[str]:
    table = Table("What the machine does at most", ("what", "rate"), text_columns=1)
    for row in rows:
        if row["name"] == "copy":
            table.rows.append(
                ("device copy, bytes read and written", f"{number(row['gb_per_second'], 4)} GB/s")
            )
        else:
            what = f"matrix product of {row['side']}, {row['dtype']}"
            table.rows.append((what, f"{number(row['tflops'])} TFLOP/s"))
    return [table.markdown()]


def _kernels(rows: list[Content], rates: dict[str, float], name: str) -> list[str]:
    columns = ("operation", "tensor", "error", "us", "PyTorch, us", "ratio", "GB/s", "of the copy rate")
    table = Table("Native operations", columns)
    for row in rows:
        table.rows.append(
            (
                row["operation"],
                row["shape"],
                f"{row['error']:.1e}",
                number(1000 * row["ms"]),
                number(1000 * row["eager_ms"]),
                f"{row['eager_ms'] / row['ms']:.1f}x",
                number(row["gb_per_second"]),
                _share(row["gb_per_second"], rates.get("copy")),
            )
        )
    table.note = "Bytes: each input read once and each output written once."
    return [table.markdown()]


def _denoise(rows: list[Content], rates: dict[str, float], name: str) -> list[str]:
    calls, loops = ([row for row in rows if row["kind"] == kind] for kind in ("call", "loop"))
    batches = dict.fromkeys(row["batch"] for row in calls)
    sections = [_calls([row for row in calls if row["batch"] == batch], rates, batch) for batch in batches]
    if loops:
        sections.append(_loops(loops))
    return [*sections, _goal(calls, rates)]


def _calls(rows: list[Content], rates: dict[str, float], batch: int) -> str:
    columns = (
        *("variant", "what it is", "dtype", "ms", "quartiles", "TFLOP/s", "executed", "of the matrix rate"),
        *("x eager", "x compile", "error", "peak GB"),
    )
    table = Table(f"One guided UNet call, {batch} images", columns, text_columns=3)
    times = {row["variant"]: row["ms"] for row in rows}
    for row in rows:
        table.rows.append(
            (
                *(row["variant"], row["about"], row["dtype"], number(row["ms"])),
                f"{number(row['q1'])} to {number(row['q3'])}",
                *(number(row["tflops"]), number(row["executed_tflops"])),
                _share(row["executed_tflops"], rates.get(row["dtype"])),
                *(_ratio(times.get(peer), row["ms"]) for peer in ("eager", "compile")),
                *(f"{row['error']:.0e}", number(row["peak_gb"])),
            )
        )
    table.note = (
        "TFLOP/s by the FLOPs of diffusers' UNet (2 rows an image; matrix products, convolutions and attention, 2 for "
        "each multiply-add); executed: of what the variant itself computes, and so is the share of the matrix rate. "
        "Each variant has a process of its own; they take turns. Peak: torch's allocations."
    )
    return table.markdown()


def _loops(rows: list[Content]) -> str:
    table = Table(
        "The whole sampling loop (PNDM)", ("variant", "images", "steps", "s", "images/s"), text_columns=1
    )
    for key in dict.fromkeys((row["batch"], row["variant"]) for row in rows):
        times = [row["ms"] / 1000 for row in rows if (row["batch"], row["variant"]) == key]
        steps = next(row["steps"] for row in rows if row["batch"] == key[0])
        best = min(times)
        table.rows.append((key[1], str(key[0]), str(steps), number(best), number(key[0] / best)))
    table.note = (
        "The shorter run where there were two. diffusers' own module runs in its StableDiffusionPipeline, all else in "
        "ubgen's sampler."
    )
    return table.markdown()


def _goal(calls: list[Content], rates: dict[str, float]) -> str:
    """The best bfloat16 variant at the largest batch, against what is wanted."""
    rows = [row for row in calls if row["batch"] >= GOAL_BATCH and row["dtype"] == "bfloat16"]
    ours = [row for row in rows if row["variant"] not in ("eager", "channels-last", "compile")]
    if not ours:
        return ""
    best = min(ours, key=lambda row: row["ms"] / row["batch"])
    times = {row["variant"]: row["ms"] for row in rows if row["batch"] == best["batch"]}
    rate = rates.get("bfloat16")
    table = Table(
        f"Goal: batch {best['batch']}, the fastest is {best['variant']}", ("figure", "wanted", "measured")
    )
    share = best["executed_tflops"] / rate if rate else None
    table.rows += [
        (
            "share of the measured bfloat16 matrix rate",
            f"{GOAL_RATE:.0%}",
            f"{share:.0%}" if share else "not measured",
        ),
        (
            "against eager diffusers",
            f"{GOAL_EAGER}x",
            _ratio(times.get("eager"), best["ms"]) or "not measured",
        ),
        (
            "against torch.compile",
            f"{GOAL_COMPILE}x",
            _ratio(times.get("compile"), best["ms"]) or "not measured",
        ),
    ]
    return table.markdown()


def _networks(rows: list[Content], rates: dict[str, float], name: str) -> list[str]:
    columns = ("network", "variant", "images", "ms", "quartiles", "images/s", "TFLOP/s", "x eager", "peak GB")
    table = Table({"decode": "Decoder", "score": "Scorers"}[name], columns)
    for row in rows:
        same = [r for r in rows if (r["network"], r["batch"]) == (row["network"], row["batch"])]
        eager = next((r["ms"] for r in same if r["variant"] == "eager"), None)
        table.rows.append(
            (
                *(row["network"], row["variant"], str(row["batch"]), number(row["ms"])),
                f"{number(row['q1'])} to {number(row['q3'])}",
                *(number(1000 * row["batch"] / row["ms"]), number(row["tflops"])),
                *(_ratio(eager, row["ms"]), number(row["peak_gb"])),
            )
        )
    return [table.markdown()]


def _training(rows: list[Content], rates: dict[str, float], name: str) -> list[str]:
    columns = ("variant", "images", "precision", "s an update", "quartiles", "images/s", "peak GB")
    table = Table("One update of the generator", columns, text_columns=1)
    for row in rows:
        table.rows.append(
            (
                *(row["variant"], str(row["batch"]), row["precision"], number(row["ms"] / 1000)),
                f"{number(row['q1'] / 1000)} to {number(row['q3'] / 1000)}",
                *(number(row["images_per_second"]), number(row["peak_gb"])),
            )
        )
    if not all(row["quality"] for row in rows):
        table.note = "Without the quality loss: there was no memory for Q-Align."
    return [table.markdown()]


def _missing(parts: dict[str, Content]) -> str:
    lines = [f"- {name}: {content['error']}" for name, content in parts.items() if content.get("error")]
    for name, content in parts.items():
        lines += [f"- {name}, {entry['what']}: {entry['reason']}" for entry in content.get("skipped", [])]
    return "## Not measured, and why\n\n" + "\n".join(lines) if lines else ""


def _share(value: float, of: float | None) -> str:
    return f"{value / of:.0%}" if of else ""


def _ratio(peer: float | None, own: float) -> str:
    return f"{peer / own:.2f}x" if peer else ""
