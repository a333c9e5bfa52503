"""What is compiled ahead of the first batch is all that batches need."""

from typing import Any

import pytest
import torch

from normcore.statistics import Histogram, Moments, MomentsStream, cells, sums, warm_up

KERNELS: list[Any] = [sums.merge_block, cells.count_values, cells.count_state, cells.edges_of]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batches_compile_nothing_more(dtype: torch.dtype) -> None:
    warm_up()
    before = [kernel.signatures for kernel in KERNELS]
    assert all(before)
    for values in (torch.ones(3, 2, 4, dtype=dtype), torch.ones(2, 4, 300, dtype=dtype).transpose(0, 1)):
        mask = torch.ones(values.shape[0], 1, dtype=torch.bool)
        Moments.of(values)
        Moments.of(values, mask=mask)
        stream = MomentsStream(dtype, values.shape)
        stream.update(values.contiguous().view(torch.uint8).numpy().tobytes())
        stream.finish()
        histogram = Histogram.start(2).update(values, mask=mask).update(values, channel_axis=1)
        histogram.merge(histogram).histogram(3, channel=1)
    assert [kernel.signatures for kernel in KERNELS] == before
