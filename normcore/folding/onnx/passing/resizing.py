"""Resize and Upsample of the other axes: every result is a weighted mean of elements of its own channel."""

from typing import Any

from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.operands import attributes_of, check_given, is_narrow
from normcore.folding.onnx.passing.rule import Demands
from normcore.folding.onnx.refusal import Refusal

_SCALES_SLOT = {"Resize": 2, "Upsample": 1}
_OPSET_WITH_ROI = 11


class ResizeRule:
    """Everything passes where the channels are not resized and nothing is extrapolated."""

    operators = frozenset({"Resize", "Upsample"})

    def backward(self, graph: Graph, index: int, output: str, demand: Demand) -> Demands:
        _check(graph, index, demand)
        if is_narrow(graph, output) and _mode(graph, index) != "nearest":
            raise Refusal(f"in float16 the tensor before {label(graph.node(index))} could overflow")
        return [(0, demand)]

    def forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Demands:
        if slot != 0:
            raise Refusal(f"it is a parameter of {label(graph.node(index))}")
        _check(graph, index, demand)
        if is_narrow(graph, graph.node(index).output[0]) and _mode(graph, index) == "cubic":
            raise Refusal(f"in float16 what {label(graph.node(index))} overshoots could overflow")
        return [(0, demand)]


def _mode(graph: Graph, index: int) -> str:
    return str(attributes_of(graph.node(index)).get("mode", b"nearest").decode())


def _check(graph: Graph, index: int, demand: Demand) -> None:
    node = graph.node(index)
    attributes = attributes_of(node)
    if _mode(graph, index) not in ("nearest", "linear", "bilinear", "cubic"):
        raise Refusal(f"{label(node)} resizes in mode {_mode(graph, index)!r}, which no rule knows")
    if attributes.get("coordinate_transformation_mode", b"") == b"tf_crop_and_resize":
        raise Refusal(f"{label(node)} fills in a constant outside of its input")
    if _is_ambiguous(attributes):
        raise Refusal(f"{label(node)} moves what it does not resize by half, or not, as the runtime likes")
    if attributes.get("antialias", 0):
        raise Refusal(f"{label(node)} smooths, with weights that differ between runtimes")
    if not _leaves_alone(graph, index, demand.axis):
        check_given(graph, index)
        raise Refusal(f"{label(node)} may resize the axis of the channels")


def _is_ambiguous(attributes: dict[str, Any]) -> bool:
    """Position i of an axis of scale 1 comes from i + 1/2, which these roundings make i + 1; runtimes take i."""
    mode = attributes.get("coordinate_transformation_mode", b"")
    return mode == b"tf_half_pixel_for_nn" and attributes.get("nearest_mode", b"") in (b"ceil", b"round_prefer_ceil")


def _leaves_alone(graph: Graph, index: int, axis: int) -> bool:
    node = graph.node(index)
    attributes = attributes_of(node)
    if "axes" in attributes:
        rank = graph.rank(node.input[0])
        return rank is not None and axis not in {int(named) % rank for named in attributes["axes"]}
    before, after = graph.shape(node.input[0]), graph.shape(node.output[0])
    if "scales" in attributes:
        return bool(attributes["scales"][axis] == 1)
    slot = 1 if graph.opset < _OPSET_WITH_ROI else _SCALES_SLOT[node.op_type]
    if len(node.input) > slot and node.input[slot] and graph.is_constant(node.input[slot]):
        scales = graph.constant(node.input[slot])
        if scales.size:
            return bool(scales.reshape(-1)[axis] == 1)
    if before is None or after is None or len(before) <= axis or len(after) <= axis:
        return False
    return before[axis] is not None and before[axis] == after[axis]


__all__ = ["ResizeRule"]
