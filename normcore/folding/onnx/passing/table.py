"""The table of passing rules."""

from normcore.folding.onnx.passing.activation import ActivationRule
from normcore.folding.onnx.passing.casting import CastRule
from normcore.folding.onnx.passing.identity import IdentityRule
from normcore.folding.onnx.passing.joining import ConcatRule, SumRule
from normcore.folding.onnx.passing.padding import PadRule
from normcore.folding.onnx.passing.pooling import AverageRule, MaximumRule
from normcore.folding.onnx.passing.resizing import ResizeRule
from normcore.folding.onnx.passing.rule import PassRule
from normcore.folding.onnx.passing.selection import SliceRule, SplitRule
from normcore.folding.onnx.passing.shuffling import DepthToSpaceRule, SpaceToDepthRule
from normcore.folding.onnx.passing.views import ReshapeRule, SqueezeRule, TransposeRule, UnsqueezeRule

_RULES: tuple[PassRule, ...] = (
    IdentityRule(),
    CastRule(),
    TransposeRule(),
    ReshapeRule(),
    SqueezeRule(),
    UnsqueezeRule(),
    AverageRule(),
    MaximumRule(),
    ResizeRule(),
    PadRule(),
    SliceRule(),
    SplitRule(),
    DepthToSpaceRule(),
    SpaceToDepthRule(),
    ConcatRule(),
    SumRule(),
    ActivationRule(),
)
PASSES: dict[str, PassRule] = {operator: rule for rule in _RULES for operator in rule.operators}

__all__ = ["PASSES"]
