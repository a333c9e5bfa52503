"""Random networks of any rank, called with every shape and default that they allow: a fold is right for all."""

import numpy as np
from hypothesis import HealthCheck, given, settings

from normcore.folding.fold import fold_onnx
from normcore.folding.onnx.options import FoldOptions
from normcore.folding.reference import NotEvaluableError, Reference
from tests.normcore.folding.builder import Array
from tests.normcore.folding.drawing import Case, networks_of_any_rank
from tests.normcore.folding.test_random_networks import OPTIONS

SETTINGS = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@given(case=networks_of_any_rank(), options=OPTIONS)
@settings(SETTINGS, max_examples=80)
def test_fold_equals_unfolded_for_every_shape_that_the_file_allows(case: Case, options: FoldOptions) -> None:
    model = case.model
    folded, entries = fold_onnx(model, **options)
    before, after = Reference(model), Reference(folded)
    generator = np.random.default_rng(0)
    for index, shape in enumerate(case.shapes):
        feeds: dict[str, Array] = {"x": generator.standard_normal(shape), **(case.overridable if index % 2 else {})}
        try:
            expected = before.run(feeds)
        except NotEvaluableError:
            continue
        for name, values in after.run(feeds).items():
            assert_same(values, expected[name])
    kept = [entry for entry in entries if entry.status == "kept" and entry.operator == "BatchNormalization"]
    assert [node.op_type for node in folded.graph.node].count("BatchNormalization") == len(kept)


def assert_same(values: Array, expected: Array) -> None:
    assert values.shape == expected.shape
    scale = np.abs(expected[np.isfinite(expected)]).max(initial=1e-12)
    assert np.allclose(values, expected, rtol=0, atol=1e-7 * scale, equal_nan=True)
