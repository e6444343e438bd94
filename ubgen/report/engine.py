"""Engines: how far each compiled network is from PyTorch, with the pictures of the comparison."""

from collections.abc import Mapping, Sequence
from typing import Any

from ubgen.report.directories import Directory
from ubgen.report.overview import settings
from ubgen.report.parts import Picture, Section, Table, Text, number

_NETWORK = ("network", "compiler", "precision", "rows", "max_abs", "error", "tolerance", "passed")
_CHAIN = {
    "images": "images",
    "psnr": "PSNR (dB)",
    "lowest_psnr": "PSNR of the worst image (dB)",
    "within_one_level": "share of pixels within one grey level",
    "clip_similarity": "CLIP similarity, largest difference",
    "mean_clip_similarity": "CLIP similarity, mean difference",
    "quality": "Q-Align score, largest difference",
    "mean_quality": "Q-Align score, mean difference",
    "passed": "passed",
}


def engines(directories: Sequence[Directory]) -> Section:
    return Section("Export", sections=[_engine(directory) for directory in directories])


def _engine(directory: Directory) -> Section:
    section, manifest = Section(directory.name), directory.manifest
    networks, chain = manifest.get("parity") or [], manifest.get("chain") or {}
    if networks:
        rows = [[number(entry.get(name)) for name in _NETWORK] for entry in networks]
        columns = [name.replace("max_abs", "largest difference") for name in _NETWORK]
        note = (
            "Compiled networks against PyTorch in float32, on real inputs. Error: the largest difference over "
            "PyTorch's largest value; for pixels, the share beyond one grey level."
        )
        section.parts.append(Table(f"Parity of the networks of {directory.name}", columns, rows, note))
    if chain:
        section.parts.append(_chain(directory.name, chain))
    picture = directory.path / "parity.png"
    if picture.is_file():
        caption = "PyTorch's images, the engine's from the same noise, and 16 times their difference"
        section.parts.append(Picture(picture, caption, f"Rows of images of {directory.name}: {caption}"))
    if not section.parts:
        section.parts.append(Text("There is no parity report."))
    section.parts.append(settings(directory))
    return section


def _chain(name: str, chain: Mapping[str, Any]) -> Table:
    rows = [[title, number(chain[key])] for key, title in _CHAIN.items() if key in chain]
    return Table(f"Parity of the whole pipeline of {name}", ["measure", "value"], rows)
