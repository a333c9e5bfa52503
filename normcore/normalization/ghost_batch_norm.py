"""Ghost batch norm: training normalizes virtual batches, small parts of a large batch, each by itself."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from normcore.errors import ParameterError
from normcore.normalization.batch_norm import BATCH_NORM, TRAINING_PARAMETERS, normalize_batch
from normcore.normalization.batch_options import BatchOptions
from normcore.normalization.batch_result import BatchNormResult
from normcore.normalization.batch_view import MAX_PARTS, BatchView
from normcore.normalization.gradients import Gradients
from normcore.normalization.method import JSON, Method, Parameter
from normcore.statistics.running import Momentum


@dataclass(frozen=True)
class GhostBatchNormResult(BatchNormResult):
    """Outputs of ghost batch norm, as of batch norm; None for what does not apply.

    In training of V virtual batches, mean, var and invstd are (V, C).

    Attributes:
        virtual_batches: results of the virtual batches; the whole batch's where it is not divided.
    """

    virtual_batches: tuple[BatchNormResult, ...] = ()

    @cached_property
    def _summary(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.by is not None or any(batch.by is None for batch in self.virtual_batches):
            return super()._summary
        parts = [(batch.mean, batch.var, batch.invstd) for batch in self.virtual_batches]
        mean, var, invstd = (
            torch.stack([own for own in column if own is not None]) for column in zip(*parts, strict=True)
        )
        return mean, var, invstd

    def diagnostics(self) -> dict[str, JSON]:
        """Those of batch norm for each virtual batch that has any, with its index; as such where there is but one."""
        reports = [batch.diagnostics() for batch in self.virtual_batches]
        if len(reports) == 1:
            return reports[0]
        found: list[JSON] = [{"index": index, **report} for index, report in enumerate(reports) if report]
        return {"virtual_batches": found} if found else {}


def ghost_batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    virtual_batch_size: int = 128,
    grad_output: Tensor | None = None,
    mask: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    training: bool = False,
    momentum: Momentum = "default",
    eps: float = 1e-5,
    convention: str = "torch",
    channel_axis: int = 1,
    nan_policy: str = "propagate",
) -> GhostBatchNormResult:
    """Batch norm of consecutive virtual batches in training, plain batch norm in inference.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with mean and var of the sample's virtual batch

    The samples are taken as they come, `virtual_batch_size` at a time; the last virtual batch is what is left, and a
    single sample left over joins the one before. Each virtual batch updates the running statistics in turn, and counts
    as a batch. Weight and bias are shared. Everything else is as in `batch_norm`, precision and derivatives too.

    Args:
        input: (N, C, *); the samples are along axis 0.
        running_mean: (C,).
        running_var: (C,).
        weight: (C,), (N, C) or the input's shape.
        bias: the weight's shape.
        virtual_batch_size: samples of a virtual batch, 1 or more.
        grad_output: gradient of the output, of the input's shape; gives the gradients of input, weight and bias.
        mask: bool, true where a position counts; broadcasts to the input's shape without the channel axis.
        num_batches_tracked: virtual batches so far, a single value.
        training: whether the statistics are those of the virtual batches.
        momentum: as in `batch_norm`.
        eps: > 0 in training, >= 0 in inference.
        convention: torch, onnx or keras.
        channel_axis: axis of the channels, from the back where negative; not that of the samples.
        nan_policy: propagate, raise or skip_update, which skips the updates of virtual batches that are not finite.

    Returns:
        Output, statistics (V, C) of V virtual batches ((C,) in inference), updated running statistics, gradients.

    Raises:
        ParameterError: a virtual_batch_size below 1, channels along axis 0, or what `batch_norm` refuses.
        StatisticsError: a virtual batch of one value per channel, or what `batch_norm` refuses.
        DtypeError: as `batch_norm`.
        ShapeError: as `batch_norm`.

    >>> import torch
    >>> input = torch.tensor([[1.0], [3.0], [10.0], [30.0], [20.0]])
    >>> ghost_batch_norm(input, virtual_batch_size=2, training=True).mean
    tensor([[ 2.],
            [20.]])
    """
    view = BatchView.of(input, channel_axis=channel_axis)
    sizes = _sizes(view, virtual_batch_size, training=training)
    options = BatchOptions(training, eps, nan_policy, momentum, convention)
    view.check_affine(weight, bias)
    view.check_grad_output(grad_output)
    running = view.running(running_mean, running_var, num_batches_tracked)
    results = []
    affine = (_affine_parts(weight, sizes), _affine_parts(bias, sizes))
    operands = (_parts(term, sizes) for term in (grad_output, view.mask(mask)))
    for part, own_weight, own_bias, own_grad, counted in zip(
        torch.split(input, sizes), *affine, *operands, strict=True
    ):
        own = BatchView(part, view.channel_axis)
        result = normalize_batch(own, own_weight, own_bias, running, options, grad_output=own_grad, counted=counted)
        # Not checked again: statistics that a NaN has reached are the answer, not a mistake of the caller.
        running = result.running if training else running
        results.append(result)
    return _joined(results) if training else GhostBatchNormResult.extending(results[0], virtual_batches=(results[0],))


def _sizes(view: BatchView, virtual_batch_size: int, *, training: bool) -> list[int]:
    """Samples of each virtual batch; the whole batch in inference, or where there are no samples."""
    if type(virtual_batch_size) is not int or virtual_batch_size < 1:
        raise ParameterError("virtual_batch_size", expected="an integer >= 1", received=repr(virtual_batch_size))
    if view.channel_axis == 0:
        raise ParameterError("channel_axis", expected="another axis than that of the samples, 0", received="0")
    samples = view.input.shape[0]
    whole, rest = divmod(samples, virtual_batch_size)
    if not training or not whole:
        return [samples]
    if whole > MAX_PARTS:
        expected = f"at least {-(-samples // MAX_PARTS)}, for at most {MAX_PARTS} virtual batches of {samples} samples"
        raise ParameterError("virtual_batch_size", expected=expected, received=repr(virtual_batch_size))
    sizes = [virtual_batch_size] * whole
    if rest == 1:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes


def _parts(tensor: Tensor | None, sizes: list[int]) -> Sequence[Tensor | None]:
    """The samples of each virtual batch."""
    if tensor is None:
        return [None] * len(sizes)
    return torch.split(tensor, sizes)


def _affine_parts(tensor: Tensor | None, sizes: list[int]) -> Sequence[Tensor | None]:
    """The parameters of each virtual batch: all where they are shared."""
    return [tensor] * len(sizes) if tensor is None or tensor.ndim == 1 else _parts(tensor, sizes)


def _joined(results: Sequence[BatchNormResult]) -> GhostBatchNormResult:
    """Results of virtual batches as one; the last has the running statistics."""
    output, gradients = torch.cat([result.output for result in results]), None
    own = [result.gradients for result in results if result.gradients is not None]
    if own:
        join = torch.cat if own[0].weight.ndim > 1 else _sum
        of_affine = (join([getattr(part, name) for part in own]) for name in ("weight", "bias"))
        gradients = Gradients(torch.cat([part.input for part in own]), *of_affine)
    batches = tuple(results)
    return GhostBatchNormResult.extending(
        results[-1], output=output, gradients=gradients, by=None, virtual_batches=batches
    )


def _sum(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(0)


_VIRTUAL_BATCH_SIZE = Parameter(
    "virtual_batch_size",
    "int",
    128,
    "Samples of a virtual batch; a single one left over joins the one before.",
    minimum=1,
)

GHOST_BATCH_NORM = Method(
    name="ghost_batch_norm",
    summary="Batch norm whose training normalizes consecutive parts of the batch, each by itself.",
    formula="y = (x - mean) / sqrt(var + eps) * weight + bias, mean and var of the virtual batch",
    source="Hoffer, Hubara and Soudry 2017, arXiv:1705.08741",
    tensors=BATCH_NORM.tensors,
    parameters=(
        *TRAINING_PARAMETERS,
        _VIRTUAL_BATCH_SIZE,
    ),
    outputs=tuple(
        replace(output, shape="(V, C), or (C,) in inference") if output.name in ("mean", "var", "invstd") else output
        for output in BATCH_NORM.outputs
    ),
    function=ghost_batch_norm,
)
