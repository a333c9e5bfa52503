"""Recalibrate: recompute the running statistics of every batch norm from data, one depth after the other.

The statistics of a layer are those of its input in the network that serves it, so a layer is measured only after all
layers before it have theirs: a network of which k batch norms lie one after the other costs k runs over the data, each
cut behind the layers it measures. Layers of one depth share a run, as none of them is before another. What a run
measures are the exact moments of all batches pooled: neither batch sizes nor their order matter.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, numpy_helper

from normcore.checkpoints.files import write_file
from normcore.checkpoints.onnx import GraphLimits, load_onnx
from normcore.errors import StatisticsError
from normcore.folding.onnx.graph import Graph
from normcore.recalibration.batches import Batch, check_batches
from normcore.recalibration.layers import Layer, find_layers
from normcore.recalibration.measure import RunLimits, measure
from normcore.recalibration.report import Kept, LayerShift, RecalibrationReport
from normcore.recalibration.shift import mean_and_var, shift_of
from normcore.statistics import Moments

Progress = Callable[[str, int, int], None]

_MEAN, _VAR = 3, 4
_DEPTH = attrgetter("depth")


def recalibrate_onnx(
    model: ModelProto,
    batches: Sequence[Batch],
    *,
    freeze_initializers: bool = False,
    threads: int = 1,
    deadline_s: float = 600.0,
    progress: Progress | None = None,
) -> tuple[ModelProto, RecalibrationReport]:
    """A copy of the model whose batch norms have the statistics of the data.

    running_mean = sum(x) / n        running_var = sum((x - mean)^2) / (n - 1)

    over all values x of a channel in all batches together, accumulated in float64 and rounded once to the datatype
    that the statistic is stored in. This is torch's convention for a running variance (unbiased); it is not torch's
    `update_bn`, which averages the statistics of batches and measures all layers in one run in training mode.

    Args:
        model: from `load_onnx`; it is not changed.
        batches: one mapping per batch from each input's name to a tensor of its datatype and shape.
        freeze_initializers: treat initializers that are also graph inputs as constants, and drop those inputs.
        threads: compute threads of onnxruntime, which runs without optimizations.
        deadline_s: seconds for everything.
        progress: called with a step's name, how many steps are done and how many there are.

    Returns:
        The new model (a plain copy where no statistic can be replaced) and, per layer, how far its statistics moved.

    Raises:
        ArgumentError: the batches do not fit the network, a layer's activations are not finite or fewer than two
            values per channel, or a statistic does not fit the datatype it is stored in.
        ExecutionError: the network fails on the data.
        DeadlineError: the time is over.
    """
    check_batches(model, batches)
    limits = RunLimits.of(threads=threads, deadline_s=deadline_s)
    report_progress = progress or (lambda step, done, total: None)
    recalibrated = ModelProto()
    recalibrated.CopyFrom(model)
    layers, kept, stored = _prepare(recalibrated, freeze_initializers=freeze_initializers)
    depths = [list(group) for _, group in groupby(sorted(layers, key=_DEPTH), key=_DEPTH)]
    shifts: dict[str, LayerShift] = {}
    for position, group in enumerate(depths):
        before, total = position * len(batches), len(depths) * len(batches)
        step = f"pass {position + 1} of {len(depths)}"
        report_batch = partial(_report_batch, report_progress, step, before, total)
        pooled = measure(recalibrated, group, batches, limits=limits, progress=report_batch)
        for layer in group:
            shifts[layer.output] = shift_of(layer, pooled[layer.output])
            _store(stored[layer.output], layer, pooled[layer.output])
    return recalibrated, RecalibrationReport(
        layers=tuple(shifts[layer.output] for layer in layers),
        kept=kept,
        passes=len(depths),
        batches=len(batches),
        notes=() if layers else ("no batch norm has statistics that data can replace; the file is unchanged",),
    )


def recalibrate_checkpoint(
    source: Path,
    target: Path,
    batches: Sequence[Batch],
    *,
    limits: GraphLimits,
    freeze_initializers: bool = False,
    threads: int = 1,
    deadline_s: float = 600.0,
    progress: Progress | None = None,
) -> RecalibrationReport:
    """Recalibrate an ONNX file into another one; see `recalibrate_onnx`.

    Where no statistic can be replaced, the target is the source, byte for byte.

    Args:
        source: an ONNX file of any origin; it is not changed.
        target: where the new file goes; it appears at once or not at all.
        batches: as for `recalibrate_onnx`.
        limits: what the source may be.
        freeze_initializers: as for `recalibrate_onnx`.
        threads: as for `recalibrate_onnx`.
        deadline_s: as for `recalibrate_onnx`.
        progress: as for `recalibrate_onnx`; loading and writing are a step each, every batch of a pass another.

    Raises:
        CheckpointError: the source is not usable.
        NormcoreError: as `recalibrate_onnx`.
    """
    report_progress = progress or (lambda step, done, total: None)
    report_progress("load", 0, 2 + len(batches))  # at least: how many passes there are is not known yet
    model = load_onnx(source, limits=limits)
    recalibrated, report = recalibrate_onnx(
        model,
        batches,
        freeze_initializers=freeze_initializers,
        threads=threads,
        deadline_s=deadline_s,
        progress=lambda step, done, total: report_progress(step, 1 + done, 2 + total),
    )
    total = 2 + report.passes * report.batches
    report_progress("write", total - 1, total)
    write_file(target, recalibrated.SerializeToString() if report.layers else source.read_bytes())
    report_progress("done", total, total)
    return report


def _report_batch(progress: Progress, step: str, before: int, total: int, done: int) -> None:
    progress(step, before + done, total)


def _prepare(
    model: ModelProto, *, freeze_initializers: bool
) -> tuple[tuple[Layer, ...], tuple[Kept, ...], dict[str, tuple[TensorProto, TensorProto]]]:
    """Give every layer initializers of its own for mean and variance; these, by the layer's output."""
    graph = Graph(model, freeze_initializers=freeze_initializers)
    layers, kept = find_layers(graph)
    names = {layer.output: _own_statistics(graph, layer) for layer in layers}
    if layers:
        graph.commit()
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    return layers, kept, {output: (stored[mean], stored[var]) for output, (mean, var) in names.items()}


def _own_statistics(graph: Graph, layer: Layer) -> tuple[str, str]:
    inputs = list(graph.node(layer.index).input)
    mean = graph.store(layer.mean, instead_of=inputs[_MEAN], fallback=f"{layer.output}.running_mean")
    var = graph.store(layer.var, instead_of=inputs[_VAR], fallback=f"{layer.output}.running_var")
    graph.set_inputs(layer.index, [*inputs[:_MEAN], mean, var])
    return mean, var


def _store(stored: tuple[TensorProto, TensorProto], layer: Layer, moments: Moments) -> None:
    for tensor, vector, frozen in zip(stored, mean_and_var(layer, moments), (layer.mean, layer.var), strict=True):
        with np.errstate(over="ignore"):
            rounded = vector.astype(frozen.dtype)
        if not np.isfinite(rounded).all():
            expected, received = f"statistics that fit {frozen.dtype.name}", f"{np.abs(vector).max():g}"
            raise StatisticsError(layer.name, expected=expected, received=received)
        tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    variance = numpy_helper.to_array(stored[1]).astype(np.float64)
    if not (variance + layer.eps > 0).all():
        expected = "data that vary in every channel, as its epsilon is 0"
        received = f"a variance of 0 in channel {int(variance.argmin())}"
        raise StatisticsError(layer.name, expected=expected, received=received)


__all__ = ["recalibrate_checkpoint", "recalibrate_onnx"]
