"""The float64 arbiter of every proof: an ONNX graph evaluated in double precision, node by node."""

from normcore.folding.reference.evaluator import NotEvaluableError, Reference

__all__ = ["NotEvaluableError", "Reference"]
