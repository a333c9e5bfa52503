"""Sweeps over a slab (outer, channels, inner): one function of a value, or of two, with parameters of its channel.

torch's broadcast arithmetic takes a sweep per operation. Its batch norm is the one fused operation of the kind, so with
mean 0 and variance 1 it serves as x * scale + shift, and its backward as two sums in one sweep.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from normcore._slab import Slab, blocks

# Up to here plain arithmetic wins: the fused operations wake all threads for a handful of values.
_SMALL_ELEMENTS = 2**15
# Values of a channel that torch's backward of batch norm may sum: rows in sequence, images in vectors.
_COLUMN = 256
_IMAGE = 2**11
# Values of a channel that it may sum at once: what it then loses of a sum is below 1e-6, and below what half precision
# has lost before.
_LARGEST_IMAGES = {torch.float64: 2**20, torch.float32: 2**13, torch.float16: 2**17, torch.bfloat16: 2**17}


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
    totals = torch.zeros(2, values.shape[1], dtype=torch.float64, device=values.device)
    for part, grad in zip(blocks(values), blocks(grads), strict=True):
        for columns, grad_columns, wide in _columns(part, grad, center):
            _, dot, total = torch.ops.aten.native_batch_norm_backward(
                grad_columns, columns, None, wide, wide, wide, torch.ones_like(wide), True, 0.0, [False, True, True]
            )
            found = torch.stack([total, dot])
            if values.shape[2] > 1:
                totals += found.view(2, len(center), -1).sum(2, dtype=torch.float64)
            else:
                totals += found.view(2, -1, len(center)).sum(1, dtype=torch.float64)
    return totals[0], totals[1]


def scaled_sum(
    grads: Tensor,
    values: Tensor,
    center: Tensor | None,
    scale: Tensor,
    slope: Tensor | None,
    constant: Tensor | None,
    *,
    mask: Tensor | None,
) -> Tensor:
    """The sum g * scale + (x - center) * slope + constant, a new tensor, rounded once.

    Only g * scale without a slope, and where the mask, of the slab's shape, is false.
    """
    if slope is None or constant is None:
        return scale_and_shift(grads, None, scale, torch.zeros_like(scale))
    output = torch.empty_like(grads)
    masks = [None] * len(blocks(values)) if mask is None else blocks(~mask)
    for grad, part, target, hidden in zip(blocks(grads), blocks(values), blocks(output), masks, strict=True):
        own = target if target.dtype == scale.dtype else torch.empty_like(target, dtype=scale.dtype)
        source = part if own is target else own.copy_(part)
        if center is not None:
            source = torch.sub(source, center[:, None], out=own)
        _affine(source, slope, constant, out=own)
        if hidden is not None:
            own.masked_fill_(hidden, 0.0)
        own.addcmul_(grad.to(scale.dtype), scale[:, None])
        if target is not own:
            target.copy_(own)
    return output


def is_exact_image(slab: Slab) -> bool:
    """Whether torch's own backward sums this slab without losing digits."""
    return slab.values.shape[2] > 1 and not _is_plain(slab.values) and slab.count <= _LARGEST_IMAGES[slab.values.dtype]


def image_gradients(
    values: Tensor, grads: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of values, weight and bias of a batch norm by its own statistics; parameters are (C,)."""
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        grads, values, weight, mean, invstd, mean, invstd, True, 0.0, [True, True, True]
    )
    return gradients


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


def _columns(values: Tensor, grads: Tensor, center: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Values, gradients and centers, each channel as several, none of them long: torch sums them in sequence.

    Rows of channels become rows of k times all channels, images k parts of each channel.
    """
    outer, channels, inner = values.shape
    width = 1
    if inner > 1:
        while inner % (2 * width) == 0 and outer * inner > _IMAGE * width:
            width *= 2
        shape = (outer, channels * width, inner // width)
        yield values.contiguous().view(shape), grads.contiguous().view(shape), center.repeat_interleave(width)
        return
    width = max(1, outer // _COLUMN)
    height = outer // width
    whole = height * width
    yield values[:whole].view(height, -1), grads[:whole].view(height, -1), center.repeat(width)
    if whole < outer:
        yield values[whole:].view(-1, channels), grads[whole:].view(-1, channels), center
