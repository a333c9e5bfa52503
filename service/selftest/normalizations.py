"""Every method, forward and backward, on a device."""

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from normcore.normalization import METHODS
from service.selftest.check import Check
from service.selftest.formulas import CASES

# 84 units in the last place of float32, relative to the largest value.
_BOUND = 1e-5


def check_normalizations(device: str) -> Iterator[Check]:
    """A row for the output and one for the gradients of every method; a method without a case fails."""
    for name in METHODS:
        yield Check.run(f"{name} forward", device, _BOUND, partial(_forward_error, name, device))
        yield Check.run(f"{name} backward", device, _BOUND, partial(_backward_error, name, device))


def _forward_error(name: str, device: str) -> float:
    case = CASES[name]
    tensors = case.tensors()
    expected = case.expected(tensors)["output"]
    del tensors["grad_output"]
    found = METHODS[name]({key: tensor.to(device) for key, tensor in tensors.items()}, case.parameters, ["output"])
    return _distance(found.outputs["output"], expected)


def _backward_error(name: str, device: str) -> float:
    case = CASES[name]
    tensors = case.tensors()
    expected = {key: tensor for key, tensor in case.expected(tensors).items() if key != "output"}
    found = METHODS[name]({key: tensor.to(device) for key, tensor in tensors.items()}, case.parameters, list(expected))
    return max(_distance(found.outputs[key], tensor) for key, tensor in expected.items())


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected).abs().max() / expected.abs().max())
