"""Calls of Torch-TensorRT and Model Optimizer against the declarations in their published wheels.

Both take unknown keywords without a word, so that a renamed one would simply do nothing. Neither is imported here.
"""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

import ubgen

CALLS = [  # requirement, file in the wheel, function, our file
    (
        "torch-tensorrt>=2.14",
        "torch_tensorrt/dynamo/_compiler.py",
        "convert_exported_program_to_serialized_trt_engine",
        "export/compilers/torch_tensorrt.py",
    ),
    (
        "nvidia-modelopt>=0.47",
        "modelopt/onnx/quantization/quantize.py",
        "quantize",
        "export/compilers/float8.py",
    ),
]


def declared(path: Path, function: str) -> set[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return {argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]}
    raise AssertionError(f"{path} has no function {function}")


def keywords(text: str, function: str) -> set[str]:
    """Those of all calls of the function, and the keys of a dictionary that `_settings` returns for it."""
    used: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == function:
            used |= {keyword.arg for keyword in node.keywords if keyword.arg}
        if isinstance(node, ast.FunctionDef) and node.name == "_settings":
            returned = next(part for part in ast.walk(node) if isinstance(part, ast.Return))
            assert isinstance(returned.value, ast.Dict)
            used |= {ast.literal_eval(key) for key in returned.value.keys if key}
    return used


@pytest.mark.parametrize(("requirement", "file", "function", "ours"), CALLS, ids=[call[0] for call in CALLS])
def test_every_keyword_is_declared(
    unpacked: Callable[[str], Path], requirement: str, file: str, function: str, ours: str
) -> None:
    used = keywords((Path(ubgen.__file__).parent / ours).read_text(encoding="utf-8"), function)
    assert len(used) > 6
    assert used <= declared(unpacked(requirement) / file, function)


def test_shapes_and_types_are_what_torch_tensorrt_takes_for_an_input(unpacked: Callable[[str], Path]) -> None:
    """`Input` takes **kwargs and looks for these keys."""
    source = (unpacked("torch-tensorrt>=2.14") / "torch_tensorrt/_Input.py").read_text(encoding="utf-8")
    keys = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    assert {"shape", "min_shape", "opt_shape", "max_shape", "dtype"} <= keys
