"""Checkpoints over HTTP, with a small network; the real ones are in the end-to-end test."""

import hashlib
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from tests.service import hostile
from tests.service.conftest import http, running_app, small_settings

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_the_life_of_a_checkpoint(tmp_path: Path) -> None:
    content = hostile.small_conv()
    identity = hashlib.sha256(content).hexdigest()
    async with running_app(small_settings(tmp_path)) as app, http(app) as client:
        uploaded = await client.post("/v1/checkpoints?filename=small.onnx", content=content)
        assert uploaded.status_code == 201, uploaded.text
        checkpoint = uploaded.json()
        assert uploaded.headers["location"] == f"/v1/checkpoints/{identity}"
        assert (checkpoint["id"], checkpoint["filename"], checkpoint["format"]) == (identity, "small.onnx", "onnx")
        assert checkpoint["tensors"] == 5
        assert (await client.post("/v1/checkpoints", files={"file": ("b.onnx", content)})).status_code == 200
        made = await check_fold(client, checkpoint)
        listed = [entry["id"] for entry in (await client.get("/v1/checkpoints")).json()["checkpoints"]]
        assert listed == [identity, made]
        for checkpoint_id in listed:
            assert (await client.delete(f"/v1/checkpoints/{checkpoint_id}")).status_code == 204
        assert (await client.get("/v1/checkpoints")).json() == {"checkpoints": []}
    assert [path for path in (tmp_path / "data" / "blobs").rglob("*") if path.is_file()] == []
    assert list((tmp_path / "data" / "staging").iterdir()) == []


async def check_fold(client: httpx.AsyncClient, checkpoint: dict[str, Any]) -> str:
    """Plan, fold, fold again, report and download; returns the folded checkpoint's id."""
    path = f"/v1/checkpoints/{checkpoint['id']}"
    plan = (await client.get(f"{path}/plan")).json()
    assert plan["foldable"] == 1
    assert plan["normalizations"] == checkpoint["normalizations"]
    assert plan["normalizations"][0]["pattern"] == "Conv -> BatchNormalization"
    folded = await client.post(f"{path}/fold", json={"verify": {"probes": 5, "seed": 7}})
    assert folded.status_code == 201, folded.text
    report, made = folded.json()["report"], folded.json()["checkpoint"]
    assert report["folded"] == 1
    assert len(report["certificate"]["probes"]) >= 5
    assert made["filename"] == "small.folded.onnx"
    assert (await client.post(f"{path}/fold")).status_code == 200
    assert (await client.get(f"{path}/report")).status_code == 404
    assert (await client.get(f"/v1/checkpoints/{made['id']}/report")).json()["folded"] == 1
    check_certified(report)
    download = await client.get(f"/v1/checkpoints/{made['id']}/content")
    assert hashlib.sha256(download.content).hexdigest() == made["id"]
    headers = {"if-none-match": download.headers["etag"]}
    not_modified = await client.get(f"/v1/checkpoints/{made['id']}/content", headers=headers)
    assert (not_modified.status_code, not_modified.content) == (304, b"")
    return str(made["id"])


def check_certified(report: dict[str, Any]) -> None:
    """The evidence of one fold of a convolution without bias."""
    (entry,), (region,) = report["entries"], report["certificate"]["regions"]
    assert entry["eps"] == pytest.approx(1e-5)
    assert entry["eps_source"].startswith("default of")
    assert 0 < entry["residual"] < 1e-7
    assert [tensor["name"] for tensor in entry["before"]] == ["scale", "bias", "mean", "var", "w"]
    assert {tuple(tensor["shape"]) for tensor in entry["after"]} == {(4, 3, 1, 1), (4,)}
    assert all(len(tensor["sha256"]) == 64 for tensor in entry["before"] + entry["after"])
    assert (region["before"], region["after"]) == (["Conv", "BatchNormalization"], ["Conv"])
    assert region["tensors"] == ["c", "y"]
    assert region["equivalent"]


async def test_two_checkpoints_compare(client: httpx.AsyncClient) -> None:
    original = onnx.load_from_string(hostile.small_conv())
    folded = (await client.post("/v1/fold", content=original.SerializeToString())).content
    wrong = onnx.load_from_string(folded)
    weight = numpy_helper.to_array(wrong.graph.initializer[0]).copy()
    weight[1] *= 1.01
    wrong.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, wrong.graph.initializer[0].name))
    renamed = onnx.load_from_string(folded)
    renamed.graph.input[0].name = renamed.graph.node[0].input[0] = "image"
    contents = (original.SerializeToString(), folded, wrong.SerializeToString(), renamed.SerializeToString())
    paths = [(await client.post("/v1/checkpoints", content=content)).json()["id"] for content in contents]
    answers = [await client.post(f"/v1/checkpoints/{paths[0]}/compare/{other}") for other in paths]
    verdicts = [answer.json().get("verdict") for answer in answers]
    assert verdicts == ["equivalent", "equivalent", "different", None]
    assert answers[1].json()["regions"][0]["before"] == ["Conv", "BatchNormalization"]
    assert "computes another function" in answers[2].json()["sentence"]
    assert answers[3].status_code == 422
    assert "the inputs of the first are x, those of the second image" in answers[3].json()["error"]


async def test_compare_takes_probes_and_seed(client: httpx.AsyncClient) -> None:
    uploaded = (await client.post("/v1/checkpoints", content=hostile.small_conv())).json()["id"]
    path = f"/v1/checkpoints/{uploaded}/compare/{uploaded}"
    answer = await client.post(path, json={"probes": 9, "seed": 50})
    assert {probe["seed"] for probe in answer.json()["probes"]} == set(range(50, 59))
    for body in ({"probes": 3}, {"seed": -1}, {"probe": 6}, {"probes": "6"}):
        refused = await client.post(path, json=body)
        assert refused.status_code == 422, body
    for other in ("0" * 64, "nothing", "%2e%2e"):
        assert (await client.post(f"/v1/checkpoints/{uploaded}/compare/{other}")).status_code == 404
        assert (await client.post(f"/v1/checkpoints/{other}/compare/{uploaded}")).status_code == 404


async def test_an_infinite_difference_is_null(client: httpx.AsyncClient) -> None:
    ids = []
    for operator in ("Abs", "Log"):
        nodes = [onnx.helper.make_node(operator, ["x"], ["y"])]
        content = hostile.serialized(hostile.model(nodes))
        ids.append((await client.post("/v1/checkpoints", content=content)).json()["id"])
    answer = await client.post(f"/v1/checkpoints/{ids[0]}/compare/{ids[1]}")
    assert answer.status_code == 200, answer.text
    assert answer.json()["verdict"] == "different"
    assert answer.json()["probes"][0]["error_folded"] is None


async def test_a_folded_checkpoint_computes_the_same(client: httpx.AsyncClient, tmp_path: Path) -> None:
    content = hostile.small_conv()
    answer = await client.post("/v1/fold", content=content)
    assert answer.headers["normserve-verdict"] == "equivalent"
    data = np.random.default_rng(5).standard_normal((2, 3, 5, 7)).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    before, after = (
        onnxruntime.InferenceSession(model, options).run(None, {"x": data})[0] for model in (content, answer.content)
    )
    np.testing.assert_allclose(after, before, atol=1e-5)


async def test_nothing_to_fold_answers_the_same_checkpoint(client: httpx.AsyncClient) -> None:
    folded = (await client.post("/v1/fold", content=hostile.small_conv())).content
    uploaded = (await client.post("/v1/checkpoints", content=folded)).json()["id"]
    answer = await client.post(f"/v1/checkpoints/{uploaded}/fold")
    assert answer.status_code == 200
    assert answer.json()["checkpoint"]["id"] == uploaded
    assert answer.json()["report"]["folded"] == 0
    once = await client.post("/v1/fold", content=folded)
    assert (once.status_code, once.headers["normserve-folded"], once.content) == (200, "0", folded)


async def test_overridable_initializers_fold_only_when_asked(client: httpx.AsyncClient) -> None:
    model = onnx.load_from_string(hostile.small_conv())
    for tensor in model.graph.initializer:
        shape = numpy_helper.to_array(tensor).shape
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, onnx.TensorProto.FLOAT, shape))
    uploaded = (await client.post("/v1/checkpoints", content=model.SerializeToString())).json()
    assert uploaded["normalizations"][0]["status"] == "kept"
    assert "freeze_initializers" in uploaded["normalizations"][0]["reason"]
    path = f"/v1/checkpoints/{uploaded['id']}"
    assert (await client.get(f"{path}/plan?freeze_initializers=true")).json()["foldable"] == 1
    assert (await client.post(f"{path}/fold")).json()["report"]["folded"] == 0
    report = (await client.post(f"{path}/fold", json={"freeze_initializers": True})).json()["report"]
    assert (report["folded"], report["certificate"]["verdict"]) == (1, "equivalent")
