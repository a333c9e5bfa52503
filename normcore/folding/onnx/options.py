"""What a caller may choose about folding an ONNX graph."""

from collections.abc import Collection
from typing import Literal, TypedDict

ZeroPadding = Literal["auto", "pad", "map", "offset", "refuse"]


class FoldOptions(TypedDict, total=False):
    """Keyword arguments of `fold_onnx`, which describes them."""

    freeze_initializers: bool
    exclude: Collection[str]
    zero_padding: ZeroPadding
    cross_activations: bool
    move_gains: bool
    affine: bool


__all__ = ["FoldOptions", "ZeroPadding"]
