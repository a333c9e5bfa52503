"""Weight standardization: every filter of a convolution or linear layer standardized over its own weights."""

from dataclasses import dataclass

from torch import Tensor

from normcore._checks import check_eps, check_floating, check_rank, check_shape
from normcore.errors import StatisticsError
from normcore.normalization.gradients import Seen
from normcore.normalization.method import JSON, Method, Output, Parameter, TensorArgument
from normcore.normalization.per_sample import Groups, Operands, PerSampleResult


@dataclass(frozen=True)
class WeightStandardizationResult(PerSampleResult):
    """Outputs of weight standardization; None for what does not apply. Mean, var and invstd are (out,)."""

    @property
    def grad_gain(self) -> Tensor | None:
        """Gradient of the gain, given or not, where grad_output was given; (out,)."""
        return self.grad_weight

    def diagnostics(self) -> dict[str, JSON]:
        """What makes the result questionable, as in layer norm: numbers of filters."""
        return {name.replace("group", "filter"): number for name, number in super().diagnostics().items()}


def weight_standardization(
    input: Tensor, gain: Tensor | None = None, grad_output: Tensor | None = None, *, eps: float = 1e-6
) -> WeightStandardizationResult:
    """Weight standardization of the filters of a convolution or linear layer.

    w_hat = (w - mean) / sqrt(var + eps) * gain
    dw = s * (a - mean(a) - xh * mean(a * xh)), with a = gain * d(w_hat), xh = (w - mean) * s, s = (var + eps)^-1/2

    Mean and biased variance are those of a filter over its fan_in weights. Scaled weight standardization is a gain of
    gamma / sqrt(fan_in), times what is learned. The first publication divides by the unbiased standard deviation plus
    1e-5 instead.

    Sums are accumulated as in batch norm; the output is
    rounded once to the input's datatype. No argument is changed. The output is differentiable in input and gain, to
    every order.

    Args:
        input: (out, in, *), the weight of a layer: float16, bfloat16, float32 or float64.
        gain: (out,); 1 where not given.
        grad_output: gradient of the output, of the input's shape; gives the gradients of input and gain.
        eps: added to the variance, >= 0. A constant filter gives zeros, and NaN where eps is 0.

    Returns:
        Output, and statistics and the gradient of the gain of shape (out,), float64 for a float64 input, else float32.

    Raises:
        DtypeError: a tensor that is not floating.
        ShapeError: an input of fewer than two dimensions, a gain that is not one value per filter, or a grad_output
            of another shape than the input.
        ParameterError: eps out of bounds.
        StatisticsError: fewer than two weights per filter.

    >>> import torch
    >>> weight_standardization(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), torch.tensor([2.0, 1.0]), eps=0.0001).output
    tensor([[-1.9999,  1.9999],
            [ 0.0000,  0.0000]])
    """
    check_floating("input", input)
    check_rank("input", input, minimum=2)
    filters, fan_in = input.shape[0], input.shape[1:].numel()
    if fan_in < 2:
        expected = "more than 1 weight per filter (fan_in)"
        raise StatisticsError("input", expected=expected, received=f"shape {tuple(input.shape)}")
    if gain is not None:
        check_shape("gain", gain, (filters,), meaning="one value per filter")
    check_eps("eps", eps, is_zero_allowed=True)
    groups = Groups(Seen((filters, fan_in), (filters, 1)), (1,), (filters,), (filters,))
    operands = Operands.of(input, gain, None, grad_output, None, groups)
    return operands.standardize(WeightStandardizationResult, eps=eps)


WEIGHT_STANDARDIZATION = Method(
    name="weight_standardization",
    summary="Standardize every filter of a convolution or linear layer over its own weights.",
    formula="w_hat = (w - mean) / sqrt(var + eps) * gain",
    source="Qiao et al. 2019, arXiv:1903.10520; Brock et al. 2021, arXiv:2101.08692 (gain, eps inside the root)",
    tensors=(
        TensorArgument("input", "weight of a layer", "(out, in, *)", is_required=True),
        TensorArgument("gain", "scale of each filter; 1 where not given", "(out,)"),
        TensorArgument("grad_output", "gradient of the output; gives the other gradients", "(out, in, *)"),
    ),
    parameters=(Parameter("eps", "float", 1e-6, "Added to the biased variance.", minimum=0.0),),
    outputs=(
        Output("output", "(out, in, *)", "standardized weight, in the input's datatype"),
        Output("mean", "(out,)", "mean of each filter; none where there are no filters"),
        Output("var", "(out,)", "biased variance of each filter; none where there are no filters"),
        Output("invstd", "(out,)", "(var + eps)^-1/2; none where there are no filters"),
        Output("grad_input", "(out, in, *)", "gradient of the input; only with grad_output"),
        Output("grad_gain", "(out,)", "gradient of the gain, given or not; only with grad_output"),
    ),
    function=weight_standardization,
)
