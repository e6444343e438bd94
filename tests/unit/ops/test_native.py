"""How the operations reach the native library: the short way, the dispatcher, and without it."""

import inspect
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ubgen.ops import group_norm_silu, guided_step, quantise, resize_normalise
from ubgen.ops._direct import direct


def call_all(x):
    """One call of each operation on what is made of x (1, 3, 6, 8): name of the operator -> result."""
    pixels = quantise(x)
    return {
        "guided_step": guided_step(x, x, x, [x], 1.5, -0.5, 2.0, [1.5, -0.5])[0],
        "quantise": pixels.pixels_BHW3,
        "resize_normalise": resize_normalise(pixels.pixels_BHW3, 4, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
        "group_norm_silu": group_norm_silu(x, 3, torch.ones(3), torch.zeros(3)),
    }


def image():
    return torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(0))


def test_a_plain_call_takes_the_short_way():
    assert direct(image(), None, torch.nn.Parameter(image(), requires_grad=False))
    with torch.no_grad():
        assert direct(torch.nn.Parameter(image()))
    assert not direct(image().requires_grad_())


def test_a_trace_sees_every_operation():
    graph = make_fx(call_all)(image()).graph
    seen = {str(node.target) for node in graph.nodes}
    assert seen >= {f"ubgen.{name}.default" for name in call_all(image())}


def test_an_export_sees_every_operation():
    class Module(torch.nn.Module):
        def forward(self, x):
            return call_all(x)

    program = torch.export.export(Module(), (image(),))
    seen = {str(node.target) for node in program.graph.nodes}
    assert seen >= {f"ubgen.{name}.default" for name in call_all(image())}
    for name, value in program.module()(image()).items():
        assert torch.equal(value, call_all(image())[name])


def test_fake_tensors_have_the_shapes_of_real_ones():
    real = call_all(image())
    with FakeTensorMode() as mode:
        fake = call_all(mode.from_tensor(image()))
    for name, value in fake.items():
        assert (value.shape, value.dtype, value.stride()) == (
            real[name].shape,
            real[name].dtype,
            real[name].stride(),
        )


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_transform_takes_the_dispatcher():
    """Called past it, the operation would see a wrapper without memory of its own."""
    images, weight = torch.rand(4, 3, 6, 8), torch.ones(3)
    each = torch.vmap(lambda x: group_norm_silu(x[None], 3, weight, weight)[0])(images)
    torch.testing.assert_close(each, group_norm_silu(images, 3, weight, weight))


def test_without_the_library_the_references_run(tmp_path):
    program = "\n".join(
        [
            "import sys, torch",
            "from ubgen.ops import *",
            inspect.getsource(image),
            inspect.getsource(call_all),
            "print(native_status())",
            "torch.save(call_all(image()), sys.argv[1])",
        ]
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "results.pt")],
        env={**os.environ, "UBGEN_DISABLE_NATIVE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == "(False, 'switched off by UBGEN_DISABLE_NATIVE')"
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for name, value in call_all(image()).items():
        torch.testing.assert_close(results[name], value, rtol=1e-5, atol=1e-5)
