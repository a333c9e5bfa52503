"""The function of a local response norm: D of windows of channels, the output by it, and its adjoint."""

from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

# Powers of D within this and its inverse have all the digits of float64.
_LEAST_POWER = 1e-290


@dataclass(frozen=True, slots=True)
class Response:
    """The function of one call: the window reaches `before` channels back and `after` forth."""

    before: int
    after: int
    scale: float
    beta: float
    k: float

    def over(self, unit: float) -> "Response":
        """That of values over a unit, whose D is this one's over the square of it."""
        return replace(self, k=self.k / unit / unit)

    def divisor(self, values: Tensor) -> Tensor:
        """D = k + scale * sum over the window of x^2; values of shape (outer, channels, inner)."""
        if self.scale == 0:
            return torch.full_like(values, self.k)
        sums = window_sums(values.square(), before=self.before, after=self.after)
        return sums.mul_(self.scale).add_(self.k)

    def output(self, values: Tensor, divisor: Tensor) -> Tensor:
        return _product(values, *self._factors(divisor))

    def gradient(self, values: Tensor, grad_output: Tensor, divisor: Tensor) -> Tensor:
        """The adjoint: a channel is reached by those that it reaches, so the window is mirrored."""
        first, *rest = self._factors(divisor)
        if self.scale == 0:
            return _product(grad_output, first, *rest)
        # Values over D, far from 1 where they are, would take the products of float64 out of its range.
        unit = _units(values.detach()) if values.dtype == torch.float64 and values.numel() else 1.0
        ratios = self._without_zeros(values / self._positive(divisor), divisor) * unit
        terms = _product(ratios, first, grad_output, *rest)
        sums = window_sums(terms, before=self.after, after=self.before)
        return _product(grad_output, first, *rest) - values / unit * sums * (2 * self.scale * self.beta)

    def gradient_without(self, ignored: Tensor, values: Tensor, grad_output: Tensor, divisor: Tensor) -> Tensor:
        """The same with some windows taken for windows of zeros, so that not even derivatives see their D."""
        return replace(self, k=0.0).gradient(values, grad_output, divisor.masked_fill(ignored, 0.0))

    def _factors(self, divisor: Tensor) -> tuple[Tensor, ...]:
        """D^-beta as a product, so that float64 holds each factor where it holds what they make of the values."""
        power = self._power(divisor)
        if self.beta <= 1 or divisor.dtype != torch.float64:
            return (power,)
        whole = power.detach()
        least, most = torch.aminmax(whole) if whole.numel() else (whole, whole)
        if not bool(((least < _LEAST_POWER) | (most > 1 / _LEAST_POWER)).any()):
            return (power,)
        is_beyond = (whole < _LEAST_POWER) | (whole > 1 / _LEAST_POWER)
        # Not even derivatives see what is not taken.
        power = self._power(divisor.masked_fill(is_beyond, 1.0))
        root = replace(self, beta=self.beta / 2)._power(divisor).clamp(max=torch.finfo(torch.float64).max)
        return torch.where(is_beyond, root, power), root.masked_fill(~is_beyond, 1.0)

    def _power(self, divisor: Tensor) -> Tensor:
        """D^-beta; 0 where D is 0, and so are the values."""
        positive = self._positive(divisor)
        if self.beta == 0.75:
            # Two roots cost a fifth of a power, and are as exact.
            root = positive.rsqrt()
            power = root * root.sqrt()
        else:
            power = positive.pow(-self.beta)
        return self._without_zeros(power, divisor)

    def _without_zeros(self, terms: Tensor, divisor: Tensor) -> Tensor:
        return terms if self.k > 0 else terms.masked_fill(divisor == 0, 0.0)

    def _positive(self, divisor: Tensor) -> Tensor:
        return divisor if self.k > 0 else divisor.masked_fill(divisor == 0, 1.0)


def _product(*terms: Tensor) -> Tensor:
    return reduce(torch.mul, terms)


def _units(values: Tensor) -> Tensor:
    """A power of two near the largest channel of every position, (outer, 1, inner); 1 for a peak of 0 or infinity."""
    peak = values.abs().amax(1, keepdim=True)
    power = torch.ldexp(torch.ones_like(peak), torch.frexp(peak).exponent)
    return torch.where((peak > 0) & power.isfinite(), power, 1.0)


def window_sums(values: Tensor, *, before: int, after: int) -> Tensor:
    """Sums of the channels from `before` back to `after` forth, zeros beyond the ends; axis 1.

    Sums over 1, 2, 4, ... channels are made of each other, and those in the binary digits of the size are added.
    """
    runs = torch.nn.functional.pad(values, (0, 0, before, after))
    channels, rest, width, offset = values.shape[1], before + 1 + after, 1, 0
    total: Tensor | None = None
    while True:
        if rest % 2:
            run = runs.narrow(1, offset, channels)
            total = run if total is None else total + run
            offset += width
        rest //= 2
        if rest == 0 and total is not None:
            return total
        length = runs.shape[1] - width
        runs = runs.narrow(1, 0, length) + runs.narrow(1, width, length)
        width *= 2
