"""`ubgen-bench probe`: the search of a linear probe, beside the same search with scikit-learn's LogisticRegression."""

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ubgen.benchmark.machine import describe, machine_record, peak_memory
from ubgen.benchmark.table import Table, number, write_result
from ubgen.core.errors import UserError
from ubgen.measures.probe import ProbeSearch, search_probe

Say = Callable[[str], None]
TIGHT = 1e-12  # with scikit-learn's default, 1e-4 of the mean loss's slope, large C stop far from the optimum


def features_like_pooled(
    count: int, dim: int, classes: int, seed: int, apart: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) float32 and (N,) labels: not negative, about half zeros, a falling spectrum, norms with a long tail."""
    rng = np.random.default_rng(seed)
    labels, rank = np.arange(count) % classes, min(dim, 256)
    spectrum = ((1 + np.arange(rank)) ** -0.6).astype(np.float32)
    spectrum /= np.sqrt((spectrum**2).sum())
    centres = apart * rng.standard_normal((classes, rank), np.float32)
    latent = (centres[labels] + rng.standard_normal((count, rank), np.float32)) * spectrum
    features = latent @ rng.standard_normal((rank, dim), np.float32)
    features += 0.25 * rng.standard_normal((count, dim), np.float32) - 0.3
    features *= np.exp(rng.normal(0, 0.5, dim)).astype(np.float32)
    np.maximum(features, 0, out=features)
    features *= 0.6 * np.exp(rng.normal(0, 0.25, (count, 1))).astype(np.float32)
    return features, labels


@dataclass
class Fit:
    """One fit with one C."""

    C: float
    seconds: float
    steps: int
    validation: float
    """Accuracy, in [0, 1]."""


@dataclass
class ProbeBench:
    """A whole search of ours, and single fits of scikit-learn with some of its C."""

    settings: dict[str, Any]
    machine: dict[str, Any]
    seconds: float = 0.0
    memory: int = 0
    """Bytes above what the features take."""
    search: dict[str, Any] = field(default_factory=dict)
    peers: dict[str, list[Fit]] = field(default_factory=dict)
    """By scikit-learn's tolerance: the trials that were run."""
    refits: dict[str, dict[str, float]] = field(default_factory=dict)
    """By the same: seconds and test accuracy of the fit to training and validation samples with the C found."""

    def ratio(self, peer: str) -> float:
        """How many times longer scikit-learn takes: its mean trial times all trials, and its last fit."""
        each = statistics.mean(fit.seconds for fit in self.peers[peer])
        return (each * self.settings["trials"] + self.refits[peer]["seconds"]) / self.seconds

    def tables(self) -> list[Table]:
        s = self.settings
        size = f"{s['samples']:,} x {s['dim']:,}, {s['classes']} classes"
        whole = Table(
            f"Linear probe, search of {s['trials']} trials: {size}; {describe(self.machine)}",
            ["side", "seconds", "times ours", "test top-1 (%)"],
            text_columns=1,
            note=self._note(),
        )
        whole.rows.append(["ours", number(self.seconds), "1", f"{100 * self.search['test']:.2f}"])
        trials = Table("Trials that both sides fitted", ["side", "C", "seconds", "steps", "validation (%)"])
        ours = dict(self.search["trials"])
        for peer, fits in self.peers.items():
            ratio, test = self.ratio(peer), self.refits[peer]["test"]
            whole.rows.append([peer, number(ratio * self.seconds), f"{ratio:.1f}", f"{100 * test:.2f}"])
            for fit in fits:
                accuracies = [f"{100 * a:.2f}" for a in (fit.validation, ours[fit.C])]
                trials.rows.append([peer, f"{fit.C:.3g}", number(fit.seconds), str(fit.steps), accuracies[0]])
                trials.rows.append(["ours, same C, within the search", f"{fit.C:.3g}", "", "", accuracies[1]])
        return [whole, trials]

    def _note(self) -> str:
        count = len(next(iter(self.peers.values()), []))
        return (
            f"Ours ran the whole search, with C = {self.search['C']:.3g} at the end, and needed "
            f"{self.memory / 2**30:.2f} GiB beside the features. scikit-learn ran {count} of the trials, at evenly "
            "spaced ranks of the C that the search tried, and the last fit; its time for all trials is its mean time "
            "for these, times their number. Synthetic features; float32 on both sides."
        )

    def write(self, out: Path) -> None:
        """probe.json and probe.md."""
        peers = {peer: [vars(fit) for fit in fits] for peer, fits in self.peers.items()}
        content = {
            name: getattr(self, name) for name in ("machine", "settings", "seconds", "memory", "search")
        }
        write_result(out, "probe", {**content, "peers": peers, "refits": self.refits}, self.tables())


def bench_probe(
    *,
    samples: int = 15_880,
    dim: int = 2048,
    classes: int = 397,
    trials: int = 30,
    peer_trials: int = 5,
    converged: bool = True,
    seed: int = 0,
    say: Say = lambda line: None,
) -> ProbeBench:
    """Ours first, then scikit-learn with its default tolerance, and with `TIGHT` if `converged`."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise UserError("ubgen-bench probe compares with scikit-learn: pip install scikit-learn") from None
    if samples < 2 * classes or not 1 <= peer_trials <= trials:
        raise UserError("samples must be at least twice the classes, and peer_trials between 1 and trials")
    held = max(classes, samples // 4)
    x, y = features_like_pooled(samples + 2 * held, dim, classes, seed)
    parts = np.split(np.random.default_rng(seed).permutation(len(y)), [samples, samples + held])
    (x, vx, tx), (y, vy, ty) = [x[p] for p in parts], [y[p] for p in parts]
    settings = {
        "samples": samples,
        "held": held,
        "dim": dim,
        "classes": classes,
        "trials": trials,
        "seed": seed,
    }
    result = ProbeBench(settings, machine_record())

    say("the search of ours")
    with peak_memory() as peak:
        begun = time.perf_counter()
        found = search_probe(x, y, vx, vy, trials=trials)
        result.seconds = time.perf_counter() - begun
    result.memory = peak.extra
    result.search = _record(found, float((found.probe.predict(tx) == ty).mean()))
    tried = sorted(C for C, _ in found.trials)
    chosen = [tried[round(i)] for i in np.linspace(0, trials - 1, peer_trials)]
    both, labels = np.concatenate([x, vx]), np.concatenate([y, vy])
    for peer, tolerance in [("scikit-learn", 1e-4), (f"scikit-learn, tol={TIGHT:g}", TIGHT)][: 1 + converged]:
        result.peers[peer] = []
        for C in [*chosen, found.C]:
            last = len(result.peers[peer]) == peer_trials
            say(f"{peer}, C = {C:.3g}")
            model = LogisticRegression(C=C, tol=tolerance, max_iter=2000)
            begun = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of 2,000 steps that were not enough: the protocol's limit
                model.fit(*((both, labels) if last else (x, y)))
            seconds = time.perf_counter() - begun
            if last:
                result.refits[peer] = {"seconds": seconds, "test": float(model.score(tx, ty))}
            else:
                fit = Fit(C, seconds, int(model.n_iter_[0]), float(model.score(vx, vy)))
                result.peers[peer].append(fit)
    return result


def _record(found: ProbeSearch, test: float) -> dict[str, Any]:
    return {"C": found.C, "accuracy": found.accuracy, "test": test, "trials": list(found.trials)}
