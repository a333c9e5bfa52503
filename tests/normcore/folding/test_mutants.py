"""Folds of every kind, made from the formulas: the right one is certified, and every wrong one is rejected."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

from normcore.folding.report import Certificate
from normcore.folding.verify import ProbeOptions, certify
from tests.normcore.folding.networks import change
from tests.normcore.folding.pairs import EPS, PAIRS, Make, Pair

Array = NDArray[Any]
DTYPES = {"fp32": np.float32, "fp16": np.float16}


def certificate(original: ModelProto, folded: ModelProto, folder: Path, **options: Any) -> Certificate:
    paths = (folder / "original.onnx", folder / "folded.onnx")
    for path, model in zip(paths, (original, folded), strict=True):
        path.write_bytes(model.SerializeToString())
    return certify(*paths, ProbeOptions(**options))


@pytest.mark.parametrize("has_kept_names", [True, False], ids=["kept_names", "any_names"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
def test_a_right_fold_is_certified(make: Make, dtype: Any, has_kept_names: bool, tmp_path: Path) -> None:
    for seed in range(3):
        pair = make(seed, dtype, EPS)
        found = certificate(pair.original, pair.folded, tmp_path, seed=seed, has_kept_names=has_kept_names)
        assert found.verdict == "equivalent", found.sentence
        assert found.regions


def scaled(pair: Pair, factor: float = 1.01) -> None:
    def edit(values: Array) -> Array:
        np.moveaxis(values, pair.axis, 0)[1] *= factor
        return values

    change(pair.folded, pair.weight, edit)


def swapped(pair: Pair) -> None:
    def edit(values: Array) -> Array:
        order = [1, 0, *range(2, values.shape[pair.axis])]
        return values.take(order, pair.axis)

    change(pair.folded, pair.weight, edit)


def without_bias(pair: Pair) -> None:
    def edit(values: Array) -> Array:
        np.squeeze(values)[0] = 0
        return values

    assert pair.bias is not None
    change(pair.folded, pair.bias, edit)


MUTATIONS: dict[str, Callable[[Pair], None]] = {"scaled": scaled, "swapped": swapped, "without_bias": without_bias}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS)
@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
def test_a_mutant_is_rejected(make: Make, mutate: Callable[[Pair], None], dtype: Any, tmp_path: Path) -> None:
    pair = make(0, dtype, EPS)
    mutate(pair)
    found = certificate(pair.original, pair.folded, tmp_path)
    assert found.verdict == "different", found.sentence
    assert any(not region.equivalent for region in found.regions)


@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
def test_another_eps_is_rejected(make: Make, tmp_path: Path) -> None:
    pair = make(0, np.float32, 1e-5)
    assert certificate(pair.original, pair.folded, tmp_path).verdict == "different"


@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
def test_a_mutant_is_rejected_whatever_the_names(make: Make, tmp_path: Path) -> None:
    pair = make(0, np.float32, EPS)
    scaled(pair)
    assert certificate(pair.original, pair.folded, tmp_path, has_kept_names=False).verdict == "different"


def test_a_name_that_moved_counts_only_where_names_are_kept(tmp_path: Path) -> None:
    """Other tools leave the name of the unscaled tensor on the scaled one."""
    pair = PAIRS["through_pool"](0, np.float32, EPS)
    for node in pair.folded.graph.node:
        for names in (node.input, node.output):
            names[:] = [{"scaled": "conv"}.get(name, name) for name in names]
    regions = certificate(pair.original, pair.folded, tmp_path).regions
    assert [region.output for region in regions if not region.equivalent] == ["conv", "norm"]
    found = certificate(pair.original, pair.folded, tmp_path, has_kept_names=False)
    assert found.verdict == "equivalent"
    assert [(region.output, region.tensors) for region in found.regions] == [("norm", ("pooled", "norm"))]
