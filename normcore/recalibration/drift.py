"""Drift: whether a network's frozen statistics still fit the data that it is given, found in one run."""

from collections.abc import Sequence

from onnx import ModelProto

from normcore.errors import ParameterError
from normcore.folding.onnx.graph import Graph
from normcore.recalibration.batches import Batch, check_batches
from normcore.recalibration.layers import find_layers
from normcore.recalibration.measure import RunLimits, measure
from normcore.recalibration.recalibrate import Progress
from normcore.recalibration.report import DriftReport, DriftVerdict, LayerShift
from normcore.recalibration.shift import shift_of

THRESHOLD = 0.25


def measure_drift(
    model: ModelProto,
    batches: Sequence[Batch],
    *,
    threshold: float = THRESHOLD,
    threads: int = 1,
    deadline_s: float = 600.0,
    progress: Progress | None = None,
) -> DriftReport:
    """Compare every batch norm's frozen statistics with those of the data, in the network as it is.

    A layer is stale when its distance, the root mean square over channels of sqrt(d^2 + (r - 1)^2), exceeds the
    threshold (d: shift of the mean, r: ratio of the deviations, see `shift`). A layer whose data would show such a
    distance by chance (`noise`) decides nothing. All layers are measured in one run, with the frozen statistics of all
    others: what follows a stale layer sees its error.

    Args:
        model: from `load_onnx`; it is not changed. Initializers that callers may override are taken as they are.
        batches: one mapping per batch from each input's name to a tensor of its datatype and shape.
        threshold: in frozen standard deviations, above 0.
        threads: compute threads of onnxruntime, which runs without optimizations.
        deadline_s: seconds for everything.
        progress: called with a step's name, how many batches are done and how many there are.

    Returns:
        The verdict, and per layer the distance and the worst channels.

    Raises:
        ArgumentError: the batches do not fit the network, a layer's activations are not finite or fewer than two
            values per channel.
        ExecutionError: the network fails on the data.
        DeadlineError: the time is over.
    """
    if not threshold > 0:
        raise ParameterError("threshold", expected="a number above 0", received=repr(threshold))
    check_batches(model, batches)
    limits = RunLimits.of(threads=threads, deadline_s=deadline_s)
    report_progress = progress or (lambda step, done, total: None)
    layers, kept = find_layers(Graph(model, freeze_initializers=True))
    pooled = measure(
        model, layers, batches, limits=limits, progress=lambda done: report_progress("measure", done, len(batches))
    )
    shifts = tuple(shift_of(layer, pooled[layer.output]) for layer in layers)
    verdict, sentence = _judge(shifts, threshold)
    return DriftReport(verdict, sentence, threshold, shifts, kept, len(batches))


def _judge(shifts: Sequence[LayerShift], threshold: float) -> tuple[DriftVerdict, str]:
    if not shifts:
        return "unknown", "No batch norm has frozen statistics to compare with."
    telling = [shift for shift in shifts if shift.noise < threshold]
    stale = [shift for shift in telling if shift.distance is None or shift.distance > threshold]
    if stale:
        return "stale", (
            f"{len(stale)} of {len(shifts)} batch norms are further than {threshold:g} frozen standard deviations from "
            f"the data; {_describe(stale)}."
        )
    if len(telling) < len(shifts):
        fewest = min(shifts, key=lambda shift: shift.count)
        return "unknown", (
            f"{len(shifts) - len(telling)} of {len(shifts)} batch norms have too few values to tell a distance of "
            f"{threshold:g} from chance; {fewest.normalization!r} has {fewest.count} per channel."
        )
    return "fresh", (
        f"All {len(shifts)} batch norms are within {threshold:g} frozen standard deviations of the data; "
        f"{_describe(telling)}."
    )


def _describe(shifts: Sequence[LayerShift]) -> str:
    """The furthest layer, with its worst channel."""
    furthest = max(shifts, key=lambda shift: float("inf") if shift.distance is None else shift.distance)
    name = repr(furthest.normalization)
    if furthest.distance is None:
        return f"the frozen statistics of {name} are no mean and variance"
    worst = furthest.worst_channels[0]
    return (
        f"the furthest is {name} at {furthest.distance:.3g}, in channel {worst.channel} the mean moved by "
        f"{worst.mean_shift:+.3g} and the log of the variance by {worst.log_var_ratio:+.3g}"
    )


__all__ = ["THRESHOLD", "measure_drift"]
