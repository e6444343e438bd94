"""The stage on a GPU, around stand-ins for the networks: streams, pinned copies, nvjpeg."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ubgen.dataset import is_marked_synthetic, open_dataset, open_store
from ubgen.dataset.tools.verify import verify
from ubgen.synth import SynthConfig
from ubgen.synth.audit import audit
from ubgen.synth.encode import NvjpegEncoder
from ubgen.synth.generator import Scored
from ubgen.synth.plan import Item
from ubgen.synth.synthesise import synthesise

pytestmark = pytest.mark.gpu
Settings = Callable[..., SynthConfig]


def on_gpu(stand_ins: ModuleType) -> Any:
    class OnGpu(stand_ins.FromIdentities):  # type: ignore[name-defined, misc]
        """Each stage first keeps its stream busy: one that did not wait for it would read what is not there yet."""

        device = torch.device("cuda")

        def denoise(self, items: Sequence[Item]) -> Tensor:
            noise = super().denoise(items).pin_memory()
            _busy()
            return noise.to(self.device, non_blocking=True)

        def decode(self, latents: Tensor) -> Tensor:
            _busy()
            return super().decode(latents)

        def score(self, items: Sequence[Item], latents: Tensor, pixels: Tensor) -> Scored:
            _busy()
            scored = super().score(items, latents, pixels)
            return Scored(
                pixels,
                scored.similarity,
                scored.quality,
                scored.finite.to(self.device),
                scored.constant.to(self.device),
                scored.features.to(self.device),
            )

    return OnGpu()


def _busy() -> None:
    big = torch.ones(2048, 2048, device="cuda")
    for _ in range(5):
        big = big @ big / 2048


def shards(out: Path) -> dict[str, bytes]:
    store = open_store(str(out))
    return {name: store.read(name) for name in store.names() if name.endswith(".tar")}


def test_the_shards_are_those_of_the_cpu(settings: Settings, stand_ins: ModuleType, tmp_path: Path) -> None:
    given = {"format": "png", "per_class": 60}
    synthesise(settings(tmp_path / "cpu", **given), open_source=lambda *_: stand_ins.FromIdentities())
    synthesise(settings(tmp_path / "gpu", device="cuda", **given), open_source=lambda *_: on_gpu(stand_ins))
    assert len(shards(tmp_path / "cpu")) > 10
    assert shards(tmp_path / "gpu") == shards(tmp_path / "cpu")


def test_nvjpeg_writes_the_same_pictures(settings: Settings, stand_ins: ModuleType, tmp_path: Path) -> None:
    """Both encoders at the same quality: neither may be much further from the pixels than the other."""
    synthesise(settings(tmp_path / "png", format="png"), open_source=lambda *_: stand_ins.FromIdentities())
    errors = {}
    for encoder in ("cpu", "nvjpeg"):
        out = tmp_path / encoder
        config = settings(out, format="jpg", encoder=encoder, device="cuda")
        synthesise(config, open_source=lambda *_: on_gpu(stand_ins))
        assert verify(out).problems == []
        exact, written = open_dataset(tmp_path / "png"), open_dataset(out)
        files = [written.encoded(i)[0] for i in range(len(written))]
        assert all(is_marked_synthetic(file) for file in files)
        gaps = [np.abs(_pixels(file) - _pixels(exact.encoded(i)[0])).mean() for i, file in enumerate(files)]
        errors[encoder] = float(np.mean(gaps))
    assert errors["nvjpeg"] < 2 * errors["cpu"] + 0.5


def test_nvjpeg_takes_images_from_any_stream() -> None:
    """Each caller has a stream of its own, which is still at work on the images."""
    encode = NvjpegEncoder()
    wanted = torch.randint(256, (512, 512, 3), dtype=torch.uint8, device="cuda")
    (right,) = encode([wanted])
    for _ in range(3):
        image = torch.zeros_like(wanted)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            _busy()
            image.copy_(wanted)
            assert encode([image, image]) == [right, right]


@pytest.mark.parametrize("name", ["cpu", "nvjpeg"])
def test_runs_in_one_process_write_the_same_files_and_pass_the_audit(
    settings: Settings, stand_ins: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    class Renders(type(on_gpu(stand_ins))):  # type: ignore[misc]
        def make(self, items: Sequence[Item]) -> Any:
            latents = self.denoise(items)
            return self.score(items, latents, self.decode(latents)).rows(len(items))

    configs = [settings(tmp_path / str(i), encoder=name, device="cuda") for i in range(3)]
    for config in configs:
        synthesise(config, open_source=lambda *_: Renders())
    first = shards(tmp_path / "0")
    assert all(shards(Path(config.out)) == first for config in configs)
    monkeypatch.setattr("ubgen.synth.audit.load", lambda *_, **__: SimpleNamespace(key="sha256:none"))
    monkeypatch.setattr("ubgen.synth.audit.Generator", lambda *_: Renders())
    found = audit(tmp_path / "0", sample=60, device="cuda")
    assert (found.samples, found.same_bytes, found.largest) == (60, 60, 0)


def _pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), dtype=np.float32)
