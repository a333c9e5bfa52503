"""What a fold writes into a state_dict: the operator's weight and bias, and what is left of the batch norm.

With scale = weight / sqrt(var + eps) and shift = bias - mean scale of the batch norm, W and b of the operator:

    deploy             W' = scale W                     b' = scale b + shift     the batch norm goes
    shape-preserving   W' = scale r W                   b' = scale r b           weight' = w, bias' = shift,
                                                                                 mean' = 0, var' = 1
    where w is sqrt(1 + eps) as it is rounded when stored (1 for a batch norm without weight), and
    r = sqrt(1 + eps) / w makes up for that; a batch norm without bias gets mean' = -shift r instead

All in float64 with one rounding; weights pass in blocks of rows, so that no tensor need fit into memory.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from normcore.checkpoints.safetensors_writer import Computed
from normcore.checkpoints.tensors import DATATYPES, TensorFile, read_rows, read_tensor
from normcore.folding.affine import Affine
from normcore.folding.filters import on_axis, on_groups, rows_of, transposed_rows
from normcore.folding.onnx.refusal import Refusal
from normcore.folding.onnx.rounding import Stored, store, store_scaled
from normcore.folding.report import TensorHash
from normcore.folding.state_dict.hashing import Hashing, bytes_of
from normcore.folding.state_dict.modules import Linear, Norm, join
from normcore.folding.state_dict.report import Form, Kind, Pairing
from normcore.folding.state_dict.weights import Exact, effective_weight, gain_axes, read_exact

_LAST_PLACE = 32.0  # of the largest float16
_BLOCK_ELEMENTS = 1 << 18  # handing smaller blocks to the thread that hashes costs more than hashing them

FORMULAS: dict[Form, str] = {
    "deploy": "W' = scale W; b' = scale b + shift",
    "shape_preserving": "W' = scale r W; b' = scale r b; weight' = w; bias' = shift; mean' = 0; var' = 1; "
    "r = sqrt(1 + eps) / w; without bias mean' = -shift r",
}


@dataclass(frozen=True, slots=True)
class Fold:
    """A batch norm that folds, into what, and by which map."""

    norm: Norm
    linear: Linear
    kind: Kind
    eps: float
    affine: Affine
    entry: Pairing


@dataclass(slots=True)
class Ledger:
    """What is learnt of the tensors of one fold while they are written."""

    before: dict[str, TensorHash] = field(default_factory=dict)
    after: dict[str, TensorHash] = field(default_factory=dict)
    residual: float = 0.0


@dataclass(frozen=True, slots=True)
class Rewrite:
    """One fold, ready to be written; `removed` are the keys that go."""

    fold: Fold
    tensors: dict[str, Computed]
    removed: tuple[str, ...]
    ledger: Ledger

    def sources(self, key: str) -> tuple[str, ...]:
        """Keys of the original that a new or changed tensor was computed from."""
        norm, linear = self.fold.norm, self.fold.linear
        statistics = tuple(own for own in norm.keys if own != norm.num_batches_tracked)
        if key in statistics:
            return statistics
        is_weight = key == linear.weight or key in linear.parts
        own = linear.parts if is_weight else (linear.bias,) if linear.bias else ()
        return (*own, *statistics)


def rewrite(file: BinaryIO, source: TensorFile, fold: Fold, *, form: Form) -> Rewrite:
    """All small tensors at once; the weight when it is written. Raises Refusal."""
    ledger = Ledger()
    pen = _Pen(source, ledger)
    for key in (*fold.norm.keys, fold.linear.bias):
        if key is not None and key != fold.norm.num_batches_tracked:
            pen.note(file, key)
    tensors: dict[str, Computed] = {}
    removed: tuple[str, ...] = ()
    factor = fold.affine.scale
    if form == "shape_preserving":
        weight = _stored_root(source, fold)
        ratio = np.sqrt(1 + fold.eps) / weight
        factor = fold.affine.scale * ratio
        _check_range(fold, factor)
        tensors |= _reduced_norm(pen, fold, weight, ratio)
        if fold.linear.bias is not None:
            tensors[fold.linear.bias] = pen.vector(fold.linear.bias, factor * _bias(file, source, fold), role="bias")
        weights = _shaped_weight(pen, fold, factor)
    else:
        bias = factor * _bias(file, source, fold) + fold.affine.shift
        key = join(fold.linear.name, "bias")
        datatype = source.tensors[fold.linear.bias].datatype if fold.linear.bias else fold.linear.datatype
        tensors[key] = pen.vector(key, bias, role="bias", datatype=datatype)
        gone = fold.linear.parts if fold.linear.recipe != "plain" else ()
        weights, removed = _plain_weight(pen, fold, factor), (*fold.norm.keys, *gone)
    return Rewrite(fold, tensors | weights, removed, ledger)


@dataclass(frozen=True, slots=True)
class Baking:
    """A reparametrized operator on its way to a plain weight."""

    linear: Linear
    weight: Computed
    ledger: Ledger


def bake(file: BinaryIO, source: TensorFile, linear: Linear) -> Baking:
    """The plain weight of a reparametrized operator; computed to see that it can be, and again to be written.

    Raises:
        Refusal: it cannot be computed or stored.
    """
    pen = _Pen(source, Ledger())

    def blocks(reading: BinaryIO) -> Iterator[NDArray[Any]]:
        exact = effective_weight(reading, source, linear)
        return pen.vector(linear.weight, exact, role="weight", datatype=linear.datatype).blocks(reading)

    blocks(file)
    return Baking(linear, Computed(linear.datatype, linear.shape, blocks), pen.ledger)


class _Pen:
    """Makes tensors and notes their hashes."""

    def __init__(self, source: TensorFile, ledger: Ledger) -> None:
        self.source = source
        self.ledger = ledger

    def note(self, file: BinaryIO, key: str) -> None:
        """The hash of a tensor as it was."""
        tensor = self.source.tensors[key]
        digest = hashlib.sha256(bytes_of(read_tensor(file, tensor))).hexdigest()
        self.ledger.before[key] = TensorHash(key, tensor.shape, tensor.datatype, digest)

    def vector(self, key: str, exact: Exact, *, role: str, datatype: str | None = None) -> Computed:
        """A tensor that is known at once. Raises Refusal."""
        name = datatype or self.source.tensors[key].datatype
        rows = exact.reshape(len(exact), -1) if role == "weight" else None
        stored = store(exact, DATATYPES[name], role, rows=rows)
        self.ledger.residual = max(self.ledger.residual, stored.residual)
        digest = hashlib.sha256(bytes_of(stored.array)).hexdigest()
        self.ledger.after[key] = TensorHash(key, exact.shape, name, digest)
        return Computed(name, exact.shape, lambda file: iter([stored.array]))


def _check_range(fold: Fold, factor: Exact) -> None:
    """Between operator and batch norm the shift is missing, which may be what keeps the sum finite. Raises Refusal."""
    if fold.linear.datatype != "F16":
        return
    is_reaching = (np.abs(factor) > 1) & (np.abs(fold.affine.shift) > _LAST_PLACE)
    if is_reaching.any():
        channel = int(np.argmax(is_reaching))
        raise Refusal(
            f"in float16 the output of {fold.linear.name}, {factor[channel]:.3g} times what it was in channel "
            f"{channel}, could overflow before its shift of {fold.affine.shift[channel]:.3g}; the deploy form cannot"
        )


def _stored_root(source: TensorFile, fold: Fold) -> float:
    """The weight of the reduced batch norm: sqrt(1 + eps) in its datatype, or the 1 of a norm without weight."""
    if fold.norm.weight is None:
        return 1.0
    dtype = source.tensors[fold.norm.weight].dtype
    return float(store(np.array([np.sqrt(1 + fold.eps)]), dtype, "batch norm weight").array[0])


def _reduced_norm(pen: _Pen, fold: Fold, weight: float, ratio: float) -> dict[str, Computed]:
    norm, shift = fold.norm, fold.affine.shift
    zeros = np.zeros(norm.num_features)
    tensors = {
        norm.running_mean: pen.vector(norm.running_mean, zeros if norm.bias else -shift * ratio, role="running mean"),
        norm.running_var: pen.vector(norm.running_var, zeros + 1, role="running variance"),
    }
    if norm.weight:
        tensors[norm.weight] = pen.vector(norm.weight, zeros + weight, role="batch norm weight")
    if norm.bias:
        tensors[norm.bias] = pen.vector(norm.bias, shift, role="batch norm bias")
    return tensors


def _bias(file: BinaryIO, source: TensorFile, fold: Fold) -> Exact:
    if fold.linear.bias is None:
        return np.zeros(fold.norm.num_features)
    bias = read_exact(file, source.tensors[fold.linear.bias])
    if bias.shape != (fold.norm.num_features,):
        raise Refusal(f"the bias of {fold.linear.name} has shape {list(bias.shape)}")
    return bias


def _plain_weight(pen: _Pen, fold: Fold, factor: Exact) -> dict[str, Computed]:
    linear = fold.linear

    def blocks(file: BinaryIO) -> Iterator[NDArray[Any]]:
        if linear.recipe != "plain":
            for part in linear.parts:
                pen.note(file, part)
            yield from scaled(iter([effective_weight(file, pen.source, linear)]))
            return
        tensor = pen.source.tensors[linear.weight]
        # A transposed convolution's output channel is spread over all rows; float16 wants to see it whole.
        is_whole = fold.kind == "conv_transpose"
        rows = iter([read_tensor(file, tensor)]) if is_whole else read_rows(file, tensor, elements=_BLOCK_ELEMENTS)
        yield from scaled(rows)

    def scaled(parts: Iterator[NDArray[Any]]) -> Iterator[NDArray[Any]]:
        row = 0
        with Hashing() as hashing:
            for part in parts:
                stored = _store_rows(part, fold, factor, row)
                pen.ledger.residual = max(pen.ledger.residual, stored.residual)
                hashing.update(part, stored.array)
                row += len(part)
                yield stored.array
            before, after = hashing.finish()
        if linear.recipe == "plain":
            name, datatype = linear.weight, linear.datatype
            pen.ledger.before[name] = TensorHash(name, linear.shape, datatype, before)
        pen.ledger.after[linear.weight] = TensorHash(linear.weight, linear.shape, linear.datatype, after)

    return {linear.weight: Computed(linear.datatype, linear.shape, blocks)}


def _store_rows(block: NDArray[Any], fold: Fold, factor: Exact, row: int) -> Stored:
    """A block of rows as it is written. Raises Refusal."""
    dtype = DATATYPES[fold.linear.datatype]
    try:
        if fold.kind == "conv_transpose":
            groups = fold.norm.num_features // block.shape[1]
            spread = on_groups(factor, block.shape, groups=groups)
            return store_scaled(block, spread, dtype, "weight", rows=partial(transposed_rows, groups=groups))
        own = on_axis(factor[row : row + len(block)], 0, rank=block.ndim)
        return store_scaled(block, own, dtype, "weight", rows=rows_of)
    except Refusal:
        if not np.isfinite(block).all():
            raise Refusal(f"the weight of {fold.linear.name} has NaN or infinite elements") from None
        raise


def _shaped_weight(pen: _Pen, fold: Fold, factor: Exact) -> dict[str, Computed]:
    """The weight in the form it has: a weight norm keeps its direction and takes the scale into its gain."""
    linear = fold.linear
    if linear.recipe == "plain":
        return _plain_weight(pen, fold, factor)
    axis = 1 if fold.kind == "conv_transpose" else 0
    gain = pen.source.tensors[linear.parts[0]]
    is_per_channel = (
        linear.recipe == "weight_norm"
        and linear.shape[axis] == fold.norm.num_features
        and axis not in gain_axes(gain.shape, linear.shape)
    )
    if not is_per_channel:
        raise Refusal(
            f"{linear.name} has a {linear.recipe.replace('_', ' ')} that cannot take a scale per output channel; "
            "the deploy form bakes it"
        )
    shape = [-1 if place == axis else 1 for place in range(len(linear.shape))]
    with pen.source.path.open("rb") as file:
        pen.note(file, linear.parts[0])
        exact = read_exact(file, gain) * factor.reshape(shape)
    return {linear.parts[0]: pen.vector(linear.parts[0], exact, role="gain")}


__all__ = ["FORMULAS", "Baking", "Fold", "Ledger", "Rewrite", "bake", "rewrite"]
