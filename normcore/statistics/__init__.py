"""Statistics of batches (moments, which merge) and over batches (running and population statistics)."""

from normcore.statistics.conversion import convert_momentum, convert_running, initial_share, running_of_caffe
from normcore.statistics.histogram import MAX_BINS, MAX_CHANNELS, Bins, Histogram
from normcore.statistics.moments import Moments
from normcore.statistics.population import NAN_POLICIES, MeanVar, PooledMeanVar, PopulationStatistics
from normcore.statistics.running import CONVENTIONS, Convention, Momentum, RunningStatistics
from normcore.statistics.stream import MomentsStream
from normcore.statistics.warm_up import warm_up

__all__ = [
    "CONVENTIONS",
    "MAX_BINS",
    "MAX_CHANNELS",
    "NAN_POLICIES",
    "Bins",
    "Convention",
    "Histogram",
    "MeanVar",
    "Moments",
    "MomentsStream",
    "Momentum",
    "PooledMeanVar",
    "PopulationStatistics",
    "RunningStatistics",
    "convert_momentum",
    "convert_running",
    "initial_share",
    "running_of_caffe",
    "warm_up",
]
