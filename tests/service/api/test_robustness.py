"""What breaks services that only meet polite callers one at a time: odd headers, odd numbers, and races."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.service import hostile
from tests.service.api.test_refusals import BATCH_NORM, INFER, ROWS, refused
from tests.service.conftest import http, running_app, small_settings

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def _upload(client: httpx.AsyncClient, content: bytes) -> str:
    return str((await client.post("/v1/checkpoints", content=content)).json()["id"])


async def _serve(client: httpx.AsyncClient, name: str, content: bytes) -> httpx.Response:
    document = {"name": name, "checkpoint": await _upload(client, content), "fold": False}
    return await client.post("/v1/models", json=document)


@pytest.mark.parametrize("origin", ["http://[evil", "http://[::1", "//]"])
async def test_an_origin_that_is_no_url_is_403(client: httpx.AsyncClient, origin: str) -> None:
    refused(await client.get("/v1/info", headers={"origin": origin}), 403, "forbidden", "Origin")


@pytest.mark.parametrize("version", ["9" * 5000, "9" * 30, "x", "-1", "%C2%B2"])  # the last is a superscript two
async def test_versions_that_cannot_be_are_404(client: httpx.AsyncClient, version: str) -> None:
    answer = await client.post(f"/v2/models/normcore.batch_norm/versions/{version}/infer", content=b"{}")
    refused(answer, 404, "model_not_found", "version")


async def test_a_version_that_is_no_number_is_404(client: httpx.AsyncClient) -> None:
    for path in ("", "/ready", "/config", "/stats"):
        for version in ("x", "+1", "1.0", "%201"):
            answer = await client.get(f"/v2/models/normcore.batch_norm/versions/{version}{path}")
            refused(answer, 404, "model_not_found", "version")
    refused(await client.delete("/v1/models/m/versions/x"), 422, "parameter_invalid", "version")


async def test_a_timeout_of_any_size_is_cut_to_the_setting(client: httpx.AsyncClient) -> None:
    tensor = '{"name": "input", "shape": [2, 1], "datatype": "FP32", "data": [1, NaN]}'
    parameters = '{"training": true, "timeout": ' + "9" * 400 + "}"
    answer = await client.post(INFER, content=f'{{"inputs": [{tensor}], "parameters": {parameters}}}')
    assert answer.status_code == 200, answer.text


async def test_names_with_spaces_have_paths_that_work(client: httpx.AsyncClient) -> None:
    answer = await _serve(client, "my model", hostile.small_conv())
    assert answer.headers["location"] == "/v1/models/my%20model"
    (shown,) = (await client.get(answer.headers["location"])).json()["models"]
    assert set(shown.pop("requests")) == {"json", "binary"}
    assert shown == answer.json()
    assert answer.json()["infer"] == "/v2/models/my%20model/versions/1/infer"
    assert (await client.delete("/v1/models/my%20model/versions/1")).status_code == 204


async def test_a_multipart_body_must_end_with_its_boundary(client: httpx.AsyncClient) -> None:
    part = b'--B\r\nContent-Disposition: form-data; name="file"; filename="m.onnx"\r\n\r\n' + hostile.small_conv()
    headers = {"content-type": "multipart/form-data; boundary=B"}
    for cut in (part, part + b"\r\n--B", part + b"\r\n--B\r\n"):
        answer = await client.post("/v1/checkpoints", content=cut, headers=headers)
        refused(answer, 400, "payload_malformed", "boundary")
    answer = await client.post("/v1/checkpoints", content=part + b"\r\n--B--\r\n", headers=headers)
    assert answer.status_code in (200, 201), answer.text


async def test_a_multipart_boundary_has_a_bound(client: httpx.AsyncClient) -> None:
    headers = {"content-type": f"multipart/form-data; boundary={'B' * 5000}"}
    answer = await client.post("/v1/checkpoints", content=b"x", headers=headers)
    refused(answer, 400, "payload_malformed", "boundary", "70")


async def test_the_same_file_at_the_same_time_is_one_checkpoint(tmp_path: Path) -> None:
    async with running_app(small_settings(tmp_path)) as app, http(app) as client:
        content = hostile.small_conv()
        answers = await asyncio.gather(
            *(client.post("/v1/checkpoints", params={"filename": f"{n}.onnx"}, content=content) for n in range(5))
        )
        assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 200, 201]
        assert len({answer.text for answer in answers}) == 1
        assert not list((tmp_path / "data" / "staging").iterdir())


async def test_a_checkpoint_that_an_operation_uses_is_not_deleted(tmp_path: Path) -> None:
    settings = small_settings(tmp_path, infer_deadline_s=2)
    async with running_app(settings) as app, http(app) as client:
        checkpoint = await _upload(client, hostile.small_conv())
        blocking = asyncio.create_task(_serve(client, "endless", hostile.endless_loop()))
        await asyncio.sleep(0.5)
        path = f"/v1/checkpoints/{checkpoint}"
        waiting = [
            asyncio.create_task(client.post(f"{path}/fold")),
            asyncio.create_task(client.get(f"{path}/plan", params={"freeze_initializers": True})),
            asyncio.create_task(client.post("/v1/models", json={"name": "waits", "checkpoint": checkpoint})),
        ]
        await asyncio.sleep(0.2)
        refused(await client.delete(path), 409, "conflict", "operation")
        assert (await blocking).status_code == 400
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [201, 200, 201]
        refused(await client.delete(path), 409, "conflict", "waits/1")
        assert (await client.delete("/v1/models/waits/versions/1")).status_code == 204
        assert (await client.delete(path)).status_code == 204


async def test_a_load_fails_no_request_of_the_engine_it_replaces(client: httpx.AsyncClient) -> None:
    assert (await _serve(client, "swapped", hostile.counted_loop())).status_code == 201
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [200_000, 0, 0, 0]}
    call = {"inputs": [tensor]}
    requests = [asyncio.create_task(client.post("/v2/models/swapped/infer", json=call)) for _ in range(4)]
    await asyncio.sleep(0.05)
    assert not any(request.done() for request in requests)
    assert (await client.post("/v2/repository/models/swapped/load")).status_code == 200
    assert [answer.status_code for answer in await asyncio.gather(*requests)] == [200] * 4


@pytest.mark.parametrize("is_deleted", [False, True], ids=["unload", "delete"])
async def test_a_model_that_goes_answers_what_it_has_accepted(client: httpx.AsyncClient, is_deleted: bool) -> None:
    name = "deleted" if is_deleted else "unloaded"
    assert (await _serve(client, name, hostile.counted_loop())).status_code == 201
    call = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [200_000, 0, 0, 0]}]}
    requests = [asyncio.create_task(client.post(f"/v2/models/{name}/infer", json=call)) for _ in range(4)]
    await asyncio.sleep(0.05)
    assert not any(request.done() for request in requests)
    if is_deleted:
        gone = await client.delete(f"/v1/models/{name}/versions/1")
    else:
        gone = await client.post(f"/v2/repository/models/{name}/unload", json={"parameters": {}})
    assert gone.is_success
    assert [answer.status_code for answer in await asyncio.gather(*requests)] == [200] * 4
    assert (await client.post(f"/v2/models/{name}/infer", json=call)).status_code == (404 if is_deleted else 503)


async def test_a_body_that_comes_after_its_version_went_meets_the_other_one(tmp_path: Path) -> None:
    async with running_app(small_settings(tmp_path, body_timeout_s=20)) as app, http(app) as client:
        for _ in range(2):
            assert (await _serve(client, "late", hostile.counted_loop())).status_code == 201
        begun, gone = asyncio.Event(), asyncio.Event()

        async def body() -> AsyncIterator[bytes]:
            yield b'{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", '
            begun.set()
            await gone.wait()
            yield b'"data": [1, 0, 0, 0]}]}'

        request = asyncio.create_task(client.post("/v2/models/late/infer", content=body()))
        await begun.wait()
        assert (await client.delete("/v1/models/late/versions/2")).status_code == 204
        gone.set()
        answer = await request
    assert answer.status_code == 200, answer.text
    assert answer.json()["model_version"] == "1"


@pytest.mark.parametrize(
    ("parameters", "status"), [(3, 400), ([], 400), ({"unload_dependents": 1}, 400), ({"force": True}, 501)]
)
async def test_parameters_of_an_unload_are_checked(client: httpx.AsyncClient, parameters: object, status: int) -> None:
    assert (await _serve(client, "stays", hostile.counted_loop())).status_code in (201, 409)
    answer = await client.post("/v2/repository/models/stays/unload", json={"parameters": parameters})
    assert answer.status_code == status, answer.text
    assert "parameters" in answer.json()["error"]
    assert (await client.get("/v2/models/stays/ready")).status_code == 200


async def test_refusals_leave_the_budget_as_it_was(tmp_path: Path) -> None:
    async with running_app(small_settings(tmp_path, receive_budget_bytes=1000)) as app, http(app) as client:
        for _ in range(3):
            refused(await client.post(BATCH_NORM, content=b"{" * 900), 400, "payload_malformed")
        assert (await client.post(BATCH_NORM, json={"input": ROWS, "training": True})).status_code == 200


async def test_v2_has_its_statuses_behind_a_prefix(tmp_path: Path) -> None:
    async with running_app(small_settings(tmp_path)) as app, http(app, root_path="/base") as client:
        for prefix in ("", "/base"):
            wrong = await client.post(f"{prefix}{INFER}", json={"inputs": []})
            refused(wrong, 400, "parameter_invalid", "input")
            refused(await client.delete(f"{prefix}/v1/models/m/versions/x"), 422, "parameter_invalid", "version")
