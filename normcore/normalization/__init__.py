"""Normalization methods; METHODS is the one table that describes them and checks their callers."""

from collections.abc import Mapping
from types import MappingProxyType

from normcore._untraced import untraced
from normcore.normalization.batch_norm import BATCH_NORM, batch_norm
from normcore.normalization.batch_renorm import BATCH_RENORM, BatchRenormResult, batch_renorm
from normcore.normalization.batch_result import BatchNormResult
from normcore.normalization.ghost_batch_norm import GHOST_BATCH_NORM, GhostBatchNormResult, ghost_batch_norm
from normcore.normalization.group_norm import GROUP_NORM, group_norm
from normcore.normalization.instance_norm import INSTANCE_NORM, InstanceNormResult, instance_norm
from normcore.normalization.layer_norm import LAYER_NORM, layer_norm
from normcore.normalization.local_response_norm import (
    LOCAL_RESPONSE_NORM,
    LocalResponseNormResult,
    local_response_norm,
)
from normcore.normalization.lp_norm import LP_NORM, LpNormResult, lp_norm
from normcore.normalization.mean_variance_norm import (
    MEAN_VARIANCE_NORM,
    MeanVarianceNormResult,
    mean_variance_norm,
)
from normcore.normalization.method import (
    JSON,
    Method,
    MethodResult,
    Output,
    Parameter,
    ParameterValue,
    TensorArgument,
)
from normcore.normalization.per_sample import PerSampleResult
from normcore.normalization.rms_norm import RMS_NORM, RmsNormResult, rms_norm
from normcore.normalization.spectral_norm import SPECTRAL_NORM, SpectralNormResult, spectral_norm
from normcore.normalization.synchronized_batch_norm import (
    SYNCHRONIZED_BATCH_NORM,
    SynchronizedBatchNormResult,
    synchronized_batch_norm,
)
from normcore.normalization.warm_up import warm_up
from normcore.normalization.weight_norm import WEIGHT_NORM, WeightNormResult, weight_norm
from normcore.normalization.weight_standardization import (
    WEIGHT_STANDARDIZATION,
    WeightStandardizationResult,
    weight_standardization,
)
from normcore.normalization.whitening import WHITENING, whitening
from normcore.normalization.whitening_result import WhiteningResult

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            BATCH_NORM,
            BATCH_RENORM,
            GHOST_BATCH_NORM,
            SYNCHRONIZED_BATCH_NORM,
            GROUP_NORM,
            INSTANCE_NORM,
            LAYER_NORM,
            RMS_NORM,
            LOCAL_RESPONSE_NORM,
            LP_NORM,
            MEAN_VARIANCE_NORM,
            SPECTRAL_NORM,
            WEIGHT_NORM,
            WEIGHT_STANDARDIZATION,
            WHITENING,
        )
    }
)

batch_norm = untraced(batch_norm)
batch_renorm = untraced(batch_renorm)
ghost_batch_norm = untraced(ghost_batch_norm)
group_norm = untraced(group_norm)
instance_norm = untraced(instance_norm)
layer_norm = untraced(layer_norm)
local_response_norm = untraced(local_response_norm)
lp_norm = untraced(lp_norm)
mean_variance_norm = untraced(mean_variance_norm)
rms_norm = untraced(rms_norm)
spectral_norm = untraced(spectral_norm)
synchronized_batch_norm = untraced(synchronized_batch_norm)
weight_norm = untraced(weight_norm)
weight_standardization = untraced(weight_standardization)
whitening = untraced(whitening)

__all__ = [
    "JSON",
    "METHODS",
    "BatchNormResult",
    "BatchRenormResult",
    "GhostBatchNormResult",
    "InstanceNormResult",
    "LocalResponseNormResult",
    "LpNormResult",
    "MeanVarianceNormResult",
    "Method",
    "MethodResult",
    "Output",
    "Parameter",
    "ParameterValue",
    "PerSampleResult",
    "RmsNormResult",
    "SpectralNormResult",
    "SynchronizedBatchNormResult",
    "TensorArgument",
    "WeightNormResult",
    "WeightStandardizationResult",
    "WhiteningResult",
    "batch_norm",
    "batch_renorm",
    "ghost_batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "local_response_norm",
    "lp_norm",
    "mean_variance_norm",
    "rms_norm",
    "spectral_norm",
    "synchronized_batch_norm",
    "warm_up",
    "weight_norm",
    "weight_standardization",
    "whitening",
]
