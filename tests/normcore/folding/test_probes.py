"""Probe inputs: shapes that a graph accepts, sizes that cannot be confused, values of every kind."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from normcore import execution
from normcore.folding import probes
from normcore.folding.probes import Feeds, NoProbeError

Axes = list[int | str | None] | None


def graph_of(inputs: dict[str, tuple[int, Axes]], nodes: list[onnx.NodeProto] | None = None) -> ModelProto:
    infos = [helper.make_tensor_value_info(name, kind, axes) for name, (kind, axes) in inputs.items()]
    return helper.make_model(helper.make_graph(nodes or [], "graph", infos, []))


def anything(_: Feeds) -> None:
    return None


def find(inputs: dict[str, tuple[int, Axes]], accept: probes.Accept = anything) -> dict[str, tuple[int, ...]]:
    return probes.find_shapes(graph_of(inputs), accept, seed=0)


def test_free_axes_get_pairwise_distinct_sizes() -> None:
    (shape,) = find({"x": (1, ["n", 3, "h", "w"])}).values()
    assert shape[1] == 3
    assert len(set(shape)) == 4


def test_one_name_is_one_size_and_a_question_mark_is_no_name() -> None:
    shapes = find({"x": (1, ["n", "t"]), "y": (1, ["n", "t", "?", "?", None])})
    assert shapes["x"] == shapes["y"][:2]
    assert len(set(shapes["y"])) == 5


def test_fixed_axes_are_kept() -> None:
    assert find({"x": (1, [1, 3, 640, 640])}) == {"x": (1, 3, 640, 640)}


@pytest.mark.parametrize("is_initializer", [True, False], ids=["initializer", "constant_node"])
def test_sizes_differ_from_the_channels_of_normalizations(is_initializer: bool) -> None:
    gamma = numpy_helper.from_array(np.zeros(32), "gamma")
    nodes = [helper.make_node("BatchNormalization", ["x", "gamma", "b", "m", "v"], ["y"])]
    if not is_initializer:
        nodes.append(helper.make_node("Constant", [], ["gamma"], value=gamma))
    model = graph_of({"x": (1, ["n", "l", 64])}, nodes)
    if is_initializer:
        model.graph.initializer.append(gamma)
    _, length, _ = probes.find_shapes(model, anything, seed=0)["x"]
    assert length not in (32, 64)


def test_a_free_channel_axis_gets_a_size_of_the_weights() -> None:
    model = graph_of({"x": (1, ["n", "c"])})
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((37, 5)), "w"))
    accept = {37: None}
    shapes = probes.find_shapes(model, lambda feeds: accept.get(feeds["x"].shape[1], "no"), seed=0)
    assert shapes["x"][1] == 37


ACCEPTED: dict[str, Any] = {
    "multiples_of_64": lambda shape: shape[2] % 64 == shape[3] % 64 == 0,
    "large": lambda shape: min(shape[2:]) >= 200,
    "one_row": lambda shape: shape[0] == 1,
    "square": lambda shape: shape[2] == shape[3],
    "tiny": lambda shape: max(shape[2:]) <= 16,
}


@pytest.mark.parametrize("rule", ACCEPTED.values(), ids=ACCEPTED)
def test_sizes_are_searched_until_the_network_accepts_them(rule: Any) -> None:
    shapes = find({"x": (1, ["n", 3, "h", "w"])}, lambda feeds: None if rule(feeds["x"].shape) else "no")
    assert rule(shapes["x"])


def test_rows_of_two_inputs_become_equal_where_the_network_needs_it() -> None:
    def accept(feeds: Feeds) -> str | None:
        return None if len(feeds["a"]) == len(feeds["b"]) else "rows differ"

    shapes = find({"a": (1, [None, 4]), "b": (1, [None, 4])}, accept)
    assert shapes["a"] == shapes["b"]


def test_a_network_that_accepts_nothing_is_said_with_its_reason() -> None:
    with pytest.raises(NoProbeError, match=r"accepts none .* the last answer: too hot"):
        find({"x": (1, ["n", 3, "h", "w"])}, lambda _: "too hot")


def test_the_detector_gets_sizes_that_it_accepts(ocr_det: Path) -> None:
    session = execution.open_session(ocr_det, threads=2, optimization="none")

    def accept(feeds: Feeds) -> str | None:
        try:
            execution.run(session, feeds, deadline_s=10)
        except execution.ExecutionError as error:
            return str(error)
        return None

    shape = probes.find_shapes(onnx.load(ocr_det), accept, seed=0)["x"]
    assert shape[2] % 32 == shape[3] % 32 == 0
    assert shape[2] != shape[3]
    assert shape[2] * shape[3] < 20_000


REFUSED: dict[str, tuple[dict[str, tuple[int, Axes]], str]] = {
    "strings": ({"x": (TensorProto.STRING, ["n"])}, "input x: .*numbers"),
    "no_rank": ({"x": (1, None)}, "input x: .*rank"),
}


@pytest.mark.parametrize(("inputs", "reason"), REFUSED.values(), ids=REFUSED)
def test_inputs_that_cannot_be_probed_are_named(inputs: dict[str, tuple[int, Axes]], reason: str) -> None:
    with pytest.raises(NoProbeError, match=reason):
        find(inputs)


def test_sequences_are_no_probe_inputs() -> None:
    info = helper.make_tensor_sequence_value_info("x", 1, None)
    model = helper.make_model(helper.make_graph([], "graph", [info], []))
    with pytest.raises(NoProbeError, match="input x"):
        probes.read_inputs(model)


def test_inputs_with_an_initializer_need_no_probe() -> None:
    model = graph_of({"x": (1, ["n"]), "w": (1, [3])})
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(3, dtype=np.float32), "w"))
    assert [info.name for info in probes.read_inputs(model)] == ["x"]


def make(kind: str, *, seed: int = 0, datatype: int = TensorProto.FLOAT, nodes: Any = None) -> Any:
    inputs = probes.read_inputs(graph_of({"x": (datatype, [3, 4, 5, 6])}, nodes))
    return probes.make_probe(inputs, {"x": (3, 4, 5, 6)}, kind=kind, seed=seed)["x"]


def test_random_probes_are_normal_and_seeded() -> None:
    x = make("random")
    assert x.dtype == np.float32
    assert abs(x.mean()) < 0.2
    assert 0.8 < x.std() < 1.2
    np.testing.assert_array_equal(x, make("random"))
    assert not np.array_equal(x, make("random", seed=1))


def test_constant_probes_are_constant_in_each_channel_and_differ_between_them() -> None:
    x = make("constant").reshape(12, -1)
    assert (x == x[:, :1]).all()
    assert len(np.unique(x[:, 0])) == 12


def test_offset_probes_are_far_from_zero() -> None:
    x = make("large offset")
    assert x.min() > 5
    assert x.std() > 0.5


def test_impulse_probes_have_one_peak_per_channel_at_its_own_place() -> None:
    x = make("impulse").reshape(12, -1)
    assert ((x != 0).sum(axis=1) == 1).all()
    assert len(set(np.abs(x).argmax(axis=1).tolist())) > 6


def test_small_probes_are_small() -> None:
    assert np.abs(make("small")).max() < 1


@pytest.mark.parametrize("kind", probes.KINDS)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (3, 0, 2)], ids=str)
def test_every_kind_works_for_every_rank(kind: str, shape: tuple[int, ...]) -> None:
    inputs = probes.read_inputs(graph_of({"x": (TensorProto.FLOAT16, list(shape))}))
    x = probes.make_probe(inputs, {"x": shape}, kind=kind, seed=0)["x"]
    assert x.shape == shape
    assert x.dtype == np.float16


def test_integers_stay_below_the_table_they_look_up() -> None:
    model = graph_of({"x": (TensorProto.INT64, [50])}, [helper.make_node("Gather", ["table", "x"], ["y"])])
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((3, 2)), "table"))
    x = probes.make_probe(probes.read_inputs(model), {"x": (50,)}, kind="random", seed=0)["x"]
    assert sorted(set(x.tolist())) == [0, 1, 2]


def test_bytes_cover_their_range_and_booleans_both_values() -> None:
    pixels = make("random", datatype=TensorProto.UINT8)
    assert pixels.dtype == np.uint8
    assert pixels.max() > 200
    flags = make("random", datatype=TensorProto.BOOL)
    assert flags.dtype == np.bool_
    assert 0 < flags.mean() < 1
    assert make("random", datatype=TensorProto.INT64).max() < 8


def test_jitter_moves_floats_by_a_thousandth_and_leaves_integers() -> None:
    feeds: Feeds = {"x": np.full((200, 5), 3.0, dtype=np.float32), "ids": np.arange(4)}
    moved = probes.jitter(feeds, seed=1)
    assert moved["x"].dtype == np.float32
    assert 1e-3 < np.abs(moved["x"] - 3).max() < 3e-2
    np.testing.assert_array_equal(moved["ids"], feeds["ids"])
