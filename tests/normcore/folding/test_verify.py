"""Certificates: correct folds are never rejected, mutants always, and what cannot be told is said."""

import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from normcore.errors import CheckpointError
from normcore.folding.report import Certificate
from normcore.folding.verify import ProbeOptions, certify
from tests.normcore.folding import networks
from tests.normcore.folding.networks import Builder, Mutation

Certify = Callable[..., Certificate]


@pytest.fixture
def certificate(tmp_path: Path) -> Certify:
    def compare(original: ModelProto, folded: ModelProto, **options: Any) -> Certificate:
        paths = (tmp_path / "original.onnx", tmp_path / "folded.onnx")
        for path, model in zip(paths, (original, folded), strict=True):
            path.write_bytes(model.SerializeToString())
        return certify(*paths, ProbeOptions(**options))

    return compare


DTYPES = {"fp32": np.float32, "fp16": np.float16}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_correct_folds_are_never_rejected(dtype: Any, seed: int, certificate: Certify) -> None:
    model = networks.random_network(seed, dtype=dtype)
    found = certificate(model, networks.fold(model), seed=seed)
    assert found.verdict == "equivalent", found.sentence
    assert [region.output for region in found.regions] == ["bn1", "bn2", "bn3", "bn4"]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("dtype", "ratio"), [(np.float32, 1e3), (np.float16, 30.0)], ids=["fp32_mean_1000_sigma", "fp16_mean_30_sigma"]
)
def test_correct_folds_of_large_means_are_never_rejected(
    dtype: Any, ratio: float, seed: int, certificate: Certify
) -> None:
    model = networks.random_network(100 + seed, dtype=dtype, mean_over_sigma=ratio)
    found = certificate(model, networks.fold(model), seed=seed)
    assert found.verdict == "equivalent", found.sentence


MUTATIONS: dict[str, Mutation] = {
    "conv_channel_scaled": networks.scale_channel("bn1"),
    "grouped_channel_scaled": networks.scale_channel("bn2", channel=5),
    "transposed_channel_scaled": networks.scale_channel("bn3", axis=1),
    "gemm_channel_scaled": networks.scale_channel("bn4"),
    "conv_channels_swapped": networks.swap_channels("bn1"),
    "transposed_channels_swapped": networks.swap_channels("bn3", axis=1),
    "conv_bias_dropped": networks.drop_bias("bn2"),
    "gemm_bias_dropped": networks.drop_bias("bn4"),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS)
def test_mutants_are_rejected(mutate: Mutation, dtype: Any, seed: int, certificate: Certify) -> None:
    model = networks.random_network(seed, dtype=dtype)
    folded = networks.fold(model)
    mutate(folded)
    found = certificate(model, folded)
    assert found.verdict == "different"
    assert "another function" in found.sentence


@pytest.mark.parametrize("output", ["bn1", "bn3", "bn4"])
@pytest.mark.parametrize("eps", [1e-3, 0.0])
def test_another_eps_is_rejected(output: str, eps: float, certificate: Certify) -> None:
    model, mutant = networks.random_network(0), networks.random_network(0)
    for node in mutant.graph.node:
        if node.output[0] == output:
            node.attribute[0].f = eps
    assert certificate(model, networks.fold(mutant)).verdict == "different"


@pytest.mark.parametrize("length", ["l", 6], ids=["free", "coincident"])
def test_a_fold_along_the_wrong_axis_is_rejected(length: Any, certificate: Certify) -> None:
    build = Builder(0)
    weight = build.constant("weight", build.generator.normal(size=(4, 6)))
    build.add("MatMul", ["x", weight], "product")
    build.normalization("product", 6, "y")
    model = build.model("y", ["n", 6, 4])
    wrong = ModelProto()
    wrong.CopyFrom(model)
    parameters = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    scale = parameters["y.weight"] / np.sqrt(parameters["y.var"] + 1e-5)
    networks.change(wrong, "weight", lambda values: values * scale)
    shift = parameters["y.bias"] - parameters["y.mean"] * scale
    wrong.graph.initializer.append(numpy_helper.from_array(shift.astype(np.float32), "shift"))
    wrong.graph.node[1].CopyFrom(helper.make_node("Add", ["product", "shift"], ["y"]))
    assert certificate(model, wrong).verdict == "different"


def test_a_wrong_fold_that_no_output_shows_is_found_in_its_region(certificate: Certify) -> None:
    build = Builder(0)
    weight = build.constant("weight", build.generator.normal(size=(4, 3, 1, 1)))
    build.add("Conv", ["x", weight], "conv")
    build.normalization("conv", 4, "norm")
    zero = build.constant("zero", np.zeros((1, 4, 1, 1)))
    build.add("Mul", ["norm", zero], "nothing")
    build.add("GlobalMaxPool", ["x"], "peak")
    build.add("ReduceMax", ["nothing"], "silent", keepdims=0)
    build.add("Add", ["peak", "silent"], "y")
    model = build.model("y", ["n", 3, "h", "w"])
    folded = networks.fold(model)
    assert certificate(model, folded).verdict == "equivalent"
    networks.scale_channel("norm")(folded)
    found = certificate(model, folded)
    assert found.verdict == "different"
    assert [region.output for region in found.regions if not region.equivalent] == ["norm"]
    assert "where Conv -> BatchNormalization became Conv, norm differs" in found.sentence


def test_the_sentence_gives_the_numbers(certificate: Certify) -> None:
    model = networks.random_network(1)
    found = certificate(model, networks.fold(model), count=7)
    assert "computes the same function: over 7 probes" in found.sentence
    assert "Each of 4 rewritten parts" in found.sentence
    assert {probe.seed for probe in found.probes} == set(range(7))
    assert all(0 < probe.error_folded <= probe.bound < 1e-4 for probe in found.probes)
    assert found.original_sha256 == hashlib.sha256(model.SerializeToString()).hexdigest()


def test_a_file_is_equivalent_to_itself(certificate: Certify) -> None:
    model = networks.random_network(2)
    found = certificate(model, model)
    assert found.verdict == "equivalent"
    assert found.regions == ()
    assert all(probe.error_between == probe.error_exact == 0 for probe in found.probes)


@pytest.mark.parametrize(("fixture", "regions"), [("ocr_cls", 35), ("ocr_det", 2)])
def test_real_networks_are_certified_in_seconds(
    fixture: str, regions: int, certificate: Certify, request: pytest.FixtureRequest
) -> None:
    model = onnx.load(request.getfixturevalue(fixture))
    folded = networks.fold(model)
    start = time.monotonic()
    found = certificate(model, folded, threads=2)
    assert found.verdict == "equivalent", found.sentence
    assert len(found.regions) == regions
    assert time.monotonic() - start < 30
    networks.scale_channel(found.regions[0].output)(folded)
    assert certificate(model, folded, threads=2).verdict == "different"


def chain(*nodes: onnx.NodeProto, kind: int = TensorProto.FLOAT, out: int = TensorProto.FLOAT) -> ModelProto:
    inputs = [helper.make_tensor_value_info("x", kind, ["n", 4])]
    outputs = [helper.make_tensor_value_info(nodes[-1].output[0], out, None)]
    graph = helper.make_graph(list(nodes), "graph", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def constant(name: str, values: Any) -> onnx.NodeProto:
    tensor = numpy_helper.from_array(np.asarray(values, dtype=np.float32))
    return helper.make_node("Constant", [], [name], value=tensor)


def test_a_saturated_output_is_judged_before_its_activation(certificate: Certify) -> None:
    def model(shift: float) -> ModelProto:
        return chain(
            constant("shift", [shift]),
            helper.make_node("Add", ["x", "shift"], ["logits"]),
            helper.make_node("Sigmoid", ["logits"], ["y"]),
        )

    found = certificate(model(40.0), model(40.0))
    assert found.verdict == "equivalent"
    assert {probe.output: probe.conclusive for probe in found.probes} == {"y": False, "logits": True}
    assert certificate(model(40.0), model(40.5)).verdict == "different"


def test_an_output_that_never_varies_proves_nothing(certificate: Certify) -> None:
    model = chain(constant("zero", [0.0]), constant("one", [1.0]), *_constant_output())
    found = certificate(model, model)
    assert found.verdict == "inconclusive"
    assert "could tell anything of output y; it varies by less than 0.001" in found.sentence
    assert len(found.probes) > 6
    assert len(found.inconclusive) == len(found.probes)
    assert found.inconclusive[0].startswith("probe of kind random (seed 0), output y: it varies by less")


def _constant_output() -> list[onnx.NodeProto]:
    return [helper.make_node("Mul", ["x", "zero"], ["nothing"]), helper.make_node("Add", ["nothing", "one"], ["y"])]


def test_a_difference_counts_even_where_the_output_never_varies(certificate: Certify) -> None:
    models = [chain(constant("zero", [0.0]), constant("one", [one]), *_constant_output()) for one in (1.0, 1.1)]
    assert certificate(*models).verdict == "different"


def test_integer_outputs_are_compared_by_the_share_that_differs(certificate: Certify) -> None:
    def model(*order: str) -> ModelProto:
        return chain(
            helper.make_node(order[0], ["x"], ["middle"]),
            helper.make_node("ArgMax", ["middle"], ["y"], axis=1),
            out=TensorProto.INT64,
        )

    options = {"has_kept_names": False}
    assert certificate(model("Identity"), model("Sigmoid"), **options).verdict == "equivalent"
    assert certificate(model("Identity"), model("Neg"), **options).verdict == "different"


def test_not_a_number_at_the_same_places_is_equal(certificate: Certify) -> None:
    model = chain(helper.make_node("Log", ["x"], ["y"]))
    assert certificate(model, model).verdict == "equivalent"
    other = chain(helper.make_node("Abs", ["x"], ["positive"]), helper.make_node("Log", ["positive"], ["y"]))
    found = certificate(model, other)
    assert found.verdict == "different"
    assert "NaN or infinite at other places" in found.sentence


def test_an_overflow_of_the_folded_network_alone_is_a_difference(certificate: Certify) -> None:
    model = chain(constant("huge", [3e38]), constant("big", [300.0]), helper.make_node("Mul", ["x", "big"], ["y"]))
    overflow = chain(
        constant("huge", [3e38]),
        constant("big", [300.0]),
        helper.make_node("Mul", ["x", "huge"], ["once"]),
        helper.make_node("Mul", ["once", "big"], ["twice"]),
        helper.make_node("Div", ["twice", "huge"], ["y"]),
    )
    assert certificate(model, overflow).verdict == "different"
    found = certificate(overflow, model)
    assert found.verdict == "inconclusive", "where the original overflows, a probe tells nothing"


INTERFACES: dict[str, tuple[Callable[[ModelProto], None], str]] = {
    "input_name": (lambda model: setattr(model.graph.input[0], "name", "z"), "inputs of the original are x"),
    "output_type": (
        lambda model: setattr(model.graph.output[0].type.tensor_type, "elem_type", TensorProto.DOUBLE),
        "output y of the original is FLOAT, that of the folded is DOUBLE",
    ),
    "input_shape": (
        lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 5),
        r"input x of the original is of shape \[-1, 4\]",
    ),
}


@pytest.mark.parametrize(("edit", "reason"), INTERFACES.values(), ids=INTERFACES)
def test_networks_that_are_not_called_alike_are_different(
    edit: Callable[[ModelProto], None], reason: str, certificate: Certify
) -> None:
    model, other = (chain(helper.make_node("Abs", ["x"], ["y"])) for _ in range(2))
    edit(other)
    found = certificate(model, other)
    assert found.verdict == "different"
    assert re.search(f"not called alike: .*{reason}", found.sentence)
    assert found.probes == ()


def test_free_and_fixed_output_sizes_are_called_alike(certificate: Certify) -> None:
    model, other = (chain(helper.make_node("Abs", ["x"], ["y"])) for _ in range(2))
    other.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "m"]))
    assert certificate(model, other).verdict == "equivalent"


def test_an_original_that_does_not_load_proves_nothing(certificate: Certify) -> None:
    good, bad = chain(helper.make_node("Abs", ["x"], ["y"])), chain(helper.make_node("Nope", ["x"], ["y"]))
    found = certificate(bad, good)
    assert found.verdict == "inconclusive"
    assert "Nope" in found.sentence
    found = certificate(good, bad)
    assert found.verdict == "different"
    assert "cannot be used" in found.sentence


def test_a_folded_network_that_fails_is_different(certificate: Certify) -> None:
    good = chain(helper.make_node("Abs", ["x"], ["y"]))
    bad = chain(
        helper.make_node("Constant", [], ["shape"], value=numpy_helper.from_array(np.array([7, 11]))),
        helper.make_node("Reshape", ["x", "shape"], ["y"]),
    )
    found = certificate(good, bad)
    assert found.verdict == "different"
    assert "fails where the original does not" in found.sentence


def test_another_shape_of_an_output_is_a_difference(certificate: Certify) -> None:
    good = chain(helper.make_node("Abs", ["x"], ["y"]))
    bad = chain(helper.make_node("Abs", ["x"], ["positive"]), helper.make_node("Transpose", ["positive"], ["y"]))
    found = certificate(good, bad)
    assert found.verdict == "different"
    assert "another shape" in found.sentence


def test_an_operator_that_has_no_value_in_float64_is_named(certificate: Certify) -> None:
    model = chain(helper.make_node("RandomNormalLike", ["x"], ["y"]))
    found = certificate(model, model)
    assert found.verdict == "inconclusive"
    assert "RandomNormalLike" in found.sentence


def test_a_network_that_never_ends_proves_nothing(certificate: Certify) -> None:
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["again"], ["go"]), helper.make_node("Neg", ["state"], ["next"])],
        "body",
        [value("i", TensorProto.INT64, []), value("again", TensorProto.BOOL, []), value("state", 1, None)],
        [value("go", TensorProto.BOOL, []), value("next", 1, None)],
    )
    true = numpy_helper.from_array(np.array(True))
    model = chain(
        helper.make_node("Constant", [], ["true"], value=true),
        helper.make_node("Loop", ["", "true", "x"], ["y"], body=body),
    )
    start = time.monotonic()
    found = certificate(model, model, deadline_s=0.3)
    assert time.monotonic() - start < 3
    assert found.verdict == "inconclusive"
    assert "deadline of 0.3 s" in found.sentence


def test_a_passed_deadline_proves_nothing(certificate: Certify) -> None:
    model = networks.random_network(0)
    found = certificate(model, networks.fold(model), deadline_s=0.0)
    assert found.verdict == "inconclusive"
    assert "deadline" in found.sentence


def test_what_is_no_model_is_a_checkpoint_error(tmp_path: Path) -> None:
    path, noise, empty = (tmp_path / name for name in ("model.onnx", "noise.onnx", "empty.onnx"))
    path.write_bytes(networks.random_network(0).SerializeToString())
    noise.write_bytes(b"\xff" * 20)
    empty.write_bytes(b"")
    with pytest.raises(CheckpointError, match="the folded file is no ONNX model"):
        certify(path, noise)
    with pytest.raises(CheckpointError, match="the original file is no ONNX model: it holds no graph"):
        certify(empty, path)


def test_torch_gets_its_threads_back(certificate: Certify) -> None:
    model = chain(helper.make_node("Abs", ["x"], ["y"]))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        certificate(model, model, threads=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
