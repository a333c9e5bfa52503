"""Every normalization from its plain formula in float64, differentiated by autograd; no code of normcore's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
_GRADIENTS = ("input", "weight", "bias", "g", "gain")


@dataclass(frozen=True, slots=True)
class Case:
    """One call of a method: its formula, the shapes of its tensors, its parameters, and tensors that are given."""

    formula: Callable[[Tensors], Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    parameters: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    given: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> Tensors:
        """Seeded float32 operands and the gradient of the output."""
        generator = torch.Generator().manual_seed(0)
        drawn = {name: torch.randn(shape, generator=generator) + 1.5 for name, shape in self.shapes.items()}
        return drawn | dict(self.given) | {"grad_output": torch.randn(self.shapes["input"], generator=generator)}

    def expected(self, tensors: Tensors) -> Tensors:
        """The output and the gradients, by the names that the methods give them."""
        doubles = {name: tensor.double() for name, tensor in tensors.items()}
        operands = {name: doubles[name].requires_grad_() for name in _GRADIENTS if name in doubles}
        output = self.formula(doubles)
        gradients = torch.autograd.grad(output, list(operands.values()), doubles["grad_output"])
        named = {f"grad_{name}": gradient for name, gradient in zip(operands, gradients, strict=True)}
        return {"output": output.detach()} | named


def _standardized(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True) + eps).sqrt()


def _affine(values: Tensor, given: Tensors, *, axis: int = 1) -> Tensor:
    shape = [-1 if index == axis else 1 for index in range(values.ndim)]
    return values * given["weight"].reshape(shape) + given["bias"].reshape(shape)


def _batch_norm(given: Tensors) -> Tensor:
    return _affine(_standardized(given["input"], (0, 2), 1e-5), given)


def _batch_renorm(given: Tensors) -> Tensor:
    x = given["input"]
    mean, var = (statistic.detach() for statistic in (x.mean((0, 2)), x.var((0, 2), correction=0)))
    sigma = (given["running_var"] + 1e-5).sqrt()
    r = ((var + 1e-5).sqrt() / sigma).clamp(1 / 3, 3).reshape(1, -1, 1)
    d = ((mean - given["running_mean"]) / sigma).clamp(-5, 5).reshape(1, -1, 1)
    return _affine(_standardized(x, (0, 2), 1e-5) * r + d, given)


def _ghost_batch_norm(given: Tensors) -> Tensor:
    return _affine(torch.cat([_standardized(part, (0, 2), 1e-5) for part in torch.split(given["input"], 6)]), given)


def _group_norm(given: Tensors) -> Tensor:
    x = given["input"]
    return _affine(_standardized(x.reshape(len(x), 2, -1), (2,), 1e-5).reshape(x.shape), given)


def _instance_norm(given: Tensors) -> Tensor:
    return _affine(_standardized(given["input"], (2,), 1e-5), given)


def _layer_norm(given: Tensors) -> Tensor:
    return _affine(_standardized(given["input"], (2,), 1e-5), given, axis=2)


def _rms_norm(given: Tensors) -> Tensor:
    x = given["input"]
    return x / (x.square().mean(2, keepdim=True) + 1e-6).sqrt() * given["weight"]


def _local_response_norm(given: Tensors) -> Tensor:
    x = given["input"]
    channels = torch.arange(x.shape[1])
    window = ((channels[:, None] - channels).abs() <= 1).double()
    sums = torch.einsum("cj,njl->ncl", window, x.square())
    return x * (2 + 0.5 / 3 * sums) ** -0.75


def _lp_norm(given: Tensors) -> Tensor:
    return given["input"] / given["input"].square().sum(-1, keepdim=True).sqrt()


def _mean_variance_norm(given: Tensors) -> Tensor:
    centred = given["input"] - given["input"].mean((0, 2), keepdim=True)
    return centred / (centred.square().mean((0, 2), keepdim=True).sqrt() + 1e-9)


def _spectral_norm(given: Tensors) -> Tensor:
    sigma: Tensor = torch.linalg.svdvals(given["input"])[0]
    return given["input"] / sigma


def _weight_norm(given: Tensors) -> Tensor:
    v = given["input"]
    return given["g"][:, None] * v / v.square().sum(1, keepdim=True).sqrt()


def _weight_standardization(given: Tensors) -> Tensor:
    return _standardized(given["input"], (1, 2), 1e-6) * given["gain"].reshape(-1, 1, 1)


def _whitening(given: Tensors) -> Tensor:
    x = given["input"]
    centred = x - x.mean((0, 2), keepdim=True)
    covariance = torch.einsum("ncl,ndl->cd", centred, centred) / (x.shape[0] * x.shape[2])
    values, vectors = torch.linalg.eigh(covariance + 1e-3 * torch.eye(x.shape[1], dtype=x.dtype))
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    return _affine(torch.einsum("cd,ndl->ncl", root, centred), given)


_IMAGE = (18, 6, 20)
_AFFINE = {"input": _IMAGE, "weight": (6,), "bias": (6,)}
_LAST = {"input": _IMAGE, "weight": (20,), "bias": (20,)}
_RUNNING = {"running_mean": torch.linspace(-9, 9, 6), "running_var": torch.linspace(0.05, 4, 6)}
_SHARDS = {"shard_sizes": torch.tensor([5, 0, 13])}

CASES: Mapping[str, Case] = {
    "batch_norm": Case(_batch_norm, _AFFINE, {"training": True}),
    "batch_renorm": Case(_batch_renorm, _AFFINE, {"training": True}, _RUNNING),
    "ghost_batch_norm": Case(_ghost_batch_norm, _AFFINE, {"training": True, "virtual_batch_size": 6}),
    "synchronized_batch_norm": Case(_batch_norm, _AFFINE, {"training": True}, _SHARDS),
    "group_norm": Case(_group_norm, _AFFINE, {"num_groups": 2}),
    "instance_norm": Case(_instance_norm, _AFFINE),
    "layer_norm": Case(_layer_norm, _LAST, {"normalized_shape": "20"}),
    "rms_norm": Case(_rms_norm, {"input": _IMAGE, "weight": (20,)}, {"normalized_shape": "20", "eps": 1e-6}),
    "local_response_norm": Case(_local_response_norm, {"input": _IMAGE}, {"size": 3, "alpha": 0.5, "k": 2.0}),
    "lp_norm": Case(_lp_norm, {"input": _IMAGE}),
    "mean_variance_norm": Case(_mean_variance_norm, {"input": _IMAGE}, {"axes": "0,2"}),
    "spectral_norm": Case(_spectral_norm, {"input": (12, 30)}, {"exact": True}),
    "weight_norm": Case(_weight_norm, {"input": (12, 30), "g": (12,)}),
    "weight_standardization": Case(_weight_standardization, {"input": (8, 6, 9), "gain": (8,)}),
    "whitening": Case(_whitening, _AFFINE, {"training": True, "mode": "zca", "eps": 1e-3}),
}
