"""What values themselves, rather than statistics of them, say about a standardized result."""

import torch
from torch import Tensor

from normcore.normalization.method import JSON

# Statistics of fewer values say little.
FEW_VALUES = 8
# At most so many values, evenly spread, are looked at for their size: about 0.1 ms whatever the input.
_SAMPLE_ELEMENTS = 2**16
_FAR = 4.0
_NOTABLE_SHARE = 0.01


def tails(input: Tensor, output: Tensor) -> dict[str, JSON]:
    """Shares of values beyond |4| of the input and the output, where the output's is above 1 %; of a sample of many.

    >>> tails(torch.tensor([1.0, 9.0]), torch.tensor([0.0, 5.0]))
    {'share_beyond_4_before': 0.5, 'share_beyond_4_after': 0.5}
    """
    after = _share_beyond(output)
    if not after > _NOTABLE_SHARE:
        return {}
    return {"share_beyond_4_before": _share_beyond(input), "share_beyond_4_after": after}


def unresolved(mean: Tensor, var: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a deviation is less than two steps of a datatype at the mean, which then holds little of the spread."""
    step = torch.finfo(dtype).eps * mean.abs()
    return (var.sqrt() < 2 * step) & (var > 0)


def _share_beyond(tensor: Tensor) -> float:
    # In the order of the memory, so that no copy is made.
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    values = tensor.permute(order).reshape(-1)
    # An odd step, so that it meets all channels of an even number.
    sample = values[:: -(-len(values) // _SAMPLE_ELEMENTS) | 1]
    return float((sample.abs() > _FAR).float().mean())
