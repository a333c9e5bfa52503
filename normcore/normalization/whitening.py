"""Whitening: channels of a group decorrelated and scaled to unit variance together."""

import torch
from torch import Tensor

from normcore._checks import check_eps, check_floating, check_per_channel, check_rank, check_shape
from normcore._slab import Slab
from normcore.errors import NotSupportedError, ParameterError, ShapeError, StatisticsError
from normcore.normalization.group_transform import GroupTransform, grouped, ungrouped
from normcore.normalization.inverse_root import MODES, MODES_WITH_PULLBACK, inverse_root
from normcore.normalization.method import Method, Output, Parameter, TensorArgument
from normcore.normalization.whitening_result import WhiteningResult
from normcore.statistics.covariance import GroupCovariance, RunningCovariance
from normcore.statistics.running import CONVENTIONS, Momentum, check_momentum

_MOST_ITERATIONS = 100
_LARGEST_GROUP = 4096


def whitening(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_covariance: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    num_batches_tracked: Tensor | None = None,
    grad_output: Tensor | None = None,
    mode: str = "zca",
    groups: int = 1,
    iterations: int = 5,
    eps: float = 1e-5,
    training: bool = False,
    momentum: Momentum = "default",
    convention: str = "torch",
) -> WhiteningResult:
    """Whitening of groups of d = C / groups channels, in training or inference.

    y = weight * W (x - mean) + bias,  W (cov + eps I) W^T = I

    W is (cov + eps I)^-1/2 (zca), eigenvectors over root eigenvalues, the largest first (pca), the inverse of
    Cholesky's factor (cholesky), or what some iterations of Newton and Schulz make of zca's (iternorm: whitening is
    partial, and the less so the more iterations). Training takes mean and biased covariance from the batch and returns
    updated running ones, r <- (1 - f) r + f b, with the batch covariance corrected as the convention says (torch:
    Bessel). Inference computes W from the running covariance; averaging W itself would not whiten the average batch.

    Everything is computed in float64 and rounded once to the input's datatype, so that an ill-conditioned covariance
    costs a float32 input no digits. No argument is changed. The output is differentiable to any order with respect to
    input, weight and bias; in mode zca and cholesky also where eigenvalues repeat. Running statistics are constants.

    Args:
        input: (N, C, *), float16, bfloat16, float32 or float64. An empty one in training gives an empty output and
            changes no statistics.
        running_mean: (C,), any floating datatype; with running_covariance.
        running_covariance: (groups, d, d), symmetric.
        weight: (C,); 1 where not given.
        bias: (C,); 0 where not given.
        num_batches_tracked: batches so far, a single value; training with momentum None needs it.
        grad_output: the gradient of the output, in its shape; gives grad_input, grad_weight and grad_bias in closed
            form.
        mode: zca, pca, cholesky or iternorm.
        groups: a divisor of C; a group is a run of neighbouring channels.
        iterations: of mode iternorm, 1 to 100.
        eps: added to the variances, >= 0.
        training: whether the statistics are the batch's own.
        momentum: in the convention's sense: torch, weight of the new batch (0.1); onnx and keras, weight of the kept
            value (0.9, 0.99). None: cumulative average over batches.
        convention: torch, onnx or keras, for the update of the running statistics.

    Returns:
        Output, statistics (float64 for a float64 input, else float32) and updated running statistics (float64 where
        they were given so).

    Raises:
        DtypeError: a tensor that is not floating.
        ShapeError: an input of fewer than two dimensions, or a tensor that has not the shape it should.
        ParameterError: mode, groups, iterations, eps, momentum or convention out of bounds.
        StatisticsError: a covariance that, with eps added, is not positive definite beyond rounding; no running
            statistics in inference, or one without the other; one value per channel in training; momentum None
            without num_batches_tracked; repeated eigenvalues where mode pca needs a gradient.
        NotSupportedError: grad_output in training with mode pca or iternorm.

    >>> result = whitening(torch.tensor([[1.0, 1.0], [-1.0, -1.0], [3.0, 1.0], [-3.0, -1.0]]), training=True, eps=0.0)
    >>> torch.allclose(result.output.T @ result.output / 4, torch.eye(2), atol=1e-6)
    True
    """
    num_features = _check_tensors(input, weight, bias, grad_output)
    _check_parameters(mode, groups=groups, iterations=iterations, num_features=num_features)
    if grad_output is not None and training and mode not in MODES_WITH_PULLBACK:
        message = f"grad_output: no closed form in training with mode {mode}; use {' or '.join(MODES_WITH_PULLBACK)}"
        raise NotSupportedError(message)
    check_eps("eps", eps, is_zero_allowed=True)
    check_momentum(momentum, convention=convention)
    shape = (groups, num_features // groups)
    running = RunningCovariance.checked(running_mean, running_covariance, num_batches_tracked, shape=shape)
    slab = Slab.of(input, channel_axis=1)
    if training and input.numel() == 0:
        return WhiteningResult.of_nothing(input, running, has_gradients=grad_output is not None)
    values = grouped(slab.values, groups=groups)
    by = _of_batch(values, input) if training else _of_running(running, values)
    argument = "input" if training else "running_covariance"
    root = inverse_root(by.covariance, argument=argument, mode=mode, iterations=iterations, eps=eps)
    transform = GroupTransform(by, root, _affine(weight, 1.0, like=by.center), _affine(bias, 0.0, like=by.center))
    output = slab.restore(ungrouped(transform.output(), like=slab.values))
    with torch.no_grad():
        result = WhiteningResult.of(output, transform, mode, eps=eps, count=slab.count if training else None)
        result = result.looked_at(input, running)
        if training and running is not None:
            updated = running.update(by, momentum=momentum, convention=convention)
            result = result.with_running(updated, running)
        if grad_output is not None:
            upstream = grouped(Slab.of(grad_output, channel_axis=1).values, groups=groups)
            grads = transform.batch_gradients(upstream) if training else transform.frozen_gradients(upstream)
            result = result.with_gradients(grads, slab)
    return result


def _check_tensors(input: Tensor, weight: Tensor | None, bias: Tensor | None, grad_output: Tensor | None) -> int:
    """The number of channels of an input that can be whitened."""
    check_floating("input", input)
    check_rank("input", input, minimum=2)
    num_features = input.shape[1]
    if num_features == 0:
        raise ShapeError("input", expected="at least 1 channel", received=f"shape {tuple(input.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_per_channel(name, tensor, num_features=num_features)
    if grad_output is not None:
        check_shape("grad_output", grad_output, input.shape, meaning="that of the input")
    return num_features


def _check_parameters(mode: str, *, groups: int, iterations: int, num_features: int) -> None:
    if mode not in MODES:
        raise ParameterError("mode", expected=f"one of {', '.join(MODES)}", received=repr(mode))
    if _is_within(groups, num_features) and num_features // groups > _LARGEST_GROUP:
        expected = f"groups of at most {_LARGEST_GROUP} of the {num_features} channels: a covariance has their square"
        raise ParameterError("groups", expected=expected, received=repr(groups))
    if not _is_within(groups, num_features) or num_features % groups:
        expected = f"a divisor of the input's {num_features} channels"
        raise ParameterError("groups", expected=expected, received=repr(groups))
    if not _is_within(iterations, _MOST_ITERATIONS):
        expected = f"an integer from 1 to {_MOST_ITERATIONS}"
        raise ParameterError("iterations", expected=expected, received=repr(iterations))


def _is_within(value: object, maximum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= maximum


def _of_batch(values: Tensor, input: Tensor) -> GroupCovariance:
    if values.shape[-1] == 1:
        expected = "more than 1 value per channel when training"
        raise StatisticsError("input", expected=expected, received=f"shape {tuple(input.shape)}")
    return GroupCovariance.of(values)


def _of_running(running: RunningCovariance | None, values: Tensor) -> GroupCovariance:
    if running is None:
        expected = "running statistics in inference (training false)"
        raise StatisticsError("running_mean", expected=expected, received="none")
    return running.about(values)


def _affine(parameter: Tensor | None, default: float, *, like: Tensor) -> Tensor:
    return torch.full_like(like, default) if parameter is None else parameter.double().reshape(like.shape)


WHITENING = Method(
    name="whitening",
    summary="Decorrelate the channels of each group and scale them to unit variance.",
    formula="y = W (x - mean) * weight + bias, W (covariance + eps I) W^T = I",
    source="Kessy, Lewin and Strimmer 2018, arXiv:1512.00809 (zca, pca, cholesky); Huang et al. 2018, "
    "arXiv:1804.08450; Huang et al. 2019, arXiv:1904.03441 (iternorm)",
    tensors=(
        TensorArgument("input", "values to whiten", "(N, C, *)", is_required=True),
        TensorArgument("running_mean", "running mean; needed in inference", "(C,)"),
        TensorArgument(
            "running_covariance", "running covariance; needed in inference", "(groups, d, d), d = C / groups"
        ),
        TensorArgument("weight", "scale (gamma); 1 where not given", "(C,)"),
        TensorArgument("bias", "shift (beta); 0 where not given", "(C,)"),
        TensorArgument("num_batches_tracked", "batches so far; needed in training with momentum null", "()"),
        TensorArgument("grad_output", "gradient of the output; asks for the gradients", "(N, C, *)"),
    ),
    parameters=(
        Parameter(
            "mode",
            "str",
            "zca",
            "Which W: zca, the symmetric one; pca, eigenvectors over root eigenvalues, largest first; cholesky, the "
            "inverse of the lower triangular factor; iternorm, an approximation of zca's by iterations.",
            choices=MODES,
        ),
        Parameter("groups", "int", 1, "Groups of neighbouring channels; a divisor of C.", minimum=1),
        Parameter("iterations", "int", 5, "Iterations of mode iternorm.", minimum=1, maximum=_MOST_ITERATIONS),
        Parameter("eps", "float", 1e-5, "Added to the variances on the covariance's diagonal.", minimum=0.0),
        Parameter("training", "bool", False, "Whiten by the batch's statistics and update the running ones."),
        Parameter(
            "momentum",
            "float",
            CONVENTIONS["torch"].momentum,
            "In the convention's sense: torch, weight of the new batch (0.1 where not given); onnx and keras, weight "
            "of the kept value (0.9 and 0.99 where not given). null: cumulative average over batches.",
            is_nullable=True,
            minimum=0.0,
            maximum=1.0,
        ),
        Parameter(
            "convention",
            "str",
            "torch",
            "How running statistics are updated: torch takes Bessel's covariance of the batch, onnx and keras the "
            "biased one.",
            choices=tuple(CONVENTIONS),
        ),
    ),
    outputs=(
        Output("output", "(N, C, *)", "whitened values, in the input's datatype"),
        Output("mean", "(C,)", "mean that was subtracted; none for an empty batch in training"),
        Output("covariance", "(groups, d, d)", "biased covariance, without eps; none for an empty batch in training"),
        Output("whitening_matrix", "(groups, d, d)", "W; none for an empty batch in training"),
        Output("running_mean", "(C,)", "updated running mean; only in training with running statistics"),
        Output(
            "running_covariance",
            "(groups, d, d)",
            "updated running covariance; only in training with running statistics",
        ),
        Output(
            "num_batches_tracked", "()", "updated number of batches; only in training with running statistics and it"
        ),
        Output("grad_input", "(N, C, *)", "gradient of the input; only with grad_output"),
        Output("grad_weight", "(C,)", "gradient of the weight; only with grad_output"),
        Output("grad_bias", "(C,)", "gradient of the bias; only with grad_output"),
    ),
    function=whitening,
)
