"""Sweeps over a slab (outer, channels, inner): one function of a value, or of two, with parameters of its channel.

torch's broadcast arithmetic takes a sweep per operation. Its batch norm is the one fused operation of the kind, so with
mean 0 and variance 1 it serves as x * scale + shift, and its backward as two sums in one sweep.
"""

import torch
from torch import Tensor

from normcore._slab import blocks

# Up to here plain arithmetic wins: the fused operations wake all threads for a handful of values.
_SMALL_ELEMENTS = 2**15
# Values of a channel that torch's backward of batch norm may sum in sequence.
_COLUMN = 256


def scale_and_shift(values: Tensor, center: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:
    """(x - center) * scale + shift, a new tensor, rounded once; the parameters are (C,) in the datatype computed in."""
    output = torch.empty_like(values)
    parts = (values,) if center is None else blocks(values)
    targets = (output,) if center is None else blocks(output)
    for part, target in zip(parts, targets, strict=True):
        if center is None:
            _affine(part, scale, shift, out=target)
        elif target.dtype == center.dtype:
            _affine(torch.sub(part, center[:, None], out=target), scale, shift, out=target)
        else:
            deviations = part.to(center.dtype).sub_(center[:, None])
            target.copy_(_affine(deviations, scale, shift, out=deviations))
    return output


def dot_sums(values: Tensor, grads: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """Sums per channel of g and of g * (x - center); float64 of shape (C,)."""
    if _is_plain(values):
        deviations = values.to(center.dtype) - center[:, None]
        total, dot = (term.sum((0, 2), dtype=torch.float64) for term in (grads, deviations.mul_(grads)))
        return total, dot
    channels = values.shape[1]
    totals = torch.zeros(2, channels, dtype=torch.float64, device=values.device)
    for part, grad in zip(blocks(values), blocks(grads), strict=True):
        for columns, grad_columns in _columns(part, grad):
            width = columns.shape[1] // channels
            wide = center.repeat(width)
            _, dot, total = torch.ops.aten.native_batch_norm_backward(
                grad_columns, columns, None, wide, wide, wide, torch.ones_like(wide), True, 0.0, [False, True, True]
            )
            totals += torch.stack([total, dot]).view(2, width, channels).sum(1, dtype=torch.float64)
    return totals[0], totals[1]


def scaled_sum(
    grads: Tensor, values: Tensor, center: Tensor, scale: Tensor, slope: Tensor | None, constant: Tensor | None
) -> Tensor:
    """The sum g * scale + (x - center) * slope + constant, a new tensor, rounded once; without slope, g * scale."""
    if slope is None or constant is None:
        return scale_and_shift(grads, None, scale, torch.zeros_like(scale))
    output = torch.empty_like(grads)
    for grad, part, target in zip(blocks(grads), blocks(values), blocks(output), strict=True):
        if target.dtype == center.dtype:
            torch.sub(part, center[:, None], out=target)
            _affine(target, slope, constant, out=target).addcmul_(grad, scale[:, None])
        else:
            deviations = part.to(center.dtype).sub_(center[:, None])
            _affine(deviations, slope, constant, out=deviations)
            target.copy_(deviations.addcmul_(grad.to(center.dtype), scale[:, None]))
    return output


def _affine(values: Tensor, scale: Tensor, shift: Tensor, *, out: Tensor) -> Tensor:
    if (values.shape[2] == 1 or _is_plain(values)) and values.dtype == scale.dtype:
        return torch.addcmul(shift[:, None], values, scale[:, None], out=out)
    if _is_plain(values):
        return out.copy_(torch.addcmul(shift[:, None], values.to(scale.dtype), scale[:, None]))
    mean, var = torch.zeros_like(scale), torch.ones_like(scale)
    torch.ops.aten.native_batch_norm.out(
        values,
        scale,
        shift,
        mean,
        var,
        False,
        0.0,
        0.0,
        out=out,
        save_mean=scale.new_empty(0),
        save_invstd=scale.new_empty(0),
    )
    return out


def _is_plain(values: Tensor) -> bool:
    return values.numel() <= _SMALL_ELEMENTS or values.device.type != "cpu"


def _columns(values: Tensor, grads: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Both as torch sums them well: rows of channels as (r, k * C), so that no column is long."""
    outer, channels, inner = values.shape
    if inner > 1:
        return [(values, grads)]
    width = max(1, outer // _COLUMN)
    height = outer // width
    found = []
    for start, stop, shape in (
        (0, height * width, (height, width * channels)),
        (height * width, outer, (-1, channels)),
    ):
        if stop > start:
            found.append((values[start:stop].view(shape), grads[start:stop].view(shape)))
    return found
