"""Normalization methods; METHODS is the one table that describes them and checks their callers."""

from collections.abc import Mapping
from types import MappingProxyType

from normcore.normalization.batch_norm import BATCH_NORM, BatchNormResult, batch_norm
from normcore.normalization.lp_norm import LP_NORM, LpNormResult, lp_norm
from normcore.normalization.method import (
    JSON,
    Method,
    MethodResult,
    Output,
    Parameter,
    ParameterValue,
    TensorArgument,
)

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            BATCH_NORM,
            LP_NORM,
        )
    }
)

__all__ = [
    "JSON",
    "METHODS",
    "BatchNormResult",
    "LpNormResult",
    "Method",
    "MethodResult",
    "Output",
    "Parameter",
    "ParameterValue",
    "TensorArgument",
    "batch_norm",
    "lp_norm",
]
