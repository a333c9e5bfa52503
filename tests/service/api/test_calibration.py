"""Recalibration and drift over HTTP: every encoding, jobs, refusals, bounds, and nothing left behind."""

import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.numpy import save

from tests.normcore.folding.builder import Net
from tests.normcore.recalibration.networks import gemm, with_statistics
from tests.service import hostile
from tests.service.api.test_jobs import ASYNC, service, upload, watch
from tests.service.api.test_refusals import refused

pytestmark = pytest.mark.asyncio(loop_scope="session")

Array = NDArray[Any]

ROWS = np.random.default_rng(4).standard_normal((40, 3)).astype(np.float32)
NPZ, SAFETENSORS, NPY = "application/x-npz", "application/vnd.safetensors", "application/x-npy"
GEMM = gemm().SerializeToString()


def npz(**tensors: Any) -> dict[str, Any]:
    """A request with such a body."""
    file = io.BytesIO()
    np.savez(file, **tensors)
    return {"content": file.getvalue(), "headers": {"content-type": NPZ}}


def npy(tensor: Array) -> dict[str, Any]:
    file = io.BytesIO()
    np.save(file, tensor)
    return {"content": file.getvalue(), "headers": {"content-type": NPY}}


def two_inputs() -> bytes:
    net = Net()
    net.norm(net.op("Sub", "x", "z"), 3, output="y")
    return bytes(net.model({"x": ["N", 3], "z": ["N", 3]}, "y").SerializeToString())


async def download(client: httpx.AsyncClient, checkpoint_id: str) -> onnx.ModelProto:
    return onnx.load_from_string((await client.get(f"/v1/checkpoints/{checkpoint_id}/content")).content)


def stored_statistics(model: onnx.ModelProto) -> tuple[Array, Array]:
    (norm,) = (node for node in model.graph.node if node.op_type == "BatchNormalization")
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return tensors[norm.input[3]], tensors[norm.input[4]]


async def test_recalibration_makes_a_new_checkpoint_with_the_statistics_of_the_data(tmp_path: Path) -> None:
    async with service(tmp_path) as client:
        checkpoint_id = await upload(client, GEMM)
        path = f"/v1/checkpoints/{checkpoint_id}"
        answer = await client.post(f"{path}/recalibrate", **npz(**{"x.0": ROWS[:9], "x.1": ROWS[9:]}))
        assert answer.status_code == 201, answer.text
        made, report = answer.json()["checkpoint"], answer.json()["report"]
        assert answer.headers["location"] == f"/v1/checkpoints/{made['id']}"
        assert made["filename"] == "checkpoint.recalibrated.onnx"
        assert (report["recalibrated"], report["recalibrated_from"], report["passes"]) == (1, checkpoint_id, 1)
        assert (report["batches"], report["layers"][0]["count"], report["kept"]) == (2, 40, [])
        assert (await client.get(f"/v1/checkpoints/{made['id']}/report")).json() == report
        assert (await client.get(f"{path}/content")).content == GEMM
        mean, var = stored_statistics(await download(client, made["id"]))
        weight = numpy_helper.to_array(onnx.load_from_string(GEMM).graph.initializer[0]).astype(np.float64)
        hidden = ROWS.astype(np.float64) @ weight
        np.testing.assert_allclose(mean, hidden.mean(0), atol=1e-6)
        np.testing.assert_allclose(var, hidden.var(0, ddof=1), rtol=1e-5)
        drift = (await client.post(f"/v1/checkpoints/{made['id']}/drift", **npz(x=ROWS))).json()
        assert (drift["verdict"], drift["checkpoint"], drift["threshold"]) == ("fresh", made["id"], 0.25)
        again = await client.post(f"/v1/checkpoints/{made['id']}/recalibrate", **npz(x=ROWS))
        assert (again.status_code, again.json()["checkpoint"]["id"]) == (200, made["id"])
        assert list((tmp_path / "data" / "staging").iterdir()) == []


async def test_content_that_was_kept_before_gets_the_report_of_the_new_run(client: httpx.AsyncClient) -> None:
    original = await upload(client, GEMM)
    data = npz(x=ROWS[::-1])
    first = (await client.post(f"/v1/checkpoints/{original}/recalibrate", **data)).json()
    made = first["checkpoint"]["id"]
    again = await client.post(f"/v1/checkpoints/{made}/recalibrate", **data)
    assert again.status_code == 200, again.text
    second = again.json()
    assert second["checkpoint"]["id"] == made
    report = (await client.get(f"/v1/checkpoints/{made}/report")).json()
    assert report == second["report"]
    assert (first["report"]["recalibrated_from"], report["recalibrated_from"]) == (original, made)


async def test_every_encoding_gives_the_same_checkpoint(client: httpx.AsyncClient) -> None:
    path = f"/v1/checkpoints/{await upload(client, GEMM)}/recalibrate"
    answers = [
        await client.post(path, json={"x": ROWS.tolist()}),
        await client.post(path, **npz(x=ROWS)),
        await client.post(path, **npz(**{"x.0": ROWS})),
        await client.post(path, **npy(ROWS)),
        await client.post(path, content=save({"x": ROWS}), headers={"content-type": SAFETENSORS}),
    ]
    assert {answer.status_code for answer in answers} <= {200, 201}
    assert len({answer.json()["checkpoint"]["id"] for answer in answers}) == 1


async def test_an_unaligned_and_a_fortran_ordered_tensor_are_taken(client: httpx.AsyncClient) -> None:
    path = f"/v1/checkpoints/{await upload(client, two_inputs())}/recalibrate"
    plain = await client.post(path, **npz(x=ROWS, z=2 * ROWS))
    fortran = await client.post(path, **npz(z=np.asfortranarray(2 * ROWS), x=ROWS))
    assert plain.json()["checkpoint"]["id"] == fortran.json()["checkpoint"]["id"]


async def test_recalibration_as_a_job(tmp_path: Path) -> None:
    async with service(tmp_path) as client:
        path = f"/v1/checkpoints/{await upload(client, hostile.small_conv())}/recalibrate"
        data = np.random.default_rng(1).standard_normal((4, 3, 5, 7)).astype(np.float32)
        request = npz(**{f"x.{number}": data[number : number + 1] for number in range(4)})
        direct = await client.post(path, **request)
        answer = await client.post(path, content=request["content"], headers=request["headers"] | ASYNC)
        assert answer.status_code == 202, answer.text
        job, seen = await watch(client, answer.headers["location"])
        assert (job["state"], job["operation"]) == ("succeeded", "recalibrate")
        assert job["result"] == direct.json()
        assert job["progress"] == {"step": "done", "done": 7, "total": 7}
        assert [step["done"] for step in seen] == sorted(step["done"] for step in seen)
        assert list((tmp_path / "data" / "staging").iterdir()) == []


async def test_overridable_statistics_are_recalibrated_only_when_asked(client: httpx.AsyncClient) -> None:
    model = onnx.load_from_string(GEMM)
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, 1, list(tensor.dims)))
    path = f"/v1/checkpoints/{await upload(client, model.SerializeToString())}/recalibrate"
    kept = await client.post(path, **npy(ROWS))
    assert (kept.status_code, "freeze_initializers" in kept.json()["report"]["kept"][0]["reason"]) == (200, True)
    frozen = await client.post(f"{path}?freeze_initializers=true", **npy(ROWS))
    assert frozen.json()["report"]["recalibrated"] == 1
    assert [entry["name"] for entry in frozen.json()["checkpoint"]["summary"]["inputs"]] == ["x"]


async def test_drift_tells_stale_from_fresh(client: httpx.AsyncClient) -> None:
    checkpoint_id = await upload(client, GEMM)
    made = (await client.post(f"/v1/checkpoints/{checkpoint_id}/recalibrate", **npy(ROWS))).json()["checkpoint"]["id"]
    stale = await client.post(f"/v1/checkpoints/{made}/drift", **npy(ROWS + 2))
    assert stale.status_code == 200
    content = stale.json()
    (layer,) = content["layers"]
    assert content["verdict"] == "stale"
    assert layer["distance"] > 0.25
    assert layer["normalization"] in content["sentence"]
    assert set(layer["worst_channels"][0]) >= {"channel", "mean_shift", "log_var_ratio", "distance"}
    patient = await client.post(f"/v1/checkpoints/{made}/drift?threshold={layer['distance'] + 0.01}", **npy(ROWS + 2))
    assert patient.json()["verdict"] == "fresh"
    answer = await client.post(
        f"/v1/checkpoints/{made}/drift", **(npy(ROWS) | {"headers": {"content-type": NPY} | ASYNC})
    )
    job, _ = await watch(client, answer.headers["location"])
    assert (job["operation"], job["result"]["verdict"]) == ("drift", "fresh")


async def test_frozen_statistics_that_are_no_numbers_are_null_in_the_answer(client: httpx.AsyncClient) -> None:
    broken = with_statistics(onnx.load_from_string(GEMM), mean=float("nan"), var=float("inf"))
    path = f"/v1/checkpoints/{await upload(client, broken.SerializeToString())}"
    (layer,) = (await client.post(f"{path}/drift", **npy(ROWS))).json()["layers"]
    assert (layer["distance"], layer["worst_channels"][0]["frozen_mean"]) == (None, None)
    assert (await client.post(f"{path}/recalibrate", **npy(ROWS))).json()["report"]["layers"][0]["mean_shift"] is None


async def test_nothing_to_recalibrate_is_a_200_with_the_reason(client: httpx.AsyncClient) -> None:
    training = await upload(client, hostile.training_norm())
    data = np.ones((2, 3, 4, 4), np.float32)
    answer = await client.post(f"/v1/checkpoints/{training}/recalibrate", **npy(data))
    assert (answer.status_code, answer.json()["checkpoint"]["id"]) == (200, training)
    report = answer.json()["report"]
    assert (report["recalibrated"], report["layers"]) == (0, [])
    assert "training_mode" in report["kept"][0]["reason"]
    assert "unchanged" in report["notes"][0]
    drift = (await client.post(f"/v1/checkpoints/{training}/drift", **npy(data))).json()
    assert (drift["verdict"], drift["layers"]) == ("unknown", [])


NAN = ROWS.copy()
NAN[3, 1] = np.nan


@pytest.mark.parametrize("operation", ["recalibrate", "drift"])
@pytest.mark.parametrize(
    ("request_", "status", "code", "words"),
    [
        pytest.param(npz(z=ROWS), 422, "parameter_invalid", ("z", "x, or", "number"), id="unknown-input"),
        pytest.param({"json": {"z": [[1, 2, 3]]}}, 422, "parameter_invalid", ("z", "x"), id="unknown-in-json"),
        pytest.param(npz(**{"x.1": ROWS}), 422, "parameter_invalid", ("x.0",), id="numbers-not-from-0"),
        pytest.param(npz(**{"x.0": ROWS, "x.2": ROWS}), 422, "parameter_invalid", ("x.1",), id="gap"),
        pytest.param(npz(**{"x.0": ROWS, "x": ROWS}), 422, "parameter_invalid", ("x",), id="numbered-and-not"),
        pytest.param(npz(**{"x.00": ROWS}), 422, "parameter_invalid", ("x.00",), id="two-spellings"),
        pytest.param(npz(), 422, "parameter_invalid", ("body", "no tensors"), id="no-tensors"),
        pytest.param({"json": {}}, 422, "parameter_invalid", ("body", "no tensors"), id="empty-object"),
        pytest.param({"content": b"", "headers": {"content-type": NPZ}}, 400, "payload_malformed", (), id="empty"),
        pytest.param(npz(x=ROWS[:0]), 422, "shape_mismatch", ("x", "element"), id="no-elements"),
        pytest.param(npz(x=ROWS[:, :2]), 422, "shape_mismatch", ("x", "[-1, 3]", "[40, 2]"), id="shape"),
        pytest.param(npz(x=ROWS[None]), 422, "shape_mismatch", ("x", "[1, 40, 3]"), id="rank"),
        pytest.param(npz(x=ROWS.astype(np.float64)), 422, "dtype_mismatch", ("float32", "float64"), id="datatype"),
        pytest.param(npz(x=ROWS[:1]), 422, "statistics_invalid", ("batchnormalization_1", "2"), id="one-value"),
        pytest.param(
            npz(**{"x.0": ROWS, "x.1": NAN}),
            422,
            "statistics_invalid",
            ("batchnormalization_1", "'hidden'", "batch 1", "NaN"),
            id="nan",
        ),
        pytest.param(
            {"content": b"1,2", "headers": {"content-type": "text/csv"}}, 415, "media_type_unsupported", (), id="csv"
        ),
    ],
)
async def test_refusals(
    client: httpx.AsyncClient, operation: str, request_: dict[str, Any], status: int, code: str, words: tuple[str, ...]
) -> None:
    path = f"/v1/checkpoints/{await upload(client, GEMM)}"
    before = (await client.get("/v1/checkpoints")).json()
    refused(await client.post(f"{path}/{operation}", **request_), status, code, *words)
    assert (await client.get("/v1/checkpoints")).json() == before


async def test_a_file_without_names_is_refused_for_two_inputs(client: httpx.AsyncClient) -> None:
    path = f"/v1/checkpoints/{await upload(client, two_inputs())}/recalibrate"
    refused(await client.post(path, **npy(ROWS)), 422, "parameter_invalid", "x, z", NPZ)
    refused(await client.post(path, **npz(x=ROWS)), 422, "parameter_invalid", "z: expected a tensor")
    answer = await client.post(path, **npz(**{"x.0": ROWS, "z.0": ROWS, "x.1": ROWS}))
    refused(answer, 422, "parameter_invalid", "z.1: expected a tensor")
    refused(await client.post(path, **npz(x=ROWS, z=ROWS[:7])), 422, "parameter_invalid", "the graph failed")


async def test_a_network_without_inputs_takes_no_batches(client: httpx.AsyncClient) -> None:
    net = Net()
    net.norm(net.op("RandomNormal", shape=[4, 3]), 3, output="y")
    path = f"/v1/checkpoints/{await upload(client, net.model({}, 'y').SerializeToString())}/drift"
    for request, words in ((npz(x=ROWS), ("x", "has none")), (npy(ROWS), ("body",)), (npz(), ("body", "no tensors"))):
        refused(await client.post(path, **request), 422, "parameter_invalid", *words)


@pytest.mark.parametrize("threshold", ["0", "-1", "nan", "inf", "much"])
async def test_an_impossible_threshold_is_refused(client: httpx.AsyncClient, threshold: str) -> None:
    path = f"/v1/checkpoints/{await upload(client, GEMM)}/drift?threshold={threshold}"
    refused(await client.post(path, **npy(ROWS)), 422, "parameter_invalid", "threshold")


@pytest.mark.parametrize("operation", ["recalibrate", "drift"])
async def test_an_unknown_checkpoint_is_a_404(client: httpx.AsyncClient, operation: str) -> None:
    answer = await client.post(f"/v1/checkpoints/{'0' * 64}/{operation}", **npy(ROWS))
    refused(answer, 404, "checkpoint_not_found")


async def test_bounds_are_settings(tmp_path: Path) -> None:
    async with service(tmp_path, max_calibration_batches=2, calibration_budget_bytes=600) as client:
        path = f"/v1/checkpoints/{await upload(client, GEMM)}"
        three = npz(**{f"x.{number}": ROWS[:2] for number in range(3)})
        answer = await client.post(f"{path}/drift", **three)
        refused(answer, 413, "payload_too_large", "NORMSERVE_MAX_CALIBRATION_BATCHES", "2", "3")
        large = await client.post(f"{path}/drift", **npy(np.tile(ROWS, (2, 1))))
        refused(large, 413, "payload_too_large", "NORMSERVE_CALIBRATION_BUDGET_BYTES")
        assert (await client.post(f"{path}/drift", **npy(ROWS))).status_code == 200
        assert list((tmp_path / "data" / "staging").iterdir()) == []


async def test_waiting_batches_count_until_their_job_has_ended(tmp_path: Path) -> None:
    async with service(tmp_path, calibration_budget_bytes=1500) as client:
        path = f"/v1/checkpoints/{await upload(client, hostile.endless_loop_before_norm())}/drift"
        data = npy(np.ones((1, 3, 8, 8), np.float32))
        headers = data["headers"] | ASYNC
        answer = await client.post(path, content=data["content"], headers=headers)
        assert answer.status_code == 202, answer.text
        refused(await client.post(path, **data), 429, "overloaded", "NORMSERVE_CALIBRATION_BUDGET_BYTES")
        await client.delete(answer.headers["location"])
        assert list((tmp_path / "data" / "staging").iterdir()) == []
        second = await client.post(path, content=data["content"], headers=headers)
        assert second.status_code == 202
        await client.delete(second.headers["location"])


async def test_batches_of_a_job_that_is_refused_are_let_go(tmp_path: Path) -> None:
    async with service(tmp_path, max_running_jobs=1) as client:
        endless = await upload(client, hostile.endless_loop_before_norm())
        running = await client.post(f"/v1/checkpoints/{endless}/fold", headers=ASYNC)
        data = npy(np.ones((1, 3, 8, 8), np.float32))
        path = f"/v1/checkpoints/{endless}/drift"
        answer = await client.post(path, content=data["content"], headers=data["headers"] | ASYNC)
        refused(answer, 429, "overloaded", "NORMSERVE_MAX_RUNNING_JOBS")
        await client.delete(running.headers["location"])
        assert list((tmp_path / "data" / "staging").iterdir()) == []


async def test_a_run_without_end_is_stopped_at_the_deadline(tmp_path: Path) -> None:
    async with service(tmp_path, sandbox_deadline_s=1.5) as client:
        path = f"/v1/checkpoints/{await upload(client, hostile.endless_loop_before_norm())}/recalibrate"
        answer = await client.post(path, **npy(np.ones((1, 3, 8, 8), np.float32)))
        refused(answer, 504, "deadline_exceeded", "NORMSERVE_SANDBOX_DEADLINE_S", "batches")
        assert list((tmp_path / "data" / "staging").iterdir()) == []


async def test_more_memory_than_allowed_is_refused(tmp_path: Path) -> None:
    async with service(tmp_path, sandbox_memory_bytes=600 * 1024**2) as client:
        net = Net()
        net.norm(net.op("Expand", "x", net.constant(np.array([1, 64, 64, 64], np.int64))), 64, output="y")
        checkpoint_id = await upload(client, net.model({"x": ["N", 64, 1, 1]}, "y").SerializeToString())
        path = f"/v1/checkpoints/{checkpoint_id}"
        answer = await client.post(f"{path}/drift", **npy(np.ones((1000, 64, 1, 1), np.float32)))
        refused(answer, 400, "checkpoint_invalid", "memory")


async def test_a_recalibrated_checkpoint_can_be_folded(client: httpx.AsyncClient) -> None:
    checkpoint_id = await upload(client, hostile.small_conv())
    data = np.random.default_rng(2).standard_normal((8, 3, 6, 6)).astype(np.float32)
    made = (await client.post(f"/v1/checkpoints/{checkpoint_id}/recalibrate", **npy(data))).json()["checkpoint"]["id"]
    report = (await client.post(f"/v1/checkpoints/{made}/fold")).json()["report"]
    assert (report["folded"], report["certificate"]["verdict"]) == (1, "equivalent")
    session = onnxruntime.InferenceSession((await client.get(f"/v1/checkpoints/{made}/content")).content)
    output = session.run(None, {"x": data})[0]
    scale = numpy_helper.to_array(onnx.load_from_string(hostile.small_conv()).graph.initializer[1])
    np.testing.assert_allclose(output.std((0, 2, 3)), np.abs(scale), rtol=1e-2)
