"""DepthToSpace and SpaceToDepth: blocks of channels become blocks of positions, in one of two orders.

With C channels on the wide side and blocks of r, the deep side has C r^2 of them. Deep channel i C + c belongs to wide
channel c in the order DCR (ONNX's default), deep channel c r^2 + i in the order CRD (torch's PixelShuffle).
"""

import numpy as np
from numpy.typing import NDArray

from normcore.folding.affine import Affine
from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.graph import Graph, label
from normcore.folding.onnx.operands import attributes_of
from normcore.folding.onnx.passing.rule import Demands
from normcore.folding.onnx.refusal import Refusal


class DepthToSpaceRule:
    """Backward each map repeats; forward all channels of a block need the same one."""

    operators = frozenset({"DepthToSpace"})

    def backward(self, graph: Graph, index: int, output: str, demand: Demand) -> Demands:
        return [(0, demand.mapped(demand.affine.take(_owners(graph, index, demand, demand.channels))))]

    def forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Demands:
        return [(0, demand.mapped(_gather(graph, index, demand)))]


class SpaceToDepthRule:
    """The other way round."""

    operators = frozenset({"SpaceToDepth"})

    def backward(self, graph: Graph, index: int, output: str, demand: Demand) -> Demands:
        return [(0, demand.mapped(_gather(graph, index, demand)))]

    def forward(self, graph: Graph, index: int, slot: int, demand: Demand) -> Demands:
        return [(0, demand.mapped(demand.affine.take(_owners(graph, index, demand, demand.channels))))]


def _owners(graph: Graph, index: int, demand: Demand, wide: int) -> NDArray[np.integer]:
    """By deep channel, the wide one it belongs to. Raises Refusal."""
    node = graph.node(index)
    if demand.axis != 1:
        raise Refusal(f"{label(node)} moves the axis of the channels apart")
    attributes = attributes_of(node)
    block = int(attributes["blocksize"]) ** 2
    if attributes.get("mode", b"DCR") == b"CRD":
        return np.repeat(np.arange(wide), block)
    return np.tile(np.arange(wide), block)


def _gather(graph: Graph, index: int, demand: Demand) -> Affine:
    """The map of each wide channel. Raises Refusal where its deep channels have several."""
    node = graph.node(index)
    block = int(attributes_of(node)["blocksize"]) ** 2
    if demand.channels % block:
        raise Refusal(f"{demand.channels} channels do not divide into the blocks of {label(node)}")
    wide = demand.channels // block
    owners = _owners(graph, index, demand, wide)
    first = np.array([int(np.argmax(owners == channel)) for channel in range(wide)], np.int64)
    gathered = demand.affine.take(first)
    again = gathered.take(owners)
    if not (np.array_equal(again.scale, demand.affine.scale) and np.array_equal(again.shift, demand.affine.shift)):
        raise Refusal(f"the channels that {label(node)} interleaves have different maps")
    return gathered


__all__ = ["DepthToSpaceRule", "SpaceToDepthRule"]
