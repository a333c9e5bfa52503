"""Normalization on a GPU agrees with the CPU, method by method, through the engine and over HTTP."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch

from normcore.normalization import METHODS
from service.api.examples import NORMALIZATIONS
from service.codecs import json_v1
from service.engine.normalization import NormalizationEngine
from service.engine.worker import Worker
from tests.service.conftest import http, running_app, small_settings

pytestmark = pytest.mark.gpu


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    worker = Worker("normalization", queue_size=4)
    yield worker
    await worker.close()


@pytest.mark.parametrize("name", METHODS)
async def test_both_devices_agree_on_the_example(worker: Worker, name: str) -> None:
    method = METHODS[name]
    request = json_v1.decode(orjson.dumps(NORMALIZATIONS[name]), tensor_names=[one.name for one in method.tensors])
    results = [
        await NormalizationEngine(method, worker, torch.device(device)).infer(
            request.tensors, outputs=request.outputs, parameters=request.parameters, deadline_s=60
        )
        for device in ("cpu", "cuda:0")
    ]
    assert list(results[0].outputs) == list(results[1].outputs)
    for output, on_cpu in results[0].outputs.items():
        np.testing.assert_allclose(results[1].outputs[output], on_cpu, rtol=2e-5, atol=2e-5, err_msg=output)


async def test_large_batch_norm_agrees_forward_and_backward(worker: Worker) -> None:
    generator = np.random.default_rng(0)
    tensors = {
        "input": (generator.standard_normal((16, 64, 56, 56)) + 3).astype(np.float32),
        "weight": generator.standard_normal(64).astype(np.float32),
        "grad_output": generator.standard_normal((16, 64, 56, 56)).astype(np.float32),
    }
    engine = NormalizationEngine(METHODS["batch_norm"], worker)
    results = [
        await engine.infer(tensors, parameters={"training": True, "device": device}, deadline_s=60)
        for device in ("cpu", "cuda:0")
    ]
    for output, on_cpu in results[0].outputs.items():
        scale = max(1.0, float(np.abs(on_cpu).max()))
        np.testing.assert_allclose(results[1].outputs[output], on_cpu, rtol=0, atol=1e-5 * scale, err_msg=output)


async def test_the_setting_and_the_parameter_choose_over_http(tmp_path: Path) -> None:
    document: dict[str, Any] = {"input": [[1, 2], [3, 4], [5, 9]], "training": True, "outputs": ["output"]}
    async with running_app(small_settings(tmp_path, device="cuda:0")) as app, http(app) as client:
        assert (await client.get("/v1/info")).json()["normalization_device"] == "cuda:0"
        answers = [
            (await client.post("/v1/normalizations/batch_norm", json=document | device)).json()
            for device in ({}, {"device": "cpu"})
        ]
    on_gpu, on_cpu = (answer["outputs"]["output"]["data"] for answer in answers)
    assert on_gpu == pytest.approx(on_cpu, abs=1e-5)
