"""Edges that are answered, by every normalization method over HTTP: the decided values, datatypes and findings."""

from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from service import datatypes
from service.application.methods import METHODS
from tests.service.edges import VALID, of, post, ramp

pytestmark = pytest.mark.asyncio(loop_scope="session")

METHOD = pytest.mark.parametrize("method", sorted(METHODS))
Arrays = dict[str, NDArray[Any]]
BATCH_KIN = ("batch_norm", "batch_renorm", "ghost_batch_norm", "synchronized_batch_norm")


async def answered(
    client: httpx.AsyncClient, method: str, request: dict[str, Any]
) -> tuple[Arrays, dict[str, str], dict[str, Any]]:
    """Outputs, which both surfaces give alike, their datatypes, and diagnostics."""
    own, protocol = await post(client, method, request)
    assert own.status_code == 200, own.text
    assert protocol.status_code == 200, protocol.text
    outputs = own.json()["outputs"]
    again = {item["name"]: item for item in protocol.json()["outputs"]}
    arrays = {name: _array(item) for name, item in outputs.items()}
    assert set(again) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, _array(again[name]))
    return arrays, {name: item["datatype"] for name, item in outputs.items()}, own.json()["diagnostics"]


def _array(item: dict[str, Any]) -> NDArray[Any]:
    dtype = datatypes.by_name(item["datatype"]).numpy
    return np.array(item["data"], np.float64 if dtype.kind != "i" else dtype).reshape(item["shape"])


def scaled(tensor: dict[str, Any], factor: float) -> dict[str, Any]:
    return tensor | {"data": [value * factor for value in tensor["data"]]}


def cast(request: dict[str, Any], datatype: str) -> dict[str, Any]:
    """The request with input and grad_output in another datatype."""
    return request | {name: request[name] | {"datatype": datatype} for name in ("input", "grad_output")}


EMPTY: dict[str, dict[str, Any]] = {
    **{method: {"input": ramp(0, 3), "grad_output": ramp(0, 3), "mask": None} for method in BATCH_KIN},
    **{method: {"input": ramp(0, 4, 3), "grad_output": ramp(0, 4, 3)} for method in ("layer_norm", "rms_norm")},
    **{
        method: {"input": ramp(0, 4, 2, 2), "grad_output": ramp(0, 4, 2, 2)}
        for method in ("group_norm", "instance_norm", "local_response_norm", "mean_variance_norm")
    },
    "lp_norm": {"input": ramp(0, 3), "grad_output": ramp(0, 3)},
    "weight_norm": {"input": ramp(0, 3), "grad_output": ramp(0, 3), "g": ramp(0)},
    "weight_standardization": {"input": ramp(0, 3), "grad_output": ramp(0, 3), "gain": ramp(0)},
    "whitening": {"input": ramp(0, 2), "grad_output": ramp(0, 2)},
}
EMPTY["synchronized_batch_norm"] = EMPTY["batch_norm"] | {"shard_sizes": of([0, 0], datatype="INT64")}


@pytest.mark.parametrize("method", sorted(EMPTY))
async def test_an_empty_input_gives_an_empty_output_and_changes_no_state(
    client: httpx.AsyncClient, method: str
) -> None:
    request = VALID[method] | EMPTY[method]
    arrays, _, diagnostics = await answered(client, method, request)
    assert list(arrays["output"].shape) == request["input"]["shape"]
    assert list(arrays["grad_input"].shape) == request["input"]["shape"]
    assert diagnostics == {}
    for name, array in arrays.items():
        if name.startswith("running") or name == "num_batches_tracked":
            np.testing.assert_array_equal(array.reshape(-1), request[name]["data"])
        if name in ("grad_weight", "grad_bias", "grad_g", "grad_gain"):
            np.testing.assert_array_equal(array, 0)


@pytest.mark.parametrize("method", [*BATCH_KIN, "instance_norm", "whitening"])
async def test_an_empty_input_in_inference_is_empty(client: httpx.AsyncClient, method: str) -> None:
    request = VALID[method] | (EMPTY[method]) | {"training": False}
    arrays, _, _ = await answered(client, method, request)
    assert list(arrays["output"].shape) == request["input"]["shape"]


@pytest.mark.parametrize("method", sorted(EMPTY))
async def test_axes_of_no_values_are_answered_or_refused(client: httpx.AsyncClient, method: str) -> None:
    for shape in ((2, 0), (0, 0), (2, 0, 3), (2, 3, 0), (3, 2, 0, 2)):
        for training in (False, True):
            request: dict[str, Any] = {"input": ramp(*shape)}
            if "training" in VALID[method]:
                request |= {"training": training, "running_mean": ramp(shape[1])}
                request["running_var"] = request["running_mean"]
            if method == "whitening":
                request["running_covariance"] = request.pop("running_var") | {"shape": [1, *[shape[1]] * 2]}
            if method == "synchronized_batch_norm":
                request["shard_sizes"] = of([shape[0]], datatype="INT64")
            for answer in await post(client, method, request):
                assert answer.status_code in (200, 400, 422), answer.text


@METHOD
@pytest.mark.parametrize(("datatype", "tolerance"), [("FP16", 4e-3), ("BF16", 3e-2), ("FP64", 1e-5)])
async def test_the_output_has_the_datatype_of_the_input(
    client: httpx.AsyncClient, method: str, datatype: str, tolerance: float
) -> None:
    expected, _, _ = await answered(client, method, VALID[method])
    arrays, found, _ = await answered(client, method, cast(VALID[method], datatype))
    assert found["output"] == found["grad_input"] == datatype
    for name in ("mean", "var", "invstd", "mean_square", "norm", "sigma", "covariance", "running_mean"):
        if name in found:
            assert found[name] == ("FP64" if datatype == "FP64" else "FP32"), name
    for name in ("output", "grad_input"):
        scale = max(1.0, np.abs(expected[name]).max())
        np.testing.assert_allclose(arrays[name], expected[name], rtol=0, atol=tolerance * scale)


CONSTANT = of([7.0, -1e4, 3e30] * 4, 4, 3)
BIAS = [0.5, -2.0, 3.0]
_OF_CHANNELS = of([7.1] * 4 + [-1e4] * 4 + [3e30] * 4, 1, 3, 4)


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        *((method, {"input": CONSTANT, "bias": of(BIAS), "training": True}) for method in BATCH_KIN),
        ("instance_norm", {"input": _OF_CHANNELS, "bias": of(BIAS)}),
        ("group_norm", {"input": _OF_CHANNELS, "bias": of(BIAS), "num_groups": 3}),
        ("layer_norm", {"input": of([7.1] * 3 + [-1e4] * 3 + [3e30] * 3, 3, 3), "bias": of(BIAS)}),
        ("mean_variance_norm", {"input": _OF_CHANNELS, "axes": "0,2"}),
        ("weight_standardization", {"input": of([7.1] * 3 + [-1e4] * 3 + [3e30] * 3, 3, 3)}),
        ("layer_norm", {"input": ramp(4, 1), "bias": of([0.25])}),
        ("group_norm", {"input": ramp(1, 3), "bias": of(BIAS), "num_groups": 3}),
        ("whitening", {"input": of([7.0, -1e4] * 4, 4, 2), "bias": of([0.5, -2.0]), "training": True}),
    ],
)
async def test_what_is_constant_is_exactly_the_bias(
    client: httpx.AsyncClient, method: str, request_: dict[str, Any]
) -> None:
    extra: dict[str, Any] = {}
    if method == "synchronized_batch_norm":
        extra = {"shard_sizes": of([1, 3], datatype="INT64")}
    if method == "batch_renorm":
        extra = {"running_mean": of([0, 0, 0]), "running_var": of([1, 1, 1]), "dmax": 0}
    arrays, _, diagnostics = await answered(client, method, request_ | extra)
    bias = np.array(request_.get("bias", {"data": [0.0]})["data"])
    output = arrays["output"]
    if method in ("instance_norm", "group_norm") and output.ndim == 3:
        bias = bias[:, None]
    np.testing.assert_array_equal(output, np.broadcast_to(bias, output.shape))
    assert diagnostics


@pytest.mark.parametrize(
    ("method", "request_", "finding"),
    [
        ("lp_norm", {"input": ramp(2, 0, 3), "axis": 1}, "zero_vectors"),
        ("lp_norm", {"input": of([0] * 6, 2, 3)}, "zero_vectors"),
        ("lp_norm", {"input": of([0] * 6, 2, 3), "p": 1}, "zero_vectors"),
        ("lp_norm", {"input": of([0] * 6, 2, 3), "p": "inf", "eps": 1e-12}, "zero_vectors"),
        ("rms_norm", {"input": of([0] * 6, 2, 3)}, "zero_groups"),
        ("weight_norm", {"input": of([0] * 6, 2, 3), "g": of([3, 4])}, "zero_rows"),
        ("weight_norm", {"input": of([0] * 6, 2, 3), "g": of([3]), "axis": None}, "zero_rows"),
        ("spectral_norm", {"input": of([0] * 6, 2, 3)}, "zero_matrix"),
        ("spectral_norm", {"input": of([0] * 6, 2, 3), "exact": True}, "zero_matrix"),
        ("local_response_norm", {"input": of([0] * 6, 2, 3), "k": 0}, None),
    ],
)
async def test_zeros_give_zeros_with_gradients_of_zeros(
    client: httpx.AsyncClient, method: str, request_: dict[str, Any], finding: str | None
) -> None:
    gradient = {"grad_output": ramp(*request_["input"]["shape"])}
    arrays, _, diagnostics = await answered(client, method, request_ | gradient)
    np.testing.assert_array_equal(arrays["output"], 0)
    assert np.isfinite(arrays["grad_input"]).all()
    if method != "rms_norm":
        np.testing.assert_array_equal(arrays["grad_input"], 0)
    assert diagnostics == {} if finding is None else finding in diagnostics


SCALES = [1e30, 1e18, 1e-18, 1e-40, 1e-44]
NO_EPS: dict[str, dict[str, Any]] = {
    method: {"eps": 0} for method in ("layer_norm", "rms_norm", "group_norm", "instance_norm", "lp_norm")
} | {
    "mean_variance_norm": {"eps": 0},
    "weight_standardization": {"eps": 0},
    "weight_norm": {},
    "spectral_norm": {"iterations": 40},
    "whitening": {"eps": 0, "running_mean": None, "running_covariance": None, "num_batches_tracked": None},
}


@METHOD
@pytest.mark.parametrize("factor", SCALES)
async def test_outputs_are_finite_at_every_scale(client: httpx.AsyncClient, method: str, factor: float) -> None:
    request = VALID[method] | {"input": scaled(VALID[method]["input"], factor)}
    arrays, _, _ = await answered(client, method, request)
    assert np.isfinite(arrays["output"]).all()
    if factor > 1e-38:  # the gradient of a direction is beyond float32 where the values are below it
        assert np.isfinite(arrays["grad_input"]).all()


@pytest.mark.parametrize("method", sorted(NO_EPS))
@pytest.mark.parametrize("factor", SCALES[:4])
async def test_the_output_does_not_depend_on_the_scale(client: httpx.AsyncClient, method: str, factor: float) -> None:
    request = VALID[method] | NO_EPS[method] | {"grad_output": None, "mask": None, "outputs": ["output"]}
    expected, _, _ = await answered(client, method, request)
    arrays, _, _ = await answered(client, method, request | {"input": scaled(request["input"], factor)})
    tolerance = 1e-6 if factor > 1e-38 else 1e-3  # denormals have few digits
    np.testing.assert_allclose(arrays["output"], expected["output"], rtol=0, atol=tolerance * 4)


@pytest.mark.parametrize("method", BATCH_KIN)
async def test_a_large_scale_is_standardized_in_training(client: httpx.AsyncClient, method: str) -> None:
    request = VALID[method] | {"grad_output": None, "outputs": ["output"], "dmax": 0}
    if method != "batch_renorm":
        del request["dmax"]
    else:
        request["rmax"] = 1
    expected, _, _ = await answered(client, method, request)
    for factor in (1e18, 1e30):
        arrays, _, _ = await answered(client, method, request | {"input": scaled(request["input"], factor)})
        np.testing.assert_allclose(arrays["output"], expected["output"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"ghost_batch_norm"}))
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
async def test_values_that_are_not_finite_are_answered(client: httpx.AsyncClient, method: str, value: str) -> None:
    data = VALID[method]["input"]["data"]
    request = VALID[method] | {"input": VALID[method]["input"] | {"data": [value, *data[1:]]}}
    arrays, _, diagnostics = await answered(client, method, request)
    assert not np.isfinite(arrays["output"]).all()
    assert diagnostics


@pytest.mark.parametrize("method", [method for method in BATCH_KIN if method != "ghost_batch_norm"])
async def test_one_nan_makes_its_channel_alone_nan(client: httpx.AsyncClient, method: str) -> None:
    data = VALID[method]["input"]["data"]
    request = VALID[method] | {"input": VALID[method]["input"] | {"data": ["NaN", *data[1:]]}}
    arrays, _, _ = await answered(client, method, request)
    assert np.isnan(arrays["running_mean"]).tolist() == [True, False, False]
    assert np.isfinite(arrays["output"][:, 1:]).all()
    arrays, _, _ = await answered(client, method, request | {"nan_policy": "skip_update"})
    np.testing.assert_array_equal(arrays["running_mean"], 0)
    np.testing.assert_array_equal(arrays["running_var"], 1)


@METHOD
async def test_parameters_that_are_not_finite_are_answered(client: httpx.AsyncClient, method: str) -> None:
    for tensor in METHODS[method].tensors:
        if tensor.name in ("input", "mask", "shard_sizes", "num_batches_tracked", "running_var"):
            continue
        right = VALID[method][tensor.name]
        for value in ("NaN", "Infinity"):
            request = VALID[method] | {tensor.name: right | {"data": [value, *right["data"][1:]]}}
            for answer in await post(client, method, request):
                assert answer.status_code in (200, 400, 422), answer.text


async def test_halves_whose_squares_overflow(client: httpx.AsyncClient) -> None:
    large = of([6e4, -6e4, 3e4, 0], 1, 4, datatype="FP16")
    arrays, _, _ = await answered(client, "rms_norm", {"input": large})
    root = np.sqrt((6e4**2 * 2 + 3e4**2) / 4)
    np.testing.assert_allclose(arrays["output"], [[6e4 / root, -6e4 / root, 3e4 / root, 0]], atol=1e-3)
    thousand = of([1000] * 4, 1, 4, datatype="FP16")
    arrays, _, _ = await answered(client, "local_response_norm", {"input": thousand, "size": 1, "alpha": 1})
    np.testing.assert_allclose(arrays["output"], 1000 * (1 + 1e6) ** -0.75, rtol=1e-3)


async def test_a_window_larger_than_the_channels(client: httpx.AsyncClient) -> None:
    for size in (9, 2**31, 2**53):
        arrays, _, _ = await answered(client, "local_response_norm", {"input": ramp(2, 4), "size": size})
        assert np.isfinite(arrays["output"]).all()


@pytest.mark.parametrize("method", ["batch_norm", "ghost_batch_norm", "synchronized_batch_norm", "whitening"])
async def test_a_count_of_any_datatype_goes_on(client: httpx.AsyncClient, method: str) -> None:
    for datatype in ("UINT8", "UINT16", "UINT32", "INT16", "INT64", "FP32", "FP64"):
        request = VALID[method] | {"num_batches_tracked": of([3], datatype=datatype), "momentum": None}
        arrays, found, _ = await answered(client, method, request)
        assert int(arrays["num_batches_tracked"]) == (5 if method == "ghost_batch_norm" else 4)
        assert found["num_batches_tracked"] == "INT64"


async def test_groups_of_no_channels_are_empty(client: httpx.AsyncClient) -> None:
    for num_groups in (1, 32, 2**63):
        arrays, _, _ = await answered(client, "group_norm", {"input": ramp(2, 0, 3), "num_groups": num_groups})
        assert arrays["output"].shape == (2, 0, 3)


async def test_a_count_that_cannot_go_on_is_refused(client: httpx.AsyncClient) -> None:
    request = VALID["batch_norm"] | {"num_batches_tracked": of([2**63 - 1], datatype="INT64"), "momentum": None}
    for answer in await post(client, "batch_norm", request):
        assert answer.status_code in (400, 422), answer.text


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("instance_norm", {"input": ramp(2, 3, 4), "running_mean": of([0, 0, 0]), "running_var": of([1, 1, 1])}),
        ("group_norm", {"input": ramp(2, 1), "num_groups": 1}),
    ],
)
async def test_a_bias_per_sample_needs_no_weight(
    client: httpx.AsyncClient, method: str, request_: dict[str, Any]
) -> None:
    shape = request_["input"]["shape"][:2]
    arrays, _, _ = await answered(client, method, request_ | {"bias": ramp(*shape)})
    weighted = {"weight": ramp(*shape) | {"data": [1] * (shape[0] * shape[1])}, "bias": ramp(*shape)}
    expected, _, _ = await answered(client, method, request_ | weighted)
    np.testing.assert_allclose(arrays["output"], expected["output"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["layer_norm", "group_norm", "instance_norm", "weight_standardization"])
async def test_without_eps_a_small_scale_loses_nothing(client: httpx.AsyncClient, method: str) -> None:
    tensor = ramp(4, 8, 6)
    request: dict[str, Any] = {"input": tensor, "eps": 0} | ({"num_groups": 2} if method == "group_norm" else {})
    expected, _, _ = await answered(client, method, request)
    arrays, _, _ = await answered(client, method, request | {"input": scaled(tensor, 1e-22)})
    np.testing.assert_allclose(arrays["output"], expected["output"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "parameter", "alike"),
    [
        ("layer_norm", "normalized_shape", (3, "3", [3])),
        ("rms_norm", "normalized_shape", (3, "3", [3])),
        ("mean_variance_norm", "axes", (1, "1", [1], -1)),
    ],
)
async def test_a_single_integer_stands_for_a_list_of_one(
    client: httpx.AsyncClient, method: str, parameter: str, alike: tuple[Any, ...]
) -> None:
    request = {"input": ramp(4, 3), "outputs": ["output"]}
    expected, *others = [(await answered(client, method, request | {parameter: value}))[0] for value in alike]
    for arrays in others:
        np.testing.assert_array_equal(arrays["output"], expected["output"])


async def test_the_smallest_eps_is_answered(client: httpx.AsyncClient) -> None:
    tensor = of([1, 2, 3], 3, 1, datatype="FP64")
    arrays, _, _ = await answered(client, "layer_norm", {"input": tensor, "eps": 5e-324})
    np.testing.assert_array_equal(arrays["output"], 0)


async def test_a_nan_in_a_virtual_batch_propagates(client: httpx.AsyncClient) -> None:
    valid = VALID["ghost_batch_norm"]
    arrays, _, _ = await answered(client, "ghost_batch_norm", valid | {"input": of(["NaN", *range(11)], 4, 3)})
    assert np.isnan(arrays["running_mean"]).tolist() == [True, False, False]
