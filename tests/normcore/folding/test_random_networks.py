"""Random legal networks: whatever folds computes the same, and the plan tells the same as the fold."""

from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto

from normcore.folding.fold import fold_onnx
from normcore.folding.onnx.options import FoldOptions
from normcore.folding.plan import plan_onnx
from normcore.folding.reference import Reference
from tests.normcore.folding.builder import Net, difference, evaluate, noise, operators

SIZES = (2, 11, 7)  # no channel count below is one of these
PADS = [0, 0, 1, 0, 0, 0, 0, 1]
STEPS: dict[str, dict[str, Any]] = {
    "Relu": {},
    "LeakyRelu": {"alpha": 0.3},
    "Tanh": {},
    "Identity": {},
    "Dropout": {},
    "AveragePool": {"kernel_shape": [2, 2], "pads": [1, 1, 0, 0]},
    "MaxPool": {"kernel_shape": [2, 2], "pads": [1, 1, 0, 0]},
    "CountingPool": {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1},
    "Transpose": {},
    "Reshape": {},
    "Slice": {},
    "ReflectPad": {},
    "ZeroPad": {},
    "Resize": {},
}


def weight(net: Net, *shape: int) -> str:
    """Of a size that neither saturates nor amplifies rounding."""
    return net.weight(*shape, scale=float(np.prod(shape[1:])) ** -0.5)


def channel_shapes(channels: int) -> list[tuple[int, ...]]:
    return [(channels, 1, 1), (1, channels, 1, 1), (1,), ()]


@st.composite
def linear(draw: st.DrawFn, net: Net, name: str, channels: int) -> tuple[str, int]:
    """A convolution, or a product over the channels behind a transpose."""
    kind = draw(st.sampled_from(["Conv", "Conv", "ConvTranspose", "MatMul"]))
    groups = draw(st.sampled_from([1, 1, channels])) if kind != "MatMul" else 1
    made = draw(st.sampled_from([3, 4, 5])) * groups
    bias = [net.weight(made)] if draw(st.booleans()) else []
    size = draw(st.sampled_from([1, 3]))
    half = size // 2
    pads: dict[str, Any] = {"pads": draw(st.sampled_from([[half] * 4, [half] * 4, [size - 1, 0, half, half]]))}
    if kind == "Conv":
        kernel = weight(net, made, channels // groups, size, size)
        return net.op("Conv", name, kernel, *bias, group=groups, **pads), made
    if kind == "ConvTranspose":
        kernel = weight(net, channels, made // groups, size, size)
        return net.op("ConvTranspose", name, kernel, *bias, group=groups, pads=[size // 2] * 4), made
    product = net.op("MatMul", net.op("Transpose", name, perm=[0, 2, 3, 1]), weight(net, channels, made))
    product = net.op("Add", product, bias[0]) if bias else product
    return net.op("Transpose", product, perm=[0, 3, 1, 2]), made


@st.composite
def between(draw: st.DrawFn, net: Net, name: str, channels: int) -> tuple[str, int]:
    """What may stand between linear operators: norms, constants, views, pools, joins."""
    step = draw(
        st.sampled_from(["Norm", "Norm", "Norm", "Constant", "Constant", "Twice", "Concat", "Branches", *STEPS])
    )
    if step == "Norm":
        return net.norm(name, channels), channels
    if step == "Constant":
        operands = [name, net.weight(*draw(st.sampled_from(channel_shapes(channels))))]
        operator = draw(st.sampled_from(["Mul", "Add", "Sub"]))
        return net.op(operator, *(operands[::-1] if draw(st.booleans()) else operands)), channels
    if step == "Twice":
        return net.op("Add", net.norm(name, channels), net.op("Tanh", name)), channels
    if step in ("Concat", "Branches"):
        parts = [net.op("Conv", name, weight(net, channels, channels, 1, 1)) for _ in range(2)]
        parts[0] = net.norm(parts[0], channels) if draw(st.booleans()) else parts[0]
        if step == "Branches":
            return net.op(draw(st.sampled_from(["Add", "Sub"])), *parts), channels
        return net.op("Concat", *parts, axis=1), 2 * channels
    return special(net, step, name), channels


def special(net: Net, step: str, name: str) -> str:
    def ints(*values: int) -> str:
        return net.constant(np.array(values, np.int64))

    if step == "Transpose":
        return net.op("Transpose", net.op("Transpose", name, perm=[2, 0, 1, 3]), perm=[1, 2, 0, 3])
    if step == "Reshape":
        return net.op("Squeeze", net.op("Unsqueeze", name, ints(0)), ints(0))
    if step == "Slice":
        return net.op("Slice", name, ints(1), ints(2**40), ints(-1))
    if step in ("ReflectPad", "ZeroPad"):
        return net.op("Pad", name, ints(*PADS), mode="edge" if step == "ReflectPad" else "constant")
    if step == "Resize":
        return net.op("Resize", name, "", net.constant(np.array([1, 1, 1, 1.5], np.float32)), mode="linear")
    operator = "AveragePool" if step == "CountingPool" else step
    return net.op(operator, name, **STEPS[step])


@st.composite
def networks(draw: st.DrawFn, dtype: Any) -> ModelProto:
    net = Net(seed=draw(st.integers(0, 99)), dtype=dtype)
    name, channels = "x", 3
    for _ in range(draw(st.integers(1, 3))):
        for _ in range(draw(st.integers(0, 4))):
            name, channels = draw(between(net, name, channels))
        name, channels = draw(linear(net, name, channels))
        for _ in range(draw(st.integers(0, 4))):
            name, channels = draw(between(net, name, channels))
        if channels > 15:
            break
    return net.model({"x": (SIZES[0], 3, *SIZES[1:])}, name)


OPTIONS = st.fixed_dictionaries(
    {
        "zero_padding": st.sampled_from(["auto", "pad", "map", "refuse"]),
        "cross_activations": st.booleans(),
        "affine": st.booleans(),
        "move_gains": st.booleans(),
    }
)


SETTINGS = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@given(model=networks(np.float64), options=OPTIONS)
@settings(SETTINGS, max_examples=60)
def test_fold_equals_unfolded_where_rounding_hides_nothing(model: ModelProto, options: FoldOptions) -> None:
    """With weights in double precision a right fold is right to twelve digits, however ill-conditioned the network."""
    plan = plan_onnx(model, **options)
    folded, entries = fold_onnx(model, **options)
    x = noise(SIZES[0], 3, *SIZES[1:]).astype(np.float64)
    exact, expected = (next(iter(Reference(each).run({"x": x}).values())) for each in (folded, model))
    assert difference(exact, expected) < 1e-9
    assert [entry.reason for entry in plan.entries] == [entry.reason for entry in entries]
    assert plan.foldable == sum(entry.status == "folded" for entry in entries)
    kept = [entry for entry in entries if entry.status == "kept" and entry.operator == "BatchNormalization"]
    assert operators(folded).count("BatchNormalization") == len(kept)
    if not options["affine"] and options["zero_padding"] not in ("pad", "map"):
        assert len(folded.graph.node) <= len(model.graph.node)
        assert fold_onnx(folded, **options)[0] == folded


@given(model=networks(np.float32), options=OPTIONS)
@settings(SETTINGS, max_examples=40)
def test_fold_runs_and_agrees_in_onnxruntime(model: ModelProto, options: FoldOptions) -> None:
    folded, _ = fold_onnx(model, **options)
    x = noise(SIZES[0], 3, *SIZES[1:])
    assert difference(evaluate(folded, x=x)[0], evaluate(model, x=x)[0]) < 1e-3
