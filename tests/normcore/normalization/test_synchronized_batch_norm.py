"""Synchronized batch norm: equal to batch norm of all shards together, in one process and between processes."""

from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from normcore.errors import ArgumentError, DtypeError, ParameterError, ShapeError, StatisticsError
from normcore.normalization import METHODS, batch_norm, synchronized_batch_norm
from normcore.normalization.synchronized import (
    shard_gradient,
    shard_gradient_sums,
    shard_statistics,
    standardize_shard,
)
from normcore.statistics import Moments

ZERO, ONE = torch.zeros(3), torch.ones(3)
SIZES = [[4, 8], [1, 10, 1], [0, 12], [5, 0, 0, 7], [12], [1] * 12]
sharded = pytest.mark.parametrize("sizes", SIZES, ids=str)
NAMES = ("output", "mean", "var", "invstd", "running_mean", "running_var", "grad_input", "grad_weight", "grad_bias")


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


@sharded
@pytest.mark.parametrize("shape", [(12, 3), (12, 3, 5), (12, 3, 40, 30)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.float64, 1e-13), (torch.bfloat16, 8e-3)], ids=str
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_shards_give_what_their_concatenation_does(
    training: bool, dtype: torch.dtype, bound: float, shape: tuple[int, ...], sizes: list[int]
) -> None:
    # Shards whose means and counts differ: means of means, or of variances, would be far off.
    input = (_randn(*shape) + torch.arange(12.0).view(-1, *[1] * (len(shape) - 1))).to(dtype)
    grad_output = _randn(*shape, seed=1).to(dtype)
    weight, bias = _randn(3, seed=2).float(), _randn(3, seed=3).float()
    expected = batch_norm(input, ZERO, ONE, weight, bias, training=training, grad_output=grad_output)
    result = synchronized_batch_norm(
        torch.split(input, sizes),
        ZERO,
        ONE,
        weight,
        bias,
        training=training,
        grad_outputs=torch.split(grad_output, sizes),
    )
    for name in NAMES:
        ours, theirs = getattr(result, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            assert float((ours - theirs).abs().max()) <= bound * max(1.0, float(theirs.abs().max()))
    assert [len(output) for output in result.outputs] == sizes
    assert result.grad_inputs is not None
    assert [len(gradient) for gradient in result.grad_inputs] == sizes


@sharded
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_masks_weigh_each_shard_by_what_counts(channel_axis: int, sizes: list[int]) -> None:
    """The first five samples do not count at all: shards of theirs alone have no statistics of their own."""
    input, grad_output, weight = _randn(12, 3, 3), _randn(12, 3, 3, seed=1), _randn(3, seed=2)
    mask = torch.rand(12, 3, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[:5] = False
    input[1] = torch.nan
    options: dict[str, Any] = {"training": True, "channel_axis": channel_axis}
    expected = batch_norm(input, ZERO, ONE, weight, mask=mask, grad_output=grad_output, **options)
    parts: dict[str, Any] = {"grad_outputs": torch.split(grad_output, sizes), "masks": torch.split(mask, sizes)}
    result = synchronized_batch_norm(torch.split(input, sizes), ZERO, ONE, weight, **parts, **options)
    tensors = {"input": input, "weight": weight, "mask": mask, "shard_sizes": torch.tensor(sizes)}
    joined = METHODS["synchronized_batch_norm"](tensors, options).outputs["output"]
    torch.testing.assert_close(joined, result.output, equal_nan=True)
    for name in NAMES:
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), equal_nan=True)


def test_derivatives_with_masks_are_those_of_the_concatenation() -> None:
    leaf, mask = _randn(6, 3).requires_grad_(), torch.tensor([True, False, True, True, True, False])

    def function(leaf: Tensor) -> Tensor:
        masks = torch.split(mask, [1, 5])
        return synchronized_batch_norm(torch.split(leaf, [1, 5]), training=True, masks=masks).output

    torch.testing.assert_close(function(leaf), batch_norm(leaf, training=True, mask=mask).output)
    assert torch.autograd.gradcheck(function, leaf)
    assert torch.autograd.gradgradcheck(function, leaf)


@sharded
@pytest.mark.parametrize("has_weight", [True, False], ids=["weight", "bias alone"])
@pytest.mark.parametrize("channel_axis", [1, 2])
def test_parameters_of_each_sample_go_with_their_shard(channel_axis: int, has_weight: bool, sizes: list[int]) -> None:
    input, grad_output = (_randn(12, 3, 5, seed=seed).transpose(1, channel_axis) for seed in (0, 1))
    weight, bias = _randn(12, 3, seed=2) if has_weight else None, _randn(12, 3, seed=3)
    given: dict[str, Any] = {"weight": weight, "bias": bias, "training": True, "channel_axis": channel_axis}
    expected = batch_norm(input, **given, grad_output=grad_output)
    grads = torch.split(grad_output, sizes)
    result = synchronized_batch_norm(torch.split(input, sizes), **given, grad_outputs=grads)
    assert result.grad_weight is not None
    assert result.grad_weight.shape == (12, 3)
    for name in ("output", "grad_input", "grad_weight", "grad_bias"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=0, atol=1e-12)


@sharded
@pytest.mark.parametrize("affine", [(3,), (12, 3)], ids=str)
def test_derivatives_are_those_of_the_concatenation(affine: tuple[int, ...], sizes: list[int]) -> None:
    leaves = tuple(term.requires_grad_() for term in (_randn(12, 3), _randn(*affine, seed=1), _randn(*affine, seed=2)))

    def output(*leaves: Tensor) -> Tensor:
        input, weight, bias = leaves
        return synchronized_batch_norm(torch.split(input, sizes), None, None, weight, bias, training=True).output

    assert torch.autograd.gradcheck(output, leaves)
    assert torch.autograd.gradgradcheck(output, leaves)


def test_a_large_mean_costs_no_digits() -> None:
    input = (_randn(12, 3, 500) + 1e4).float()
    grad_output = _randn(12, 3, 500, seed=1).float()
    expected = batch_norm(input.double(), training=True, grad_output=grad_output.double())
    shards = torch.split(input, [3, 0, 9])
    result = synchronized_batch_norm(shards, training=True, grad_outputs=torch.split(grad_output, [3, 0, 9]))
    assert float((result.output - expected.output).abs().max()) <= 1e-6
    assert result.grad_input is not None
    assert expected.grad_input is not None
    error = (result.grad_input - expected.grad_input).abs().max() / expected.grad_input.abs().max()
    assert float(error) <= 3e-7


def test_batches_are_counted_and_skipped_as_in_batch_norm() -> None:
    shards = list(torch.split(_randn(12, 3), [4, 8]))
    tracked = torch.tensor(3)
    result = synchronized_batch_norm(shards, ZERO, ONE, num_batches_tracked=tracked, training=True, momentum=None)
    assert result.num_batches_tracked is not None
    assert int(result.num_batches_tracked) == 4
    shards[1][2, 1] = torch.nan
    skipped = synchronized_batch_norm(
        shards, ZERO, ONE, num_batches_tracked=tracked, training=True, nan_policy="skip_update"
    )
    assert skipped.num_batches_tracked is not None
    assert int(skipped.num_batches_tracked) == 3
    assert skipped.diagnostics()["non_finite_values"] == 1
    with pytest.raises(StatisticsError, match=r"input: .*nan_policy raise"):
        synchronized_batch_norm(shards, training=True, nan_policy="raise")


def test_only_empty_shards_change_nothing() -> None:
    empty = torch.empty(0, 3, 4)
    result = synchronized_batch_norm([empty, empty], ZERO, ONE, training=True, grad_outputs=[empty, empty])
    assert result.output.shape == (0, 3, 4)
    assert result.running_mean is not None
    assert torch.equal(result.running_mean, ZERO)
    assert result.grad_weight is not None
    assert torch.equal(result.grad_weight, ZERO)


def test_method_splits_one_tensor() -> None:
    method = METHODS["synchronized_batch_norm"]
    tensors = {
        "input": _randn(6, 3),
        "grad_output": _randn(6, 3, seed=1),
        "running_mean": ZERO,
        "running_var": ONE,
        "num_batches_tracked": torch.tensor(0),
    }
    sizes = torch.tensor([1, 0, 5])
    with torch.inference_mode():
        found = method(tensors | {"shard_sizes": sizes}, {"training": True})
        expected = METHODS["batch_norm"](tensors, {"training": True})
    assert list(found.outputs) == list(expected.outputs)
    for name, output in found.outputs.items():
        assert torch.allclose(output, expected.outputs[name], atol=1e-12)


def _work(rank: int, folder: str, sizes: list[int]) -> None:
    """One of the workers: it has its shard alone, and gloo."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(sizes))
    input, grad_output, weight = _randn(12, 3, 4), _randn(12, 3, 4, seed=1), _randn(3, seed=2)
    shard, grad = (torch.split(whole, sizes)[rank] for whole in (input, grad_output))
    own = shard_statistics(shard)
    gathered = [torch.empty(3, 3, dtype=torch.float64) for _ in sizes]
    distributed.all_gather(gathered, torch.stack([own.count, own.mean, own.m2]))
    batch = Moments(*gathered[0]).merge(*(Moments(*part) for part in gathered[1:]))
    output = standardize_shard(shard, batch, weight)
    sums = shard_gradient_sums(grad, shard, batch, weight)
    total = torch.stack([sums.total, sums.dot])
    distributed.all_reduce(total)
    of_input = shard_gradient(grad, shard, batch, weight, total=total[0], dot=total[1])
    torch.save((output, of_input, sums.weight, sums.bias), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_workers_of_several_processes_give_what_one_does(tmp_path: Path) -> None:
    sizes = [5, 7]
    workers = [get_context("spawn").Process(target=_work, args=(rank, str(tmp_path), sizes)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(sizes))]
    weight = _randn(3, seed=2)
    expected = batch_norm(_randn(12, 3, 4), None, None, weight, training=True, grad_output=_randn(12, 3, 4, seed=1))
    assert expected.grad_input is not None
    assert torch.allclose(torch.cat([part[0] for part in found]), expected.output, atol=1e-12)
    assert torch.allclose(torch.cat([part[1] for part in found]), expected.grad_input, atol=1e-12)
    for index, gradient in ((2, expected.grad_weight), (3, expected.grad_bias)):
        assert gradient is not None
        assert torch.allclose(torch.stack([part[index] for part in found]).sum(0), gradient, atol=1e-12)


def _method(**tensors: Tensor) -> Callable[[], object]:
    return lambda: METHODS["synchronized_batch_norm"]({"input": _randn(4, 3)} | tensors, {"training": True})


SHARDS = [_randn(2, 3), _randn(3, 3)]
BATCH = shard_statistics(_randn(4, 3))
REFUSALS: dict[str, tuple[Callable[[], object], type[ArgumentError], str]] = {
    "no shards": (lambda: synchronized_batch_norm([], training=True), ShapeError, "shards: .* received none"),
    "other channels": (
        lambda: synchronized_batch_norm([_randn(2, 3), _randn(2, 4)], training=True),
        ShapeError,
        r"shards\[1\]: expected shape \(n, 3\), as the first, received shape \(2, 4\)",
    ),
    "other datatype": (
        lambda: synchronized_batch_norm([_randn(2, 3), _randn(2, 3).float()], training=True),
        DtypeError,
        r"shards\[1\]: expected float64, as the first, received float32",
    ),
    "rank": (lambda: synchronized_batch_norm([_randn(2)], training=True), ShapeError, r"shards\[0\]"),
    "gradients of other sizes": (
        lambda: synchronized_batch_norm(SHARDS, training=True, grad_outputs=SHARDS[::-1]),
        ShapeError,
        r"grad_outputs: expected the samples of the shards, \(2, 3\), received 3, 2",
    ),
    "gradients of another shape": (
        lambda: synchronized_batch_norm(SHARDS, training=True, grad_outputs=[_randn(2, 4), _randn(3, 4)]),
        ShapeError,
        "grad_output",
    ),
    "masks of other shards": (
        lambda: synchronized_batch_norm(SHARDS, training=True, masks=[torch.tensor([True, True])]),
        ShapeError,
        "masks: expected 2, one of each shard, received 1",
    ),
    "a mask of another shape": (
        lambda: synchronized_batch_norm(SHARDS, masks=[torch.ones(2, dtype=torch.bool)] * 2),
        ShapeError,
        r"mask: expected a shape that broadcasts to \(3,\)",
    ),
    "masks that leave one value": (
        lambda: synchronized_batch_norm(SHARDS, training=True, masks=[torch.tensor([True, False]), torch.zeros(3) > 0]),
        StatisticsError,
        "mask: expected more than 1 counted value per channel when training, received 1",
    ),
    "channels along the samples": (
        lambda: synchronized_batch_norm(SHARDS, training=True, channel_axis=0),
        ParameterError,
        "channel_axis",
    ),
    "weights of each sample": (
        lambda: synchronized_batch_norm(SHARDS, None, None, torch.ones(7, 3), training=True),
        ShapeError,
        r"weight: expected shape \(5, 3\)",
    ),
    "one value": (
        lambda: synchronized_batch_norm([_randn(1, 3), _randn(0, 3)], training=True),
        StatisticsError,
        "input: expected more than 1 value per channel",
    ),
    "policy": (
        lambda: synchronized_batch_norm(SHARDS, training=True, nan_policy="no"),
        ParameterError,
        "nan_policy",
    ),
    "sizes that do not sum": (
        _method(shard_sizes=torch.tensor([1, 2])),
        ParameterError,
        r"shard_sizes: expected sizes that sum to 4 samples, received \[1, 2\]",
    ),
    "negative sizes": (_method(shard_sizes=torch.tensor([5, -1])), ParameterError, "shard_sizes"),
    "no sizes": (_method(shard_sizes=torch.tensor([], dtype=torch.int64)), ShapeError, "shard_sizes"),
    "sizes of no list": (_method(shard_sizes=torch.tensor(4)), ShapeError, "shard_sizes"),
    "sizes of another datatype": (
        _method(shard_sizes=torch.tensor([4.0])),
        DtypeError,
        "shard_sizes: expected int64, received float32",
    ),
    "moments of other channels": (
        lambda: standardize_shard(_randn(4, 2), BATCH),
        ShapeError,
        "batch: expected 2 channels, as the shard has, received 3 channels",
    ),
    "moments of one value": (
        lambda: standardize_shard(_randn(1, 3), shard_statistics(_randn(1, 3))),
        StatisticsError,
        "batch: expected more than 1 value per channel when training, received 1",
    ),
    "eps": (lambda: standardize_shard(_randn(4, 3), BATCH, eps=0.0), ParameterError, "eps"),
    "gradient of another shape": (
        lambda: shard_gradient_sums(_randn(3, 3), _randn(4, 3), BATCH),
        ShapeError,
        "grad_output",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refuses(call: Callable[[], object], error: type[ArgumentError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
