"""The whole path with the real server process, real checkpoints and unmodified clients."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from numpy.typing import NDArray

from tests.server import Server, running

CLS_INPUT = (2, 3, 48, 192)


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def cls_id(http: httpx.Client, ocr_cls: Path) -> str:
    answer = http.post("/v1/checkpoints", params={"filename": "cls.onnx"}, content=ocr_cls.read_bytes())
    assert answer.status_code in (200, 201), answer.text
    return str(answer.json()["id"])


@pytest.fixture(scope="module")
def served(http: httpx.Client, cls_id: str) -> tuple[str, str]:
    """Names of the classifier served folded and unfolded."""
    for name, fold in (("cls-folded", True), ("cls-plain", False)):
        answer = http.post("/v1/models", json={"name": name, "checkpoint": cls_id, "fold": fold})
        assert answer.status_code == 201, answer.text
    return "cls-folded", "cls-plain"


@pytest.fixture(scope="module")
def images() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(CLS_INPUT).astype(np.float32)


def test_upload_lists_every_normalization(http: httpx.Client, ocr_cls: Path, ocr_det: Path) -> None:
    for path, expected in ((ocr_cls, 35), (ocr_det, 3)):
        answer = http.post("/v1/checkpoints", files={"file": (path.name, path.read_bytes())})
        assert answer.status_code in (200, 201), answer.text
        content = answer.json()
        assert content["format"] == "onnx"
        assert len(content["normalizations"]) == expected
        assert all(entry["status"] == "foldable" and entry["into"] for entry in content["normalizations"])
        again = http.post("/v1/checkpoints", content=path.read_bytes())
        assert (again.status_code, again.json()["id"]) == (200, content["id"])


@pytest.mark.parametrize(("fixture", "count"), [("ocr_cls", 35), ("ocr_det", 3)])
def test_fold_is_complete_proven_and_downloadable(
    http: httpx.Client, request: pytest.FixtureRequest, fixture: str, count: int, tmp_path: Path
) -> None:
    path: Path = request.getfixturevalue(fixture)
    uploaded = http.post("/v1/checkpoints", content=path.read_bytes()).json()
    answer = http.post(f"/v1/checkpoints/{uploaded['id']}/fold", json={})
    assert answer.status_code in (200, 201), answer.text
    report, folded = answer.json()["report"], answer.json()["checkpoint"]
    assert (report["folded"], report["normalizations"]) == (count, count)
    assert report["certificate"]["verdict"] == "equivalent", report["certificate"]["sentence"]
    assert all(entry["formula"] and entry["residual"] < 1e-6 for entry in report["entries"])
    assert folded["folded_from"] == uploaded["id"]
    assert http.get(f"/v1/checkpoints/{folded['id']}/report").json() == report
    content = http.get(f"/v1/checkpoints/{folded['id']}/content")
    assert content.headers["etag"] == f'"{folded["id"]}"'
    (tmp_path / "folded.onnx").write_bytes(content.content)
    operators = [node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node]
    assert "BatchNormalization" not in operators


def test_fold_in_one_call_answers_the_same_file(http: httpx.Client, ocr_cls: Path, cls_id: str) -> None:
    answer = http.post("/v1/fold", content=ocr_cls.read_bytes())
    assert answer.status_code == 200, answer.text
    assert answer.headers["normserve-verdict"] == "equivalent"
    assert answer.headers["normserve-folded"] == answer.headers["normserve-normalizations"] == "35"
    kept = http.post(f"/v1/checkpoints/{cls_id}/fold").json()["checkpoint"]["id"]
    assert http.get(f"/v1/checkpoints/{kept}/content").content == answer.content


def _infer(client: Any, model: str, images: NDArray[Any], *, binary_in: bool, binary_out: bool) -> NDArray[Any]:
    tensor = triton.InferInput("x", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images, binary_data=binary_in)
    wanted = triton.InferRequestedOutput("save_infer_model/scale_0.tmp_1", binary_data=binary_out)
    result = client.infer(model, [tensor], outputs=[wanted], request_id="7")
    assert result.get_response()["id"] == "7"
    output: NDArray[Any] = result.as_numpy("save_infer_model/scale_0.tmp_1")
    return output


def test_tritonclient_drives_folded_and_unfolded(
    server: Server, served: tuple[str, str], images: NDArray[np.float32]
) -> None:
    client = triton.InferenceServerClient(server.address)
    try:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
        results = []
        for model in served:
            assert client.is_model_ready(model)
            metadata = client.get_model_metadata(model)
            assert [tensor["name"] for tensor in metadata["inputs"]] == ["x"]
            assert metadata["inputs"][0]["shape"] == [-1, 3, -1, -1]
            assert client.get_model_config(model)["input"][0]["data_type"] == "TYPE_FP32"
            outputs = [
                _infer(client, model, images, binary_in=binary_in, binary_out=binary_out)
                for binary_in in (True, False)
                for binary_out in (True, False)
            ]
            for output in outputs[1:]:
                np.testing.assert_array_equal(output, outputs[0])
            results.append(outputs[0])
            statistics = client.get_inference_statistics(model)["model_stats"][0]
            assert statistics["inference_stats"]["success"]["count"] == 4
            assert statistics["inference_stats"]["compute_infer"]["ns"] > 0
        assert results[0].shape == (2, 2)
        np.testing.assert_allclose(results[0], results[1], rtol=0, atol=2e-6)
        index = {model["name"]: model["state"] for model in client.get_model_repository_index()}
        assert index["cls-folded"] == index["normcore.batch_norm"] == "READY"
    finally:
        client.close()


def test_tritonclient_unloads_and_loads(server: Server, served: tuple[str, str], images: NDArray[np.float32]) -> None:
    client = triton.InferenceServerClient(server.address)
    try:
        before = _infer(client, served[0], images, binary_in=True, binary_out=True)
        client.unload_model(served[0])
        assert not client.is_model_ready(served[0])
        with pytest.raises(triton.InferenceServerException, match="unloaded"):
            _infer(client, served[0], images, binary_in=True, binary_out=True)
        client.load_model(served[0])
        after = _infer(client, served[0], images, binary_in=True, binary_out=True)
        np.testing.assert_array_equal(after, before)
    finally:
        client.close()


async def test_tritonclient_asyncio(server: Server, served: tuple[str, str], images: NDArray[np.float32]) -> None:
    async with triton_aio.InferenceServerClient(server.address) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready(served[0])
        assert (await client.get_model_metadata(served[0]))["name"] == served[0]
        assert (await client.get_model_config(served[0]))["backend"] == "onnxruntime"
        assert len(await client.get_model_repository_index()) >= 3
        assert (await client.get_inference_statistics(served[0]))["model_stats"]
        await client.unload_model(served[1])
        await client.load_model(served[1])
        for is_binary in (True, False):
            small = np.ascontiguousarray(images[:1, :, :32, :64])  # aiohttp warns about JSON bodies over 1 MiB
            tensor = triton.InferInput("x", list(small.shape), "FP32")
            tensor.set_data_from_numpy(small, binary_data=is_binary)
            wanted = triton.InferRequestedOutput("save_infer_model/scale_0.tmp_1", binary_data=is_binary)
            results = [await client.infer(model, [tensor], outputs=[wanted]) for model in served]
            folded, plain = (result.as_numpy("save_infer_model/scale_0.tmp_1") for result in results)
            np.testing.assert_allclose(folded, plain, rtol=0, atol=2e-6)


def test_tritonclient_normalizes(server: Server) -> None:
    client = triton.InferenceServerClient(server.address)
    try:
        data = np.array([[1, 2], [3, 4], [5, 9]], np.float32)
        tensor = triton.InferInput("input", [3, 2], "FP32")
        tensor.set_data_from_numpy(data)
        result = client.infer("normcore.batch_norm", [tensor], parameters={"training": True, "eps": 1e-5})
        expected = (data - data.mean(0)) / np.sqrt(data.var(0) + 1e-5)
        np.testing.assert_allclose(result.as_numpy("output"), expected, atol=1e-6)
        np.testing.assert_allclose(result.as_numpy("mean"), data.mean(0))
        with pytest.raises(triton.InferenceServerException, match="epsilon"):
            client.infer("normcore.batch_norm", [tensor], parameters={"training": True, "epsilon": 1e-5})
    finally:
        client.close()


def test_restart_finds_everything_again(
    data_dir: Path, server: Server, http: httpx.Client, served: tuple[str, str]
) -> None:
    http.post(f"/v2/repository/models/{served[1]}/unload")
    checkpoints = http.get("/v1/checkpoints").json()
    models = http.get("/v1/models").json()
    started = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - started < 10
    with running(data_dir) as restarted, httpx.Client(base_url=restarted.url, timeout=60) as client:
        assert client.get("/v1/checkpoints").json() == checkpoints
        assert client.get("/v1/models").json() == models
        assert client.get(f"/v2/models/{served[0]}/ready").status_code == 200
        assert client.get(f"/v2/models/{served[1]}/ready").status_code == 503
        assert restarted.stop() == 0
