"""Tensors through the file between the server and its child."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from service.engine.staged_tensors import lay_out, read


@pytest.mark.parametrize(
    "dtype", [np.bool_, np.uint8, np.int64, np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 4), (2, 3, 4, 5)], ids=str)
def test_batches_come_back_as_they_were(tmp_path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    batches = [
        {name: generator.integers(0, 2, shape).astype(dtype) for name in ("x", "z.1")},
        {"x": np.asfortranarray(generator.integers(0, 2, (3, 7)).astype(dtype))},
    ]
    places, chunks = lay_out(batches)
    path = tmp_path / "tensors"
    path.write_bytes(b"".join(chunks))
    found = read(path, json.loads(json.dumps(places)))
    assert [list(batch) for batch in found] == [["x", "z.1"], ["x"]]
    for batch, expected in zip(found, batches, strict=True):
        for name, array in batch.items():
            assert array.dtype == expected[name].dtype
            assert array.flags.aligned
            np.testing.assert_array_equal(array, expected[name])


def test_nothing_at_all_comes_back_as_nothing(tmp_path: Path) -> None:
    places, chunks = lay_out([{"x": np.empty((0, 3), np.float32)}])
    path = tmp_path / "tensors"
    path.write_bytes(b"".join(chunks))
    assert read(path, places)[0]["x"].shape == (0, 3)
