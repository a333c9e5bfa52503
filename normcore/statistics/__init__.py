"""Statistics of batches (moments, which merge) and over batches (running statistics)."""

from normcore.statistics.moments import Moments
from normcore.statistics.running import CONVENTIONS, Convention, Momentum, RunningStatistics

__all__ = ["CONVENTIONS", "Convention", "Moments", "Momentum", "RunningStatistics"]
