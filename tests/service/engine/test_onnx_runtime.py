import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto

from normcore.errors import CheckpointError, ParameterError
from normcore.execution import ExecutionError
from service.engine.onnx_runtime import OnnxEngine
from service.engine.protocol import Engine, InferResult, ModelOptions, ModelSpec, TensorSpec
from service.errors import DeadlineExceededError, ModelNotReadyError, OverloadedError
from tests.service.engine import graphs

Load = Callable[..., Awaitable[OnnxEngine]]


@pytest.fixture
async def load(tmp_path: Path) -> AsyncIterator[Load]:
    engines = []

    async def load(model: ModelProto, *, queue_size: int = 4, has_arena: bool = True, **options: Any) -> OnnxEngine:
        engine = await OnnxEngine.load(
            graphs.save(model, tmp_path),
            name="m",
            version="3",
            threads=1,
            queue_size=queue_size,
            deadline_s=20,
            max_batch_bytes=1_000_000,
            has_arena=has_arena,
            options=ModelOptions(**options),
        )
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


@pytest.mark.alone
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


@pytest.mark.parametrize("has_arena", [True, False])
async def test_a_session_keeps_memory_between_runs_where_it_may(load: Load, has_arena: bool) -> None:
    engine = await load(graphs.doubling(), has_arena=has_arena)
    assert engine._session is not None
    assert engine._session.get_session_options().enable_cpu_mem_arena == has_arena
    result = await engine.infer({"x": np.ones((1, 3), np.float32)}, deadline_s=10)
    np.testing.assert_array_equal(result.outputs["sum"], [[2, 2, 2]])


async def test_load_of_a_broken_file_names_the_reason_and_leaves_no_thread(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"\x08\x09nonsense")
    await asyncio.to_thread(bool)  # starts the event loop's own thread
    before = threading.active_count()
    with pytest.raises(CheckpointError, match="onnxruntime cannot load the graph"):
        await OnnxEngine.load(
            path,
            name="m",
            version="1",
            threads=1,
            queue_size=1,
            deadline_s=20,
            max_batch_bytes=1,
            has_arena=True,
            options=ModelOptions(),
        )
    await asyncio.sleep(0.05)
    assert threading.active_count() == before


async def test_load_stays_off_the_event_loop(tmp_path: Path) -> None:
    path = graphs.save(graphs.doubling(), tmp_path)
    with pytest.raises(DeadlineExceededError):
        await OnnxEngine.load(
            path,
            name="m",
            version="1",
            threads=1,
            queue_size=1,
            deadline_s=0,
            max_batch_bytes=1,
            has_arena=True,
            options=ModelOptions(),
        )


async def test_requests_that_wait_run_together_and_each_gets_its_rows(load: Load) -> None:
    engine = await load(graphs.doubling(), max_batch_size=8, max_queue_delay_us=200_000, queue_size=20)
    inputs = [np.full((rows, 3), rows, np.float32) for rows in (1, 2, 5)]
    results = await asyncio.gather(*(engine.infer({"x": x}, outputs=["sum"], deadline_s=10) for x in inputs))

    for x, result in zip(inputs, results, strict=True):
        np.testing.assert_array_equal(result.outputs["sum"], 2 * x)
    assert [(result.rows, result.batch_rows) for result in results] == [(1, 8), (2, 8), (5, 8)]
    assert sum(result.is_first for result in results) == 1


async def test_requests_of_other_outputs_or_trailing_shapes_or_wishes_run_apart(load: Load) -> None:
    engine = await load(graphs.free_columns(), max_batch_size=8, queue_size=20)
    x = np.ones((1, 3), np.float32)
    wide = np.ones((1, 4), np.float32)
    results = await asyncio.gather(
        engine.infer({"x": x}, deadline_s=10),
        engine.infer({"x": wide}, deadline_s=10),
        engine.infer({"x": x}, outputs=["y"], deadline_s=10),
        engine.infer({"x": x}, deadline_s=10, is_alone=True),
        engine.infer({"x": np.ones((9, 3), np.float32)}, deadline_s=10),
    )
    assert results[3].batch_rows == 1
    assert results[4].batch_rows == 9
    assert results[1].outputs["y"].shape == (1, 4)


async def test_a_batch_that_fails_is_run_request_by_request(load: Load) -> None:
    engine = await load(graphs.lookup(rows=3), max_batch_size=8, max_queue_delay_us=200_000, queue_size=20)
    good, bad = np.array([[2]], np.int64), np.array([[7]], np.int64)
    first, failed, third = await asyncio.gather(
        *(engine.infer({"x": x}, deadline_s=10) for x in (good, bad, good)), return_exceptions=True
    )
    assert isinstance(failed, ExecutionError)
    for answer in (first, third):
        assert isinstance(answer, InferResult)
        assert answer.outputs["y"].shape[0] == 1


async def test_batching_needs_a_free_first_axis(load: Load) -> None:
    for model in (graphs.free_rank(), graphs.fixed_rows()):
        with pytest.raises(ParameterError, match="max_batch_size"):
            await load(model, max_batch_size=8)


async def test_warm_up_runs_before_the_model_is_there_and_names_what_does_not_fit(load: Load) -> None:
    assert await load(graphs.doubling(), warmup=({"x": [2, 3]},))
    with pytest.raises(CheckpointError, match="warmup of shapes"):
        await load(graphs.doubling(), warmup=({"x": [2, 4]},))
    with pytest.raises(ParameterError, match="warmup: expected a shape for each of x, received y"):
        await load(graphs.doubling(), warmup=({"y": [2, 3]},))


@pytest.mark.alone
async def test_instances_compute_at_the_same_time(load: Load) -> None:
    engine = await load(graphs.endless_loop(), instances=2)
    x = np.ones((1, 3), np.float32)
    started = time.monotonic()
    answers = await asyncio.gather(*(engine.infer({"x": x}, deadline_s=0.5) for _ in range(2)), return_exceptions=True)
    assert all(isinstance(answer, DeadlineExceededError) for answer in answers)
    assert time.monotonic() - started < 0.9
