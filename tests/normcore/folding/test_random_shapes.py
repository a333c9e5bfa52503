"""Random networks of any rank, called with every shape and default that they allow: a fold is right for all."""

import numpy as np
from hypothesis import HealthCheck, given, settings
from onnx import ModelProto

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
        expected = run(model, before, feeds)
        if expected is not None:
            for name, values in after.run(feeds, [output.name for output in model.graph.output]).items():
                assert_same(values, expected[name])
    kept = [entry for entry in entries if entry.status == "kept" and entry.operator == "BatchNormalization"]
    assert [node.op_type for node in folded.graph.node].count("BatchNormalization") == len(kept)


def run(model: ModelProto, reference: Reference, feeds: dict[str, Array]) -> dict[str, Array] | None:
    """All tensors; None where a runtime would refuse the shapes, which numpy's broadcasting does not always."""
    try:
        found = reference.run(
            feeds, [name for node in model.graph.node for name in (*node.input, *node.output) if name]
        )
    except NotEvaluableError:
        return None
    for node in model.graph.node:
        x = found[node.input[0]]
        if node.op_type == "Gemm" and (x.ndim != 2 or found[node.output[0]].ndim != 2):
            return None
        if node.op_type == "InstanceNormalization" and x.shape[1] != found[node.input[1]].size:
            return None
        if node.op_type in ("PRelu", "LayerNormalization") and found[node.output[0]].shape != x.shape:
            return None
    return found


def assert_same(values: Array, expected: Array) -> None:
    assert values.shape == expected.shape
    scale = np.abs(expected[np.isfinite(expected)]).max(initial=1e-12)
    assert np.allclose(values, expected, rtol=0, atol=1e-7 * scale, equal_nan=True)
