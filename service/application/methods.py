"""The normalization methods as callers of the service see them: batch norm may name statistics that are kept here."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from normcore import normalization
from normcore.errors import ParameterError, ShapeError
from normcore.normalization import Method, Parameter
from service.application.statistics import Statistics
from service.application.totals import DEFINITIONS
from service.engine.normalization import PREFIX
from service.engine.protocol import Parameters, Tensors

_BATCH_NORM = normalization.METHODS["batch_norm"]
_STATISTICS = Parameter(
    "statistics",
    "str",
    None,
    "Id of a statistics resource (/v1/statistics): inference by its running mean and variance, in place of the tensors "
    "running_mean and running_var; null: none.",
    is_nullable=True,
)
_DEFINITION = Parameter(
    "definition",
    "str",
    "pooled",
    "Which mean and variance of `statistics`. pooled: of all values, variance m2 / n; pooled_unbiased: m2 / (n - 1); "
    "paper: averages over batches of mean and unbiased variance; ema, ema_debiased: as a layer in training keeps them.",
    choices=DEFINITIONS,
)

STATISTICS_PARAMETERS = frozenset((_STATISTICS.name, _DEFINITION.name))
BATCH_NORM = f"{PREFIX}{_BATCH_NORM.name}"

METHODS: Mapping[str, Method] = MappingProxyType(
    dict(normalization.METHODS)
    | {_BATCH_NORM.name: replace(_BATCH_NORM, parameters=(*_BATCH_NORM.parameters, _STATISTICS, _DEFINITION))}
)


async def with_statistics(
    statistics: Statistics, inputs: Tensors, parameters: Parameters
) -> tuple[Tensors, Parameters]:
    """A call of batch norm with the statistics that it names as tensors, and without these two parameters.

    Raises:
        StatisticsNotFoundError: no statistics under the id.
        ParameterError: a parameter of another type; statistics in training, or beside running_mean or running_var;
            a definition without statistics.
        StatisticsError: statistics without a mean and variance of this definition in every channel.
        ShapeError: an input of another number of channels.
    """
    own = {parameter.name: parameter for parameter in (_STATISTICS, _DEFINITION)}
    others = {name: value for name, value in parameters.items() if name not in own}
    found = {name: item.check(parameters.get(name, item.default)) for name, item in own.items()}
    statistics_id = found[_STATISTICS.name]
    if statistics_id is None:
        if _DEFINITION.name in parameters:
            raise ParameterError("definition", expected="statistics beside it", received="none")
        return inputs, others
    for name in ("running_mean", "running_var"):
        if name in inputs:
            raise ParameterError("statistics", expected=f"none beside {name}", received="both")
    if parameters.get("training", False) is not False:
        raise ParameterError("statistics", expected="training false", received="training true")
    running = await statistics.running(str(statistics_id), str(found[_DEFINITION.name]))
    _check_channels(inputs, parameters, num_features=running.mean.size)
    return {**inputs, "running_mean": running.mean, "running_var": running.var}, others


def _check_channels(inputs: Tensors, parameters: Parameters, *, num_features: int) -> None:
    """Before batch norm itself, which would name the tensors that the caller did not send."""
    shape, axis = inputs["input"].shape, parameters.get("channel_axis", 1)
    if isinstance(axis, int) and -len(shape) <= axis < len(shape) and shape[axis] != num_features:
        expected = f"statistics of {shape[axis]} channels, as the input has on axis {axis}"
        raise ShapeError("statistics", expected=expected, received=f"{num_features} channels")
