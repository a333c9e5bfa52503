"""Four definitions of population statistics: against torch, update_bn and exact arithmetic; merging and storage."""

from fractions import Fraction
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from normcore.errors import DtypeError, NormcoreError, ParameterError, ShapeError, StatisticsError
from normcore.statistics import CONVENTIONS, Moments, Momentum, PopulationStatistics

BATCH = st.lists(st.integers(-1000, 1000).map(lambda value: value / 8), max_size=7)


def _column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1)


def _after(batches: list[Tensor], *, momentum: Momentum = "default", convention: str = "torch") -> PopulationStatistics:
    state = PopulationStatistics.start(batches[0].shape[1], momentum=momentum, convention=convention)
    for batch in batches:
        state = state.update(Moments.of(batch))
    return state


def _random_batches(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 2, 3, generator=generator, dtype=torch.float64) * 2 + size for size in sizes]


def _exact(values: list[float]) -> tuple[Fraction, Fraction]:
    fractions = [Fraction(value) for value in values]
    mean = sum(fractions, Fraction(0)) / len(fractions)
    return mean, sum(((value - mean) ** 2 for value in fractions), Fraction(0))


def _assert_near(actual: Tensor, expected: Fraction) -> None:
    assert abs(Fraction(float(actual)) - expected) <= Fraction(1, 10**12) * max(Fraction(1), abs(expected))


def _assert_equal(actual: PopulationStatistics, expected: PopulationStatistics) -> None:
    tensors = actual.to_tensors()
    assert tensors.keys() == expected.to_tensors().keys()
    for name, tensor in expected.to_tensors().items():
        assert torch.equal(tensors[name].nan_to_num(nan=-7), tensor.nan_to_num(nan=-7)), name


@given(st.lists(BATCH, min_size=1, max_size=8), st.randoms(use_true_random=False), st.data())
@settings(deadline=None)
def test_pooled_and_paper_are_exact_in_any_order_and_split(
    batches: list[list[float]], random: Random, data: st.DataObject
) -> None:
    values = [value for batch in batches for value in batch]
    random.shuffle(batches)
    cut = data.draw(st.integers(0, len(batches)))
    left, right = (_after([_column([]), *map(_column, part)]) for part in (batches[:cut], batches[cut:]))
    for state in (_after([_column([]), *map(_column, batches)]), left.merge(right), right.merge(left)):
        assert state.batches == sum(bool(batch) for batch in batches)
        assert float(state.pooled_moments.count) == len(values)
        if values:
            mean, m2 = _exact(values)
            _assert_near(state.pooled.mean, mean)
            _assert_near(state.pooled.var_biased, m2 / len(values))
        several = [(*_exact(batch), len(batch)) for batch in batches if len(batch) > 1]
        if several:
            _assert_near(state.paper.mean, sum((mean for mean, _, _ in several), Fraction(0)) / len(several))
            unbiased = sum((m2 / (count - 1) for _, m2, count in several), Fraction(0))
            _assert_near(state.paper.var, unbiased / len(several))
        else:
            assert bool(state.paper.mean.isnan().all() & state.paper.var.isnan().all())
    assert left.merge(right).ema is None


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, 0.0, None], ids=str)
def test_ema_is_what_a_layer_of_torch_keeps(momentum: float | None) -> None:
    batches = _random_batches(4, 9, 2, 4, 30)
    layer = torch.nn.BatchNorm1d(2, momentum=momentum).double()
    for batch in batches:
        layer(batch)
    ema = _after(batches, momentum=momentum).ema
    assert ema is not None
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert torch.allclose(ema.mean, layer.running_mean, rtol=1e-14)
    assert torch.allclose(ema.var, layer.running_var, rtol=1e-14)


def test_paper_is_update_bn_of_torch() -> None:
    batches = _random_batches(4, 9, 2, 4, 30)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2)).double()
    torch.optim.swa_utils.update_bn(batches, model)
    paper = _after(batches).paper
    assert torch.allclose(paper.mean, model.state_dict()["0.running_mean"], rtol=1e-14)
    assert torch.allclose(paper.var, model.state_dict()["0.running_var"], rtol=1e-14)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("momentum", ["default", 0.3, None], ids=str)
def test_ema_follows_the_convention_and_debiased_leaves_out_the_start(convention: str, momentum: Momentum) -> None:
    batches = _random_batches(3, 5, 8)
    rule = CONVENTIONS[convention]
    state = _after(batches, momentum=momentum, convention=convention)
    means, variances = (torch.zeros(2).double(), torch.ones(2).double())
    start = 1.0
    for number, batch in enumerate(batches, 1):
        weight = 1 / number if momentum is None else rule.weight_of_new(momentum)
        means = means * (1 - weight) + batch.mean((0, 2)) * weight
        variances = variances * (1 - weight) + batch.var((0, 2), correction=rule.correction) * weight
        start *= 1 - weight
    assert state.ema is not None
    assert state.ema_debiased is not None
    assert torch.allclose(state.ema.mean, means, rtol=1e-13)
    assert torch.allclose(state.ema.var, variances, rtol=1e-13)
    assert torch.allclose(state.ema_debiased.mean, means / (1 - start), rtol=1e-12)
    assert torch.allclose(state.ema_debiased.var, (variances - start) / (1 - start), rtol=1e-12)


def test_debiased_of_one_batch_is_the_batch_however_small_its_weight() -> None:
    (batch,) = _random_batches(5)
    debiased = _after([batch], momentum=1e-12).ema_debiased
    assert debiased is not None
    assert torch.allclose(debiased.var, batch.var((0, 2)), rtol=1e-14)


def test_before_any_batch_only_ema_tells_anything() -> None:
    state = PopulationStatistics.start(2)
    assert state.ema is not None
    assert (state.ema.mean.tolist(), state.ema.var.tolist()) == ([0.0, 0.0], [1.0, 1.0])
    assert state.ema_debiased is not None
    for tensor in (state.pooled.mean, state.pooled.var_biased, state.paper.mean, state.ema_debiased.var):
        assert bool(tensor.isnan().all())


def test_an_empty_batch_changes_nothing() -> None:
    state = _after(_random_batches(3, 4), momentum=None)
    assert state.update(Moments.of(torch.empty(0, 2))) is state


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_one_value_per_channel_enters_pooled_only(convention: str) -> None:
    before = _after(_random_batches(3, 4), convention=convention)
    after = before.update(Moments.of(torch.tensor([[5.0, 6.0]])))
    assert after.batches == 3
    assert torch.equal(after.pooled_moments.count, before.pooled_moments.count + 1)
    for name in ("paper", "ema", "ema_debiased"):
        assert torch.equal(getattr(after, name).mean, getattr(before, name).mean)
        assert torch.equal(getattr(after, name).var, getattr(before, name).var)


def test_a_channel_without_counted_values_stays_as_it_was() -> None:
    first, second = _random_batches(4, 6)
    mask = torch.tensor([True, False]).view(1, 2, 1)
    state = _after([first], momentum=None).update(Moments.of(second, mask=mask))
    both, one = _after([first, second], momentum=None), _after([first], momentum=None)
    for name in ("pooled", "paper", "ema", "ema_debiased"):
        mean = getattr(state, name).mean
        assert float(mean[0]) == float(getattr(both, name).mean[0])
        assert float(mean[1]) == float(getattr(one, name).mean[1])


def test_nan_policy() -> None:
    state = _after(_random_batches(3))
    poisoned = Moments.of(torch.tensor([[1.0, torch.nan], [2.0, 3.0]]))
    assert state.update(poisoned, nan_policy="skip_update") is state
    with pytest.raises(StatisticsError, match=r"batch: expected finite values.* received NaN, infinity"):
        state.update(poisoned)
    after = state.update(poisoned, nan_policy="propagate")
    for values in (after.pooled.mean, after.pooled.var_biased, after.paper.mean, after.paper.var):
        assert values.isnan().tolist() == [False, True]
    with pytest.raises(ParameterError, match="nan_policy: expected one of propagate, raise, skip_update"):
        state.update(poisoned, nan_policy="ignore")


def test_moments_so_far_away_that_squares_overflow_do_not_spoil_the_state() -> None:
    state = _after(_random_batches(3, 4))
    two = torch.full((2,), 2.0, dtype=torch.float64)
    far = Moments(two, two * 1e200, two)
    assert state.update(far, nan_policy="skip_update") is state
    with pytest.raises(StatisticsError, match=r"batch: .* an overflow"):
        state.update(far)
    spoiled = state.update(far, nan_policy="propagate")
    assert not bool(spoiled.pooled.var_biased.isfinite().any())
    assert spoiled.update(Moments.of(_random_batches(3)[0])).batches == 4


def test_state_survives_storage_bit_by_bit() -> None:
    states = [
        PopulationStatistics.start(2),
        _after(_random_batches(3, 5), momentum=None, convention="keras"),
        _after(_random_batches(3, 5)).merge(_after(_random_batches(7))),
    ]
    for state in states:
        tensors = state.to_tensors()
        assert {tensor.dtype for tensor in tensors.values()} <= {torch.float64, torch.int64}
        restored = PopulationStatistics.from_tensors(tensors)
        _assert_equal(restored, state)
        for batch in _random_batches(6, 2):
            restored, state = restored.update(Moments.of(batch)), state.update(Moments.of(batch))
        _assert_equal(restored, state)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("batches", None, StatisticsError, "batches: expected a tensor of this name"),
        ("batches", torch.tensor(-1), StatisticsError, "batches: expected a whole number"),
        ("pooled_moments.m2", torch.tensor([-1.0, 0.0]).double(), StatisticsError, "m2: expected values >= 0"),
        ("pooled_moments.count", torch.tensor([0.5, 0.0]).double(), StatisticsError, "count: expected whole numbers"),
        ("m2_within", torch.zeros(3).double(), ShapeError, "expected shape"),
        ("average.mean", torch.zeros(2), DtypeError, "average.mean: expected float64"),
        ("average.weight", None, StatisticsError, "average.weight"),
        ("average.convention", torch.tensor([99]), ParameterError, "convention: expected one of"),
        ("average.convention", torch.tensor([99.0]), StatisticsError, "average: expected a single momentum"),
        ("average.momentum", torch.tensor(7.0), ParameterError, "momentum: expected a number from 0 to 1"),
    ],
)
def test_impossible_states_are_refused(
    name: str, value: Tensor | None, error: type[NormcoreError], message: str
) -> None:
    tensors = _after(_random_batches(3)).to_tensors()
    del tensors[name]
    if value is not None:
        tensors[name] = value
    with pytest.raises(error, match=message):
        PopulationStatistics.from_tensors(tensors)


def test_impossible_requests_are_refused() -> None:
    state = PopulationStatistics.start(2)
    with pytest.raises(ParameterError, match="num_features: expected an integer >= 1, received 0"):
        PopulationStatistics.start(0)
    with pytest.raises(ParameterError, match="momentum"):
        PopulationStatistics.start(2, momentum=1.5)
    with pytest.raises(ParameterError, match="convention"):
        PopulationStatistics.start(2, momentum=None, convention="caffe")
    with pytest.raises(ShapeError, match="batch: expected 2 channels, received 3 channels"):
        state.update(Moments.of(torch.zeros(4, 3)))
    with pytest.raises(ShapeError, match="others: expected 2 channels, received 3 channels"):
        state.merge(PopulationStatistics.start(3))


def test_explanation_gives_the_numbers_at_hand() -> None:
    flat = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(50).view(-1, 1)
    apart = _after([flat, flat + 4]).explanation
    assert "over 2 batches" in apart
    assert "5 = 1 + 4" in apart
    assert "in channel 0 the unbiased variance is 5.02513 pooled and 1.0101 by paper" in apart
    alike = _after([flat, flat]).explanation
    assert "1 = 1 + 0." in alike
    assert "The batches are alike: pooled and paper variance differ by 0.51%" in alike


def test_explanation_of_fewer_than_two_batches_compares_none() -> None:
    assert PopulationStatistics.start(1).explanation == "No batch is counted yet: there is nothing to compare."
    single = _after([torch.tensor([[-1.0], [1.0]], dtype=torch.float64)]).explanation
    assert "over 1 batch and averaged" in single
    assert single.endswith("There is no other batch: pooled and paper variance differ by 0.00%.")
