"""The ONNX standard's own node tests, and its batch norms converted from torch."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from normcore.normalization import (
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    local_response_norm,
    lp_norm,
    mean_variance_norm,
    rms_norm,
)

AXES = [
    *(f"4d_axis{axis}" for axis in range(4)),
    *(f"4d_axis_negative_{axis}" for axis in range(1, 5)),
    "default_axis",
    *(f"2d_axis{axis}" for axis in range(2)),
    *(f"2d_axis_negative_{axis}" for axis in range(1, 3)),
    *(f"3d_axis{axis}_epsilon" for axis in range(3)),
    *(f"3d_axis_negative_{axis}_epsilon" for axis in range(1, 4)),
]

CASES = {
    "BatchNormalization": [
        "test_batchnorm_example",
        "test_batchnorm_epsilon",
        "test_batchnorm_example_training_mode",
        "test_batchnorm_epsilon_training_mode",
    ],
    "GroupNormalization": ["test_group_normalization_example", "test_group_normalization_epsilon"],
    "InstanceNormalization": ["test_instancenorm_example", "test_instancenorm_epsilon"],
    "LRN": ["test_lrn", "test_lrn_default"],
    "LayerNormalization": [f"test_layer_normalization_{axis}" for axis in AXES],
    "LpNormalization": [
        "test_l1normalization_axis_0",
        "test_l1normalization_axis_1",
        "test_l1normalization_axis_last",
        "test_l2normalization_axis_0",
        "test_l2normalization_axis_1",
        "test_lpnormalization_default",
    ],
    "MeanVarianceNormalization": ["test_mvn"],
    "RMSNormalization": [f"test_rms_normalization_{axis}" for axis in AXES],
}


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    """The standard's cases by name. It draws their inputs from numpy's global state when they are collected."""
    np.random.seed(0)  # noqa: NPY002  the generator that onnx uses
    with warnings.catch_warnings():
        # Building the cases of other operators overflows, and says so.
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        # An argument filters only the first collection of a process, so none is passed.
        return {case.name: case for case in collect_testcases()}


def _batch_norm(
    values: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, attributes: dict[str, Any]
) -> list[Tensor | None]:
    training = bool(attributes.get("training_mode", 0))
    eps, momentum = attributes.get("epsilon", 1e-5), attributes.get("momentum", "default")
    result = batch_norm(
        values, mean, var, scale, bias, training=training, eps=eps, momentum=momentum, convention="onnx"
    )
    return [result.output, result.running_mean, result.running_var]


def _group_norm(values: Tensor, scale: Tensor, bias: Tensor, attributes: dict[str, Any]) -> list[Tensor | None]:
    num_groups, eps = attributes["num_groups"], attributes.get("epsilon", 1e-5)
    return [group_norm(values, scale, bias, num_groups=num_groups, eps=eps).output]


def _instance_norm(values: Tensor, scale: Tensor, bias: Tensor, attributes: dict[str, Any]) -> list[Tensor | None]:
    return [instance_norm(values, None, None, scale, bias, eps=attributes.get("epsilon", 1e-5)).output]


def _layer_norm(values: Tensor, scale: Tensor, bias: Tensor, attributes: dict[str, Any]) -> list[Tensor | None]:
    shape = tuple(values.shape[attributes.get("axis", -1) :])
    result = layer_norm(values, scale, bias, normalized_shape=shape, eps=attributes.get("epsilon", 1e-5))
    return [result.output, result.mean, result.invstd]


def _rms_norm(values: Tensor, scale: Tensor, attributes: dict[str, Any]) -> list[Tensor | None]:
    shape = tuple(values.shape[attributes.get("axis", -1) :])
    return [rms_norm(values, scale, normalized_shape=shape, eps=attributes.get("epsilon", 1e-5)).output]


def _local_response_norm(values: Tensor, attributes: dict[str, Any]) -> list[Tensor | None]:
    names = {"size": "size", "alpha": "alpha", "beta": "beta", "bias": "k"}
    options = {names[name]: value for name, value in attributes.items()}
    return [local_response_norm(values, window="onnx", **options).output]


def _mean_variance_norm(values: Tensor, attributes: dict[str, Any]) -> list[Tensor | None]:
    return [mean_variance_norm(values, axes=attributes.get("axes", "0,2,3")).output]


def _lp_norm(values: Tensor, attributes: dict[str, Any]) -> list[Tensor | None]:
    return [lp_norm(values, p=attributes.get("p", 2), axis=attributes.get("axis", -1)).output]


RUN: dict[str, Callable[..., list[Tensor | None]]] = {
    "BatchNormalization": _batch_norm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LRN": _local_response_norm,
    "LayerNormalization": _layer_norm,
    "LpNormalization": _lp_norm,
    "MeanVarianceNormalization": _mean_variance_norm,
    "RMSNormalization": _rms_norm,
}


@pytest.mark.parametrize("name", [name for names in CASES.values() for name in names])
def test_method_passes_the_onnx_node_test(name: str, cases: dict[str, Any]) -> None:
    case = cases[name]
    (node,) = case.model.graph.node
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    inputs, expected = case.data_sets[0]
    results = RUN[node.op_type](*(torch.from_numpy(array) for array in inputs), attributes)
    outputs = [result.numpy() for result in results if result is not None]
    assert len(outputs) == len(expected)
    for output, reference in zip(outputs, expected, strict=True):
        assert output.dtype == reference.dtype
        np.testing.assert_allclose(output, reference, rtol=case.rtol, atol=case.atol)


@pytest.mark.parametrize("operator", CASES)
def test_no_node_test_of_an_operator_is_left_out(operator: str, cases: dict[str, Any]) -> None:
    graphs = {name: case.model.graph for name, case in cases.items() if case.model is not None}
    own = [name for name, graph in graphs.items() if [node.op_type for node in graph.node] == [operator]]
    assert sorted(own) == sorted(CASES[operator])


@pytest.mark.parametrize("name", ["1d_3d_input_eval", "2d_eval", "2d_momentum_eval", "3d_eval", "3d_momentum_eval"])
def test_batch_norm_passes_the_converted_models(name: str) -> None:
    folder = Path(onnx.__file__).parent / "backend/test/data/pytorch-converted" / f"test_BatchNorm{name}"
    graph = onnx.load(folder / "model.onnx").graph
    (node,) = graph.node
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    data = folder / "test_data_set_0"
    given = numpy_helper.to_array(onnx.load_tensor(data / "input_0.pb"))
    inputs = [torch.from_numpy(np.array(arrays.get(name, given))) for name in node.input]
    output = RUN[node.op_type](*inputs, attributes)[0]
    assert output is not None
    expected = numpy_helper.to_array(onnx.load_tensor(data / "output_0.pb"))
    np.testing.assert_allclose(output.numpy(), expected, rtol=1e-3, atol=1e-7)
