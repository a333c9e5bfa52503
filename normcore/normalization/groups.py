"""Fast standardization of groups, without gradient: torch's fused kernels where they are exact enough, else our own.

A group is what shares a mean and a variance. Layer, RMS, group and instance norm all view their input as
(N, G, C, S): N samples of G groups of C channels of S positions; statistics are over (C, S). Weight and bias broadcast
against the view and are either one value per channel, (1 or N, G, C, 1), or one per position, (1, 1, 1, S).

torch's kernels fold the mean into the shift, which costs eps * |mean| / std, and square in float32. So their result is
kept for the groups whose own statistics say that this is harmless, and the other groups are done again, in blocks that
fit the cache, with deviations from a nearby value.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from normcore._precision import accumulation_dtype, split
from normcore.normalization.gradients import Standardized, Statistics

# A block of this many elements and its scratch copies stay in the last cache. Smaller blocks cost more in calls than
# they gain; measured with (16, 64, 56, 56) and (32, 256, 14, 14) in both memory formats, and rows of 64 and 1024.
_BLOCK_ELEMENTS = 2**19
# Up to here the folded mean costs less than the rounding of an output (measured: 0.9e-6 at 2, 1.5e-6 at 5).
_LARGEST_RATIO = 2.0
_SHIFT_POSITIONS = 64


def standardize_groups(
    values: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, has_mean: bool
) -> Standardized:
    """Standardize a view (N, G, C, S), which is not empty, by its own statistics; `has_mean` false is the RMS form."""
    if not has_mean or values.device.type != "cpu" or not values.is_contiguous():
        return _in_blocks(values, weight, bias, eps=eps, has_mean=has_mean)
    result = _fused(values, weight, bias, eps=eps)
    for attempt in (_shifted, _again_in_blocks):
        inexact = _inexact(result.statistics)
        if inexact is None:
            break
        result = _repair(result, values, weight, bias, indices=inexact, attempt=attempt)
    return result


def standardize_groups_by(
    values: Tensor, weight: Tensor | None, bias: Tensor | None, *, mean: Tensor, var: Tensor, eps: float
) -> Standardized:
    """Standardize a view (N, G, C, S) by given statistics that broadcast against it."""
    dtype = accumulation_dtype(values.dtype)
    center, offset = split(mean, dtype)
    statistics = Statistics(center, offset, var.double(), (var.double() + eps).sqrt().reciprocal(), eps)
    output = torch.empty_like(values)
    for start, stop in _bounds(values):
        deviations = values[start:stop].to(dtype) - center
        affine = (_part(weight, start, stop), _part(bias, start, stop))
        target = output[start:stop]
        scratch = target if target.dtype == dtype else deviations
        _finish(deviations, -offset, statistics.invstd, *affine, target=target, scratch=scratch)
    return Standardized(output, statistics)


def _fused(values: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Standardized:
    """The kernel of torch that fits the parameters; the center is 0, and the offset the mean that was folded."""
    samples, groups, channels, positions = values.shape
    given = [term for term in (weight, bias) if term is not None]
    count, width = samples * groups, groups * channels
    if width == 1 and all(term.shape[0] == 1 and term.shape[3] == positions for term in given):
        terms = _parameters(weight, bias, (1, 1, 1, positions), values)
        output, mean, invstd = torch.native_layer_norm(values, [positions], *terms, eps)
    elif channels == 1 and values.dtype == torch.float16:
        # The group norm of float16 is several times slower than its batch norm, which here sees a channel per group.
        terms = _parameters(weight, bias, (samples, groups, 1, 1), values)
        output, mean, invstd = torch.native_batch_norm(
            values.view(1, count, positions), *terms, None, None, True, 0.0, eps
        )
    else:
        # Parameters of each sample: all samples become the groups of one.
        rows = 1 if any(term.shape[0] > 1 for term in given) else samples
        terms = _parameters(weight, bias, (samples // rows, groups, channels, 1), values)
        width, each = width * samples // rows, count // rows
        output, mean, invstd = torch.native_group_norm(
            values.view(rows, width, positions), *terms, rows, width, positions, each, eps
        )
    offset, invstd = (term.view(samples, groups, 1, 1).double() for term in (mean, invstd))
    var = invstd.pow(-2).sub_(eps)
    center = torch.zeros_like(offset, dtype=accumulation_dtype(values.dtype))
    statistics = Statistics(center, offset, var, invstd, eps, axes=(2, 3), count=channels * positions)
    return Standardized(output.view(values.shape), statistics)


def _parameters(
    weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...], values: Tensor
) -> tuple[Tensor, Tensor]:
    """Weight and bias in the datatype of the statistics, which torch takes from them."""
    dtype = accumulation_dtype(values.dtype)
    size = torch.Size(shape).numel()
    weight = values.new_ones(size, dtype=dtype) if weight is None else weight.to(dtype).expand(shape).reshape(-1)
    bias = values.new_zeros(size, dtype=dtype) if bias is None else bias.to(dtype).expand(shape).reshape(-1)
    return weight, bias


def _inexact(statistics: Statistics) -> Tensor | None:
    """Indices of the groups with a mean that the kernel folded, a variance below eps, or squares out of range.

    The variance follows from invstd, whose digits are those of var + eps. Comparisons with NaN fail.
    """
    smallest = 1e-15 if statistics.center.dtype == torch.float32 else 1e-140
    invstd, eps = statistics.invstd, statistics.eps
    ratio = (statistics.offset * invstd).abs_()
    least, most = (float(bound) for bound in torch.aminmax(invstd))
    largest = 1.0 / smallest
    if float(ratio.max()) <= _LARGEST_RATIO and eps * most * most <= 0.5 and smallest <= least and most <= largest:
        return None
    is_exact = (ratio <= _LARGEST_RATIO) & (eps * invstd.square() <= 0.5) & (invstd >= smallest) & (invstd <= largest)
    return (~is_exact).flatten().nonzero().flatten()


def _repair(
    result: Standardized,
    values: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    indices: Tensor,
    attempt: Callable[[Tensor, Tensor | None, Tensor | None, Statistics], Standardized],
) -> Standardized:
    """The result with the groups at `indices` done again."""
    samples, groups = values.shape[:2]
    if len(indices) == samples * groups:
        return attempt(values, weight, bias, result.statistics)

    def chosen(term: Tensor) -> Tensor:
        return term.expand(samples, -1, -1, -1).flatten(0, 1)[indices, None]

    is_shared = groups == 1 and all(term is None or term.shape[0] == 1 for term in (weight, bias))
    if not is_shared:
        weight, bias = (None if term is None else chosen(term) for term in (weight, bias))
    old = result.statistics
    found = replace(old, center=chosen(old.center), offset=chosen(old.offset))
    repaired = attempt(chosen(values), weight, bias, found)
    result.output.flatten(0, 1)[indices] = repaired.output[:, 0]
    for name in ("center", "offset", "var", "invstd"):
        getattr(old, name).view(-1)[indices] = getattr(repaired.statistics, name).flatten()
    return result


def _shifted(values: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Statistics) -> Standardized:
    """The kernel of torch on deviations from the mean that it found before."""
    center = statistics.mean.to(statistics.center.dtype)
    output = torch.empty_like(values)
    found = []
    for start, stop in _bounds(values):
        affine = (_part(weight, start, stop), _part(bias, start, stop))
        block = _fused(values[start:stop] - center[start:stop], *affine, eps=statistics.eps)
        output[start:stop] = block.output
        found.append(block.statistics)
    offset, var, invstd = (torch.cat([getattr(block, name) for block in found]) for name in ("offset", "var", "invstd"))
    return Standardized(output, replace(statistics, center=center, offset=offset, var=var, invstd=invstd))


def _again_in_blocks(
    values: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Statistics
) -> Standardized:
    return _in_blocks(values, weight, bias, eps=statistics.eps, has_mean=True)


def _in_blocks(
    values: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, has_mean: bool
) -> Standardized:
    """Our own kernel, for any strides."""
    dtype = accumulation_dtype(values.dtype)
    output = torch.empty_like(values)
    found = []
    for start, stop in _bounds(values):
        affine = (_part(weight, start, stop), _part(bias, start, stop))
        arguments = (values[start:stop], output[start:stop], *affine)
        terms = _standardize_block(*arguments, eps=eps, has_mean=has_mean, dtype=dtype)
        if terms is None:
            terms = _standardize_block(*arguments, eps=eps, has_mean=has_mean, dtype=torch.float64)
        assert terms is not None
        found.append(terms)
    center, offset, var, invstd = (torch.cat(terms) for terms in zip(*found, strict=True))
    count = values.shape[2] * values.shape[3]
    # A block done in float64 has its center in float64.
    mean = center.double() + offset
    center, offset = split(mean, dtype) if center.dtype != dtype else (center, offset)
    statistics = Statistics(center, offset, var, invstd, eps, axes=(2, 3), count=count, has_mean=has_mean)
    return Standardized(output, statistics)


def _bounds(values: Tensor) -> list[tuple[int, int]]:
    """Ranges of samples that fit the cache."""
    samples = len(values)
    step = samples if values.device.type != "cpu" else max(1, _BLOCK_ELEMENTS * samples // max(1, values.numel()))
    return [(start, min(start + step, samples)) for start in range(0, samples, step)]


def _part(term: Tensor | None, start: int, stop: int) -> Tensor | None:
    return term if term is None or term.shape[0] == 1 else term[start:stop]


def _standardize_block(
    part: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    has_mean: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Fill the target; center, offset, var and invstd, or None where float32 cannot hold the sums.

    Sums are per channel, of deviations from a shift of its own, and channels are joined in float64 (Chan), around the
    first one's shift.
    """
    channels, positions = part.shape[2:]
    values = part.to(dtype)
    scratch = target if target.dtype == dtype else torch.empty_like(values)
    if not has_mean:
        squares = torch.mul(values, values, out=scratch).sum(-1, keepdim=True).double()
        if dtype == torch.float32 and not _is_reliable(squares, positions=positions, eps=eps):
            return None
        zero = torch.zeros_like(squares)
        invstd = _invstd(squares.div_(positions), eps=eps)
        _finish(values, None, invstd, weight, bias, target=target, scratch=scratch)
        return zero.to(dtype), zero, squares, invstd
    shift = _shift(values)
    deviations = torch.sub(values, shift, out=scratch)
    total = deviations.sum(-1, keepdim=True).double()
    squares = deviations.square().sum(-1, keepdim=True).double()
    own_offset = total / positions
    if dtype == torch.float32 and not _is_reliable(squares, total * own_offset, positions=positions, eps=eps):
        return None
    own_m2 = squares.sub_(total.mul_(own_offset)).clamp_min_(0.0)
    center = shift[:, :, :1]
    if channels == 1:
        offset, residual, var = own_offset, -own_offset, own_m2.div_(positions)
    else:
        relative = shift.double() - center.double() + own_offset
        offset = relative.mean(2, keepdim=True)
        spread = relative - offset
        residual = spread - own_offset
        var = own_m2.add_(spread.square().mul_(positions)).sum(2, keepdim=True).div_(channels * positions)
    invstd = _invstd(var, eps=eps)
    _finish(deviations, residual, invstd, weight, bias, target=target, scratch=scratch)
    return center, offset, var, invstd


def _invstd(var: Tensor, *, eps: float) -> Tensor:
    """NaN for a variance beyond float64, which would otherwise turn every output into the bias without a trace."""
    return (var + eps).rsqrt_().masked_fill_(var == torch.inf, torch.nan)


def _shift(values: Tensor) -> Tensor:
    """About the mean of a channel, and exactly its value where it is constant."""
    first = values[..., :1]
    return first + (values[..., :_SHIFT_POSITIONS] - first).mean(-1, keepdim=True)


def _is_reliable(squares: Tensor, mean_part: Tensor | None = None, *, positions: int, eps: float) -> bool:
    """Whether no sum of squares overflowed or sank, and at most half of it is the poor shift's."""
    most = float(squares.max())
    if not most < torch.inf or (eps < 1e-20 and float(squares.min()) < positions * 1e-30):
        return False
    return mean_part is None or bool((2 * mean_part <= squares).all())


def _finish(
    deviations: Tensor,
    residual: Tensor | None,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    target: Tensor,
    scratch: Tensor,
) -> None:
    """Write (deviations + residual) * invstd * weight + bias to the target.

    The scratch has the deviations' datatype; it may be the deviations, and is the target where that has their datatype.
    """
    dtype = deviations.dtype
    is_per_position = any(term is not None and term.shape[3] > 1 for term in (weight, bias))
    scale = invstd if weight is None or is_per_position else invstd * weight.double()
    shift = None if residual is None else residual * scale
    if bias is not None and not is_per_position:
        shift = bias.double() if shift is None else shift + bias.double()
    torch.mul(deviations, scale.to(dtype), out=scratch)
    if shift is not None:
        scratch.add_(shift.to(dtype))
    if is_per_position and weight is not None:
        scratch.mul_(weight.to(dtype))
    if is_per_position and bias is not None:
        scratch.add_(bias.to(dtype))
    if scratch is not target:
        target.copy_(scratch)
