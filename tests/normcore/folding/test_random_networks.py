"""Random legal networks: whatever folds computes the same, and the plan tells the same as the fold."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto

from normcore.folding.fold import fold_onnx
from normcore.folding.plan import plan_onnx
from tests.normcore.folding.builder import Net, difference, evaluate, noise, operators

SIZES = (2, 11, 7)  # no channel count below is one of these


@st.composite
def layers(draw: st.DrawFn, net: Net, name: str, channels: int) -> tuple[str, int]:
    """One linear operator and what may stand around it."""
    groups = draw(st.sampled_from([1, 1, channels]))
    made = draw(st.sampled_from([3, 4, 5])) * groups
    bias = [net.weight(made)] if draw(st.booleans()) else []
    if draw(st.booleans()):
        name = net.op("Conv", name, net.weight(made, channels // groups, 3, 3), *bias, group=groups, pads=[1, 1, 1, 1])
    else:
        name = net.op(
            "ConvTranspose", name, net.weight(channels, made // groups, 3, 3), *bias, group=groups, pads=[1, 1, 1, 1]
        )
    for step in draw(st.lists(st.sampled_from(["Add", "Relu", "Norm", "Norm", "Twice"]), max_size=4)):
        if step == "Add":
            name = net.op("Add", name, net.weight(*draw(st.sampled_from([(made, 1, 1), (1, made, 1, 1), (1,), (7,)]))))
        elif step == "Norm":
            name = net.norm(name, made)
        elif step == "Twice":
            name = net.op("Add", net.norm(name, made), net.op("Tanh", name))
        else:
            name = net.op(step, name)
    return name, made


@st.composite
def networks(draw: st.DrawFn) -> ModelProto:
    net = Net(seed=draw(st.integers(0, 99)))
    name, channels = "x", 3
    for _ in range(draw(st.integers(1, 3))):
        name, channels = draw(layers(net, net.norm(name, channels) if draw(st.booleans()) else name, channels))
        channels_fit = channels <= 15
        if not channels_fit:
            break
    return net.model({"x": (SIZES[0], 3, *SIZES[1:])}, name)


@given(model=networks())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_fold_equals_unfolded(model: ModelProto) -> None:
    plan = plan_onnx(model)
    folded, entries = fold_onnx(model)
    x = noise(SIZES[0], 3, *SIZES[1:])
    assert difference(evaluate(folded, x=x)[0], evaluate(model, x=x)[0]) < 2e-5
    count = sum(entry.status == "folded" for entry in entries)
    assert plan.foldable == count
    assert [entry.reason for entry in plan.entries] == [entry.reason for entry in entries]
    assert operators(folded).count("BatchNormalization") == len(entries) - count
    assert fold_onnx(folded)[0] == folded
