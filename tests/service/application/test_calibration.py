"""Names of tensors to batches of inputs."""

import numpy as np
import pytest

from service.application.calibration import into_batches
from service.errors import PayloadTooLargeError

ROWS = np.ones((2, 3), np.float32)


def test_an_input_that_looks_numbered_is_itself() -> None:
    both = {"x": ROWS, "x.0": ROWS}
    assert into_batches(both, ["x", "x.0"], limit=1) == [both]
    with pytest.raises(PayloadTooLargeError):
        into_batches({"x.0.0": ROWS, "x.0.1": ROWS}, ["x.0"], limit=1)
