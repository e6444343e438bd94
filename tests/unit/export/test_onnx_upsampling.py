"""Convolutions behind an upsampling with fewer multiplications: the same values, and only where that form holds."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from ubgen.export.compilers.onnx_passes import fit_cpu

RTOL = 1e-6  # of the largest value
PLAIN = {"pads": [1, 1, 1, 1]}
DOUBLING = {
    "mode": "nearest",
    "nearest_mode": "floor",
    "coordinate_transformation_mode": "asymmetric",
}


def model(x, weight, size, conv=PLAIN, resize=None, scales=(1, 1, 2, 2), rows="2*b"):
    """Perhaps Resize, then Conv of float32 (rows, `x`, *size)."""
    generator = np.random.default_rng(0)
    constants = {
        "weight": generator.standard_normal(weight, np.float32) / np.sqrt(9 * weight[1]),
        "bias": generator.standard_normal(weight[0], np.float32),
        "scales": np.array(scales, np.float32),
    }
    nodes = [helper.make_node("Resize", ["x", "", "scales"], ["large"], **resize)] if resize else []
    nodes.append(helper.make_node("Conv", ["large" if resize else "x", "weight", "bias"], ["out"], **conv))
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, x, *size])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [rows, weight[0], "h", "w"])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return onnx.shape_inference.infer_shapes(proto, data_prop=True)


def fit(proto):
    fitted = ir.from_proto(proto)
    fit_cpu(fitted)
    return ir.to_proto(fitted)


def operators(proto):
    return Counter(node.op_type for node in proto.graph.node)


def run(proto, x):
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def draw(rows, channels, size):
    return np.random.default_rng(rows).standard_normal((rows, channels, *size), dtype=np.float32)


def assert_same_values(proto, fitted, channels, size):
    for rows in (1, 2, 5):
        x = draw(rows, channels, size)
        expected = run(proto, x)
        np.testing.assert_allclose(run(fitted, x), expected, rtol=0, atol=RTOL * np.abs(expected).max())


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (3, 5), (8, 8)])
@pytest.mark.parametrize(("channels", "after"), [(3, 2), (16, 32)])
def test_upsampling_comes_after_the_convolution(size, channels, after):
    proto = model(channels, (after, channels, 3, 3), size, resize=DOUBLING)
    fitted = fit(proto)
    assert operators(fitted)["Resize"] == 0
    assert operators(fitted)["Conv"] == 4
    assert_same_values(proto, fitted, channels, size)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"size": ("h", "w")}, id="free size"),
        pytest.param({"scales": (1, 1, 3, 3)}, id="times 3"),
        pytest.param({"scales": (1, 1, 2, 1)}, id="one direction"),
        pytest.param({"resize": {**DOUBLING, "mode": "linear"}}, id="linear"),
        pytest.param({"resize": {**DOUBLING, "nearest_mode": "ceil"}}, id="other pixels"),
        pytest.param({"conv": {"pads": [0, 0, 0, 0]}}, id="no border"),
        pytest.param({"conv": {"pads": [1, 1, 1, 1], "strides": [2, 2]}}, id="strided"),
        pytest.param({"conv": {"pads": [1, 1, 1, 1], "dilations": [2, 2]}}, id="dilated"),
        pytest.param({"conv": {"pads": [1, 1, 1, 1], "group": 2}, "weight": (4, 2, 3, 3)}, id="grouped"),
        pytest.param({"conv": {}, "weight": (4, 4, 1, 1)}, id="1x1"),
    ],
)
def test_other_upsampling_stays(changes):
    proto = model(**{"x": 4, "weight": (4, 4, 3, 3), "size": (4, 4), "resize": DOUBLING, **changes})
    fitted = fit(proto)
    assert operators(fitted) == operators(proto)
    assert_same_values(proto, fitted, 4, (4, 4))
