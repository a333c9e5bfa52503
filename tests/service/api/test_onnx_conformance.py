"""The ONNX standard's tests of every normalization operator, answered by the running service over HTTP.

The adapter maps names; every number comes out of the service.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, numpy_helper

pytestmark = pytest.mark.asyncio(loop_scope="session")

Arrays = list[NDArray[Any]]
Call = tuple[str, dict[str, NDArray[Any]], dict[str, Any], tuple[str, ...]]

COUNTS = {
    "BatchNormalization": 4,
    "LayerNormalization": 19,
    "RMSNormalization": 19,
    "GroupNormalization": 2,
    "InstanceNormalization": 2,
    "LpNormalization": 6,
    "LRN": 2,
    "MeanVarianceNormalization": 1,
}
CONVERTED = ("1d_3d_input_eval", "2d_eval", "2d_momentum_eval", "3d_eval", "3d_momentum_eval")
NPZ = "application/x-npz"


def _named(names: tuple[str, ...], inputs: Arrays) -> dict[str, NDArray[Any]]:
    return dict(zip(names, inputs, strict=False))


def _batch_norm(inputs: Arrays, attributes: dict[str, Any]) -> Call:
    tensors = _named(("input", "weight", "bias", "running_mean", "running_var"), inputs)
    parameters: dict[str, Any] = {"eps": attributes.get("epsilon", 1e-5)}
    if not attributes.get("training_mode", 0):
        return "batch_norm", tensors, parameters, ("output",)
    parameters |= {"training": "true", "convention": "onnx", "momentum": attributes.get("momentum", 0.9)}
    return "batch_norm", tensors, parameters, ("output", "running_mean", "running_var")


def _layer_norm(inputs: Arrays, attributes: dict[str, Any]) -> Call:
    tensors = _named(("input", "weight", "bias"), inputs)
    return "layer_norm", tensors, _trailing(inputs[0], attributes), ("output", "mean", "invstd")


def _rms_norm(inputs: Arrays, attributes: dict[str, Any]) -> Call:
    return "rms_norm", _named(("input", "weight"), inputs), _trailing(inputs[0], attributes), ("output",)


def _trailing(values: NDArray[Any], attributes: dict[str, Any]) -> dict[str, Any]:
    shape = values.shape[attributes.get("axis", -1) :]
    return {"normalized_shape": ",".join(map(str, shape)), "eps": attributes.get("epsilon", 1e-5)}


def _group_norm(inputs: Arrays, attributes: dict[str, Any]) -> Call:
    parameters = {"num_groups": attributes["num_groups"], "eps": attributes.get("epsilon", 1e-5)}
    return "group_norm", _named(("input", "weight", "bias"), inputs), parameters, ("output",)


def _instance_norm(inputs: Arrays, attributes: dict[str, Any]) -> Call:
    parameters = {"eps": attributes.get("epsilon", 1e-5)}
    return "instance_norm", _named(("input", "weight", "bias"), inputs), parameters, ("output",)


def _lp_norm(inputs: Arrays, attributes: dict[str, Any]) -> Call:
    parameters = {"p": attributes.get("p", 2), "axis": attributes.get("axis", -1)}
    return "lp_norm", _named(("input",), inputs), parameters, ("output",)


def _local_response_norm(inputs: Arrays, attributes: dict[str, Any]) -> Call:
    names = {"size": "size", "alpha": "alpha", "beta": "beta", "bias": "k"}
    parameters = {names[name]: value for name, value in attributes.items()} | {"window": "onnx"}
    return "local_response_norm", _named(("input",), inputs), parameters, ("output",)


def _mean_variance_norm(inputs: Arrays, attributes: dict[str, Any]) -> Call:
    axes = ",".join(map(str, attributes.get("axes", (0, 2, 3))))
    return "mean_variance_norm", _named(("input",), inputs), {"axes": axes}, ("output",)


ADAPTERS: dict[str, Callable[[Arrays, dict[str, Any]], Call]] = {
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LpNormalization": _lp_norm,
    "LRN": _local_response_norm,
    "MeanVarianceNormalization": _mean_variance_norm,
}


async def answer(client: httpx.AsyncClient, node: NodeProto, inputs: Arrays, expected: int) -> Arrays:
    """What the service gives for one node, in the node's order of outputs."""
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    method, tensors, parameters, outputs = ADAPTERS[node.op_type](inputs, attributes)
    body = io.BytesIO()
    np.savez(body, allow_pickle=False, **tensors)
    query = {name: str(value) for name, value in parameters.items()}
    response = await client.post(
        f"/v1/normalizations/{method}", content=body.getvalue(), params=query, headers={"content-type": NPZ}
    )
    assert response.status_code == 200, response.text
    with np.load(io.BytesIO(response.content)) as archive:
        return [archive[name] for name in outputs[:expected]]


def cases() -> Iterator[tuple[str, NodeProto, Arrays, Arrays, float, float]]:
    """Every node test of the eight operators. Their inputs come from numpy's global state."""
    np.random.seed(0)  # noqa: NPY002  the generator that onnx uses
    with warnings.catch_warnings():
        # Building the cases of other operators overflows, and says so.
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        collected = collect_testcases()
    for case in collected:
        nodes = case.model.graph.node if case.model is not None else []
        if len(nodes) == 1 and nodes[0].op_type in ADAPTERS and case.data_sets:
            inputs, expected = case.data_sets[0]
            yield case.name, nodes[0], list(inputs), list(expected), case.rtol, case.atol


async def test_the_service_passes_every_onnx_node_test(client: httpx.AsyncClient) -> None:
    passed = dict.fromkeys(COUNTS, 0)
    for name, node, inputs, expected, rtol, atol in cases():
        results = await answer(client, node, inputs, len(expected))
        assert len(results) == len(expected), name
        for result, reference in zip(results, expected, strict=True):
            assert result.dtype == reference.dtype, name
            np.testing.assert_allclose(result, reference, rtol=rtol, atol=atol, err_msg=name)
        passed[node.op_type] += 1
    assert passed == COUNTS
    assert sum(passed.values()) == 55


@pytest.mark.parametrize("name", CONVERTED)
async def test_the_service_passes_the_converted_batch_norms(client: httpx.AsyncClient, name: str) -> None:
    folder = Path(onnx.__file__).parent / "backend/test/data/pytorch-converted" / f"test_BatchNorm{name}"
    graph = onnx.load(folder / "model.onnx").graph
    (node,) = graph.node
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    inputs = [stored[name] if name in stored else _read(folder / "test_data_set_0/input_0.pb") for name in node.input]
    (result,) = await answer(client, node, inputs, 1)
    np.testing.assert_allclose(result, _read(folder / "test_data_set_0/output_0.pb"), rtol=1e-3, atol=1e-7)


def _read(path: Path) -> NDArray[Any]:
    return numpy_helper.to_array(onnx.load_tensor(path))
