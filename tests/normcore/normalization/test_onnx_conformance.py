"""The ONNX standard's own node tests."""

import warnings
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from normcore.normalization import batch_norm

CASES = [
    "test_batchnorm_example",
    "test_batchnorm_epsilon",
    "test_batchnorm_example_training_mode",
    "test_batchnorm_epsilon_training_mode",
]
Array = NDArray[Any]


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


def _run(attributes: dict[str, Any], inputs: list[Array]) -> list[Array]:
    values, scale, bias, mean, var = (torch.from_numpy(array) for array in inputs)
    training = bool(attributes.get("training_mode", 0))
    eps, momentum = attributes.get("epsilon", 1e-5), attributes.get("momentum", "default")
    result = batch_norm(
        values, mean, var, scale, bias, training=training, eps=eps, momentum=momentum, convention="onnx"
    )
    outputs = [result.output, result.running_mean, result.running_var]
    return [output.numpy() for output in outputs if output is not None]


@pytest.mark.parametrize("name", CASES)
def test_batch_norm_passes_the_onnx_node_test(name: str, cases: dict[str, Any]) -> None:
    case = cases[name]
    (node,) = case.model.graph.node
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    inputs, expected = case.data_sets[0]
    outputs = _run(attributes, inputs)
    assert len(outputs) == len(expected)
    for output, reference in zip(outputs, expected, strict=True):
        assert output.dtype == reference.dtype
        np.testing.assert_allclose(output, reference, rtol=case.rtol, atol=case.atol)
