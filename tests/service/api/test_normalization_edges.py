"""Every edge and every mistake of every normalization method over HTTP, on both surfaces: the same decided answer."""

import io
from typing import Any

import httpx
import numpy as np
import pytest

from service.application.methods import METHODS
from tests.service.api.test_refusals import refused
from tests.service.edges import LEAST_RANK, VALID, of, post, ramp

pytestmark = pytest.mark.asyncio(loop_scope="session")

SHAPE, DTYPE, PARAMETER, STATISTICS = "shape_mismatch", "dtype_mismatch", "parameter_invalid", "statistics_invalid"


async def is_refused(client: httpx.AsyncClient, method: str, changes: dict[str, Any], code: str, *words: str) -> None:
    own, protocol = await post(client, method, VALID[method] | changes)
    status = 501 if code == "not_implemented" else 422
    refused(own, status, code, *words)
    refused(protocol, 501 if status == 501 else 400, code, *words)


METHOD = pytest.mark.parametrize("method", sorted(METHODS))


async def test_every_method_has_a_valid_request_with_every_tensor() -> None:
    assert set(VALID) == set(METHODS)
    for name, method in METHODS.items():
        assert {tensor.name for tensor in method.tensors} <= set(VALID[name]), name


@METHOD
async def test_what_the_mistakes_start_from_is_right(client: httpx.AsyncClient, method: str) -> None:
    for answer in await post(client, method, VALID[method]):
        assert answer.status_code == 200, answer.text


@METHOD
@pytest.mark.parametrize("datatype", ["BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT32", "INT64"])
async def test_what_is_not_floating_is_refused(client: httpx.AsyncClient, method: str, datatype: str) -> None:
    shape = VALID[method]["input"]["shape"]
    name = {"BOOL": "bool"}.get(datatype, datatype.lower())
    changes = {"input": ramp(*shape, datatype=datatype)}
    await is_refused(client, method, changes, DTYPE, "input", "float16, bfloat16, float32 or float64", name)


@METHOD
async def test_text_is_refused(client: httpx.AsyncClient, method: str) -> None:
    tensor = of(["a"] * 6, 2, 3, datatype="BYTES")
    own, protocol = await post(client, method, VALID[method] | {"input": tensor})
    refused(own, 400, "payload_malformed", "input", "BYTES")
    assert protocol.status_code == 400, protocol.text
    assert "input: expected a tensor of numbers or BOOL" in protocol.json()["error"]


@METHOD
async def test_too_few_axes_are_refused(client: httpx.AsyncClient, method: str) -> None:
    for rank in range(LEAST_RANK[method]):
        shape = [6] * rank
        changes = {"input": ramp(*shape)}
        await is_refused(
            client, method, changes, SHAPE, "input", f"at least {LEAST_RANK[method]} dimensions", "shape ("
        )


@METHOD
async def test_64_axes_are_answered_or_refused(client: httpx.AsyncClient, method: str) -> None:
    for answer in await post(client, method, {"input": ramp(*[2] * 3, *[1] * 61)}):
        assert answer.status_code in (200, 400, 422), answer.text


@METHOD
async def test_every_tensor_of_a_wrong_shape_is_named(client: httpx.AsyncClient, method: str) -> None:
    for tensor in METHODS[method].tensors:
        if tensor.name in ("input", "shard_sizes"):
            continue
        datatype = VALID[method][tensor.name]["datatype"]
        await is_refused(client, method, {tensor.name: ramp(97, datatype=datatype)}, SHAPE, tensor.name, "shape (97,)")
        scalar = None if tensor.name in ("mask", "num_batches_tracked") else ramp(datatype=datatype)
        if scalar is not None:
            await is_refused(client, method, {tensor.name: scalar}, SHAPE, tensor.name, "shape ()")


@METHOD
async def test_every_tensor_of_a_wrong_datatype_is_named(client: httpx.AsyncClient, method: str) -> None:
    for tensor in METHODS[method].tensors:
        right = VALID[method][tensor.name]
        wrong = {"mask": ("FP32", "INT8"), "shard_sizes": ("FP32", "INT32", "BOOL"), "num_batches_tracked": ("BOOL",)}
        for datatype in wrong.get(tensor.name, ("INT64", "BOOL")):
            changes = {tensor.name: ramp(*right["shape"], datatype=datatype)}
            name = {"FP32": "float32", "BOOL": "bool"}.get(datatype, datatype.lower())
            await is_refused(client, method, changes, DTYPE, tensor.name, f"received {name}")


@METHOD
async def test_every_required_tensor_is_asked_for(client: httpx.AsyncClient, method: str) -> None:
    for tensor in METHODS[method].tensors:
        if tensor.is_required:
            own, protocol = await post(client, method, VALID[method] | {tensor.name: None})
            assert own.status_code in (400, 422), own.text
            assert tensor.name in own.json()["error"]
            assert protocol.status_code == 400, protocol.text
            assert tensor.name in protocol.json()["error"]


@METHOD
async def test_every_parameter_out_of_bounds_is_named(client: httpx.AsyncClient, method: str) -> None:
    for parameter in METHODS[method].parameters:
        numbers = parameter.kind in ("float", "int")
        values: list[Any] = ["NaN", "Infinity", "three", True] if numbers else [7.5, "nothing"]
        if parameter.minimum is not None:
            values += [parameter.minimum - 1]
        if parameter.maximum is not None:
            values += [parameter.maximum + 1]
        if parameter.kind == "int":
            values += [2.5]
        if not parameter.is_nullable:
            values += [None]
        for value in values:
            await is_refused(client, method, {parameter.name: value}, PARAMETER, parameter.name)


@METHOD
async def test_unknown_names_are_refused(client: httpx.AsyncClient, method: str) -> None:
    await is_refused(client, method, {"epsilon": 1}, PARAMETER, "epsilon", method)
    own, protocol = await post(client, method, VALID[method] | {"outputs": ["nothing"]})
    refused(own, 422, PARAMETER, "outputs", "nothing")
    assert protocol.status_code == 400, protocol.text
    assert "nothing" in protocol.json()["error"]


@METHOD
async def test_a_number_no_float_can_hold_is_refused(client: httpx.AsyncClient, method: str) -> None:
    for parameter in METHODS[method].parameters:
        if parameter.kind in ("float", "int"):
            for digits in (b"1e999", b"1" + b"0" * 400, b"-1e999", b"NaN"):
                content = b'{"input": [[1, 2], [3, 4]], "' + parameter.name.encode() + b'": ' + digits + b"}"
                answer = await client.post(f"/v1/normalizations/{method}", content=content)
                assert answer.status_code in (400, 422), answer.text


@METHOD
@pytest.mark.parametrize("text", ["nan", "inf", "", "1e", "0x1", "true ", "null null"])
async def test_texts_of_a_query_string_are_checked(client: httpx.AsyncClient, method: str, text: str) -> None:
    npy = io.BytesIO()
    np.save(npy, np.ones((2, 4, 3), np.float32))
    for parameter in METHODS[method].parameters:
        if (parameter.choices and text in parameter.choices) or parameter.kind == "str":
            continue
        answer = await client.post(
            f"/v1/normalizations/{method}",
            params={parameter.name: text},
            content=npy.getvalue(),
            headers={"content-type": "application/x-npy"},
        )
        refused(answer, 422, PARAMETER, parameter.name)
