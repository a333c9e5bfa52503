"""Options of normalization methods over HTTP, on both surfaces: variants of frameworks, adaptive weights, opt-outs."""

from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.service.edges import of, post, ramp

pytestmark = pytest.mark.asyncio(loop_scope="session")
DEEP = {"normalized_shape": [3], "eps": 1e-3}


def _values(tensor: dict[str, Any]) -> NDArray[np.float64]:
    return np.array(tensor["data"], np.float64).reshape(tensor["shape"])


async def _output(client: httpx.AsyncClient, method: str, request: dict[str, Any]) -> NDArray[np.float64]:
    own, protocol = await post(client, method, request | {"outputs": ["output"]})
    assert own.status_code == protocol.status_code == 200, own.text + protocol.text
    first, second = (_values(item) for item in (own.json()["outputs"]["output"], protocol.json()["outputs"][0]))
    np.testing.assert_array_equal(first, second)
    return first


def _layer(x: NDArray[np.float64]) -> NDArray[np.float64]:
    centred = x - x.mean(-1, keepdims=True)
    found: NDArray[np.float64] = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3)
    return found


def _rms(x: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3)
    return found


async def test_rms_norm_multiplies_by_one_plus_the_weight(client: httpx.AsyncClient) -> None:
    weight = of([0.5, -0.25, 0])
    found = await _output(client, "rms_norm", {"input": ramp(4, 3), "weight": weight, "weight_plus_one": True} | DEEP)
    np.testing.assert_allclose(found, _rms(_values(ramp(4, 3))) * (1 + _values(weight)), rtol=1e-6)


async def test_rms_norm_rounds_before_the_weight(client: httpx.AsyncClient) -> None:
    request = {"input": ramp(40, 3, datatype="FP16"), "weight": of([0.3, 0.7, 1.1], datatype="FP16")} | DEEP
    found = await _output(client, "rms_norm", request | {"cast_before_scale": True})
    weight = np.array([0.3, 0.7, 1.1], np.float16)
    expected = _rms(_values(ramp(40, 3))).astype(np.float16) * weight
    np.testing.assert_array_equal(found.astype(np.float16), expected)
    assert ((await _output(client, "rms_norm", request)).astype(np.float16) != expected).any()


@pytest.mark.parametrize("shape", [(2, 1, 3), (2, 4, 3)], ids=str)
@pytest.mark.parametrize("method", ["layer_norm", "rms_norm"])
async def test_weights_of_each_sample_or_value(client: httpx.AsyncClient, method: str, shape: tuple[int, ...]) -> None:
    found = await _output(client, method, {"input": ramp(2, 4, 3), "weight": ramp(*shape)} | DEEP)
    expected = (_layer if method == "layer_norm" else _rms)(_values(ramp(2, 4, 3))) * _values(ramp(*shape))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


async def test_batch_norm_takes_weights_of_each_value(client: httpx.AsyncClient) -> None:
    running = {"running_mean": of([1, 2, 3]), "running_var": of([1, 4, 9]), "eps": 0}
    found = await _output(client, "batch_norm", {"input": ramp(2, 3, 4), "weight": ramp(2, 3, 4)} | running)
    mean, deviation = np.array([1, 2, 3])[:, None], np.array([1, 2, 3])[:, None]
    np.testing.assert_allclose(found, (_values(ramp(2, 3, 4)) - mean) / deviation * _values(ramp(2, 3, 4)), rtol=1e-6)
    own, protocol = await post(client, "batch_norm", {"input": ramp(2, 3, 4), "weight": ramp(2, 1, 4)} | running)
    assert (own.status_code, own.json()["code"], protocol.status_code) == (422, "shape_mismatch", 400)
    assert own.json()["error"].startswith("weight: expected shape (2, 3, 4), one value for each of the input")


async def test_batch_norm_takes_a_negative_variance_where_that_is_said(client: httpx.AsyncClient) -> None:
    request = {"input": ramp(4, 2), "running_mean": of([0, 0]), "running_var": of([-1, 1]), "eps": 0}
    own, protocol = await post(client, "batch_norm", request)
    assert (own.status_code, own.json()["code"], protocol.status_code) == (422, "statistics_invalid", 400)
    found = await _output(client, "batch_norm", request | {"allow_negative_var": True})
    assert np.isnan(found[:, 0]).all()
    np.testing.assert_allclose(found[:, 1], _values(ramp(4, 2))[:, 1], rtol=1e-6)


async def test_local_response_norm_in_tensorflows_terms(client: httpx.AsyncClient) -> None:
    request = {"input": ramp(2, 4, 3), "size": 3, "alpha": 0.5, "beta": 0.5, "k": 1, "window": "symmetric-odd"}
    found = await _output(client, "local_response_norm", request | {"alpha_scaled_by_size": False})
    x = _values(ramp(2, 4, 3))
    squares = np.pad(x**2, ((0, 0), (1, 1), (0, 0)))
    expected = x / np.sqrt(1 + 0.5 * (squares[:, :-2] + squares[:, 1:-1] + squares[:, 2:]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    own, protocol = await post(client, "local_response_norm", request | {"size": 4})
    assert (own.status_code, own.json()["code"], protocol.status_code) == (422, "parameter_invalid", 400)
    assert own.json()["error"].startswith("size: expected an odd integer with window symmetric-odd, received 4")
    own, protocol = await post(client, "local_response_norm", request | {"alpha": 0, "k": 0})
    assert (own.status_code, own.json()["code"], protocol.status_code) == (422, "parameter_invalid", 400)
    assert own.json()["error"].startswith("k: expected a number > 0 with alpha 0")
