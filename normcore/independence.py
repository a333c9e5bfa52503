"""Whether a network computes every row of a batch by itself, so that requests may share an execution."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto

from normcore.errors import DeadlineError
from normcore.execution import ExecutionError, run
from normcore.folding.probes import Feeds, InputInfo, Shapes, make_probe, read_inputs

# What a row may move with its company, in units of the last place of the output's largest magnitude.
MAX_ULPS = 8.0

_ROWS = 4
_STRANGERS = 100.0

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class RowCheck:
    """What came of the check.

    Attributes:
        are_independent: every row's result stayed within `MAX_ULPS` in every company.
        worst_ulps: the largest movement; None where no two runs could be compared.
        sentence: the finding in words.
    """

    are_independent: bool
    worst_ulps: float | None
    sentence: str


def check_rows(
    model: ModelProto, session: onnxruntime.InferenceSession, shapes: Shapes, *, seed: int, deadline_s: float
) -> RowCheck:
    """Run rows alone, together, and among strangers a hundred times as large, and compare each row's results.

    Batch statistics (a normalization in training mode), sums over the batch, and fixed batch sizes inside the graph
    are found this way. It is a test on seeded rows, not a proof for all.

    Args:
        model: the graph, for its free axes.
        session: the session that would serve it.
        shapes: input shapes that the graph accepts; the first axes are replaced.
        seed: of the rows.
        deadline_s: of all runs together.

    Raises:
        DeadlineError: the runs took longer.
    """
    inputs = read_inputs(model)
    fixed = [info.name for info in inputs if not info.axes or not isinstance(info.axes[0], str)]
    if fixed or not inputs:
        return RowCheck(False, None, f"the first axis of input {', '.join(fixed) or '(none)'} is not free")
    names = [output.name for output in session.get_outputs()]
    until = time.monotonic() + deadline_s
    results = []
    try:
        for feeds, positions in _companies(inputs, shapes, seed):
            arrays = run(session, feeds, names, deadline_s=max(0.0, until - time.monotonic()))
            rows = len(next(iter(feeds.values())))
            results.append((dict(zip(names, arrays, strict=True)), positions, rows))
    except ExecutionError as error:
        return RowCheck(False, None, f"the network does not take every number of rows: {error}")
    except DeadlineError:
        raise DeadlineError("check of the rows", deadline_s=deadline_s) from None
    return _judge(names, results)


def _companies(inputs: tuple[InputInfo, ...], shapes: Shapes, seed: int) -> Iterator[tuple[Feeds, dict[int, int]]]:
    """Feeds, and where each of our rows stands in them."""
    sized = {name: (_ROWS, *shape[1:]) for name, shape in shapes.items()}
    ours = make_probe(inputs, sized, kind="random", seed=seed)
    strangers = _enlarged(make_probe(inputs, sized, kind="random", seed=seed + 1))
    yield ours, {row: row for row in range(_ROWS)}
    for row in range(_ROWS):
        yield {name: array[row : row + 1] for name, array in ours.items()}, {row: 0}
    for row in range(_ROWS):
        mixed = {
            name: np.concatenate([strangers[name][:row], array[row : row + 1], strangers[name][row:]])
            for name, array in ours.items()
        }
        yield mixed, {row: row}


def _enlarged(feeds: Feeds) -> Feeds:
    return {
        name: array if array.dtype.kind in "biu" else (array.astype(np.float64) * _STRANGERS).astype(array.dtype)
        for name, array in feeds.items()
    }


def _judge(names: list[str], results: Sequence[tuple[Arrays, Mapping[int, int], int]]) -> RowCheck:
    worst = 0.0
    together = results[0][0]
    for name in names:
        for arrays, positions, rows in results:
            array = arrays[name]
            if array.ndim == 0 or array.shape[0] != rows:
                return RowCheck(False, None, f"output {name} has shape {list(array.shape)} for {rows} rows")
            for row, position in positions.items():
                worst = max(worst, _ulps(together[name][row], array[position]))
    if worst <= MAX_ULPS:
        return RowCheck(True, worst, f"rows move by at most {worst:.3g} ulp with their company")
    return RowCheck(False, worst, f"a row moves by {worst:.3g} ulp with its company, more than {MAX_ULPS:g}")


def _ulps(left: NDArray[Any], right: NDArray[Any]) -> float:
    """The largest difference in units of the last place of the largest magnitude; infinite where they cannot agree."""
    if left.shape != right.shape:
        return float("inf")
    if left.dtype.kind in "biuOSU":
        return 0.0 if np.array_equal(left, right) else float("inf")
    info = np.finfo(left.dtype) if left.dtype.kind == "f" else None
    exact_left, exact_right = left.astype(np.float64), right.astype(np.float64)
    if not np.array_equal(np.isfinite(exact_left), np.isfinite(exact_right)):
        return float("inf")
    finite = np.isfinite(exact_left)
    scale = np.abs(exact_left[finite]).max(initial=0.0)
    difference = np.abs(exact_left[finite] - exact_right[finite]).max(initial=0.0)
    if difference == 0.0:
        return 0.0
    eps = float(info.eps) if info is not None else 2.0**-7  # bfloat16, of which numpy knows nothing
    return float(difference / (eps * 2.0 ** np.floor(np.log2(scale)))) if scale else float("inf")


__all__ = ["MAX_ULPS", "RowCheck", "check_rows"]
