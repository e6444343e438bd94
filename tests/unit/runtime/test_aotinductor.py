"""AOTInductor packages: compiled once here, with the real compiler, and run under its own strictest input checks."""

import multiprocessing
import os
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ubgen.benchmark.machine import resident
from ubgen.core.errors import UserError
from ubgen.core.probes import aotinductor_cpu
from ubgen.export.compilers import compile_network
from ubgen.export.compilers.aotinductor import plain_directory
from ubgen.export.exportable import Exportable
from ubgen.export.spec import BatchRange, NetworkSpec
from ubgen.runtime import Network, Signature
from ubgen.runtime.aotinductor import cpu_features
from ubgen.runtime.backends import backend

pytestmark = pytest.mark.skipif(not aotinductor_cpu().available, reason=aotinductor_cpu().detail)
BATCH = BatchRange(1, 2, 8)
SPEC = NetworkSpec(BATCH, 1e-4, "aotinductor")
MIB = 2**20


class Small(nn.Module):
    """A convolution, whose input has strides to get wrong, an input that all rows share, and 64 MiB of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 4, 3, padding=1)
        self.table = nn.Parameter(torch.randn(4096, 4096))

    def forward(self, images: Tensor, scale: Tensor) -> Tensor:
        return nn.functional.silu(self.convolution(images)) * scale + self.table[-1, -1]


@pytest.fixture(scope="module")
def small() -> Exportable:
    torch.manual_seed(0)
    inputs = {"images": torch.randn(4, 4, 8, 8), "scale": torch.tensor([3.0])}
    return Exportable(Small().eval(), [inputs], "out", frozenset({"scale"}))


@pytest.fixture(scope="module")
def package(small: Exportable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("package")
    files = compile_network(small, SPEC, directory / "small", "cpu", print)
    assert list(directory.iterdir()) == files
    return files[0]


@pytest.mark.parametrize("name", ["two words", "o'clock", "$HOME", "a;b", "ä"])
def test_the_compiler_works_in_a_directory_of_a_plain_name(tmp_path: Path, name: str) -> None:
    odd = tmp_path / name
    odd.mkdir()
    assert plain_directory(odd, tmp_path) == tmp_path
    assert plain_directory(tmp_path, odd) == tmp_path


class Tiny(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x) * 2


def test_a_package_is_made_in_any_directory_and_what_the_compiler_says_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "it's two words"
    odd.mkdir()
    network = Exportable(Tiny().eval(), [{"x": torch.randn(3, 4)}], "y")
    with monkeypatch.context() as full:
        full.setenv("TMPDIR", str(tmp_path / "nowhere"))  # nothing can be written there
        (file,) = compile_network(network, SPEC, odd / "tiny", "cpu", print)
    loaded = backend("aotinductor").load("tiny", file, network.signature(BATCH), "cpu", 1, {})
    torch.testing.assert_close(loaded.run(network.inputs[0])["y"], Tiny()(network.inputs[0]["x"]))
    assert list(odd.iterdir()) == [file]
    with (
        torch._inductor.config.patch({"cpp.cxx": (str(failing_compiler(tmp_path)),)}),
        pytest.raises(UserError, match=r"tiny: AOTInductor could not compile it: .*error: no such header"),
    ):
        compile_network(network, SPEC, odd / "tiny", "cpu", print)


def failing_compiler(directory: Path) -> Path:
    """A C++ compiler that is found, and then fails."""
    script = directory / "cxx"
    version = 'case "$*" in *--version*) exec g++ "$@";; esac'
    script.write_text(f'#!/bin/sh\n{version}\necho "x.cpp:1:2: error: no such header" >&2\nexit 1\n')
    script.chmod(0o755)
    return script


@pytest.fixture(scope="module", autouse=True)
def _strict() -> Iterator[None]:
    """The generated code's own checks, which it reads once, at its first call."""
    os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"
    yield
    del os.environ["AOTI_RUNTIME_CHECK_INPUTS"]


def load(path: Path, signature: Signature, threads: int = 1) -> Network:
    return backend("aotinductor").load("small", path, signature, "cpu", threads, {})


@pytest.fixture(scope="module")
def network(package: Path, small: Exportable) -> Network:
    return load(package, small.signature(BATCH))


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_every_batch_of_the_range_equals_pytorch(network: Network, small: Exportable, batch: int) -> None:
    inputs = {"images": torch.randn(batch, 4, 8, 8), "scale": torch.tensor([0.5])}
    assert torch.allclose(network.run(inputs)["out"], small.reference(inputs), atol=1e-5)


def test_strides_do_not_matter(network: Network, small: Exportable) -> None:
    """By itself a package would read the values in the wrong order."""
    images = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    inputs = {"images": images, "scale": torch.tensor([1.0])}
    assert torch.allclose(network.run(inputs)["out"], small.reference(inputs), atol=1e-5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(9, 4, 8, 8), r"\(9, 4, 8, 8\); expected float32 \(batch 1..8"),
        (torch.zeros(2, 4, 16, 16), r"\(2, 4, 16, 16\); expected"),
        (torch.zeros(2, 4, 8, 8).half(), "'images' is float16"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_call(network: Network, images: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        network.run({"images": images, "scale": torch.tensor([1.0])})


def test_threads_are_those_of_the_network_and_torch_keeps_its_own(package: Path, small: Exportable) -> None:
    before = torch.get_num_threads()
    inputs = {"images": torch.randn(8, 4, 8, 8), "scale": torch.tensor([1.0])}
    out = load(package, small.signature(BATCH), threads=before + 1).run(inputs)["out"]
    assert torch.get_num_threads() == before
    assert torch.allclose(out, small.reference(inputs), atol=1e-5)


def test_memory_stays_flat(network: Network, growth: Callable[..., int]) -> None:
    """The outputs of one call are 8 KiB: all of them together would be 16 MiB."""
    assert growth(network, {"images": torch.zeros(8, 4, 8, 8), "scale": torch.ones(1)}) < 8 * 2**20


def test_weights_are_in_memory_once(package: Path, small: Exportable) -> None:
    """In a process of its own, whose memory is known; the loader keeps two copies of the weights."""
    arguments = (package, small.signature(BATCH), small.inputs[0])
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        held, out = pool.submit(_memory_of_loading, *arguments).result()
    assert torch.allclose(out, small.reference(small.inputs[0]), atol=1e-4)
    assert held < 90 * MIB


def _memory_of_loading(package: Path, signature: Signature, inputs: dict[str, Tensor]) -> tuple[int, Tensor]:
    before = resident("VmRSS")
    out = load(package, signature).run(inputs)["out"]
    return resident("VmRSS") - before, out


@pytest.mark.parametrize("content", [b"", b"no package", None])
def test_a_file_that_is_no_whole_package(
    package: Path, small: Exportable, tmp_path: Path, content: bytes | None
) -> None:
    broken = tmp_path / "small.pt2"
    whole = package.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(UserError, match=r"small\.pt2 is no AOTInductor package, or is not whole"):
        load(broken, small.signature(BATCH))


def test_a_package_of_another_network(package: Path, small: Exportable) -> None:
    with pytest.raises(UserError, match=r"small\.pt2 was not compiled for these inputs and outputs"):
        load(package, small.signature(BatchRange(1, 2, 16)))


def test_a_package_for_another_processor(package: Path, small: Exportable, tmp_path: Path) -> None:
    """Its code would end in an illegal instruction."""
    if not cpu_features():
        pytest.skip("this system does not say what its processor has")
    other = tmp_path / "small.pt2"
    with zipfile.ZipFile(package) as source, zipfile.ZipFile(other, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("_metadata.json"):
                content = content.replace(cpu_features().encode(), f"{cpu_features()} avx1024".encode())
            target.writestr(name, content)
    with pytest.raises(UserError, match="compiled for a CPU with avx1024, which this one lacks"):
        load(other, small.signature(BATCH))


def test_without_a_compiler_it_is_refused_before_any_work(
    small: Exportable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "g++-of-nobody")
    with pytest.raises(UserError, match=r"aotinductor: CPU: .*g\+\+-of-nobody is not on the PATH"):
        compile_network(small, SPEC, tmp_path / "small", "cpu", print)
    assert list(tmp_path.iterdir()) == []


class Branching(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images if images.sum() > 0 else -images


def test_what_cannot_be_compiled_gets_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    network = Exportable(Branching().eval(), [{"images": torch.ones(4, 3)}], "out")
    with pytest.raises(UserError, match=r"small: AOTInductor could not compile it: .+") as raised:
        compile_network(network, SPEC, tmp_path / "small", "cpu", print)
    assert len(str(raised.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
