"""Compare two checkpoints of any origin: an original and what another tool, or a colleague, made of it."""

from dataclasses import replace
from pathlib import Path

from normcore.checkpoints.onnx import GraphLimits, load_onnx
from normcore.errors import ParameterError
from normcore.folding.interfaces import find_difference
from normcore.folding.report import Certificate
from normcore.folding.verify import DEFAULTS, ProbeOptions, certify


def compare_checkpoints(
    original: Path, other: Path, *, limits: GraphLimits, options: ProbeOptions = DEFAULTS
) -> Certificate:
    """The certificate of two ONNX files that are called alike.

    Nothing is assumed of the names inside the graphs: only the outputs have to agree, and the parts between tensors
    that agree are listed.

    Args:
        original: the file that counts as right.
        other: the file that may compute something else.
        limits: what the files may be.
        options: how hard to try.

    Raises:
        CheckpointError: a file is not usable.
        ParameterError: the inputs or outputs of the two differ, so that nobody could exchange one for the other.
    """
    models = [load_onnx(path, limits=limits) for path in (original, other)]
    difference = find_difference(*models, names=("first", "second"))
    if difference:
        raise ParameterError("checkpoints", expected="two with the same inputs and outputs", received=difference)
    return certify(original, other, replace(options, has_kept_names=False))


__all__ = ["compare_checkpoints"]
