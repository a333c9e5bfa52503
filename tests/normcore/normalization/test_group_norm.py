"""Behaviour of group and instance norm: torch's functions, state, adaptive parameters, edge cases and refusals."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from normcore.errors import ArgumentError, DtypeError, ParameterError, ShapeError, StatisticsError
from normcore.normalization import METHODS, batch_norm, group_norm, instance_norm, layer_norm
from tests.normcore.normalization import group_oracle as oracle

SHAPES = [(3, 6), (3, 6, 5), (3, 6, 5, 4), (2, 6, 2, 3, 2)]
SPATIAL = SHAPES[1:]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def _randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _affine(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return _randn(6, dtype=dtype, seed=1), _randn(6, dtype=dtype, seed=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_groups", [1, 2, 3, 6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_group_norm_equals_torch(shape: tuple[int, ...], num_groups: int, dtype: torch.dtype) -> None:
    input = _randn(*shape, dtype=dtype)
    weight, bias = _affine(dtype)
    for terms in ((weight, bias), (weight, None), (None, bias), (None, None)):
        output = group_norm(input, *terms, num_groups=num_groups).output
        assert output.dtype == dtype
        expected = functional.group_norm(input, num_groups, *terms)
        if input[0].numel() == num_groups:
            # Groups of one value, of which torch leaves a residue of some 1e-5 beside the bias.
            expected = (torch.zeros(6, dtype=dtype) if terms[1] is None else terms[1]).expand(shape)
        assert torch.allclose(output, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SPATIAL, ids=str)
def test_instance_norm_equals_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    input = _randn(*shape, dtype=dtype)
    weight, bias = _affine(dtype)
    for terms in ((weight, bias), (weight, None), (None, bias), (None, None)):
        for training in (False, True):
            output = instance_norm(input, None, None, *terms, training=training).output
            assert output.dtype == dtype
            expected = functional.instance_norm(input, None, None, *terms)
            assert torch.allclose(output, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", SPATIAL, ids=str)
def test_several_steps_of_instance_norm_equal_the_module_of_torch(shape: tuple[int, ...], momentum: float) -> None:
    kinds = {3: torch.nn.InstanceNorm1d, 4: torch.nn.InstanceNorm2d, 5: torch.nn.InstanceNorm3d}
    module = kinds[len(shape)](6, momentum=momentum, track_running_stats=True)
    mean, var = torch.zeros(6), torch.ones(6)
    for seed in range(3):
        input = _randn(*shape, seed=seed) * 3 - 1
        result = instance_norm(input, mean, var, training=True, momentum=momentum)
        assert torch.allclose(result.output, module(input), atol=3e-6)
        assert result.running_mean is not None
        assert result.running_var is not None
        mean, var = result.running_mean, result.running_var
    state = module.state_dict()
    assert torch.allclose(mean, state["running_mean"], rtol=1e-5, atol=1e-6)
    assert torch.allclose(var, state["running_var"], rtol=1e-5)
    # Torch never counts the batches of instance norm, and normcore keeps no count.
    assert int(state["num_batches_tracked"]) == 0
    module.eval()
    inferred = instance_norm(input, mean, var)
    assert torch.allclose(inferred.output, module(input), atol=3e-6)
    assert (inferred.running_mean, inferred.running_var) == (None, None)
    assert inferred.mean is not None
    assert torch.equal(inferred.mean, mean)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_graph", [False, True])
def test_memory_format_is_kept(dtype: torch.dtype, memory_format: torch.memory_format, with_graph: bool) -> None:
    input = _randn(3, 6, 5, 4, dtype=dtype).to(memory_format=memory_format).requires_grad_(with_graph)
    weight, bias = _affine()
    mean, var = torch.zeros(6), torch.ones(6)
    outputs = [
        group_norm(input, weight, bias, num_groups=3).output,
        instance_norm(input, None, None, weight, bias).output,
        instance_norm(input, mean, var, weight, bias).output,
    ]
    contiguous = input.detach().contiguous()
    expected = [
        group_norm(contiguous, weight, bias, num_groups=3).output,
        instance_norm(contiguous, None, None, weight, bias).output,
        instance_norm(contiguous, mean, var, weight, bias).output,
    ]
    for output, reference in zip(outputs, expected, strict=True):
        assert output.is_contiguous(memory_format=memory_format)
        assert torch.allclose(output, reference, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("view", [lambda t: t[..., ::2], lambda t: t.transpose(2, 3), lambda t: t.transpose(0, 1)])
def test_input_of_any_strides(view: Callable[[Tensor], Tensor]) -> None:
    input = view(_randn(6, 6, 5, 8))
    assert torch.allclose(
        group_norm(input, num_groups=2).output, group_norm(input.contiguous(), num_groups=2).output, atol=1e-6
    )
    assert torch.allclose(instance_norm(input).output, instance_norm(input.contiguous()).output, atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_parameters_of_each_sample(mean: float, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    input = (_randn(3, 6, 5, 4) + mean).to(dtype).to(memory_format=memory_format)
    weight, bias = _randn(3, 6, seed=1), _randn(3, 6, seed=2)
    running = _randn(6, seed=4).double(), _randn(6, seed=5).double().square()
    found = group_norm(input, weight, bias, num_groups=2)
    alone = instance_norm(input, None, None, weight, bias)
    given = instance_norm(input, *running, weight, bias)
    for result, num_groups in ((found, 2), (alone, 6)):
        expected = oracle.affine(
            oracle.groups(input, num_groups, eps=1e-5).normalized, weight, bias, shape=(3, 6, 1, 1)
        )
        assert oracle.beyond_rounding(result.output, expected) <= 2e-6
    for sample in range(3):
        one = instance_norm(input[sample : sample + 1], *running, weight[sample], bias[sample])
        assert torch.allclose(given.output[sample], one.output[0], atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parameters_of_each_value(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    input = (_randn(3, 6, 5, 4) + 100).to(dtype).to(memory_format=memory_format)
    weight, bias = _randn(3, 6, 5, 4, seed=1), _randn(3, 6, 5, 4, seed=2)
    for result, num_groups in (
        (group_norm(input, weight, bias, num_groups=2), 2),
        (instance_norm(input, None, None, weight, bias), 6),
    ):
        normalized = oracle.groups(input, num_groups, eps=1e-5).normalized
        expected = oracle.affine(normalized, weight, bias, shape=(3, 6, 5, 4))
        assert oracle.beyond_rounding(result.output, expected) <= 2e-6
        assert result.output.is_contiguous(memory_format=memory_format)


def test_statistics_and_their_shapes() -> None:
    input = _randn(3, 6, 5, 4) + 3
    groups, instances = group_norm(input, num_groups=2, eps=1e-3), instance_norm(input, eps=1e-3)
    for result, values in ((groups, input.view(3, 2, 60)), (instances, input.view(3, 6, 20))):
        assert result.mean is not None
        assert result.var is not None
        assert result.invstd is not None
        assert result.mean.dtype == torch.float32
        assert torch.allclose(result.mean, values.mean(2))
        assert torch.allclose(result.var, values.var(2, correction=0))
        assert torch.allclose(result.invstd, (result.var + 1e-3).rsqrt())


@given(
    shape=st.tuples(st.integers(1, 3), st.sampled_from([2, 4, 6]), st.integers(2, 9), st.integers(1, 9)),
    scale=st.sampled_from([1e-3, 1.0, 1e6]),
    mean=st.sampled_from([0.0, 1.0, 1e3]),
    seed=st.integers(0, 1000),
    has_channels_last=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_norms_agree_where_they_are_the_same(
    shape: tuple[int, ...], scale: float, mean: float, seed: int, has_channels_last: bool
) -> None:
    input = (_randn(*shape, dtype=torch.float64, seed=seed) + mean) * scale
    if has_channels_last:
        input = input.to(memory_format=torch.channels_last)
    eps = 1e-5 * scale**2
    whole = group_norm(input, num_groups=1, eps=eps).output
    assert torch.allclose(whole, layer_norm(input, normalized_shape=shape[1:], eps=eps).output, atol=1e-11)
    each = instance_norm(input, eps=eps).output
    assert torch.allclose(each, group_norm(input, num_groups=shape[1], eps=eps).output, atol=1e-11)
    alone = batch_norm(input[:1], training=True, eps=eps).output
    assert torch.allclose(each[:1], alone, atol=1e-11)


def test_invariance_to_scale_and_shift_without_eps() -> None:
    input = _randn(3, 6, 5, 4, dtype=torch.float64)
    output = group_norm(input, num_groups=3, eps=0.0).output
    assert torch.allclose(group_norm(input * 8 + 5, num_groups=3, eps=0.0).output, output, atol=1e-13)


@pytest.mark.parametrize("shape", [(1, 6), (4, 6), (1, 6, 1), (4, 6, 1, 1)], ids=str)
def test_groups_of_one_value_give_the_bias_for_any_number_of_samples(shape: tuple[int, ...]) -> None:
    bias = _randn(6, seed=1)
    result = group_norm(_randn(*shape) + 5, None, bias, num_groups=6)
    assert torch.equal(result.output, bias.view(6, *[1] * (len(shape) - 2)).expand(shape))
    assert result.diagnostics()["single_value_groups"] == 6 * shape[0]


@pytest.mark.parametrize("shape", [(0, 6, 4), (2, 6, 0), (2, 0, 3), (0, 6)], ids=str)
def test_empty_input_gives_an_empty_output_and_changes_nothing(shape: tuple[int, ...]) -> None:
    input, channels = torch.empty(shape), shape[1]
    weight = torch.ones(channels)
    mean, var = torch.full((channels,), 0.5), torch.full((channels,), 2.0)
    result = group_norm(input, weight, weight, input, num_groups=2)
    assert result.output.shape == shape
    assert result.mean is None
    assert result.grad_weight is not None
    assert torch.equal(result.grad_weight, torch.zeros(channels))
    trained = instance_norm(input, mean, var, training=True)
    assert trained.output.shape == shape
    assert trained.running_mean is not None
    assert trained.running_var is not None
    assert torch.equal(trained.running_mean, mean)
    assert torch.equal(trained.running_var, var)
    trained.running_mean.fill_(9)
    assert torch.equal(mean, torch.full((channels,), 0.5))
    assert instance_norm(input, mean, var).output.shape == shape


def test_constant_channels_give_the_bias_beside_others() -> None:
    input, bias = _randn(3, 6, 5, 4) + 100, _randn(6, seed=2)
    input[1, 2] = 0.1
    result = instance_norm(input, None, None, None, bias)
    assert torch.equal(result.output[1, 2], bias[2].expand(5, 4))
    assert result.diagnostics() == {"constant_groups": 1, "eps_dominated_groups": 1}


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_non_finite_values_stay_in_their_group(poison: float) -> None:
    input = _randn(3, 6, 4)
    clean = group_norm(input, num_groups=3).output
    input[1, 2, 0] = poison
    result = group_norm(input, num_groups=3)
    assert bool(result.output[1, 2:4].isnan().all())
    result.output[1, 2:4] = clean[1, 2:4]
    assert torch.allclose(result.output, clean, atol=5e-7)
    assert result.diagnostics() == {"non_finite_groups": 1, "non_finite_values": 1}


def test_instance_norm_measures_the_distance_to_the_running_statistics() -> None:
    input = _randn(8, 3, 200)

    def findings(mean: list[float], var: list[float], *, training: bool = True) -> dict[str, Any]:
        running = torch.tensor(mean), torch.tensor(var)
        return dict(instance_norm(input, *running, training=training).diagnostics())

    assert findings([0.0] * 3, [1.0] * 3) == {}
    far = findings([0.0, -5.0, 0.0], [1.0, 1.0, 0.01])
    assert far == {
        "running_mean_distance": pytest.approx(5, rel=0.1),
        "running_var_ratio": pytest.approx(100, rel=0.1),
    }
    # A running deviation of 0 has that of eps.
    still = instance_norm(input, torch.full((3,), 5.0), torch.zeros(3), training=True, eps=0.04).diagnostics()
    assert still["running_mean_distance"] == pytest.approx(25, rel=0.1)
    # Which is what the batch is measured with: its own statistics, not those that it moves.
    assert "running_mean_distance" not in findings([0.0, -5.0, 0.0], [1.0] * 3, training=False)


def test_masked_positions_shape_no_statistics() -> None:
    input = _randn(3, 6, 5, dtype=torch.float64)
    lengths = torch.tensor([5, 3, 2])
    mask = (torch.arange(5) < lengths[:, None])[:, None]
    grouped = oracle.groups(input, 2, eps=1e-5, mask=mask)
    assert np.abs(oracle.exact(group_norm(input, mask=mask, num_groups=2).output) - grouped.normalized).max() <= 1e-13
    alone = oracle.groups(input, 6, eps=1e-5, mask=mask)
    mean, var = torch.zeros(6), torch.ones(6)
    result = instance_norm(input, mean, var, mask=mask, training=True, momentum=1.0)
    assert np.abs(oracle.exact(result.output) - alone.normalized).max() <= 1e-13
    assert result.running_mean is not None
    assert result.running_var is not None
    parts = [input[sample, :, : int(lengths[sample])] for sample in range(3)]
    assert torch.allclose(result.running_mean, torch.stack([part.mean(1) for part in parts]).mean(0))
    assert torch.allclose(result.running_var, torch.stack([part.var(1) for part in parts]).mean(0))


@pytest.mark.parametrize("affine", [(4,), (2, 4), (2, 4, 3)], ids=["(C,)", "(N, C)", "full"])
@pytest.mark.parametrize("with_mask", [False, True], ids=["all", "masked"])
def test_derivatives_are_right(with_mask: bool, affine: tuple[int, ...]) -> None:
    mask = torch.tensor([True, True, False]) if with_mask else None
    shapes = ((2, 4, 3), affine, affine)
    operands = tuple(_randn(*size, dtype=torch.float64, seed=seed).requires_grad_() for seed, size in enumerate(shapes))
    mean, var = _randn(4, dtype=torch.float64), _randn(4, dtype=torch.float64).square()

    def grouped(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm(input, weight, bias, mask=mask, num_groups=2).output

    def alone(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return instance_norm(input, None, None, weight, bias, mask=mask).output

    def frozen(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return instance_norm(input, mean, var, weight, bias, mask=mask).output

    for norm in (grouped, alone, frozen):
        assert torch.autograd.gradcheck(norm, operands)
        assert torch.autograd.gradgradcheck(norm, operands)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (3, 6, 5, 4)], ids=["(C,)", "(N, C)", "full"])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_gradients_asked_for_are_those_of_autograd(
    mean: float, shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    input = (_randn(3, 6, 5, 4) + mean).to(memory_format=memory_format)
    weight, bias, grad_output = _randn(*shape, seed=1), _randn(*shape, seed=2), _randn(3, 6, 5, 4, seed=3)
    running = torch.full((6,), mean), torch.full((6,), 2.0)

    def reference(num_groups: int | None) -> list[Tensor]:
        wide = [term.double().requires_grad_() for term in (input, weight, bias)]
        values = wide[0]
        if num_groups is None:
            normalized = (values - mean) / (2.0 + 1e-5) ** 0.5
        else:
            normalized = functional.group_norm(values, num_groups)
        scale, shift = (term.reshape(*shape if len(shape) == 4 else (-1, 6, 1, 1)) for term in wide[1:])
        return list(torch.autograd.grad(normalized * scale + shift, wide, grad_output.double()))

    with torch.inference_mode():
        results = {
            2: group_norm(input, weight, bias, grad_output, num_groups=2),
            6: instance_norm(input, None, None, weight, bias, grad_output),
            None: instance_norm(input, *running, weight, bias, grad_output),
        }
    for num_groups, result in results.items():
        for found, expected in zip(
            (result.grad_input, result.grad_weight, result.grad_bias), reference(num_groups), strict=True
        ):
            assert found is not None
            assert found.shape == expected.shape
            assert torch.allclose(found.double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_argument_is_changed_or_shared(dtype: torch.dtype) -> None:
    input, mean, var, weight, bias = arguments = [
        _randn(3, 6, 4, dtype=dtype),
        *(torch.rand(6, dtype=dtype) + 1 for _ in range(4)),
    ]
    grad_output = _randn(3, 6, 4, dtype=dtype, seed=1)
    before = [argument.clone() for argument in arguments]
    for training in (False, True):
        result = instance_norm(input, mean, var, weight, bias, grad_output, training=training)
        for name in ("output", "mean", "var", "invstd", "running_mean", "running_var", "grad_input", "grad_bias"):
            if (output := getattr(result, name)) is not None:
                output.fill_(77)
        assert all(map(torch.equal, arguments, before))
    group_norm(input, weight, bias, num_groups=2).output.fill_(77)
    assert all(map(torch.equal, arguments, before))


def test_methods_select_their_outputs() -> None:
    input = _randn(3, 6, 4)
    grouped = METHODS["group_norm"]({"input": input, "grad_output": input}, {"num_groups": 3})
    assert set(grouped.outputs) == {"output", "mean", "var", "invstd", "grad_input", "grad_weight", "grad_bias"}
    tensors = {"input": input, "running_mean": torch.zeros(6), "running_var": torch.ones(6)}
    trained = METHODS["instance_norm"](tensors, {"training": True}, ["running_var", "output"])
    assert set(trained.outputs) == {"running_var", "output"}


INPUT = _randn(2, 6, 4)
ZERO, ONE = torch.zeros(6), torch.ones(6)
REFUSALS: dict[str, tuple[Callable[[], object], type[ArgumentError], str]] = {
    "group of no integer dtype": (lambda: group_norm(torch.ones(2, 6).int()), DtypeError, "input: .* received int32"),
    "group of one dimension": (lambda: group_norm(ONE, num_groups=1), ShapeError, "input: expected at least 2"),
    "groups that do not divide": (
        lambda: group_norm(INPUT, num_groups=4),
        ParameterError,
        "num_groups: expected an integer >= 1 that divides the input's 6 channels, received 4",
    ),
    "no groups": (lambda: group_norm(INPUT, num_groups=0), ParameterError, "num_groups: .* received 0"),
    "negative groups": (lambda: group_norm(INPUT, num_groups=-2), ParameterError, "num_groups"),
    "groups as a bool": (lambda: group_norm(INPUT, num_groups=True), ParameterError, "num_groups"),
    "weight per group": (
        lambda: group_norm(INPUT, torch.ones(2), num_groups=2),
        ShapeError,
        r"weight: expected shape \(6,\) or \(2, 6\), .* received shape \(2,\)",
    ),
    "weight for other samples": (lambda: instance_norm(INPUT, None, None, torch.ones(3, 6)), ShapeError, "weight"),
    "bias for each sample alone": (
        lambda: group_norm(INPUT, ONE, torch.ones(2, 6), num_groups=2),
        ShapeError,
        r"bias: expected the weight's shape \(6,\), received shape \(2, 6\)",
    ),
    "integer bias": (lambda: instance_norm(INPUT, None, None, None, ONE.int()), DtypeError, "bias"),
    "eps": (lambda: group_norm(INPUT, num_groups=2, eps=-1.0), ParameterError, "eps"),
    "grad_output": (lambda: group_norm(INPUT, grad_output=ONE, num_groups=2), ShapeError, "grad_output"),
    "one position": (
        lambda: instance_norm(torch.ones(2, 6, 1), ZERO, ONE, training=True),
        StatisticsError,
        r"input: expected more than 1 position per channel .*, received shape \(2, 6, 1\)",
    ),
    "no position axis": (lambda: instance_norm(torch.ones(2, 6)), StatisticsError, "input: expected more than 1"),
    "one position that counts": (
        lambda: instance_norm(INPUT, mask=torch.tensor([True, False, False, False])),
        StatisticsError,
        "mask: expected more than 1 position that counts in every channel, received 1",
    ),
    "mask in inference": (lambda: instance_norm(INPUT, ZERO, ONE, mask=ONE), DtypeError, "mask"),
    "wrong channels without weight": (lambda: instance_norm(INPUT, ZERO[:5], ONE[:5]), ShapeError, "running_mean"),
    "only the mean": (
        lambda: instance_norm(INPUT, ZERO),
        StatisticsError,
        "running_var: .* together with running_mean",
    ),
    "only the variance": (lambda: instance_norm(INPUT, None, ONE), StatisticsError, "running_mean"),
    "negative variance": (lambda: instance_norm(INPUT, ZERO, -ONE), StatisticsError, "running_var: .* received -1"),
    "momentum": (lambda: instance_norm(INPUT, ZERO, ONE, training=True, momentum=2.0), ParameterError, "momentum"),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_group_and_instance_norm_refuse(call: Callable[[], object], error: type[ArgumentError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_inference_by_running_statistics_takes_one_position() -> None:
    output = instance_norm(torch.full((2, 6, 1), 3.0), ONE, ONE * 4, eps=0.0).output
    assert torch.equal(output, torch.ones(2, 6, 1))


def test_inference_keeps_the_digits_of_a_float64_running_mean() -> None:
    mean = torch.tensor([1e6 - 0.01], dtype=torch.float64)
    output = instance_norm(torch.full((2, 1, 4), 1e6), mean, torch.ones(1), eps=0.0).output
    assert output.double().sub(0.01).abs().max() < 1e-8
