"""Compilation ahead of the first call."""

from collections.abc import Iterable

import torch
from torch import Tensor

from normcore.normalization.batch_norm import batch_norm
from normcore.normalization.group_norm import group_norm
from normcore.normalization.kernel import own_statistics
from normcore.normalization.kernel_backward import gradient_sums, input_gradient
from normcore.normalization.layer_norm import layer_norm
from normcore.normalization.lp_norm import lp_norm
from normcore.normalization.weight_norm import weight_norm

# The datatypes that there are kernels for.
COMPUTED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def warm_up(dtypes: Iterable[torch.dtype] = COMPUTED) -> None:
    """Compile the kernels that the methods use on the CPU, for these datatypes and every layout.

    A first call compiles what it needs, and keeps it on disk where it can: this is for a service that would rather wait
    before its first request. It takes some minutes where nothing is kept, else about a second; other threads
    of the process make slow progress meanwhile.
    """
    for dtype in dtypes:
        images = torch.arange(96, dtype=torch.float32).view(2, 4, 3, 4).to(dtype)
        mask = torch.ones(images.shape, dtype=torch.bool)
        for input in (images, images.to(memory_format=torch.channels_last)):
            batch_norm(input, torch.zeros(4), torch.ones(4), grad_output=input)
            batch_norm(input, torch.zeros(4), torch.ones(4), grad_output=input, training=True)
            _by_autograd(input)
            group_norm(input, torch.ones(4), grad_output=input, num_groups=2)
            group_norm(input, mask=mask, num_groups=2)
            _in_two_steps(input)
        layer_norm(images, grad_output=images)
        lp_norm(images, grad_output=images, axis=1)
        weight_norm(images, torch.ones(2), images)


def _by_autograd(input: Tensor) -> None:
    """A backward with weights of each sample in the input's datatype, of groups that are not worked on at once."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        leaves = torch.zeros_like(input), torch.ones(2, 4, dtype=input.dtype)
        output = batch_norm(leaves[0].requires_grad_(), weight=leaves[1].requires_grad_(), training=True).output
        torch.autograd.grad(output, leaves, torch.ones_like(output))


def _in_two_steps(input: Tensor) -> None:
    """A backward of groups that do not stay in the cache."""
    by = own_statistics(input, axes=(0, 2, 3), eps=1e-5)
    sums = gradient_sums(input, input, None, by, affine_shape=(1, 4, 1, 1))
    input_gradient(input, input, None, by, sums)
