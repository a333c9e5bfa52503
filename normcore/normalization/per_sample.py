"""What layer, RMS, group and instance norm share: groups within a sample, their statistics, gradients and findings."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from normcore._checks import check_floating, check_integers, check_mask, check_out, check_shape
from normcore._precision import accumulation_dtype
from normcore.errors import ShapeError, StatisticsError
from normcore.normalization.gradients import (
    Gradients,
    Standardized,
    Statistics,
    standardize_by,
    standardize_gradients,
    standardize_over,
)
from normcore.normalization.method import JSON, Output, TensorArgument
from normcore.normalization.value_findings import FEW_VALUES, tails, unresolved

MASK = TensorArgument(
    "mask", "BOOL, true where a value counts in the statistics; all are normalized", "broadcasts against the input"
)
GRAD_OUTPUT = TensorArgument("grad_output", "gradient of the output; gives the other gradients", "as the input")
GRAD_INPUT = Output("grad_input", "as the input", "gradient of the input; only with grad_output")


def grad_parameter(name: str, shape: str) -> Output:
    return Output(f"grad_{name}", shape, f"gradient of {name}, given or not; only with grad_output")


@dataclass(frozen=True, slots=True)
class PerSampleResult:
    """Outputs of a norm whose groups lie within a sample; None for what does not apply.

    Attributes:
        output: the input's shape and datatype; differentiable to every order.
        mean: mean of each group; none for an empty input.
        var: biased variance of each group; none for an empty input.
        invstd: (var + eps)^-1/2; none for an empty input.
        grad_input: gradient of the input, where grad_output was given; so are the next two.
        grad_weight: the weight's shape.
        grad_bias: the bias's shape.
        count: values behind each statistic, where the statistics are the input's own.
        input: what was normalized, for diagnostics.
    """

    output: Tensor
    mean: Tensor | None = None
    var: Tensor | None = None
    invstd: Tensor | None = None
    grad_input: Tensor | None = None
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None
    count: int | Tensor | None = None
    input: Tensor | None = field(default=None, kw_only=True, repr=False)

    def diagnostics(self) -> dict[str, JSON]:
        """What makes the result questionable: numbers of groups (of values that share their statistics).

        few_values_per_group: the least count, below 8. unresolved_groups: a deviation is less than two steps of the
        input's datatype. non_finite_values: their number. share_beyond_4_before and _after: as in batch norm.
        """
        if self.var is None or self.invstd is None:
            return {}
        is_finite = self.var.isfinite() & self.invstd.isfinite()
        if self.mean is not None:
            is_finite &= self.mean.isfinite()
        is_own = self.count is not None
        flags = {
            "single_value_groups": torch.as_tensor(self.count == 1).expand_as(self.var),
            "constant_groups": (self.var == 0) & is_own,
            # var < eps, without eps: var / (var + eps) is below a half.
            "eps_dominated_groups": self.var.double() * self.invstd.double().square() < 0.5,
            "non_finite_groups": ~is_finite,
        }
        if self.mean is not None and is_own:
            flags["unresolved_groups"] = unresolved(self.mean, self.var, self.output.dtype)
        counts = {name: int(flag.sum()) for name, flag in flags.items()}
        findings: dict[str, JSON] = {name: count for name, count in counts.items() if count}
        if self.count is not None and (fewest := int(torch.as_tensor(self.count).min())) < FEW_VALUES:
            findings["few_values_per_group"] = fewest
        if self.input is None:
            return findings
        if counts["non_finite_groups"] and (values := int((~self.input.isfinite()).sum())):
            findings["non_finite_values"] = values
        return findings | tails(self.input, self.output.detach())


@dataclass(frozen=True, slots=True)
class Operands:
    """Checked operands of a per-sample norm, and how they are seen.

    Attributes:
        view: (N, G, C, S), samples, groups per sample, channels per group, positions.
        affine: shape of weight and bias in front of the view, (1 or N, G, C, 1) or (1, 1, 1, S).
        affine_shape: their own shape.
        statistics_shape: shape in which statistics are given.
        out: takes the output.
    """

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    grad_output: Tensor | None
    mask: Tensor | None
    view: tuple[int, int, int, int]
    affine: tuple[int, int, int, int]
    affine_shape: tuple[int, ...]
    statistics_shape: tuple[int, ...]
    out: Tensor | None = None

    def __post_init__(self) -> None:
        if self.grad_output is not None:
            check_shape("grad_output", self.grad_output, self.input.shape, meaning="that of the input")
        if self.mask is not None:
            check_mask("mask", self.mask, self.input.shape, meaning="the input's")
        if self.out is not None:
            check_out("out", self.out, self.input)

    def standardize(self, *, eps: float, has_mean: bool = True) -> PerSampleResult:
        """By the statistics of each group."""
        if self.input.numel() == 0:
            return self._empty()
        values, weight, bias = self._views()
        mask = self._counted()
        return self._result(
            standardize_over(
                values, weight, bias, axes=(2, 3), eps=eps, has_mean=has_mean, mask=mask, out=self._target()
            )
        )

    def standardize_by(self, mean: Tensor, var: Tensor, *, eps: float) -> PerSampleResult:
        """By a given mean and variance of each of G groups."""
        values, weight, bias = self._views()
        mean, var = (statistic.view(1, -1, 1, 1) for statistic in (mean, var))
        return self._result(standardize_by(values, weight, bias, mean=mean, var=var, eps=eps, out=self._target()))

    def _views(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        weight, bias = (None if term is None else term.reshape(self.affine) for term in (self.weight, self.bias))
        return self.input.reshape(self.view), weight, bias

    def _target(self) -> Tensor | None:
        return None if self.out is None else self.out.reshape(self.view)

    def _counted(self) -> Tensor | None:
        """The mask in the view's shape; every group counts a value."""
        if self.mask is None:
            return None
        mask = self.mask.expand(self.input.shape).reshape(self.view)
        nothing = int((~mask.any(-1).any(-1)).sum())
        if nothing:
            expected = "at least one value that counts in every group"
            raise StatisticsError("mask", expected=expected, received=f"{nothing} groups without one")
        return mask

    def _result(self, found: Standardized) -> PerSampleResult:
        by = found.statistics
        dtype = accumulation_dtype(self.input.dtype)
        mean, var, invstd = by.summary(self.statistics_shape, dtype)
        count = by.count if by.axes else None
        if isinstance(count, Tensor):
            count = count.reshape(self.statistics_shape)
        output = found.output.reshape(self.input.shape)
        if self.out is not None:
            # A memory format that allows no such view has made a copy.
            output = self.out if output.data_ptr() == self.out.data_ptr() else self.out.copy_(output)
        grad_input, grad_weight, grad_bias = self._gradients(by)
        given_mean = mean if by.has_mean else None
        grads = (grad_input, grad_weight, grad_bias)
        return PerSampleResult(output, given_mean, var, invstd, *grads, count, input=self.input.detach())

    def _gradients(self, by: Statistics) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.grad_output is None:
            return None, None, None
        values, weight, _ = self._views()
        grad_output = self.grad_output.reshape(self.view)
        found: Gradients = standardize_gradients(grad_output, values, weight, by, affine_shape=self.affine)
        grad_input = found.input.reshape(self.input.shape)
        return grad_input, found.weight.reshape(self.affine_shape), found.bias.reshape(self.affine_shape)

    def _empty(self) -> PerSampleResult:
        """Nothing to normalize: only shapes and gradients of zeros."""
        values, weight, bias = self._views()
        output = values.clone() if weight is None else values * weight
        output = output if bias is None else output + bias
        output = output.to(values.dtype).reshape(self.input.shape)
        if self.grad_output is None:
            return PerSampleResult(output)
        dtype = accumulation_dtype(values.dtype)
        nothing = (torch.zeros(self.affine_shape, dtype=dtype, device=values.device) for _ in range(2))
        return PerSampleResult(output, None, None, None, torch.zeros_like(self.input), *nothing)


def trailing_axes(input: Tensor, normalized_shape: str | int | Sequence[int] | None) -> tuple[int, ...]:
    """The shape normalized over, which ends the input's; the last axis for None.

    Raises:
        ParameterError: no integers.
        ShapeError: the input does not end in this shape.
    """
    if normalized_shape is None:
        return (input.shape[-1],)
    sizes = [normalized_shape] if isinstance(normalized_shape, int) else normalized_shape
    shape = check_integers("normalized_shape", sizes)
    if tuple(input.shape[-len(shape) :]) != shape:
        expected = f"shape (*, {', '.join(map(str, shape))}) for normalized_shape {shape}"
        raise ShapeError("input", expected=expected, received=f"shape {tuple(input.shape)}")
    return shape


def check_channel_affine(weight: Tensor | None, bias: Tensor | None, *, input: Tensor) -> tuple[int, ...]:
    """The one shape of weight and bias: (C,), or (N, C) for parameters of each sample.

    Raises:
        DtypeError: a tensor that is not floating.
        ShapeError: another shape, or two different ones.
    """
    samples, channels = input.shape[:2]
    given = [(name, term) for name, term in (("weight", weight), ("bias", bias)) if term is not None]
    for name, term in given:
        check_floating(name, term)
        if tuple(term.shape) not in ((channels,), (samples, channels)):
            expected = f"shape ({channels},) or ({samples}, {channels}), one value per channel, for all samples or each"
            raise ShapeError(name, expected=expected, received=f"shape {tuple(term.shape)}")
    shape = tuple(given[0][1].shape) if given else (channels,)
    if given and tuple(given[-1][1].shape) != shape:
        received = f"shape {tuple(given[-1][1].shape)}"
        raise ShapeError("bias", expected=f"the weight's shape {shape}", received=received)
    return shape
