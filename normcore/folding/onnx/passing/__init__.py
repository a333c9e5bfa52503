"""Operators through which a map per channel goes on, one kind per file.

Each rule tells, for a map wanted at an output, what its inputs would have to be mapped with; and for a map found at an
input, which map that is at the outputs.
"""

from normcore.folding.onnx.passing.table import PASSES

__all__ = ["PASSES"]
