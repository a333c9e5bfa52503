"""Statistics of batches (moments, which merge) and over batches (running and population statistics)."""

from normcore.statistics.histogram import MAX_BINS, MAX_CHANNELS, Bins, Histogram
from normcore.statistics.moments import Moments
from normcore.statistics.population import NAN_POLICIES, MeanVar, PooledMeanVar, PopulationStatistics
from normcore.statistics.running import CONVENTIONS, Convention, Momentum, RunningStatistics
from normcore.statistics.stream import MomentsStream

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
]
