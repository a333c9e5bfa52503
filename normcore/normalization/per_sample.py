"""What layer, RMS, group and instance norm share: groups within a sample, their statistics, gradients and findings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from normcore._checks import check_floating, check_integers, check_mask, check_out, check_shape
from normcore._precision import accumulation_dtype
from normcore.errors import ShapeError, StatisticsError
from normcore.normalization.gradients import (
    Gradients,
    Seen,
    Standardized,
    differentiable,
    standardize_by,
    standardize_gradients,
    standardize_over,
)
from normcore.normalization.method import JSON, Output, TensorArgument
from normcore.normalization.standardized_result import StandardizedResult
from normcore.normalization.value_findings import FEW_VALUES, tails, unresolved

MASK = TensorArgument(
    "mask", "BOOL, true where a value counts in the statistics; all are normalized", "broadcasts against the input"
)
GRAD_OUTPUT = TensorArgument("grad_output", "gradient of the output; gives the other gradients", "as the input")
GRAD_INPUT = Output("grad_input", "as the input", "gradient of the input; only with grad_output")


def grad_parameter(name: str, shape: str) -> Output:
    return Output(f"grad_{name}", shape, f"gradient of {name}, given or not; only with grad_output")


@dataclass(frozen=True)
class PerSampleResult(StandardizedResult):
    """Outputs of a norm whose groups lie within a sample; None for what does not apply."""

    @property
    def count(self) -> int | Tensor | None:
        """Values behind each statistic, where the statistics are the input's own."""
        if self.by is None or not self.by.axes:
            return None
        return self.by.count.reshape(self.shape) if isinstance(self.by.count, Tensor) else self.by.count

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
        input = self.input.detach()
        if counts["non_finite_groups"] and (values := int((~input.isfinite()).sum())):
            findings["non_finite_values"] = values
        return findings | tails(input, self.output.detach())


Result = TypeVar("Result", bound=PerSampleResult)


class Groups(NamedTuple):
    """How the operands of a per-sample norm are seen.

    Attributes:
        seen: shapes in which input, weight and bias are seen.
        axes: those of the view that statistics are over.
        affine_shape: own shape of weight and bias.
        statistics_shape: shape in which statistics are given.
    """

    seen: Seen
    axes: tuple[int, ...]
    affine_shape: tuple[int, ...]
    statistics_shape: tuple[int, ...]


class Operands(NamedTuple):
    """Checked operands of a per-sample norm."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    grad_output: Tensor | None
    mask: Tensor | None
    out: Tensor | None
    groups: Groups

    @classmethod
    def of(
        cls,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        grad_output: Tensor | None,
        mask: Tensor | None,
        groups: Groups,
        *,
        out: Tensor | None = None,
    ) -> "Operands":
        """Of an input, weight and bias that are checked."""
        if grad_output is not None:
            check_shape("grad_output", grad_output, input.shape, meaning="that of the input")
        if mask is not None:
            check_mask("mask", mask, input.shape, meaning="the input's")
        if out is not None:
            check_out("out", out, input, weight, bias, grad_output)
        return cls(input, weight, bias, grad_output, mask, out, groups)

    def standardize(
        self, kind: type[Result], *, eps: float, has_mean: bool = True, is_cast_first: bool = False
    ) -> Result:
        """By the statistics of each group; `is_cast_first` rounds before the weight is multiplied by, and after."""
        if self.input.numel() == 0:
            return self._empty(kind)
        input, weight, bias, _, _, out, groups = self
        how: dict[str, Any] = {"axes": groups.axes, "eps": eps, "has_mean": has_mean, "mask": self._counted()}
        if is_cast_first and weight is not None:
            with torch.no_grad():
                found = standardize_over(input, **how, out=out, seen=groups.seen)
                found.output.mul_(weight)
            found = differentiable(found, input, weight, seen=groups.seen)
        else:
            found = standardize_over(input, weight, bias, **how, out=out, seen=groups.seen)
        return self._result(kind, found)

    def standardize_by(self, kind: type[Result], mean: Tensor, var: Tensor, *, eps: float) -> Result:
        """By a given mean and variance, in front of the view."""
        input, weight, bias, _, _, out, groups = self
        found = standardize_by(input, weight, bias, mean=mean, var=var, eps=eps, out=out, seen=groups.seen)
        return self._result(kind, found)

    def _counted(self) -> Tensor | None:
        """The mask in the view's shape; every group counts a value."""
        if self.mask is None:
            return None
        mask = self.groups.seen.values(self.mask.expand(self.input.shape))
        nothing = int((~mask.any(self.groups.axes)).sum())
        if nothing:
            expected = "at least one value that counts in every group"
            raise StatisticsError("mask", expected=expected, received=f"{nothing} groups without one")
        return mask

    def _result(self, kind: type[Result], found: Standardized) -> Result:
        gradients, groups = None, self.groups
        if self.grad_output is not None:
            terms = self.grad_output, self.input, self.weight, found.statistics
            gradients = standardize_gradients(*terms, affine_shape=groups.affine_shape, seen=groups.seen)
        return kind(found.output, found.statistics, groups.statistics_shape, gradients, self.input)

    def _empty(self, kind: type[Result]) -> Result:
        """Nothing to normalize: only shapes and gradients of zeros."""
        seen = self.groups.seen
        values, weight, bias = seen.values(self.input), seen.parameter(self.weight), seen.parameter(self.bias)
        output = values.clone() if weight is None else values * weight
        output = output if bias is None else output + bias
        output = output.to(values.dtype).reshape(self.input.shape)
        if self.grad_output is None:
            return kind(output)
        dtype = accumulation_dtype(values.dtype)
        nothing = (torch.zeros(self.groups.affine_shape, dtype=dtype, device=values.device) for _ in range(2))
        return kind(output, gradients=Gradients(torch.zeros_like(self.input), *nothing))


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
    """The one shape of weight and bias: (C,), (N, C) for those of each sample, or the input's for those of each value.

    Raises:
        DtypeError: a tensor that is not floating.
        ShapeError: another shape, or two different ones.
    """
    samples, channels = input.shape[:2]
    given = [(name, term) for name, term in (("weight", weight), ("bias", bias)) if term is not None]
    for name, term in given:
        check_floating(name, term)
        if term.shape not in ((channels,), (samples, channels), input.shape):
            each = "" if input.ndim == 2 else f", or {tuple(input.shape)}, one for each value"
            expected = f"shape ({channels},) or ({samples}, {channels}), one value per channel, for all samples or each"
            raise ShapeError(name, expected=expected + each, received=f"shape {tuple(term.shape)}")
    shape = tuple(given[0][1].shape) if given else (channels,)
    if given and tuple(given[-1][1].shape) != shape:
        received = f"shape {tuple(given[-1][1].shape)}"
        raise ShapeError("bias", expected=f"the weight's shape {shape}", received=received)
    return shape
