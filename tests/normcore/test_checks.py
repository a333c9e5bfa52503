"""Every check takes what fits, and names the argument, what it expected and what came."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from normcore import _checks as checks
from normcore.errors import ArgumentError, DtypeError, ParameterError, ShapeError, StatisticsError
from normcore.normalization import synchronized_batch_norm


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_check_floating_takes_the_four_datatypes(dtype: torch.dtype) -> None:
    checks.check_floating("input", torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize(
    ("axis", "expected"), [(0, 0), (1, 1), (3, 3), (-1, 3), (-4, 0)], ids=["first", "1", "last", "-1", "-4"]
)
def test_check_axis_counts_from_the_front(axis: int, expected: int) -> None:
    assert checks.check_axis("channel_axis", axis, rank=4) == expected


def test_checks_take_the_bounds() -> None:
    checks.check_rank("input", torch.zeros(2, 3), minimum=2)
    checks.check_per_channel("weight", torch.zeros(3), num_features=3)
    checks.check_eps("eps", 0.0, is_zero_allowed=True)
    checks.check_eps("eps", 5e-324, is_zero_allowed=False)
    checks.check_fraction("momentum", 0)
    checks.check_fraction("momentum", 1.0)
    checks.check_variance("running_var", torch.tensor([0.0, torch.inf]))
    checks.check_batch_count("num_batches_tracked", torch.tensor([7.0]))
    checks.check_batch_count("num_batches_tracked", torch.tensor(0))


@pytest.mark.parametrize("value", ["2,3", " +2 , 3", [2, 3], (2, 3)], ids=repr)
def test_check_integers_reads_texts_and_sequences(value: str | list[int]) -> None:
    assert checks.check_integers("axes", value) == (2, 3)
    assert checks.check_axes("axes", value, rank=4) == (2, 3)


def test_check_axes_sorts_them_from_the_front() -> None:
    assert checks.check_axes("axes", "-1,0,2", rank=4) == (0, 2, 3)


REFUSALS: dict[str, tuple[Callable[[], object], type[ArgumentError], str]] = {
    "no integers": (
        lambda: checks.check_integers("axes", ""),
        ParameterError,
        """axes: expected an integer, or integers with commas between them, such as "2,3", received ''""",
    ),
    "empty list of integers": (lambda: checks.check_integers("axes", []), ParameterError, "axes"),
    "text that is no integer": (lambda: checks.check_integers("axes", "1,2.0"), ParameterError, "'1,2.0'"),
    "trailing comma": (lambda: checks.check_integers("axes", "1,"), ParameterError, "axes"),
    "endless integer": (lambda: checks.check_integers("axes", "1" * 5000), ParameterError, "axes"),
    "bools for integers": (lambda: checks.check_integers("axes", [True, 1]), ParameterError, r"\[True, 1\]"),
    "an axis twice": (
        lambda: checks.check_axes("axes", "1,-1", rank=2),
        ParameterError,
        "axes: expected different axes for an input of rank 2, received '1,-1'",
    ),
    "an axis too many": (lambda: checks.check_axes("axes", "0,2", rank=2), ParameterError, "axes: .* received 2"),
    "another shape": (
        lambda: checks.check_shape("grad_output", torch.zeros(3), (2, 3), meaning="that of the output"),
        ShapeError,
        r"grad_output: expected shape \(2, 3\), that of the output, received shape \(3,\)",
    ),
    "an array for a tensor": (
        lambda: checks.check_floating("input", np.zeros(1, np.float32)),  # type: ignore[arg-type]  # what callers try
        DtypeError,
        "input: expected a tensor, received 'ndarray'",
    ),
    "a number for a mask": (
        lambda: checks.check_mask("mask", True, (2,), meaning="the input's"),  # type: ignore[arg-type]  # the same
        DtypeError,
        "mask: expected a tensor, received 'bool'",
    ),
    "a number for a count": (
        lambda: checks.check_batch_count("num_batches_tracked", 3),  # type: ignore[arg-type]  # the same
        DtypeError,
        "num_batches_tracked: expected a tensor, received 'int'",
    ),
    "a list for an output": (
        lambda: checks.check_out("out", [0.0], torch.zeros(1)),  # type: ignore[arg-type]  # the same
        DtypeError,
        "out: expected a tensor, received 'list'",
    ),
    "sparse": (
        lambda: checks.check_rank("input", torch.eye(2).to_sparse(), minimum=2),
        DtypeError,
        "input: expected a dense tensor, received one of layout sparse_coo",
    ),
    "shards that are none": (
        lambda: synchronized_batch_norm([[1.0]]),  # type: ignore[list-item]  # the same
        DtypeError,
        r"shards\[0\]: expected a tensor, received 'list'",
    ),
    "integer input": (
        lambda: checks.check_floating("input", torch.zeros(1, dtype=torch.int32)),
        DtypeError,
        "input: expected float16, bfloat16, float32 or float64, received int32",
    ),
    "complex input": (
        lambda: checks.check_floating("input", torch.zeros(1, dtype=torch.complex64)),
        DtypeError,
        "received complex64",
    ),
    "float8 input": (
        lambda: checks.check_floating("input", torch.zeros(1, dtype=torch.float8_e4m3fn)),
        DtypeError,
        "received float8_e4m3fn",
    ),
    "rank": (
        lambda: checks.check_rank("input", torch.zeros(3), minimum=2),
        ShapeError,
        r"input: expected at least 2 dimensions, received shape \(3,\)",
    ),
    "axis too large": (
        lambda: checks.check_axis("channel_axis", 2, rank=2),
        ParameterError,
        "channel_axis: expected an integer from -2 to 1 for an input of 2 dimensions, received 2",
    ),
    "axis too small": (lambda: checks.check_axis("channel_axis", -3, rank=2), ParameterError, "received -3"),
    "axis bool": (lambda: checks.check_axis("channel_axis", True, rank=2), ParameterError, "received True"),
    "axis float": (
        lambda: checks.check_axis("channel_axis", 1.0, rank=2),  # type: ignore[arg-type]  # the mistake tested
        ParameterError,
        "received 1.0",
    ),
    "channels": (
        lambda: checks.check_per_channel("weight", torch.zeros(4), num_features=3),
        ShapeError,
        r"weight: expected shape \(3,\), one value per channel of the input, received shape \(4,\)",
    ),
    "channels of rank 2": (
        lambda: checks.check_per_channel("weight", torch.zeros(3, 1), num_features=3),
        ShapeError,
        r"received shape \(3, 1\)",
    ),
    "integer weight": (
        lambda: checks.check_per_channel("weight", torch.ones(3, dtype=torch.int64), num_features=3),
        DtypeError,
        "weight: .* received int64",
    ),
    "eps zero in training": (
        lambda: checks.check_eps("eps", 0.0, is_zero_allowed=False),
        ParameterError,
        "eps: expected a finite number > 0 in training, received 0.0",
    ),
    "eps negative": (
        lambda: checks.check_eps("eps", -1e-5, is_zero_allowed=True),
        ParameterError,
        "eps: expected a finite number >= 0, received -1e-05",
    ),
    "eps NaN": (lambda: checks.check_eps("eps", math.nan, is_zero_allowed=True), ParameterError, "received nan"),
    "eps infinite": (lambda: checks.check_eps("eps", math.inf, is_zero_allowed=True), ParameterError, "received inf"),
    "eps text": (
        lambda: checks.check_eps("eps", "1e-5", is_zero_allowed=True),  # type: ignore[arg-type]  # the mistake tested
        ParameterError,
        "received '1e-5'",
    ),
    "fraction above": (
        lambda: checks.check_fraction("momentum", 2.0),
        ParameterError,
        "momentum: expected a number from 0 to 1, received 2.0",
    ),
    "fraction below": (lambda: checks.check_fraction("momentum", -3), ParameterError, "received -3"),
    "fraction NaN": (lambda: checks.check_fraction("momentum", math.nan), ParameterError, "received nan"),
    "fraction bool": (lambda: checks.check_fraction("momentum", True), ParameterError, "received True"),
    "variance negative": (
        lambda: checks.check_variance("running_var", torch.tensor([1.0, -0.5])),
        StatisticsError,
        "running_var: expected values >= 0, received -0.5",
    ),
    "variance NaN": (
        lambda: checks.check_variance("running_var", torch.tensor([torch.nan, 1.0])),
        StatisticsError,
        "received nan",
    ),
    "batches negative": (
        lambda: checks.check_batch_count("num_batches_tracked", torch.tensor(-1)),
        StatisticsError,
        "num_batches_tracked: expected a whole number >= 0 and below 2.62, received -1",
    ),
    "batches near the end of int64": (
        lambda: checks.check_batch_count("num_batches_tracked", torch.tensor(2**63 - 1)),
        StatisticsError,
        "num_batches_tracked: expected a whole number >= 0 and below 2.62, received 9.22337e.18",
    ),
    "batches fractional": (
        lambda: checks.check_batch_count("num_batches_tracked", torch.tensor(1.5)),
        StatisticsError,
        "received 1.5",
    ),
    "batches several": (
        lambda: checks.check_batch_count("num_batches_tracked", torch.tensor([1, 2])),
        ShapeError,
        r"expected a single value, received shape \(2,\)",
    ),
    "batches bool": (
        lambda: checks.check_batch_count("num_batches_tracked", torch.tensor(True)),
        DtypeError,
        "expected an integer, received bool",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_check_refuses(call: Callable[[], object], error: type[ArgumentError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
