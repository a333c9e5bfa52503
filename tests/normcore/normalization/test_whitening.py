"""Behaviour of whitening: groups, layouts, state, edge cases, refusals and diagnostics."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from normcore.errors import ArgumentError, DtypeError, ParameterError, ShapeError, StatisticsError
from normcore.normalization import METHODS, WhiteningResult, batch_norm, whitening

MODES = ["zca", "pca", "cholesky", "iternorm"]
EXACT_MODES = MODES[:3]
DATATYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def _correlated(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Channels that share much of their spread, away from zero."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    channels = torch.arange(1.0, shape[1] + 1, dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 2))
    correlated: Tensor = values * channels + 2 * values.mean(1, keepdim=True) + 3 * channels
    return correlated.to(dtype)


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


@pytest.mark.parametrize("mode", MODES)
def test_groups_are_whitened_apart(mode: str) -> None:
    input = _correlated(9, 6, 4)
    result = whitening(input, mode=mode, groups=3, training=True)
    for group in range(3):
        channels = slice(2 * group, 2 * group + 2)
        alone = whitening(input[:, channels], mode=mode, training=True)
        assert torch.allclose(result.output[:, channels], alone.output, atol=1e-6)
        assert torch.allclose(_given(result.covariance)[group], _given(alone.covariance)[0])


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("mode", EXACT_MODES)
def test_groups_of_one_channel_are_batch_norm(mode: str, training: bool) -> None:
    input, mean, var = _correlated(8, 3, 5), torch.ones(3), torch.tensor([1.0, 2.0, 3.0])
    weight, bias = torch.tensor([1.0, -2.0, 0.5]), torch.ones(3)
    expected = batch_norm(input, mean, var, weight, bias, training=training)
    result = whitening(input, mean, var.reshape(3, 1, 1), weight, bias, mode=mode, groups=3, training=training)
    assert torch.allclose(result.output, expected.output, atol=1e-6)
    if training:
        assert torch.allclose(_given(result.running_mean), _given(expected.running_mean))
        assert torch.allclose(_given(result.running_covariance).flatten(), _given(expected.running_var))


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_shape_and_memory_format_change_nothing_else(training: bool) -> None:
    input = _correlated(4, 3, 5, 6)
    state = torch.ones(3), torch.eye(3)[None] * 2
    expected = whitening(input, *state, training=training).output
    channels_last = whitening(input.contiguous(memory_format=torch.channels_last), *state, training=training).output
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(channels_last, expected)
    flat = whitening(input.movedim(1, -1).reshape(-1, 3), *state, training=training).output
    assert torch.allclose(flat.reshape(4, 5, 6, 3).movedim(-1, 1), expected, atol=1e-6)
    volume = whitening(input.reshape(4, 3, 5, 2, 3), *state, training=training).output
    assert torch.equal(volume.reshape(4, 3, 5, 6), expected)
    gaps = whitening(input.repeat_interleave(2, -1)[..., ::2], *state, training=training).output
    assert torch.equal(gaps, expected)


@pytest.mark.parametrize(
    ("convention", "momentum", "weight_of_new", "correction"),
    [("torch", 0.3, 0.3, 1), ("onnx", 0.3, 0.7, 0), ("keras", 0.6, 0.4, 0), ("torch", None, None, 1)],
)
def test_running_covariance_is_the_average_of_the_batches(
    convention: str, momentum: float | None, weight_of_new: float | None, correction: int
) -> None:
    mean, covariance, tracked = torch.zeros(3).double(), torch.eye(3).double()[None], torch.tensor(0)
    expected_mean, expected = mean, covariance[0]
    for step in range(3):
        input = _correlated(7, 3, dtype=torch.float64, seed=step)
        result = whitening(
            input,
            mean,
            covariance,
            num_batches_tracked=tracked,
            training=True,
            momentum=momentum,
            convention=convention,
        )
        weight = 1 / (step + 1) if weight_of_new is None else weight_of_new
        expected_mean = expected_mean * (1 - weight) + input.mean(0) * weight
        expected = expected * (1 - weight) + torch.cov(input.T, correction=correction) * weight
        mean, covariance = _given(result.running_mean), _given(result.running_covariance)
        tracked = _given(result.num_batches_tracked)
        assert int(tracked) == step + 1
    assert torch.allclose(mean, expected_mean)
    assert torch.allclose(covariance[0], expected)


@pytest.mark.parametrize("mode", MODES)
def test_inference_on_the_batch_statistics_equals_training(mode: str) -> None:
    input = _correlated(64, 4)
    input[:, 1] = input[:, 0] + 1e-4 * input[:, 1]
    state = torch.zeros(4).double(), torch.eye(4).double()[None]
    trained = whitening(input, *state, mode=mode, training=True, momentum=0.0, convention="onnx", eps=1e-9)
    assert _given(trained.running_covariance).dtype == torch.float64
    mean, covariance = _given(trained.running_mean), _given(trained.running_covariance)
    inferred = whitening(input, mean, covariance, mode=mode, eps=1e-9)
    assert torch.allclose(inferred.output, trained.output, atol=1e-5)
    assert inferred.running_mean is None
    assert torch.equal(_given(inferred.covariance), covariance.float())


@pytest.mark.parametrize("dtype", DATATYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_statistics_are_float64_for_float64_and_else_float32(dtype: torch.dtype, training: bool) -> None:
    result = whitening(_correlated(6, 2, dtype=dtype), torch.zeros(2), torch.eye(2)[None], training=training)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    statistics = ["mean", "covariance", "whitening_matrix"]
    for name in statistics + (["running_mean", "running_covariance"] if training else []):
        assert getattr(result, name).dtype == expected


@pytest.mark.parametrize("shape", [(4, 3, 5), (1, 3, 5)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_no_argument_is_changed_or_shared(training: bool, shape: tuple[int, ...]) -> None:
    arguments = [_correlated(*shape, dtype=torch.float64), torch.ones(3).double(), torch.eye(3).double()[None]]
    arguments += [torch.ones(3).double(), torch.ones(3).double()]
    others = {"num_batches_tracked": torch.tensor(5), "grad_output": _correlated(*shape, dtype=torch.float64, seed=1)}
    given = [*arguments, *others.values()]
    before = [tensor.clone() for tensor in given]
    result = whitening(*arguments, **others, training=training)  # type: ignore[arg-type]  # both are tensors
    for name in WhiteningResult.__dataclass_fields__:
        if isinstance(output := getattr(result, name), Tensor):
            output.fill_(77)
    assert all(map(torch.equal, given, before))


@pytest.mark.parametrize("shape", [(0, 4), (2, 4, 0)], ids=str)
def test_empty_batch_changes_nothing(shape: tuple[int, ...]) -> None:
    input, mean, covariance, tracked = torch.empty(shape), torch.ones(4), torch.eye(4)[None], torch.tensor(4)
    result = whitening(input, mean, covariance, num_batches_tracked=tracked, grad_output=input, training=True)
    assert result.output.shape == _given(result.grad_input).shape == shape
    assert (result.mean, result.covariance, result.whitening_matrix) == (None, None, None)
    assert torch.equal(_given(result.running_mean), mean)
    assert torch.equal(_given(result.running_covariance), covariance)
    assert torch.equal(_given(result.num_batches_tracked), tracked)
    assert torch.equal(_given(result.grad_weight), torch.zeros(4))
    assert result.diagnostics() == {}
    _given(result.num_batches_tracked).fill_(77)
    assert int(tracked) == 4
    assert whitening(input, training=True).running_mean is None
    inferred = whitening(input, mean, covariance, grad_output=input)
    assert inferred.output.shape == _given(inferred.grad_input).shape == shape
    assert torch.equal(_given(inferred.grad_bias), torch.zeros(4))


@pytest.mark.parametrize("mode", MODES)
def test_non_finite_values_stay_in_their_group(mode: str) -> None:
    input = _correlated(12, 4)
    clean = whitening(input, mode=mode, groups=2, training=True, iterations=20)
    input[3, 1] = torch.nan
    result = whitening(input, mode=mode, groups=2, training=True, iterations=20)
    assert bool(result.output[:, :2].isnan().all())
    assert torch.equal(result.output[:, 2:], clean.output[:, 2:])
    assert result.diagnostics()["non_finite_groups"] == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [1e-20, 1e30])
def test_scale_of_the_values_does_not_matter(mode: str, scale: float) -> None:
    input = _correlated(12, 3)
    expected = whitening(input, mode=mode, training=True, eps=0.0).output
    output = whitening(input * scale, mode=mode, training=True, eps=0.0).output
    assert torch.allclose(output, expected, atol=2e-6)


@pytest.mark.parametrize("mode", EXACT_MODES)
def test_diagnostics_name_what_is_questionable(mode: str) -> None:
    assert whitening(_correlated(8, 4), mode=mode, training=True).diagnostics() == {}
    for count in (3, 4):
        few = whitening(_correlated(count, 4), mode=mode, training=True).diagnostics()
        assert few == {
            "few_values_per_channel": count,
            "few_values_per_group": count,
            "eps_dominated_directions": 5 - count,
        }
    constant = _correlated(20, 3)
    constant[:, 1] = 7.0
    result = whitening(constant, mode=mode, groups=3, training=True)
    names = ("constant_channels", "eps_dominated_channels", "eps_dominated_directions")
    assert result.diagnostics() == dict.fromkeys(names, 1)
    assert bool((result.output[:, 1] == 0).all())


def test_method_row_serves_inference_mode() -> None:
    method = METHODS["whitening"]
    with torch.inference_mode():
        tensors = {"input": _correlated(8, 4), "grad_output": _correlated(8, 4, seed=1)}
        result = method(tensors, {"training": True, "groups": 2, "mode": "cholesky"})
    names = {"output", "mean", "covariance", "whitening_matrix", "grad_input", "grad_weight", "grad_bias"}
    assert result.outputs.keys() == names


def _whiten(*shape: int, **options: object) -> Callable[[], object]:
    return lambda: whitening(_correlated(*shape), **options)  # type: ignore[arg-type]  # mistakes are the point


MEAN, COVARIANCE = torch.zeros(4), torch.eye(4)[None]
SINGULAR = torch.ones(1, 4, 4)
ASYMMETRIC = COVARIANCE + torch.ones(1, 4, 4).triu(1)
STATE = {"running_mean": MEAN, "running_covariance": COVARIANCE}
REFUSALS: dict[str, tuple[Callable[[], object], type[ArgumentError], str]] = {
    "groups": (_whiten(8, 4, groups=3, training=True), ParameterError, "groups: .*divisor of the input's 4 channels"),
    "no groups": (_whiten(8, 4, groups=0, training=True), ParameterError, "groups: .* received 0"),
    "mode": (_whiten(8, 4, mode="svd", training=True), ParameterError, "mode: .*zca.* received 'svd'"),
    "iterations": (_whiten(8, 4, iterations=0, training=True), ParameterError, "iterations: .* from 1 to 100"),
    "bool": (_whiten(8, 4, iterations=True, training=True), ParameterError, "iterations: .* received True"),
    "eps": (_whiten(8, 4, eps=-1e-5, training=True), ParameterError, "eps"),
    "momentum": (_whiten(8, 4, momentum=2.0, training=True), ParameterError, "momentum"),
    "convention": (_whiten(8, 4, convention="flax", training=True), ParameterError, "convention"),
    "rank": (lambda: whitening(torch.ones(4), training=True), ShapeError, "input: expected at least 2"),
    "channels": (lambda: whitening(torch.ones(4, 0), training=True), ShapeError, "input: expected at least 1 channel"),
    "integers": (lambda: whitening(torch.ones(4, 2, dtype=torch.int64)), DtypeError, "input"),
    "weight": (_whiten(8, 4, weight=torch.ones(3), training=True), ShapeError, "weight"),
    "bias": (_whiten(8, 4, bias=torch.ones(4, dtype=torch.int32), training=True), DtypeError, "bias"),
    "grad_output": (_whiten(8, 4, grad_output=torch.ones(8), training=True), ShapeError, "grad_output"),
    "no statistics": (_whiten(8, 4), StatisticsError, "running_mean: expected running statistics in inference"),
    "only mean": (_whiten(8, 4, running_mean=MEAN), StatisticsError, "running_covariance: expected to be given"),
    "only covariance": (
        _whiten(8, 4, running_covariance=COVARIANCE),
        StatisticsError,
        "running_mean: expected to be given together with running_covariance",
    ),
    "mean's shape": (_whiten(8, 4, **(STATE | {"running_mean": torch.ones(2)})), ShapeError, "running_mean"),
    "covariance's shape": (
        _whiten(8, 4, **STATE, groups=2),
        ShapeError,
        r"running_covariance: expected shape \(2, 2, 2\), a covariance per group, received shape \(1, 4, 4\)",
    ),
    "asymmetric": (
        _whiten(8, 4, **(STATE | {"running_covariance": ASYMMETRIC})),
        StatisticsError,
        "running_covariance: expected symmetric matrices, received differences of 1",
    ),
    "NaN": (
        _whiten(8, 4, **(STATE | {"running_covariance": COVARIANCE * torch.nan})),
        StatisticsError,
        "running_covariance: expected finite values",
    ),
    "tracked": (
        _whiten(8, 4, **STATE, num_batches_tracked=torch.tensor(-1), training=True),
        StatisticsError,
        "num_batches_tracked",
    ),
    "cumulative": (_whiten(8, 4, **STATE, momentum=None, training=True), StatisticsError, "num_batches_tracked"),
    "one value": (_whiten(1, 4, 1, training=True), StatisticsError, "input: expected more than 1 value"),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals(call: Callable[[], object], error: type[ArgumentError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("covariance", "eps"), [(SINGULAR, 0.0), (COVARIANCE - SINGULAR, 1e-5)], ids=["singular", "indefinite"]
)
def test_covariance_that_is_not_positive_definite_is_refused(mode: str, covariance: Tensor, eps: float) -> None:
    message = "expected a covariance that is positive definite .* received 1 of 1 groups where it is not"
    with pytest.raises(StatisticsError, match=f"running_covariance: {message}"):
        whitening(_correlated(8, 4), MEAN, covariance, mode=mode, eps=eps)
    for seed in range(10):
        # Rounding leaves some of these covariances a smallest eigenvalue above zero.
        with pytest.raises(StatisticsError, match=f"input: {message}"):
            whitening(_correlated(4, 4, seed=seed), mode=mode, eps=0.0, training=True)
