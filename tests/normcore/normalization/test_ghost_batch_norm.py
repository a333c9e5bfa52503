"""Ghost batch norm: batch norms of parts of the batch, in turn."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from normcore.errors import ArgumentError, ParameterError, ShapeError, StatisticsError
from normcore.normalization import BatchNormResult, GhostBatchNormResult, batch_norm, ghost_batch_norm

ZERO, ONE = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
GRADIENTS = ("grad_input", "grad_weight", "grad_bias")


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


@pytest.mark.parametrize(
    ("samples", "size", "sizes"),
    [
        (12, 4, [4, 4, 4]),
        (14, 4, [4, 4, 4, 2]),
        (13, 4, [4, 4, 5]),
        (5, 2, [2, 3]),
        (4, 3, [4]),
        (4, 9, [4]),
        (4, 4, [4]),
        (3, 1, [1, 1, 1]),
    ],
)
@pytest.mark.parametrize("momentum", [0.3, None], ids=str)
def test_virtual_batches_are_normalized_in_turn(
    samples: int, size: int, sizes: list[int], momentum: float | None
) -> None:
    input, grad_output = _randn(samples, 3, 5), _randn(samples, 3, 5, seed=1)
    weight, bias = _randn(3, seed=2), _randn(3, seed=3)
    result = ghost_batch_norm(
        input,
        ZERO,
        ONE,
        weight,
        bias,
        virtual_batch_size=size,
        num_batches_tracked=torch.tensor(2),
        momentum=momentum,
        training=True,
        grad_output=grad_output,
    )
    mean, var, tracked = ZERO, ONE, torch.tensor(2)
    parts: list[BatchNormResult] = []
    for part, grad in zip(torch.split(input, sizes), torch.split(grad_output, sizes), strict=True):
        parts.append(
            batch_norm(
                part,
                mean,
                var,
                weight,
                bias,
                num_batches_tracked=tracked,
                momentum=momentum,
                training=True,
                grad_output=grad,
            )
        )
        assert parts[-1].running_mean is not None
        assert parts[-1].running_var is not None
        assert parts[-1].num_batches_tracked is not None
        mean, var, tracked = parts[-1].running_mean, parts[-1].running_var, parts[-1].num_batches_tracked
    assert torch.equal(result.output, torch.cat([part.output for part in parts]))
    for name in ("mean", "var", "invstd"):
        assert torch.equal(getattr(result, name), torch.stack([getattr(part, name) for part in parts]))
    for name, state in (("running_mean", mean), ("running_var", var), ("num_batches_tracked", tracked)):
        assert torch.equal(getattr(result, name), state)
    of_inputs = [part.grad_input for part in parts if part.grad_input is not None]
    assert result.grad_input is not None
    assert torch.equal(result.grad_input, torch.cat(of_inputs))
    for name in ("grad_weight", "grad_bias"):
        assert torch.allclose(getattr(result, name), sum(getattr(part, name) for part in parts))
    assert int(tracked) == 2 + len(sizes)


def test_one_virtual_batch_is_batch_norm_and_samples_of_their_own_are_instance_norm() -> None:
    input = _randn(6, 3, 7)
    whole = ghost_batch_norm(input, ZERO, ONE, virtual_batch_size=6, training=True)
    assert torch.equal(whole.output, batch_norm(input, training=True).output)
    alone = ghost_batch_norm(input, virtual_batch_size=1, training=True)
    assert torch.allclose(alone.output, torch.nn.functional.instance_norm(input))


def test_inference_is_batch_norm() -> None:
    input, grad_output = _randn(6, 3), _randn(6, 3, seed=1)
    result = ghost_batch_norm(input, ZERO, ONE, virtual_batch_size=2, grad_output=grad_output)
    expected = batch_norm(input, ZERO, ONE, grad_output=grad_output)
    for name in ("output", "mean", "var", "invstd", *GRADIENTS):
        assert torch.equal(getattr(result, name), getattr(expected, name))
    assert result.running_mean is None


def test_masks_and_parameters_per_sample_go_with_their_samples() -> None:
    input, grad_output, weight = _randn(6, 3, 4), _randn(6, 3, 4, seed=1), _randn(6, 3, seed=2)
    mask = torch.arange(24).view(6, 4) % 5 > 0
    result = ghost_batch_norm(
        input, None, None, weight, weight, virtual_batch_size=3, mask=mask, training=True, grad_output=grad_output
    )
    parts = [
        batch_norm(
            input[rows], None, None, weight[rows], weight[rows], mask=mask[rows], training=True,
            grad_output=grad_output[rows],
        )
        for rows in (slice(0, 3), slice(3, 6))
    ]  # fmt: skip
    for name in ("output", *GRADIENTS):
        assert torch.equal(getattr(result, name), torch.cat([getattr(part, name) for part in parts]))
    shared = ghost_batch_norm(input, virtual_batch_size=3, mask=mask[0], training=True)
    assert torch.equal(shared.output[3:], batch_norm(input[3:], mask=mask[0], training=True).output)


def test_mask_of_samples_goes_with_them() -> None:
    input, mask = _randn(6, 3), torch.tensor([True, True, False] * 2)
    result = ghost_batch_norm(input, virtual_batch_size=3, mask=mask, training=True)
    assert torch.equal(result.output[3:], batch_norm(input[3:], mask=mask[3:], training=True).output)


def test_derivatives_are_right_to_the_second_order() -> None:
    leaves = tuple(term.requires_grad_() for term in (_randn(5, 3, 2), _randn(3, seed=1), _randn(3, seed=2)))

    def output(*leaves: Tensor) -> Tensor:
        input, weight, bias = leaves
        return ghost_batch_norm(input, None, None, weight, bias, virtual_batch_size=2, training=True).output

    assert torch.autograd.gradcheck(output, leaves)
    assert torch.autograd.gradgradcheck(output, leaves)


def test_findings_name_the_virtual_batch() -> None:
    input = _randn(32, 3)
    input[8:16, 1] = 4.0
    findings = ghost_batch_norm(input, virtual_batch_size=8, training=True).diagnostics()
    assert findings == {"virtual_batches": [{"index": 1, "constant_channels": 1, "eps_dominated_channels": 1}]}
    assert ghost_batch_norm(_randn(32, 3), virtual_batch_size=8, training=True).diagnostics() == {}
    whole = ghost_batch_norm(input[8:16], virtual_batch_size=8, training=True).diagnostics()
    assert whole == {"constant_channels": 1, "eps_dominated_channels": 1}


def test_skipped_updates_are_those_of_spoiled_virtual_batches() -> None:
    input = _randn(6, 3)
    expected = ghost_batch_norm(input[2:], ZERO, ONE, virtual_batch_size=2, training=True)
    input[0, 0] = torch.nan
    result = ghost_batch_norm(input, ZERO, ONE, virtual_batch_size=2, training=True, nan_policy="skip_update")
    assert result.running_mean is not None
    assert expected.running_mean is not None
    assert torch.equal(result.running_mean, expected.running_mean)


def test_a_value_that_is_not_finite_stays_in_its_channel_and_makes_its_running_statistics_nan() -> None:
    input = _randn(6, 3)
    input[0, 0] = torch.nan
    result = ghost_batch_norm(input, ZERO, ONE, virtual_batch_size=2, training=True)
    assert result.running_mean is not None
    assert result.running_mean.isnan().tolist() == [True, False, False]
    assert result.output.isnan().nonzero().tolist() == [[0, 0], [1, 0]]
    findings = {"non_finite_channels": 1, "few_values_per_channel": 2, "non_finite_values": 1}
    assert result.virtual_batches[0].diagnostics() == findings | {"nan_policy": "propagate"}


def test_empty_batch_changes_nothing() -> None:
    result = ghost_batch_norm(torch.empty(0, 3), ZERO, ONE, virtual_batch_size=2, training=True)
    assert isinstance(result, GhostBatchNormResult)
    assert result.output.shape == (0, 3)
    assert result.mean is None
    assert result.running_mean is not None
    assert torch.equal(result.running_mean, ZERO)


REFUSALS: dict[str, tuple[Callable[[], object], type[ArgumentError], str]] = {
    "no size": (
        lambda: ghost_batch_norm(_randn(4, 3), virtual_batch_size=0, training=True),
        ParameterError,
        "virtual_batch_size: expected an integer >= 1, received 0",
    ),
    "channels along the samples": (
        lambda: ghost_batch_norm(_randn(4, 3), channel_axis=-2, training=True),
        ParameterError,
        "channel_axis: expected another axis than that of the samples",
    ),
    "one value per channel": (
        lambda: ghost_batch_norm(_randn(4, 3), virtual_batch_size=1, training=True),
        StatisticsError,
        "input: expected more than 1 value per channel",
    ),
    "gradient": (
        lambda: ghost_batch_norm(_randn(4, 3), virtual_batch_size=2, training=True, grad_output=_randn(3, 3)),
        ShapeError,
        r"grad_output: expected shape \(4, 3\)",
    ),
    "mask": (
        lambda: ghost_batch_norm(_randn(4, 3), virtual_batch_size=2, training=True, mask=torch.ones(2) > 0),
        ShapeError,
        r"mask: .* \(4,\), the input's without the channel axis, received shape \(2,\)",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refuses(call: Callable[[], object], error: type[ArgumentError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
