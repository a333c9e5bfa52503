"""Accuracy of float64 sums over many values, most of them with rounding errors of one sign, against long double.

With -s, torch's errors are shown beside ours.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from normcore.normalization import batch_norm, group_norm, instance_norm
from tests.normcore.normalization import group_oracle
from tests.normcore.normalization import oracle as batch_oracle

EPS = 1e-5


def _batch(input: Tensor) -> tuple[Tensor, Tensor, batch_oracle.LongDouble]:
    theirs = functional.batch_norm(input, None, None, training=True, eps=EPS)
    return batch_norm(input, training=True, eps=EPS).output, theirs, batch_oracle.batch_norm(input, eps=EPS).output


def _instance(input: Tensor) -> tuple[Tensor, Tensor, batch_oracle.LongDouble]:
    expected = group_oracle.over_last(input, input.shape[2] * input.shape[3], eps=EPS).normalized
    return instance_norm(input, eps=EPS).output, functional.instance_norm(input, eps=EPS), expected


def _group(input: Tensor) -> tuple[Tensor, Tensor, batch_oracle.LongDouble]:
    groups = input.shape[1] // 8
    expected = group_oracle.over_last(input, input[0].numel() // groups, eps=EPS).normalized
    ours = group_norm(input, num_groups=groups, eps=EPS).output
    return ours, functional.group_norm(input, groups, eps=EPS), expected


class Case(NamedTuple):
    norm: Callable[[Tensor], tuple[Tensor, Tensor, batch_oracle.LongDouble]]
    shape: tuple[int, ...]
    is_channels_last: bool = True


CASES = {
    "batch of columns": Case(_batch, (4096, 64), is_channels_last=False),
    "batch of few columns": Case(_batch, (20000, 3), is_channels_last=False),
    "batch of images": Case(_batch, (4, 8, 40, 40)),
    "batch of contiguous images": Case(_batch, (16384, 2, 4, 4), is_channels_last=False),
    "instances": Case(_instance, (2, 64, 56, 56)),
    "instances beyond the cache": Case(_instance, (1, 96, 56, 56)),
    "groups": Case(_group, (2, 64, 56, 56)),
    "contiguous group of many values": Case(_group, (1, 8, 1024, 256), is_channels_last=False),
}


def _values(kind: str, shape: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    generator = np.random.default_rng(7)
    if kind == "exponential":
        return generator.exponential(size=shape)
    if kind == "lognormal":
        return np.exp(2 * generator.standard_normal(shape))
    return generator.standard_normal(shape)


@pytest.mark.parametrize("kind", ["normal", "exponential", "lognormal"])
@pytest.mark.parametrize("name", CASES)
def test_sums_of_many_values_keep_the_digits(name: str, kind: str) -> None:
    case = CASES[name]
    input = torch.from_numpy(_values(kind, case.shape))
    input = input.contiguous(memory_format=torch.channels_last) if case.is_channels_last else input
    ours, theirs, expected = case.norm(input)
    scale = np.maximum(1.5, np.abs(expected))
    error, other = (float((np.abs(group_oracle.exact(output) - expected) / scale).max()) for output in (ours, theirs))
    print(f"{name}, {kind}: {error:.1e}, torch {other:.1e}")  # noqa: T201
    assert error <= 1e-15


@pytest.mark.parametrize("kind", ["normal", "exponential", "lognormal"])
def test_gradients_of_parameters_of_many_instances_keep_the_digits(kind: str) -> None:
    input, grad = torch.from_numpy(_values("normal", (50000, 2, 8))), torch.from_numpy(_values(kind, (50000, 2, 8)))
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    output = instance_norm(input, weight=weight, bias=bias, eps=EPS).output
    of_weight, of_bias = torch.autograd.grad(output, (weight, bias), grad)
    normalized, exact = group_oracle.over_last(input, 8, eps=EPS).normalized, group_oracle.exact(grad)
    for found, terms in ((of_weight, exact * normalized), (of_bias, exact)):
        error = np.abs(group_oracle.exact(found) - terms.sum((0, 2))) / np.abs(terms).sum((0, 2))
        print(f"{kind}: {float(error.max()):.1e}")  # noqa: T201
        assert error.max() <= 2e-16


def test_infinite_sums_of_many_parts_stay_infinite() -> None:
    input = torch.randn(4096, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grad = torch.ones_like(input)
    grad[0, 1], grad[0, 2], grad[-1, 2] = torch.inf, torch.inf, -torch.inf
    ones = torch.ones(4, dtype=torch.float64)
    found = batch_norm(input, torch.zeros_like(ones), ones, ones, ones, grad_output=grad).grad_bias
    assert found is not None
    assert found[:2].tolist() == [4096.0, torch.inf]
    assert bool(found[2].isnan())
    assert float(found[3]) == 4096.0
