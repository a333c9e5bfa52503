"""Every refusal over HTTP: the status, the code, a sentence that names what is wrong, and a service that goes on."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.types import Receive, Scope, Send

from service.app import create_app
from tests.service import hostile
from tests.service.conftest import http, running_app, small_settings

pytestmark = pytest.mark.asyncio(loop_scope="session")

ROWS = [[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]]
BATCH_NORM = "/v1/normalizations/batch_norm"
INFER = "/v2/models/normcore.batch_norm/infer"


def refused(answer: httpx.Response, status: int, code: str, *words: str) -> dict[str, Any]:
    """The one form of every error answer."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    content: dict[str, Any] = answer.json()
    assert set(content) == {"error", "code", "request_id", "details"}
    assert content["code"] == code
    assert content["request_id"] == answer.headers["x-request-id"]
    for word in words:
        assert word in content["error"]
    return content


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        pytest.param(
            {"running_mean": [0, 0, 0], "running_var": [1, 1]}, "shape_mismatch", ("running_mean",), id="shape"
        ),
        pytest.param({"weight": [1, 1, 1]}, "shape_mismatch", ("weight", "2", "3"), id="channels"),
        pytest.param({"input": [1.0, 2.0]}, "shape_mismatch", ("input",), id="rank"),
        pytest.param(
            {"input": {"shape": [3, 2], "datatype": "INT32", "data": [1, 2, 3, 4, 5, 9]}},
            "dtype_mismatch",
            ("input",),
            id="datatype",
        ),
        pytest.param({"training": True, "eps": 0}, "parameter_invalid", ("eps", "0"), id="eps-zero"),
        pytest.param({"training": True, "eps": -1e-5}, "parameter_invalid", ("eps",), id="eps-negative"),
        pytest.param({"training": True, "momentum": 2}, "parameter_invalid", ("momentum", "2"), id="momentum"),
        pytest.param({"training": "yes"}, "parameter_invalid", ("training",), id="type"),
        pytest.param({"epsilon": 1e-5}, "parameter_invalid", ("epsilon",), id="unknown-parameter"),
        pytest.param({"training": True, "outputs": ["grad"]}, "parameter_invalid", ("outputs",), id="unknown-output"),
        pytest.param({"input": [[1.0, 2.0]], "training": True}, "statistics_invalid", ("input",), id="batch-of-one"),
        pytest.param({}, "statistics_invalid", ("running_mean",), id="no-statistics"),
        pytest.param(
            {"running_mean": [0, 0], "running_var": [1, -1]},
            "statistics_invalid",
            ("running_var",),
            id="negative-variance",
        ),
    ],
)
async def test_normalization_refuses(
    client: httpx.AsyncClient, changes: dict[str, Any], code: str, words: tuple[str, ...]
) -> None:
    refused(await client.post(BATCH_NORM, json={"input": ROWS} | changes), 422, code, *words)


async def test_normalization_refuses_the_wrong_element_count(client: httpx.AsyncClient) -> None:
    tensor = {"shape": [3, 2], "datatype": "FP32", "data": [1, 2, 3]}
    refused(await client.post(BATCH_NORM, json={"input": tensor}), 400, "payload_malformed", "input", "6", "3")


async def test_unknown_method_lists_the_known(client: httpx.AsyncClient) -> None:
    for answer in (
        await client.post("/v1/normalizations/batchnorm", json={"input": ROWS}),
        await client.get("/v1/normalizations/batchnorm"),
    ):
        refused(answer, 404, "method_not_found", "batchnorm", "batch_norm")


async def test_malformed_json_is_named(client: httpx.AsyncClient) -> None:
    for path in (BATCH_NORM, INFER, "/v1/models"):
        refused(await client.post(path, content=b'{"input": [[1'), 400, "payload_malformed", "JSON")


async def test_media_types_are_negotiated(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "text/csv"}
    refused(await client.post(BATCH_NORM, content=b"1,2", headers=headers), 415, "media_type_unsupported", "text/csv")
    headers = {"content-type": "application/x-www-form-urlencoded"}  # curl's own, with -d
    answer = await client.post(BATCH_NORM, content=b'{"input": [[1]]}', headers=headers)
    refused(answer, 415, "media_type_unsupported", "-H 'Content-Type: application/json'")
    answer = await client.post(BATCH_NORM, json={"input": ROWS}, headers={"accept": "image/png"})
    refused(answer, 406, "not_acceptable", "image/png")
    answer = await client.post(BATCH_NORM, json={"input": ROWS}, headers={"content-encoding": "br"})
    refused(answer, 415, "media_type_unsupported", "br")


def _binary(header: dict[str, Any], tail: bytes, length: str | None = None) -> dict[str, Any]:
    text = json.dumps(header).encode()
    return {"content": text + tail, "headers": {"Inference-Header-Content-Length": length or str(len(text))}}


def _input(**changes: Any) -> dict[str, Any]:
    tensor = {"name": "input", "shape": [3, 2], "datatype": "FP32", "parameters": {"binary_data_size": 24}}
    return {"inputs": [tensor | changes], "parameters": {"training": True}}


DATA = np.array(ROWS, np.float32).tobytes()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        pytest.param(_binary(_input(), DATA, "9999"), ("Inference-Header-Content-Length",), id="header-too-long"),
        pytest.param(_binary(_input(), DATA, "many"), ("Inference-Header-Content-Length",), id="header-no-number"),
        pytest.param(_binary(_input(), DATA, "1 0"), ("Inference-Header-Content-Length",), id="header-two-numbers"),
        pytest.param(_binary(_input(), DATA, "-1"), ("Inference-Header-Content-Length",), id="header-negative"),
        pytest.param(_binary(_input(), DATA + b"\0"), ("body", "expected", "received"), id="trailing-bytes"),
        pytest.param(_binary(_input(), DATA[:-1]), ("24", "23"), id="missing-bytes"),
        pytest.param(_binary(_input(shape=[3, 3]), DATA), ("input", "36", "24"), id="element-count"),
        pytest.param(_binary(_input(datatype="FP8"), DATA), ("FP8", "FP16"), id="unknown-datatype"),
        pytest.param(_binary(_input(name="x"), DATA), ("x", "input"), id="unknown-input"),
        pytest.param(_binary({"inputs": []}, b""), ("input",), id="missing-input"),
        pytest.param(
            _binary(_input() | {"outputs": [{"name": "nothing"}]}, DATA), ("nothing", "output"), id="unknown-output"
        ),
        pytest.param(_binary(_input() | {"parameters": {"eps": -1, "training": True}}, DATA), ("eps",), id="eps"),
        pytest.param(
            _binary(_input() | {"parameters": {"timeout": "soon", "training": True}}, DATA), ("timeout",), id="timeout"
        ),
    ],
)
async def test_infer_refuses_with_400(client: httpx.AsyncClient, call: dict[str, Any], words: tuple[str, ...]) -> None:
    answer = await client.post(INFER, **call)
    assert answer.status_code == 400, answer.text
    assert answer.headers["content-type"] == "application/json"
    for word in words:
        assert word in answer.json()["error"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("priority", value) for value in (-1, 0.5, True, "high")],
        *[("sequence_id", value) for value in (-1, 0.5, True)],
        *[("sequence_start", 1), ("sequence_end", "no"), ("deterministic", 1), ("triton_x", 1)],
    ],
)
async def test_parameters_of_the_protocol_have_their_types(client: httpx.AsyncClient, name: str, value: Any) -> None:
    answer = await client.post(INFER, **_binary(_input() | {"parameters": {name: value, "training": True}}, DATA))
    assert answer.status_code == 400, answer.text
    assert name in answer.json()["error"]


_LONG = "q" * 50_000


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"inputs": [{"name": _LONG, "shape": [1], "datatype": "FP32", "data": [1]}]}, id="input"),
        pytest.param({"outputs": [{"name": _LONG}]}, id="output"),
        pytest.param({"parameters": {_LONG: 1}}, id="parameter"),
        *[
            pytest.param({"parameters": {name: _LONG}}, id=name)
            for name in ("eps", "timeout", "priority", "sequence_start", "deterministic", "binary_data_output")
        ],
    ],
)
async def test_a_refusal_quotes_the_beginning_of_what_came(client: httpx.AsyncClient, changes: dict[str, Any]) -> None:
    answer = await client.post(
        INFER, json={"inputs": [_input()["inputs"][0] | {"data": [0] * 6, "parameters": {}}]} | changes
    )
    assert answer.status_code == 400, answer.text[:200]
    assert "qqq" in answer.json()["error"]
    assert len(answer.content) < 1500


async def test_a_refusal_quotes_the_beginning_of_a_path_and_of_headers(client: httpx.AsyncClient) -> None:
    for answer in (
        await client.get(f"/v2/{_LONG}"),
        await client.get(f"/v2/models/{_LONG}"),
        await client.get(f"/v2/systemsharedmemory/{_LONG}"),
        await client.get("/v2", headers={"origin": _LONG}),
        await client.post("/v2/repository/index", json={"ready": _LONG}),
        await client.post(INFER, content=b"", headers={"content-encoding": _LONG}),
        await client.post(INFER, content=b"", headers={"inference-header-content-length": _LONG}),
    ):
        assert answer.status_code in (400, 403, 404, 415, 501)
        assert "qqq" in answer.json()["error"]
        assert len(answer.content) < 1500


async def test_unknown_models_are_404(client: httpx.AsyncClient) -> None:
    for answer in (
        await client.post("/v2/models/nobody/infer", json={}),
        await client.get("/v2/models/nobody"),
        await client.get("/v2/models/nobody/ready"),
        await client.get("/v2/models/nobody/config"),
        await client.get("/v2/models/nobody/stats"),
        await client.get("/v2/models/normcore.batch_norm/versions/7/ready"),
        await client.post("/v2/repository/models/nobody/load"),
        await client.get("/v1/models/nobody"),
    ):
        refused(answer, 404, "model_not_found")


async def test_v2_has_its_error_form_for_404_and_405(client: httpx.AsyncClient) -> None:
    refused(await client.get("/v2/nowhere"), 404, "not_found", "/v2/nowhere")
    answer = await client.get(INFER)
    refused(answer, 405, "method_not_allowed", "GET")
    assert answer.headers["allow"] == "POST"


async def test_bodies_over_a_limit_are_413(client: httpx.AsyncClient) -> None:
    async def chunked() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield bytes(100_000)

    npy = {"content-type": "application/x-npy"}
    for content in (bytes(1_000_001), chunked()):
        answer = await client.post(BATCH_NORM, content=content, headers=npy)
        refused(answer, 413, "payload_too_large", "1000000", "NORMSERVE_MAX_BODY_BYTES")
    answer = await client.post(BATCH_NORM, content=b'{"input": [' + b"1," * 60_000 + b"1]}")
    refused(answer, 413, "payload_too_large", "NORMSERVE_MAX_JSON_BYTES")
    answer = await client.post(INFER, content=b'{"inputs": [' + b"1," * 60_000 + b"1]}")
    refused(answer, 413, "payload_too_large", "NORMSERVE_MAX_JSON_BYTES")
    answer = await client.post("/v1/checkpoints", content=bytes(20_000_001))
    refused(answer, 413, "payload_too_large", "NORMSERVE_MAX_CHECKPOINT_BYTES")
    answer = await client.post("/v1/models", content=b" " * 2_000_000)
    refused(answer, 413, "payload_too_large")


async def test_a_body_that_stops_arriving_is_408(client: httpx.AsyncClient) -> None:
    async def stalling() -> AsyncIterator[bytes]:
        yield b'{"input": '
        await asyncio.sleep(30)
        yield b"never"

    for path in (BATCH_NORM, INFER, "/v1/checkpoints", "/v1/models"):
        refused(await client.post(path, content=stalling()), 408, "body_timeout", "10 of", "NORMSERVE_BODY_TIMEOUT_S")


async def test_the_receive_budget_is_429(tmp_path: Path) -> None:
    settings = small_settings(tmp_path, receive_budget_bytes=1000, body_timeout_s=5)
    async with running_app(settings) as app, http(app) as client:
        release = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield json.dumps({"input": ROWS, "training": True}).encode()[:-1]
            await release.wait()
            yield b"}"

        headers = {"content-length": str(len(json.dumps({"input": ROWS, "training": True})))}
        first = asyncio.create_task(client.post(BATCH_NORM, content=slow(), headers=headers))
        await asyncio.sleep(0.05)
        answer = await client.post(BATCH_NORM, content=bytes(950))
        refused(answer, 429, "overloaded", "NORMSERVE_RECEIVE_BUDGET_BYTES")
        assert int(answer.headers["retry-after"]) >= 1
        release.set()
        assert (await first).status_code == 200
        answer = await client.post(BATCH_NORM, content=bytes(1001))
        refused(answer, 413, "payload_too_large", "NORMSERVE_RECEIVE_BUDGET_BYTES")


async def test_bodies_of_unknown_length_count_as_they_come(tmp_path: Path) -> None:
    """Many may be under way at once, whatever each might grow to; those that do grow are refused in the end."""
    document = json.dumps({"input": ROWS, "training": True}).encode()
    async with running_app(small_settings(tmp_path, body_timeout_s=5)) as app, http(app) as client:
        release = asyncio.Event()

        async def slow(content: bytes) -> AsyncIterator[bytes]:
            yield content[:-1]
            await release.wait()
            yield content[-1:]

        packed = {"content-encoding": "gzip"}
        waiting = [asyncio.create_task(client.post(BATCH_NORM, content=slow(document))) for _ in range(5)]
        waiting += [
            asyncio.create_task(client.post(BATCH_NORM, content=slow(gzip.compress(document)), headers=packed))
            for _ in range(5)
        ]
        await asyncio.sleep(0.1)
        npy = {"content-type": "application/x-npy"}
        large = [
            asyncio.create_task(client.post(BATCH_NORM, content=slow(bytes(900_000)), headers=npy)) for _ in range(3)
        ]
        await asyncio.sleep(0.1)
        release.set()
        assert [(await task).status_code for task in waiting] == [200] * 10
        answers = [await task for task in large]
        assert sorted(answer.status_code for answer in answers) == [400, 400, 429]
        text = (await client.get("/metrics")).text
        assert "normserve_receive_budget_used_bytes 0" in text


async def test_foreign_origins_are_403(client: httpx.AsyncClient) -> None:
    for path in ("/v2/health/live", "/v1/info"):
        answer = await client.get(path, headers={"origin": "http://evil.example"})
        refused(answer, 403, "forbidden", "Origin", "evil.example")
        assert (await client.get(path, headers={"origin": "http://localhost"})).status_code == 200


async def test_hosts_can_be_restricted(tmp_path: Path) -> None:
    async with running_app(small_settings(tmp_path, allowed_hosts=("models.example",))) as app, http(app) as client:
        refused(await client.get("/v1/info"), 403, "forbidden", "localhost", "models.example")
        assert (await client.get("/v1/info", headers={"host": "models.example:8000"})).status_code == 200
        assert (await client.get("/v2/health/ready")).status_code == 200


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(hostile.cut_in_half, (), id="cut-in-half"),
        pytest.param(hostile.pickled, ("pickle",), id="pickle"),
        pytest.param(hostile.external_data, ("external",), id="external-data"),
        pytest.param(hostile.custom_domain, ("com.evil",), id="custom-domain"),
        pytest.param(hostile.gigabytes, ("big", "1099511627776", "268435456"), id="gigabytes"),
        pytest.param(lambda: b"hello, I am no model", (), id="text"),
    ],
)
async def test_hostile_uploads_are_400(
    client: httpx.AsyncClient, content: Callable[[], bytes], words: tuple[str, ...]
) -> None:
    for path in ("/v1/checkpoints", "/v1/fold"):
        answer = await client.post(
            path, params={"filename": "model.onnx"} if "check" in path else {}, content=content()
        )
        refused(answer, 400, "checkpoint_invalid", *words)
    assert (await client.get("/v2/health/live")).status_code == 200


async def test_an_empty_upload_is_400(client: httpx.AsyncClient) -> None:
    refused(await client.post("/v1/checkpoints"), 400, "payload_malformed", "body")
    answer = await client.post("/v1/checkpoints", files={"model": b"x"})
    refused(answer, 400, "payload_malformed", "file")


async def test_a_loop_that_never_ends_is_stopped(tmp_path: Path) -> None:
    async with (
        running_app(small_settings(tmp_path, sandbox_deadline_s=3, infer_deadline_s=1)) as app,
        http(app) as client,
    ):
        uploaded = (await client.post("/v1/checkpoints", content=hostile.endless_loop())).json()
        answer = await client.post("/v1/models", json={"name": "loop", "checkpoint": uploaded["id"], "fold": False})
        assert 400 <= answer.status_code < 500, answer.text
        assert "1 s" in answer.json()["error"]
        refused(await client.get("/v2/models/loop/ready"), 404, "model_not_found")
        assert (await client.get("/v2/health/live")).status_code == 200


async def test_a_training_mode_model_is_not_served(client: httpx.AsyncClient) -> None:
    uploaded = (await client.post("/v1/checkpoints", content=hostile.training_norm())).json()
    assert uploaded["normalizations"][0]["status"] == "kept"
    assert "training" in uploaded["normalizations"][0]["reason"]
    answer = await client.post("/v1/models", json={"name": "training", "checkpoint": uploaded["id"]})
    refused(answer, 400, "checkpoint_invalid", "training")


async def test_unknown_checkpoints_are_404(client: httpx.AsyncClient) -> None:
    for unknown in ("0" * 64, "..%2F..%2Fetc%2Fpasswd", "x"):
        for answer in (
            await client.get(f"/v1/checkpoints/{unknown}"),
            await client.get(f"/v1/checkpoints/{unknown}/content"),
            await client.get(f"/v1/checkpoints/{unknown}/plan"),
            await client.post(f"/v1/checkpoints/{unknown}/fold"),
            await client.delete(f"/v1/checkpoints/{unknown}"),
        ):
            assert answer.status_code == 404, answer.text
    answer = await client.post("/v1/models", json={"name": "x", "checkpoint": "0" * 64})
    refused(answer, 404, "checkpoint_not_found", "0" * 64)


@pytest.mark.parametrize(
    ("document", "status", "words"),
    [
        pytest.param({"checkpoint": "x"}, 422, ("name",), id="missing"),
        pytest.param({"name": "m", "checkpoint": "x", "folds": True}, 422, ("folds",), id="unknown-field"),
        pytest.param({"name": "m", "checkpoint": "x", "version": 0}, 422, ("version",), id="version"),
        pytest.param({"name": "a/b", "checkpoint": "x"}, 422, ("name", "a/b"), id="name"),
        pytest.param({"name": "normcore.mine", "checkpoint": "x"}, 409, ("reserved",), id="reserved"),
        pytest.param({"name": "stats", "checkpoint": "x"}, 409, ("reserved",), id="stats"),
        pytest.param([1], 422, ("body",), id="no-object"),
    ],
)
async def test_model_documents_are_checked(
    client: httpx.AsyncClient, document: Any, status: int, words: tuple[str, ...]
) -> None:
    code = {422: "parameter_invalid", 409: "conflict"}[status]
    refused(await client.post("/v1/models", json=document), status, code, *words)


async def test_conflicts_are_409(client: httpx.AsyncClient) -> None:
    uploaded = (await client.post("/v1/checkpoints", content=hostile.small_conv())).json()["id"]
    document = {"name": "conflict", "checkpoint": uploaded, "version": 3, "fold": False}
    assert (await client.post("/v1/models", json=document)).status_code == 201
    refused(await client.post("/v1/models", json=document), 409, "conflict", "3")
    refused(await client.delete(f"/v1/checkpoints/{uploaded}"), 409, "conflict", "conflict/3")
    refused(await client.post("/v2/repository/models/normcore.batch_norm/unload"), 409, "conflict", "built in")
    assert (await client.delete("/v1/models/conflict/versions/3")).status_code == 204


async def test_an_unloaded_model_is_503(client: httpx.AsyncClient) -> None:
    uploaded = (await client.post("/v1/checkpoints", content=hostile.small_conv())).json()["id"]
    await client.post("/v1/models", json={"name": "unloaded", "checkpoint": uploaded, "fold": False})
    assert (await client.post("/v2/repository/models/unloaded/unload")).status_code == 200
    for answer in (await client.post("/v2/models/unloaded/infer", json={}), await client.get("/v2/models/unloaded")):
        refused(answer, 503, "model_not_ready", "unloaded")
        assert "retry-after" in answer.headers


async def test_an_unforeseen_error_is_a_fixed_500(tmp_path: Path) -> None:
    app = create_app(small_settings(tmp_path))

    async def unopened(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": {}}, receive, send)

    async with http(unopened) as client:
        refused(await client.get("/v1/info"), 500, "internal", "internal error")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"num_features": "x"}, "num_features: Input should be a valid integer, received 'x'"),
        ({}, "num_features: expected a value, received none"),
        ([1], "body: expected an object, received a list of 1"),
        ({"num_features": 1, "nope": 2}, "nope: expected no field of this name"),
    ],
    ids=["type", "missing", "list", "unknown"],
)
async def test_a_document_that_does_not_fit_is_told_what_came(
    client: httpx.AsyncClient, body: object, sentence: str
) -> None:
    answer = await client.post("/v1/statistics", json=body)
    assert (answer.status_code, answer.json()["error"]) == (422, sentence)
