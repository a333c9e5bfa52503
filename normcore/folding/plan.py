"""Plan: what a fold would do, and why not more."""

from dataclasses import replace
from typing import Unpack

from onnx import ModelProto

from normcore.folding.fold import fold_onnx
from normcore.folding.onnx.options import FoldOptions
from normcore.folding.report import Plan


def plan_onnx(model: ModelProto, **options: Unpack[FoldOptions]) -> Plan:
    """Every normalization of a model: what it folds into, or the reason why it stays.

    The plan is a fold of a copy, so it cannot promise what the fold would then refuse; the model is not changed.

    Args:
        model: from `load_onnx`.
        options: see `fold_onnx`.
    """
    _, entries = fold_onnx(model, **options)
    return Plan(
        tuple(
            replace(entry, status="foldable", residual=None) if entry.status == "folded" else entry for entry in entries
        )
    )


__all__ = ["plan_onnx"]
