"""Fast standardization of groups, without gradient: torch's fused kernels where they are exact enough, else our own.

A group is what shares a mean and a variance. Layer, RMS, group and instance norm all view their input as
(N, G, C, S): N samples of G groups of C channels of S positions; statistics are over (C, S). Weight and bias broadcast
against the view and are either one value per channel, (1 or N, G, C, 1), or one per position, (1, 1, 1, S).

torch's kernels fold the mean into the shift, which costs eps * |mean| / std, and square in float32. So their result is
kept for the groups whose own statistics say that this is harmless, and the other groups are done again, in blocks that
fit the cache, with deviations from a nearby value.
"""

from dataclasses import replace

import torch
from torch import Tensor

from normcore._precision import accumulation_dtype, split
from normcore.normalization.gradients import Standardized, Statistics

# A block of this many elements and its scratch copies stay in a core's second-level cache.
_BLOCK_ELEMENTS = 2**18
# Up to here the folded mean costs less than the rounding of an output (measured: 0.9e-6 at 2, 1.5e-6 at 5).
_LARGEST_RATIO = 2.0
_SHIFT_POSITIONS = 64


def standardize_groups(
    values: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, has_mean: bool
) -> Standardized:
    """Standardize a view (N, G, C, S), which is not empty, by its own statistics; `has_mean` false is the RMS form."""
    if not has_mean or values.device.type != "cpu" or not values.is_contiguous():
        return _in_blocks(values, weight, bias, eps=eps, has_mean=has_mean)
    samples, groups = values.shape[:2]
    rows = values.flatten(0, 1)[:, None]
    weight, bias = (_of_rows(term, samples, groups) for term in (weight, bias))
    result = _fused(rows, weight, bias, eps=eps)
    is_exact = _is_exact(result.statistics).flatten()
    if not bool(is_exact.all()):
        result = _repair(result, rows, weight, bias, indices=(~is_exact).nonzero().flatten())
    return _reshape(result, values.shape)


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
        _finish(deviations, -offset, statistics.invstd, *affine, target=output[start:stop])
    return Standardized(output, statistics)


def _of_rows(term: Tensor | None, samples: int, groups: int) -> Tensor | None:
    """Weight or bias for the groups of all samples in one row each."""
    if term is None or groups == term.shape[0] == 1:
        return term
    return term.expand(samples, groups, -1, -1).flatten(0, 1)[:, None]


def _fused(rows: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Standardized:
    """A kernel of torch for (R, 1, C, S); the parameters are given so that statistics come in their datatype."""
    count, _, channels, positions = rows.shape
    dtype = accumulation_dtype(rows.dtype)
    is_per_position = channels == 1 and all(term is None or term.shape[3] == positions for term in (weight, bias))
    shape = (1, 1, 1, positions) if is_per_position else (count, 1, channels, 1)
    weight = _parameter(weight, shape, 1.0, dtype=dtype, device=rows.device)
    bias = _parameter(bias, shape, 0.0, dtype=dtype, device=rows.device)
    if is_per_position:
        output, mean, invstd = torch.native_layer_norm(rows, [positions], weight, bias, eps)
    elif channels == 1 and rows.dtype == torch.float16:
        # The group norm of float16 is several times slower than its batch norm, which here sees a channel per group.
        view = rows.view(1, count, positions)
        output, mean, invstd = torch.native_batch_norm(view, weight, bias, None, None, True, 0.0, eps)
    else:
        view = rows.view(1, count * channels, positions)
        output, mean, invstd = torch.native_group_norm(view, weight, bias, 1, count * channels, positions, count, eps)
    center, invstd = mean.view(-1, 1, 1, 1), invstd.view(-1, 1, 1, 1).double()
    var = (invstd.square().reciprocal() - eps).clamp_min(0.0)
    statistics = Statistics(center, torch.zeros_like(var), var, invstd, eps, axes=(2, 3), count=channels * positions)
    return Standardized(output.view(rows.shape), statistics)


def _parameter(
    term: Tensor | None, shape: tuple[int, ...], default: float, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if term is None:
        return torch.full((torch.Size(shape).numel(),), default, dtype=dtype, device=device)
    return term.to(dtype).expand(shape).reshape(-1)


def _is_exact(statistics: Statistics) -> Tensor:
    """Where the mean is small, the variance can be told from eps, and no square overflowed; comparisons with NaN fail.

    The variance follows from invstd, whose digits are those of var + eps.
    """
    smallest = 1e-15 if statistics.center.dtype == torch.float32 else 1e-140
    invstd = statistics.invstd
    is_centered = (statistics.center * invstd).abs() <= _LARGEST_RATIO
    return is_centered & (statistics.eps * invstd.square() <= 0.5) & (invstd >= smallest)


def _repair(
    result: Standardized, rows: Tensor, weight: Tensor | None, bias: Tensor | None, *, indices: Tensor
) -> Standardized:
    """The result with the groups at `indices` done again."""
    eps = result.statistics.eps
    if len(indices) == len(rows):
        return _in_blocks(rows, weight, bias, eps=eps, has_mean=True)
    chosen = (term if term is None or term.shape[0] == 1 else term[indices] for term in (weight, bias))
    repaired = _in_blocks(rows[indices], *chosen, eps=eps, has_mean=True)
    result.output[indices] = repaired.output
    for name in ("center", "offset", "var", "invstd"):
        getattr(result.statistics, name)[indices] = getattr(repaired.statistics, name)
    return result


def _reshape(result: Standardized, shape: torch.Size) -> Standardized:
    """Rows as (N, G, C, S)."""
    found = result.statistics
    center, offset, var, invstd = (
        term.view(*shape[:2], 1, 1) for term in (found.center, found.offset, found.var, found.invstd)
    )
    statistics = replace(found, center=center, offset=offset, var=var, invstd=invstd)
    return Standardized(result.output.view(shape), statistics)


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
    shift = _shift(values) if has_mean else values.new_zeros(()).expand(*part.shape[:3], 1)
    deviations = values
    if has_mean:
        deviations = torch.sub(values, shift, out=target) if target.dtype == dtype else values - shift
    squares = deviations.square().sum(-1, keepdim=True).double()
    total = deviations.sum(-1, keepdim=True).double() if has_mean else torch.zeros_like(squares)
    own_offset = total / positions
    own_m2 = (squares - positions * own_offset.square()).clamp_min(0.0)
    if dtype == torch.float32 and not _is_reliable(squares, own_offset, own_m2, positions=positions, eps=eps):
        return None
    center = shift[:, :, :1]
    relative = shift.double() - center.double() + own_offset
    offset = relative.mean(2, keepdim=True) if has_mean else torch.zeros_like(relative[:, :, :1])
    spread = relative - offset
    var = (own_m2 + positions * spread.square()).sum(2, keepdim=True) / (channels * positions)
    invstd = (var + eps).sqrt().reciprocal().masked_fill(~var.isfinite(), torch.nan)
    _finish(deviations, spread - own_offset, invstd, weight, bias, target=target)
    return center, offset, var, invstd


def _shift(values: Tensor) -> Tensor:
    """About the mean of a channel, and exactly its value where it is constant."""
    first = values[..., :1]
    return first + (values[..., :_SHIFT_POSITIONS] - first).mean(-1, keepdim=True)


def _is_reliable(squares: Tensor, offset: Tensor, m2: Tensor, *, positions: int, eps: float) -> bool:
    """Whether no square overflowed or sank, and the shift was near enough to the mean."""
    is_reliable = squares.isfinite() & (positions * offset.square() <= m2)
    if eps < 1e-20:
        is_reliable &= squares >= positions * 1e-30
    return bool(is_reliable.all())


def _finish(
    deviations: Tensor, residual: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, *, target: Tensor
) -> None:
    """Write (deviations + residual) * invstd * weight + bias to the target, which may be the deviations."""
    dtype = deviations.dtype
    is_per_position = any(term is not None and term.shape[3] > 1 for term in (weight, bias))
    scale = invstd if weight is None or is_per_position else invstd * weight.double()
    shift = residual * scale
    if bias is not None and not is_per_position:
        shift = shift + bias.double()
    result = target if target.dtype == dtype else torch.empty_like(deviations)
    torch.mul(deviations, scale.to(dtype), out=result)
    if bool(shift.any()):
        result.add_(shift.to(dtype))
    if is_per_position and weight is not None:
        result.mul_(weight.to(dtype))
    if is_per_position and bias is not None:
        result.add_(bias.to(dtype))
    if result is not target:
        target.copy_(result)
