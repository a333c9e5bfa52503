"""A zero-padded Conv takes scale and shift of its input by one of two exact ways that its caller asked for.

`pad`: the input is padded with -shift / scale, which the map would make zero, and the convolution pads no more. ONNX
pads with one number; where channels need their own, a constant is added to a border of zeros, for a fixed size.

`map`: the convolution keeps its padding, and what it gives for the constant input `shift` is added to its output: a
bias per position, for a fixed size.
"""

import numpy as np

from normcore.folding.affine import Affine
from normcore.folding.filters import Exact, conv_constant, conv_response, on_groups, rows_of
from normcore.folding.onnx.constants import label
from normcore.folding.onnx.demand import Demand
from normcore.folding.onnx.edit import Edit, Padding
from normcore.folding.onnx.graph import Graph
from normcore.folding.onnx.operands import attributes_of, read_bias, read_weight
from normcore.folding.onnx.options import ZeroPadding
from normcore.folding.onnx.refusal import Refusal
from normcore.folding.onnx.rounding import Stored, store, store_scaled

PADDED = frozenset({"conv_padded", "conv_mapped"})

_OPSET_WITH_PAD_INPUTS = 11


def check_padded(graph: Graph, index: int, demand: Demand, *, option: ZeroPadding) -> Edit:
    """Take the map of a padded convolution's input. Raises Refusal."""
    node = graph.node(index)
    weight = read_weight(graph, index)
    if weight.dtype == np.float16:
        raise Refusal(f"the output of {label(node)} without its shift could overflow in float16")
    groups = int(attributes_of(node).get("group", 1))
    affine = demand.on(1, weight.shape[1] * groups, where=label(node))
    stored = store_scaled(
        weight, on_groups(affine.scale, weight.shape, groups=groups), weight.dtype, "weight", rows=rows_of
    )
    if option == "map":
        addend = _bias_map(graph, index, weight.astype(np.float64), affine.shift, groups)
        formula = "W'[:, i] = scale[i] W[:, i]; Add(W * shift), per position"
        return Edit(index, "conv_mapped", formula, {1: stored}, addend=store(addend[None], weight.dtype, "bias"))
    bias = read_bias(graph, index, channels=len(weight))
    bias = bias + conv_response(weight.astype(np.float64), affine.shift, groups=groups)
    return Edit(
        index,
        "conv_padded",
        "Pad(-shift / scale); W'[:, i] = scale[i] W[:, i]; b' = b + sum over i, k of W shift",
        {1: stored, 2: store(bias, weight.dtype, "bias")},
        padding=_padding(graph, index, affine, weight.dtype),
        resets=("pads", "auto_pad"),
    )


def _padding(graph: Graph, index: int, affine: Affine, dtype: np.dtype[np.floating]) -> Padding:
    if not affine.scale.all():
        raise Refusal(f"a channel of scale 0 has no number to pad {label(graph.node(index))} with")
    if graph.opset < _OPSET_WITH_PAD_INPUTS:
        raise Refusal(f"Pad of opset {graph.opset} is none that this rule writes")
    begins, ends, _ = _geometry(graph, index)
    pads = (0, 0, *begins, 0, 0, *ends)
    filling = -affine.shift / affine.scale
    if affine.is_uniform:
        return Padding(pads, store(filling[:1].reshape(()), dtype, "padding"), None)
    sizes = _sizes(graph, index)
    inside = np.pad(np.ones(sizes), list(zip(begins, ends, strict=True)))
    border = filling.reshape(-1, *[1] * len(sizes)) * (1 - inside)
    return Padding(pads, Stored(np.zeros((), dtype), 0.0), store(border[None], dtype, "padding"))


def _bias_map(graph: Graph, index: int, weight: Exact, shift: Exact, groups: int) -> Exact:
    attributes = attributes_of(graph.node(index))
    begins, ends, strides = _geometry(graph, index)
    dilations = attributes.get("dilations") or [1] * len(begins)
    masks = []
    for axis, size in enumerate(_sizes(graph, index)):
        taps = np.arange(weight.shape[2 + axis]) * dilations[axis]
        count = (size + begins[axis] + ends[axis] - taps[-1] - 1) // strides[axis] + 1
        places = taps[:, None] + np.arange(count) * strides[axis] - begins[axis]
        masks.append(((places >= 0) & (places < size)).astype(np.float64))
    return conv_constant(weight, shift, masks, groups=groups)


def _geometry(graph: Graph, index: int) -> tuple[list[int], list[int], list[int]]:
    """Pads at the begins, at the ends, and strides. Raises Refusal."""
    node = graph.node(index)
    attributes = attributes_of(node)
    if attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise Refusal(f"{label(node)} finds its padding at run time (auto_pad)")
    pads = [int(width) for width in attributes["pads"]]
    half = len(pads) // 2
    if min(pads) < 0:
        raise Refusal(f"{label(node)} pads with negative widths")
    return pads[:half], pads[half:], list(attributes.get("strides") or [1] * half)


def _sizes(graph: Graph, index: int) -> list[int]:
    """Sizes of the input's spatial axes. Raises Refusal."""
    node = graph.node(index)
    shape = graph.shape(node.input[0])
    sizes = [size for size in (shape or ())[2:] if size is not None]
    if shape is None or len(sizes) < len(shape) - 2:
        raise Refusal(f"the file leaves free at what size {label(node)} is padded")
    return sizes


__all__ = ["PADDED", "check_padded"]
