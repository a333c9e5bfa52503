"""What all methods of the standardize family return."""

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Self

from torch import Tensor

from normcore._precision import accumulation_dtype
from normcore.normalization.gradients import Gradients, Statistics


@dataclass(frozen=True)
class StandardizedResult:
    """Outputs of a method; None for what does not apply. Statistics are made at their first use.

    Attributes:
        output: the input's shape and datatype; differentiable to every order.
        by: what it was standardized with; none for an empty input.
        shape: that of mean, var and invstd.
        gradients: where grad_output was given; those of weight and bias in their own shape.
        input: what was normalized, for diagnostics.
    """

    output: Tensor
    by: Statistics | None = field(default=None, repr=False)
    shape: tuple[int, ...] = field(default=(), repr=False)
    gradients: Gradients | None = None
    input: Tensor | None = field(default=None, repr=False)

    @classmethod
    def extending(cls, result: "StandardizedResult", **others: Any) -> Self:
        """The same with more, or other, attributes."""
        return cls(**{own.name: getattr(result, own.name) for own in fields(result)} | others)

    @property
    def mean(self) -> Tensor | None:
        """Mean that was subtracted."""
        return self._summary[0]

    @property
    def var(self) -> Tensor | None:
        """Biased variance that was divided by."""
        return self._summary[1]

    @property
    def invstd(self) -> Tensor | None:
        """(var + eps)^-1/2."""
        return self._summary[2]

    @property
    def grad_input(self) -> Tensor | None:
        """Gradient of the input, where grad_output was given."""
        return None if self.gradients is None else self.gradients.input

    @property
    def grad_weight(self) -> Tensor | None:
        """That of the weight, in its shape."""
        return None if self.gradients is None else self.gradients.weight

    @property
    def grad_bias(self) -> Tensor | None:
        """That of the bias, in its shape."""
        return None if self.gradients is None else self.gradients.bias

    @cached_property
    def _summary(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.by is None:
            return None, None, None
        mean, var, invstd = self.by.summary(self.shape, accumulation_dtype(self.output.dtype))
        return mean if self.by.has_mean else None, var, invstd
