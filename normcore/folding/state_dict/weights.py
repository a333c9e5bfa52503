"""The weight that a linear operator computes with, where it is stored as the parts of a reparametrization.

    weight norm:    W = g v / |v|        |v| over every axis on which g has one element
    spectral norm:  W = W_orig / sigma   sigma = u^T W_mat v with the stored u and v, as in inference mode

W_mat is W_orig with the axis that belongs to u in front, flattened to a matrix. All in float64.
"""

from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from normcore.checkpoints.tensors import Tensor, TensorFile, read_tensor
from normcore.folding.onnx.refusal import Refusal
from normcore.folding.state_dict.modules import Linear

Exact = NDArray[np.float64]

_CONVERGED = 0.999  # of |W v|: what u^T W v reaches after training; an unrelated u reaches far less


def read_exact(file: BinaryIO, tensor: Tensor) -> Exact:
    """A tensor in float64."""
    return read_tensor(file, tensor).astype(np.float64)


def effective_weight(file: BinaryIO, source: TensorFile, linear: Linear) -> Exact:
    """The weight in float64, whatever its recipe. Raises Refusal."""
    parts = [read_exact(file, source.tensors[part]) for part in linear.parts]
    if linear.recipe == "plain":
        return parts[0]
    if linear.recipe == "weight_norm":
        return _weight_norm(*parts)
    return _spectral_norm(*parts)


def _weight_norm(gain: Exact, direction: Exact) -> Exact:
    axes = gain_axes(gain.shape, direction.shape)
    length = np.sqrt((direction * direction).sum(axis=axes, keepdims=True))
    if not (length > 0).all():
        raise Refusal("its weight norm divides by the length of a direction that is zero")
    return np.asarray(direction * (gain / length))


def gain_axes(gain: tuple[int, ...], direction: tuple[int, ...]) -> tuple[int, ...]:
    """Axes that the length of the direction is taken over. Raises Refusal."""
    if not gain:  # dim=None: one length for the whole tensor
        return tuple(range(len(direction)))
    kept = [axis for axis, size in enumerate(gain) if size != 1]
    if len(gain) != len(direction) or len(kept) > 1 or any(gain[axis] != direction[axis] for axis in kept):
        raise Refusal(f"its weight norm has a gain of shape {list(gain)} for a direction of shape {list(direction)}")
    return tuple(axis for axis in range(len(direction)) if axis not in kept)


def _spectral_norm(weight: Exact, left: Exact, right: Exact) -> Exact:
    fits = []
    for axis in range(min(weight.ndim, 2)):
        matrix = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
        if left.shape != (matrix.shape[0],) or right.shape != (matrix.shape[1],):
            continue
        product = matrix @ right
        sigma, length = float(left @ product), float(np.linalg.norm(product))
        if np.isfinite(sigma) and sigma > _CONVERGED * length > 0:
            fits.append(sigma)
    if len(fits) != 1:
        raise Refusal(
            f"its spectral norm's vectors, of {left.size} and {right.size} elements, do not tell which axis of the "
            f"weight of shape {list(weight.shape)} they belong to"
        )
    return weight / fits[0]


__all__ = ["Exact", "effective_weight", "gain_axes", "read_exact"]
