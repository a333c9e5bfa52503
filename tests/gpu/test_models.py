"""Models on a GPU: the results of the CPU."""

import base64

import numpy as np
import pytest

from normcore import execution
from service.api.examples import NETWORK
from service.engine.devices import providers_for

pytestmark = pytest.mark.gpu


def test_a_network_gives_the_same_on_both_devices() -> None:
    images = np.random.default_rng(0).random((4, 2, 50), np.float32)
    found = []
    for device in ("cuda:0", "cpu"):
        session = execution.open_session(base64.b64decode(NETWORK), threads=1, providers=providers_for(device))
        found += execution.run(session, {"x": images}, deadline_s=60)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-6)
