"""Models on a GPU: the results of the CPU."""

import base64
from pathlib import Path

import numpy as np
import pytest

from normcore import execution
from service.api.examples import CHECKPOINT, INFER, NETWORK
from service.engine.devices import providers_for
from tests.service.conftest import http, running_app, small_settings

pytestmark = pytest.mark.gpu


def test_a_network_gives_the_same_on_both_devices() -> None:
    images = np.random.default_rng(0).random((4, 2, 50), np.float32)
    found = []
    for device in ("cuda:0", "cpu"):
        session = execution.open_session(base64.b64decode(NETWORK), threads=1, providers=providers_for(device))
        found += execution.run(session, {"x": images}, deadline_s=60)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-6)


async def test_a_model_served_on_each_device_answers_the_same(tmp_path: Path) -> None:
    async with running_app(small_settings(tmp_path)) as app, http(app) as client:
        await client.post("/v1/checkpoints", content=base64.b64decode(NETWORK))
        answers = []
        for name, device in (("on-gpu", "cuda:0"), ("on-cpu", "cpu")):
            served = await client.post("/v1/models", json={"name": name, "checkpoint": CHECKPOINT, "device": device})
            assert served.status_code == 201, served.text
            assert served.json()["options"]["device"] == device
            answers.append((await client.post(f"/v2/models/{name}/infer", json=INFER)).json()["outputs"][0]["data"])
    assert answers[0] == pytest.approx(answers[1], rel=1e-5, abs=1e-6)
