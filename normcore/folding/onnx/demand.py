"""A map per channel that waits beside a tensor to be taken by the operators around it."""

from dataclasses import dataclass

import numpy as np

from normcore.folding.affine import Affine
from normcore.folding.onnx.refusal import Refusal


@dataclass(frozen=True, slots=True)
class Demand:
    """The map `affine` along one axis of a tensor, whose rank the file may leave free (None)."""

    affine: Affine
    axis: int
    rank: int | None

    def __post_init__(self) -> None:
        if not self.channels:
            raise Refusal("there are no channels to fold")
        if self.rank is not None and self.axis >= self.rank:
            raise Refusal(f"a tensor of rank {self.rank} has no axis {self.axis}")

    @property
    def channels(self) -> int:
        return self.affine.scale.size

    def on(self, axis: int, size: int | None, *, where: str) -> Affine:
        """The map along `axis`, where there are `size` channels. Raises Refusal.

        Which axis it is does not matter to a map that is the same for every channel.
        """
        if self.axis == axis and size in (self.channels, None):
            return self.affine
        if size is not None and self.affine.is_uniform:
            return self.affine.take(np.zeros(size, np.int64))
        if self.axis != axis:
            raise Refusal(f"its channels are on axis {self.axis}, those of {where} on axis {axis}")
        raise Refusal(f"it normalizes {self.channels} channels, and {where} gives {size}")

    def moved(self, axis: int, rank: int | None) -> "Demand":
        """The same map along another axis of another tensor."""
        return Demand(self.affine, axis, rank)

    def mapped(self, affine: Affine) -> "Demand":
        """Another map along the same axis."""
        return Demand(affine, self.axis, self.rank)


__all__ = ["Demand"]
