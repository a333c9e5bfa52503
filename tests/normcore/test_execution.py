"""Sessions: what they compute, how they fail, and that a run ends at its deadline."""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from normcore import execution
from normcore.errors import CheckpointError, DeadlineError, NormcoreError
from normcore.execution import ExecutionError, TensorInfo

Shape = Sequence[int | str]


def model(nodes: list[onnx.NodeProto], inputs: dict[str, tuple[int, Shape]], outputs: Mapping[str, int]) -> bytes:
    infos = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    results = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()]
    graph = helper.make_graph(nodes, "graph", infos, results)
    opsets = [helper.make_opsetid("", 17)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


def identity(kind: int, shape: Shape = ("n", 3)) -> bytes:
    return model([helper.make_node("Identity", ["x"], ["y"])], {"x": (kind, shape)}, {"y": kind})


def endless() -> bytes:
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["again"], ["go"]), helper.make_node("Add", ["state", "state"], ["next"])],
        "body",
        [
            value("i", TensorProto.INT64, []),
            value("again", TensorProto.BOOL, []),
            value("state", TensorProto.FLOAT, []),
        ],
        [value("go", TensorProto.BOOL, []), value("next", TensorProto.FLOAT, [])],
    )
    true = numpy_helper.from_array(np.array(True))
    nodes = [
        helper.make_node("Constant", [], ["true"], value=true),
        helper.make_node("Loop", ["", "true", "x"], ["y"], body=body),
    ]
    return model(nodes, {"x": (TensorProto.FLOAT, ())}, {"y": TensorProto.FLOAT})


@pytest.mark.parametrize("optimization", ["none", "basic", "extended", "all"])
def test_run_computes_all_outputs_in_order(optimization: execution.Optimization) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["z"])]
    file = model(nodes, {"x": (TensorProto.FLOAT, ("n",))}, {"y": TensorProto.FLOAT, "z": TensorProto.FLOAT})
    session = execution.open_session(file, threads=2, optimization=optimization)
    x = np.array([-1, 2], dtype=np.float32)
    y, z = execution.run(session, {"x": x}, deadline_s=5)
    np.testing.assert_array_equal(y, [0, 2])
    np.testing.assert_array_equal(z, [1, -2])
    (only,) = execution.run(session, {"x": x}, ["z"], deadline_s=5)
    np.testing.assert_array_equal(only, z)


def test_open_session_reads_a_path_and_leaves_the_graph_alone_when_asked(ocr_cls: Path) -> None:
    session = execution.open_session(ocr_cls, threads=2, optimization="none")
    x = np.random.default_rng(0).normal(size=(2, 3, 48, 192)).astype(np.float32)
    (y,) = execution.run(session, {"x": x}, deadline_s=30)
    np.testing.assert_allclose(y.sum(1), 1, rtol=1e-5)


def test_threads_of_a_session_sleep_between_runs() -> None:
    options = execution.open_session(identity(TensorProto.FLOAT), threads=2).get_session_options()
    for pool in ("intra_op", "inter_op"):
        assert options.get_session_config_entry(f"session.{pool}.allow_spinning") == "0"


FLOATS: dict[str, tuple[int, Any]] = {
    "fp16": (TensorProto.FLOAT16, np.float16),
    "bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
    "fp64": (TensorProto.DOUBLE, np.float64),
    "bool": (TensorProto.BOOL, np.bool_),
    "uint8": (TensorProto.UINT8, np.uint8),
}


@pytest.mark.parametrize(("kind", "dtype"), FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("rows", [0, 2])
def test_run_keeps_datatypes(kind: int, dtype: Any, rows: int) -> None:
    session = execution.open_session(identity(kind), threads=1)
    x = np.arange(3 * rows).reshape(3, rows).T.astype(dtype)
    (y,) = execution.run(session, {"x": x}, deadline_s=5)
    assert y.dtype == x.dtype
    assert y.shape == (rows, 3)
    assert y.tobytes() == x.tobytes()


def test_run_mixes_bfloat16_with_other_datatypes() -> None:
    nodes = [
        helper.make_node("Identity", ["x"], ["y"]),
        helper.make_node("Identity", ["a"], ["b"]),
    ]
    inputs: dict[str, tuple[int, Shape]] = {"x": (TensorProto.BFLOAT16, ()), "a": (TensorProto.FLOAT, ("n",))}
    outputs = {"y": TensorProto.BFLOAT16, "b": TensorProto.FLOAT}
    session = execution.open_session(model(nodes, inputs, outputs), threads=1)
    x = np.array(1.5, dtype=ml_dtypes.bfloat16)
    a = np.arange(8, dtype=np.float32)[::2]
    y, b = execution.run(session, {"x": x, "a": a}, deadline_s=5)
    assert (y.shape, float(y)) == ((), 1.5)
    np.testing.assert_array_equal(b, a)


def test_bfloat16_outputs_outlive_the_session() -> None:
    x = np.random.default_rng(0).normal(size=(400, 3)).astype(ml_dtypes.bfloat16)
    (y,) = execution.run(execution.open_session(identity(TensorProto.BFLOAT16), threads=1), {"x": x}, deadline_s=5)
    [np.ones((400, 3), dtype=ml_dtypes.bfloat16) for _ in range(50)]
    assert y.tobytes() == x.tobytes()


@pytest.mark.parametrize("elements", [["a", "é", ""], [b"a", "é".encode(), b""]], ids=["str", "bytes"])
def test_run_takes_strings_and_bytes(elements: list[Any]) -> None:
    session = execution.open_session(identity(TensorProto.STRING), threads=1)
    (y,) = execution.run(session, {"x": np.array([elements], dtype=object)}, deadline_s=5)
    assert y.tolist() == [["a", "é", ""]]


def test_run_refuses_bytes_that_are_no_text() -> None:
    session = execution.open_session(identity(TensorProto.STRING), threads=1)
    with pytest.raises(ExecutionError, match=r"input x: .*UTF-8"):
        execution.run(session, {"x": np.array([[b"\xff", b"", b""]], dtype=object)}, deadline_s=5)


@pytest.mark.alone
@pytest.mark.parametrize("deadline_s", [0.0, 0.05, 0.2])
def test_a_run_without_end_stops_at_its_deadline(deadline_s: float) -> None:
    session = execution.open_session(endless(), threads=1)
    start = time.monotonic()
    with pytest.raises(DeadlineError, match=f"deadline of {deadline_s:g} s"):
        execution.run(session, {"x": np.array(1, dtype=np.float32)}, deadline_s=deadline_s)
    assert time.monotonic() - start < deadline_s + 0.5


@pytest.mark.alone
def test_deadlines_stop_only_their_own_runs() -> None:
    session = execution.open_session(endless(), threads=1)
    ends: dict[float, float] = {}

    def stop(deadline_s: float) -> None:
        start = time.monotonic()
        with pytest.raises(DeadlineError):
            execution.run(session, {"x": np.array(1, dtype=np.float32)}, deadline_s=deadline_s)
        ends[deadline_s] = time.monotonic() - start

    runs = [threading.Thread(target=stop, args=(deadline_s,)) for deadline_s in (0.6, 0.1, 0.3)]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join()
    assert all(deadline_s <= end < deadline_s + 0.3 for deadline_s, end in ends.items())
    (y,) = execution.run(
        execution.open_session(identity(TensorProto.FLOAT), threads=1),
        {"x": np.ones((1, 3), dtype=np.float32)},
        deadline_s=5,
    )
    assert y.shape == (1, 3)


def test_runs_share_one_watchdog_thread() -> None:
    session = execution.open_session(identity(TensorProto.FLOAT), threads=1)
    x = np.ones((1, 3), dtype=np.float32)
    for _ in range(200):
        execution.run(session, {"x": x}, deadline_s=30)
    assert sum("watchdog" in thread.name for thread in threading.enumerate()) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_deadlines_hold_in_a_forked_child() -> None:
    session = execution.open_session(identity(TensorProto.FLOAT), threads=1)
    execution.run(session, {"x": np.ones((1, 3), dtype=np.float32)}, deadline_s=30)
    child = os.fork()
    if child == 0:
        try:
            execution.run(
                execution.open_session(endless(), threads=1), {"x": np.array(1, dtype=np.float32)}, deadline_s=0.1
            )
        except DeadlineError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_failing_graph_is_an_error_of_the_caller_in_one_sentence() -> None:
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    inputs: dict[str, tuple[int, Shape]] = {
        "x": (TensorProto.FLOAT, ("n",)),
        "shape": (TensorProto.INT64, ("rank",)),
    }
    session = execution.open_session(model(nodes, inputs, {"y": TensorProto.FLOAT}), threads=1)
    with pytest.raises(ExecutionError, match="cannot be reshaped") as caught:
        execution.run(session, {"x": np.ones(3, dtype=np.float32), "shape": np.array([2, 2])}, deadline_s=5)
    assert isinstance(caught.value, NormcoreError)
    assert "ONNXRuntimeError" not in str(caught.value)
    assert "onnxruntime/core" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("feeds", "reason"),
    [
        ({}, "missing"),
        ({"x": np.ones((1, 4), dtype=np.float32)}, "dimensions"),
        ({"x": np.ones((1, 3))}, "data type"),
        ({"x": np.ones((1, 3), dtype=np.complex64)}, "type"),
    ],
    ids=["missing", "shape", "datatype", "complex"],
)
def test_wrong_feeds_are_errors_of_the_caller(feeds: dict[str, Any], reason: str) -> None:
    session = execution.open_session(identity(TensorProto.FLOAT), threads=1)
    with pytest.raises(ExecutionError, match=reason):
        execution.run(session, feeds, deadline_s=5)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "No graph was found"),
        (b"\xff" * 20, "protobuf parsing failed"),
        (model([helper.make_node("Nope", ["x"], ["y"])], {"x": (1, ())}, {"y": 1}), "No Op registered for Nope"),
    ],
    ids=["empty", "noise", "unknown_operator"],
)
def test_what_cannot_be_loaded_is_a_checkpoint_error(
    content: bytes, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CheckpointError, match=f"onnxruntime cannot load the graph: .*{reason}"):
        execution.open_session(content, threads=1)
    assert capfd.readouterr() == ("", "")


def test_errors_do_not_name_the_path_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "secret.onnx"
    with pytest.raises(CheckpointError) as caught:
        execution.open_session(path, threads=1)
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(CheckpointError) as unreadable:
        execution.open_session(path, threads=1)
    assert "secret" not in str(caught.value) + str(unreadable.value)


def test_long_messages_are_cut() -> None:
    name = "N" * 5000
    with pytest.raises(CheckpointError) as caught:
        execution.open_session(model([helper.make_node(name, ["x"], ["y"])], {"x": (1, ())}, {"y": 1}), threads=1)
    assert len(str(caught.value)) < 400


def test_describe_speaks_the_words_of_the_protocol() -> None:
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.INT64), helper.make_node("Identity", ["s"], ["t"])]
    inputs: dict[str, tuple[int, Shape]] = {
        "x": (TensorProto.FLOAT16, ("n", 3)),
        "s": (TensorProto.STRING, (2,)),
    }
    file = model(nodes, inputs, {"y": TensorProto.INT64, "t": TensorProto.STRING})
    signature = execution.describe(execution.open_session(file, threads=1))
    assert signature.inputs == (TensorInfo("x", "FP16", (-1, 3)), TensorInfo("s", "BYTES", (2,)))
    assert signature.outputs == (TensorInfo("y", "INT64", (-1, 3)), TensorInfo("t", "BYTES", (2,)))


def test_describe_refuses_what_the_protocol_cannot_carry() -> None:
    nodes = [helper.make_node("SequenceConstruct", ["x"], ["y"])]
    sequence = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "graph", [helper.make_tensor_value_info("x", 1, [3])], [sequence])
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    with pytest.raises(CheckpointError, match=r"output y: seq\(tensor\(float\)\)"):
        execution.describe(execution.open_session(file, threads=1))
