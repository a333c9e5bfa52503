"""Running statistics: the update of each convention, cumulative averages, and what changes nothing."""

import pytest
import torch

from normcore.errors import ParameterError, StatisticsError
from normcore.statistics import CONVENTIONS, Moments, Momentum, RunningStatistics

BATCH = Moments.of(torch.tensor([[1.0], [3.0], [8.0]]))  # mean 4, m2 26


def _start(tracked: int | None = None) -> RunningStatistics:
    count = None if tracked is None else torch.tensor(tracked)
    return RunningStatistics(torch.tensor([10.0]).double(), torch.tensor([1.0]).double(), count)


@pytest.mark.parametrize(
    ("convention", "momentum", "weight", "batch_var"),
    [
        ("torch", "default", 0.1, 13.0),
        ("torch", 0.25, 0.25, 13.0),
        ("onnx", "default", 0.1, 26 / 3),
        ("onnx", 0.25, 0.75, 26 / 3),
        ("keras", "default", 0.01, 26 / 3),
        ("keras", 1.0, 0.0, 26 / 3),
    ],
)
def test_update_follows_the_convention(convention: str, momentum: Momentum, weight: float, batch_var: float) -> None:
    updated = _start().update(BATCH, momentum=momentum, convention=convention)
    assert float(updated.mean) == pytest.approx(10 * (1 - weight) + 4 * weight, rel=1e-14)
    assert float(updated.var) == pytest.approx(1 * (1 - weight) + batch_var * weight, rel=1e-14)
    assert updated.num_batches_tracked is None


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_cumulative_update_is_the_average_over_batches(convention: str) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [Moments.of(torch.randn(4, 2, generator=generator)) for _ in range(5)]
    running = RunningStatistics(torch.zeros(2), torch.ones(2), torch.tensor(0))
    for batch in batches:
        running = running.update(batch, momentum=None, convention=convention)
    correction = 1 if convention == "torch" else 0
    assert torch.allclose(running.mean.double(), torch.stack([batch.mean for batch in batches]).mean(0), atol=1e-7)
    expected_var = torch.stack([batch.var(correction=correction) for batch in batches]).mean(0)
    assert torch.allclose(running.var.double(), expected_var, rtol=1e-6)
    assert running.num_batches_tracked is not None
    assert running.num_batches_tracked.equal(torch.tensor(5))


def test_update_keeps_datatypes_and_does_not_stall_in_bfloat16_arithmetic() -> None:
    target = Moments(*(torch.tensor([value], dtype=torch.float64) for value in (100.0, 10.25, 0.0)))
    running = RunningStatistics(torch.zeros(1), torch.ones(1))
    for _ in range(2000):
        running = running.update(target, momentum=0.01)
    assert running.mean.dtype == torch.float32
    assert float(running.mean) == pytest.approx(10.25, rel=1e-5)


@pytest.mark.parametrize("momentum", ["default", None], ids=["ema", "cumulative"])
def test_update_with_an_empty_batch_changes_nothing(momentum: Momentum) -> None:
    before = _start(tracked=3)
    assert before.update(Moments.of(torch.empty(0, 1)), momentum=momentum) is before


def test_update_does_not_change_the_old_statistics() -> None:
    before = _start(tracked=3)
    before.update(BATCH)
    assert (float(before.mean), float(before.var)) == (10.0, 1.0)
    assert before.num_batches_tracked is not None
    assert int(before.num_batches_tracked) == 3


def test_update_refuses() -> None:
    with pytest.raises(ParameterError, match="convention: expected one of torch, onnx, keras, received 'caffe'"):
        _start().update(BATCH, convention="caffe")
    with pytest.raises(ParameterError, match=r"momentum: expected a number from 0 to 1, received 1.5"):
        _start().update(BATCH, momentum=1.5)
    with pytest.raises(StatisticsError, match=r"num_batches_tracked: .* received none"):
        _start().update(BATCH, momentum=None)
    with pytest.raises(StatisticsError, match="batch: expected more than 1 value per channel"):
        _start().update(Moments.of(torch.ones(1, 1)))
    assert float(_start().update(Moments.of(torch.ones(1, 1)), convention="onnx").var) == pytest.approx(0.9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("correction", [0, 1])
def test_compiled_move_gives_the_bits_of_the_plain_one(dtype: torch.dtype, correction: int) -> None:
    generator = torch.Generator().manual_seed(3)
    kept = torch.randn(2, 64, generator=generator, dtype=torch.float64).abs()
    # Every other value of a longer tensor, as views of checkpoints are.
    start = RunningStatistics(kept[0].to(dtype)[::2], kept[1].to(dtype)[::2], torch.tensor(7))
    moments = torch.randn(2, 32, generator=generator, dtype=torch.float64).abs()
    mean, var = moments
    moved, is_finite = start.moved_by(moments.numpy(), 0.3, count=11, correction=correction)
    expected = start.moved(mean, var * 11 / (11 - correction), 0.3)
    assert is_finite
    assert moved.mean.dtype == moved.var.dtype == dtype
    assert torch.equal(moved.mean, expected.mean)
    assert torch.equal(moved.var, expected.var)
    assert moved.num_batches_tracked == 8
    for row in range(2):
        spoiled = moments.clone()
        spoiled[row, 5] = torch.inf
        assert not start.moved_by(spoiled.numpy(), 0.3, count=11, correction=correction)[1]
