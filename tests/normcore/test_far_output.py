"""Outputs too large for a cache: the same to the last bit as those of their parts, wherever in memory they start."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from normcore.normalization import batch_norm, group_norm, instance_norm, layer_norm

# Planes that no line of memory divides, of more than 16 MiB together; of half of the channels it is less.
SHAPES = {torch.float32: (2, 640, 61, 61), torch.float16: (3, 960, 61, 61), torch.float64: (1, 640, 61, 61)}
Method = Callable[[Tensor, Tensor, Tensor], Tensor]


def _inference(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return batch_norm(values, torch.zeros_like(weight), torch.ones_like(weight), weight, bias).output


def _training(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return batch_norm(values, weight=weight, bias=bias, training=True).output


def _instance(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return instance_norm(values, weight=weight, bias=bias).output


def _group(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return group_norm(values, weight, bias, num_groups=values.shape[1] // 4).output


def _layer(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(values, weight, bias).output


METHODS = [_inference, _training, _instance, _group]


def _gradients(method: Method, values: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    inputs = [tensor.clone().requires_grad_() for tensor in (values, weight, weight)]
    output = method(*inputs)
    return output, *torch.autograd.grad(output, inputs, grad)


@pytest.mark.parametrize("dtype", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_large_output_and_gradients_are_those_of_halves(method: Method, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    values, grad = (torch.randn(SHAPES[dtype], generator=generator).to(dtype) for _ in range(2))
    weight = torch.rand(values.shape[1], generator=generator).to(dtype)
    found = _gradients(method, values, weight, grad)
    assert values.nbytes > 2**24
    half = values.shape[1] // 2
    for own in (slice(0, half), slice(half, None)):
        parts = _gradients(method, values[:, own].contiguous(), weight[own], grad[:, own].contiguous())
        for whole, part in zip(found, parts, strict=True):
            assert torch.equal(whole[:, own] if whole.ndim > 1 else whole[own], part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1024, 1229])
def test_large_output_and_gradient_of_vectors_are_those_of_halves(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    rows = 24000 // dtype.itemsize
    values, grad = (torch.randn(rows, size, generator=generator).to(dtype) for _ in range(2))
    weight = torch.rand(size, generator=generator).to(dtype)
    found = _gradients(_layer, values, weight, grad)
    assert values.nbytes > 2**24
    for own in (slice(0, rows // 2), slice(rows // 2, None)):
        parts = _gradients(_layer, values[own], weight, grad[own])
        for whole, part in zip(found[:2], parts[:2], strict=True):
            assert torch.equal(whole[own], part)


@pytest.mark.parametrize("first", [1, 7, 16])
def test_large_output_may_start_anywhere_and_nothing_else_is_written(first: int) -> None:
    values = torch.randn(SHAPES[torch.float32], generator=torch.Generator().manual_seed(4))
    mean = torch.zeros(values.shape[1])
    room = torch.full((values.numel() + 32,), 7.0)
    out = room[first:][: values.numel()].view(values.shape)
    batch_norm(values, mean, mean + 1, eps=0.0, out=out)
    assert torch.equal(out, values)
    assert (room[:first] == 7).all()
    assert (room[first + values.numel() :] == 7).all()
