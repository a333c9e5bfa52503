import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto

from normcore.errors import CheckpointError
from normcore.execution import ExecutionError
from service.engine.onnx_runtime import OnnxEngine
from service.engine.protocol import Engine, ModelSpec, TensorSpec
from service.errors import DeadlineExceededError, ModelNotReadyError, OverloadedError
from tests.service.engine import graphs

Load = Callable[..., Awaitable[OnnxEngine]]


@pytest.fixture
async def load(tmp_path: Path) -> AsyncIterator[Load]:
    engines = []

    async def load(model: ModelProto, *, queue_size: int = 4) -> OnnxEngine:
        path = graphs.save(model, tmp_path)
        engine = await OnnxEngine.load(path, name="m", version="3", threads=1, queue_size=queue_size, deadline_s=20)
        engines.append(engine)
        return engine

    yield load
    for engine in engines:
        await engine.close()


async def test_spec_describes_the_graph(load: Load) -> None:
    engine: Engine = await load(graphs.doubling())

    assert engine.spec == ModelSpec(
        name="m",
        version="3",
        platform="onnxruntime_onnx",
        backend="onnxruntime",
        inputs=(TensorSpec("x", "FP32", (-1, 3)),),
        outputs=(TensorSpec("sum", "FP32", (-1, 3)), TensorSpec("negative", "FP32", (-1, 3))),
    )


async def test_infer_computes_the_outputs_asked_for_in_their_order(load: Load) -> None:
    engine = await load(graphs.doubling())
    x = np.arange(6, dtype=np.float32).reshape(2, 3)

    both = await engine.infer({"x": x}, deadline_s=10)
    one = await engine.infer({"x": x}, outputs=["negative"], deadline_s=10)

    assert list(both.outputs) == ["sum", "negative"]
    np.testing.assert_array_equal(both.outputs["sum"], 2 * x)
    assert list(one.outputs) == ["negative"]
    np.testing.assert_array_equal(one.outputs["negative"], -x)
    assert both.queue_ns > 0
    assert both.compute_ns > 0


async def test_input_of_free_rank_is_left_to_the_engine(load: Load) -> None:
    engine = await load(graphs.free_rank())

    assert engine.spec.is_checked_by_engine
    result = await engine.infer({"x": np.ones((1, 2, 1), dtype=np.float32)}, deadline_s=10)
    np.testing.assert_array_equal(result.outputs["y"], -np.ones((1, 2, 1)))
    with pytest.raises(ExecutionError, match="int64"):
        await engine.infer({"x": np.ones(2, dtype=np.int64)}, deadline_s=10)


async def test_strings_go_in_and_out_as_bytes(load: Load) -> None:
    engine = await load(graphs.text())
    words = np.array(["grün".encode(), b"", b"plain"], dtype=object)

    result = await engine.infer({"x": words}, deadline_s=10)

    assert result.outputs["y"].tolist() == words.tolist()


async def test_strings_that_are_not_utf8_are_refused_by_name(load: Load) -> None:
    engine = await load(graphs.text())
    with pytest.raises(ExecutionError, match=r"x: .*UTF-8"):
        await engine.infer({"x": np.array([b"\xff"], dtype=object)}, deadline_s=10)


async def test_endless_graph_stops_at_the_deadline_and_frees_the_worker(load: Load) -> None:
    engine = await load(graphs.endless_loop(), queue_size=1)
    x = {"x": np.ones((1, 3), dtype=np.float32)}
    began = time.monotonic()
    with pytest.raises(DeadlineExceededError, match="model m version 3"):
        await engine.infer(x, deadline_s=0.3)
    with pytest.raises(DeadlineExceededError):  # runs only if the first run was stopped
        await engine.infer(x, deadline_s=0.3)
    await engine.close()
    assert time.monotonic() - began < 10


async def test_time_in_the_queue_counts_against_the_deadline(load: Load) -> None:
    engine = await load(graphs.endless_loop())
    x = {"x": np.ones((1, 3), dtype=np.float32)}
    began = time.monotonic()
    results = await asyncio.gather(
        engine.infer(x, deadline_s=1.0), engine.infer(x, deadline_s=1.1), return_exceptions=True
    )
    await engine.close()  # returns when the last run has stopped

    assert [type(result) for result in results] == [DeadlineExceededError] * 2
    assert time.monotonic() - began < 1.9  # 2.1 if the second run began its time anew


async def test_full_queue_refuses(load: Load) -> None:
    engine = await load(graphs.endless_loop(), queue_size=1)
    x = {"x": np.ones((1, 3), dtype=np.float32)}
    results = await asyncio.gather(*(engine.infer(x, deadline_s=0.3) for _ in range(3)), return_exceptions=True)

    kinds = sorted(type(result).__name__ for result in results)
    assert kinds == ["DeadlineExceededError", "DeadlineExceededError", "OverloadedError"]
    assert any(isinstance(result, OverloadedError) for result in results)


async def test_graph_that_fails_on_its_inputs_says_so(load: Load) -> None:
    engine = await load(graphs.doubling())
    with pytest.raises(ExecutionError, match="the graph failed"):
        await engine.infer({"x": np.ones((1, 4), dtype=np.float32)}, deadline_s=10)
    assert (await engine.infer({"x": np.ones((1, 3), dtype=np.float32)}, deadline_s=10)).outputs


async def test_closed_engine_refuses(load: Load) -> None:
    engine = await load(graphs.doubling())
    await engine.close()
    await engine.close()
    with pytest.raises(ModelNotReadyError, match="model m version 3"):
        await engine.infer({"x": np.ones((1, 3), dtype=np.float32)}, deadline_s=10)


async def test_load_of_a_broken_file_names_the_reason_and_leaves_no_thread(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"\x08\x09nonsense")
    before = threading.active_count()
    with pytest.raises(CheckpointError, match="onnxruntime cannot load the graph"):
        await OnnxEngine.load(path, name="m", version="1", threads=1, queue_size=1, deadline_s=20)
    await asyncio.sleep(0.05)
    assert threading.active_count() == before


async def test_load_stays_off_the_event_loop(tmp_path: Path) -> None:
    path = graphs.save(graphs.doubling(), tmp_path)
    with pytest.raises(DeadlineExceededError):
        await OnnxEngine.load(path, name="m", version="1", threads=1, queue_size=1, deadline_s=0)
