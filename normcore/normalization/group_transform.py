"""y = weight * W (x - mean) + bias for every group of channels: the output and its gradients in closed form."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from normcore.normalization.inverse_root import InverseRoot
from normcore.statistics.covariance import GroupCovariance


class Gradients(NamedTuple):
    """Gradients of the values (groups, d, count), the weight (C,) and the bias (C,)."""

    values: Tensor
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class GroupTransform:
    """The transform of the deviations that `by` holds; weight and bias are float64 of shape (groups, d, 1)."""

    by: GroupCovariance
    root: InverseRoot
    weight: Tensor
    bias: Tensor

    def output(self) -> Tensor:
        matrix = self.weight * self.root.matrix
        return torch.baddbmm(self.bias - matrix @ self.by.offset, matrix, self.by.deviations)

    def frozen_gradients(self, grad_output: Tensor) -> Gradients:
        """Where mean and W are constants."""
        products = self._products(grad_output)
        return self._gradients((self.weight * self.root.matrix).mT @ grad_output, products, grad_output)

    def batch_gradients(self, grad_output: Tensor) -> Gradients:
        """Where mean and W are those of the values, and W has a pullback.

        dX = A^T dY + 2/n dS Xc, less its mean, with A = weight * W and dS what dW = weight * dY Xc^T is as a gradient
        of the covariance.
        """
        assert self.root.pullback is not None
        products = self._products(grad_output)
        matrix = (self.weight * self.root.matrix).mT
        slope = self.root.pullback(self.weight * products) * (2.0 / grad_output.shape[-1])
        shift = matrix @ grad_output.mean(-1, keepdim=True) + slope @ self.by.offset
        values = torch.baddbmm(-shift, matrix, grad_output).baddbmm_(slope, self.by.deviations)
        return self._gradients(values, products, grad_output)

    def _products(self, grad_output: Tensor) -> Tensor:
        """The product dY Xc^T."""
        return grad_output @ self.by.deviations.mT - grad_output.sum(-1, keepdim=True) @ self.by.offset.mT

    def _gradients(self, values: Tensor, products: Tensor, grad_output: Tensor) -> Gradients:
        weight = (products * self.root.matrix).sum(-1)
        return Gradients(values, weight.flatten(), grad_output.sum(-1).flatten())


def grouped(values: Tensor, *, groups: int) -> Tensor:
    """A slab's values (outer, C, inner) as float64 (groups, C / groups, outer * inner), always a copy."""
    outer, channels, inner = values.shape
    moved = values.transpose(0, 1).to(torch.float64, memory_format=torch.contiguous_format, copy=True)
    return moved.reshape(groups, channels // groups, outer * inner)


def ungrouped(values: Tensor, *, like: Tensor) -> Tensor:
    """The way back: in the shape and datatype of a slab's values, contiguous."""
    outer, channels, inner = like.shape
    moved = values.reshape(channels, outer, inner).transpose(0, 1)
    return moved.to(like.dtype, memory_format=torch.contiguous_format).contiguous()
