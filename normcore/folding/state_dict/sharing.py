"""Tensors under several names: a module that is registered twice, or a weight that two modules share.

A PyTorch checkpoint says so by its storages. A safetensors file cannot: equal bytes then stand for one tensor, unless
all elements are equal, as fresh parameters are.
"""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from normcore.checkpoints.tensors import Tensor, TensorFile, read_rows
from normcore.folding.state_dict.rewrite import Fold

_SAMPLE_BYTES = 4096
_BLOCK_ELEMENTS = 1 << 18


@dataclass(frozen=True, slots=True)
class Sharing:
    """By key, the class of keys that name one tensor; and the keys whose bytes others use in part."""

    twins: Mapping[str, tuple[str, ...]]
    overlapping: Mapping[str, str]

    def of(self, key: str) -> tuple[str, ...]:
        """All names of a tensor, its own included."""
        return self.twins.get(key, (key,))


def find_sharing(file: TensorFile, keys: Collection[str]) -> Sharing:
    """Which tensors share a tensor with one of `keys`: those of weights and of batch norms."""
    same: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for key, tensor in file.tensors.items():
        if tensor.elements:
            same[tensor.offset, tensor.datatype, tensor.shape, tensor.strides].append(key)
    twins = {key: tuple(group) for group in same.values() if len(group) > 1 for key in group}
    overlapping = _overlapping(file.tensors)
    if file.format == "safetensors":
        with file.path.open("rb") as reading:
            for group in _equal(reading, file.tensors, keys):
                twins |= dict.fromkeys(group, group)
    return Sharing(twins, overlapping)


def inconsistent(folds: Mapping[str, Fold], sharing: Sharing) -> dict[str, str]:
    """By batch norm, why tensors with several names forbid its fold.

    A shared weight may be rewritten if every name of it takes the same scale; a batch norm may go if it goes under
    all its names.
    """
    owners: dict[str, list[Fold]] = defaultdict(list)
    for fold in folds.values():
        for key in (*fold.linear.keys, *fold.norm.keys):
            owners[key].append(fold)
    problems = {}
    for name, fold in folds.items():
        problem = _conflict(fold, owners, sharing)
        if problem is not None:
            problems[name] = problem
    return problems


def _conflict(fold: Fold, owners: Mapping[str, Sequence[Fold]], sharing: Sharing) -> str | None:
    rivals = [other for key in fold.linear.keys for other in owners[key] if other is not fold]
    if rivals:
        return f"{fold.linear.name} would also take {rivals[0].norm.name}"
    tracked = fold.norm.num_batches_tracked
    for key in (*fold.linear.keys, *fold.norm.keys):
        if key in sharing.overlapping and key != tracked:
            return f"{key} shares a part of its bytes with {sharing.overlapping[key]}; save the model with .clone()s"
        for twin in sharing.of(key) if key != tracked else ():
            partner = next(iter(owners.get(twin, ())), None)
            if partner is None:
                return f"{key} is the same tensor as {twin}, which takes no batch norm"
            if key in fold.linear.keys and not _acts_alike(fold, partner):
                return f"{key} is the same tensor as {twin}, which takes another batch norm"
    return None


def _acts_alike(fold: Fold, other: Fold) -> bool:
    return (
        fold.kind == other.kind
        and fold.eps == other.eps
        and np.array_equal(fold.affine.scale, other.affine.scale)
        and np.array_equal(fold.affine.shift, other.affine.shift)
    )


def _overlapping(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """By key, another one whose bytes begin inside its own without being the same tensor."""
    found: dict[str, str] = {}
    widest: tuple[int, str] | None = None
    for key in sorted(tensors, key=lambda key: (tensors[key].offset, -tensors[key].span_bytes)):
        tensor = tensors[key]
        if not tensor.elements:
            continue
        if widest is not None and tensor.offset < widest[0]:
            other = tensors[widest[1]]
            if (other.offset, other.shape, other.strides) != (tensor.offset, tensor.shape, tensor.strides):
                found[key], found[widest[1]] = widest[1], key
        end = tensor.offset + tensor.span_bytes
        if widest is None or end > widest[0]:
            widest = end, key
    return found


def _equal(file: BinaryIO, tensors: Mapping[str, Tensor], keys: Iterable[str]) -> Iterable[tuple[str, ...]]:
    """Groups of keys with the same bytes; most tensors differ in the first few."""
    by_sample: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for key in keys:
        tensor = tensors[key]
        file.seek(tensor.offset)
        by_sample[tensor.datatype, tensor.shape, file.read(min(_SAMPLE_BYTES, tensor.nbytes))].append(key)
    for alike in by_sample.values():
        if len(alike) < 2:
            continue
        by_hash: dict[bytes, list[str]] = defaultdict(list)
        for key in alike:
            digest, is_constant = _digest(file, tensors[key])
            if not is_constant:
                by_hash[digest].append(key)
        yield from (tuple(group) for group in by_hash.values() if len(group) > 1)


def _digest(file: BinaryIO, tensor: Tensor) -> tuple[bytes, bool]:
    digest, is_constant, first = hashlib.sha256(), True, None
    for block in read_rows(file, tensor, elements=_BLOCK_ELEMENTS) if tensor.shape else ():
        digest.update(block.reshape(-1).view(np.uint8).data)
        first = block.reshape(-1)[0] if first is None else first
        is_constant = is_constant and bool((block == first).all())
    return digest.digest(), is_constant


__all__ = ["Sharing", "find_sharing", "inconsistent"]
