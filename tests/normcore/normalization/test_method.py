"""The method table: its checks, its description, and that both say what the functions do."""

import inspect
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from normcore.errors import ParameterError, ShapeError
from normcore.normalization import METHODS, Method, Parameter, ParameterValue

BATCH_NORM = METHODS["batch_norm"]
PARAMETERS = {parameter.name: parameter for parameter in BATCH_NORM.parameters}
ORDER = Parameter("p", "str", "2", "", choices=("1", "2", "inf"))
WHOLE = Parameter("size", "int", 5, "", minimum=1, maximum=9)
INTEGERS = Parameter("axes", "ints", "0,2", "", is_nullable=True)
POSITIVE = Parameter("alpha", "float", 1.0, "", minimum=0.0, exclusive_minimum=True)


def _tensors() -> dict[str, torch.Tensor]:
    return {"input": torch.randn(8, 3, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize(
    ("parameter", "text", "value"),
    [
        (PARAMETERS["training"], "true", True),
        (PARAMETERS["training"], "false", False),
        (PARAMETERS["eps"], "1e-3", 1e-3),
        (PARAMETERS["eps"], "0", 0.0),
        (PARAMETERS["eps"], ".5", 0.5),
        (PARAMETERS["momentum"], "null", None),
        (PARAMETERS["momentum"], "1", 1.0),
        (PARAMETERS["convention"], "keras", "keras"),
        (PARAMETERS["channel_axis"], "-1", -1),
        (WHOLE, "9", 9),
        (INTEGERS, "2, -3", "2,-3"),
        (INTEGERS, "null", None),
        (POSITIVE, "1e-300", 1e-300),
    ],
)
def test_parse_reads_query_strings(parameter: Parameter, text: str, value: ParameterValue) -> None:
    parsed = parameter.parse(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("parameter", "text", "message"),
    [
        (PARAMETERS["training"], "yes", r"training: expected true or false, received 'yes' \(str\)"),
        (PARAMETERS["training"], "1", "training"),
        (PARAMETERS["training"], "null", "training"),
        (PARAMETERS["eps"], "null", "eps: expected a finite number >= 0, received 'null'"),
        (PARAMETERS["eps"], "nan", "eps"),
        (PARAMETERS["eps"], "inf", "eps"),
        (PARAMETERS["eps"], "1e999", "eps"),
        (PARAMETERS["eps"], "1_0", "eps"),
        (PARAMETERS["eps"], "", "eps"),
        (PARAMETERS["eps"], "-1", "eps"),
        (PARAMETERS["momentum"], "1.1", "momentum: expected a finite number >= 0 and <= 1, or null, received 1.1"),
        (PARAMETERS["momentum"], "default", "momentum"),
        (PARAMETERS["convention"], "flax", "convention: expected one of torch, onnx, keras, received 'flax'"),
        (PARAMETERS["channel_axis"], "1.0", "channel_axis: expected an integer, received '1.0'"),
        (PARAMETERS["channel_axis"], "9" * 5000, "channel_axis"),
        (WHOLE, "0", "size: expected an integer >= 1 and <= 9, received 0"),
        (WHOLE, "10", "size"),
        (POSITIVE, "0", "alpha: expected a finite number > 0, received 0.0"),
    ],
)
def test_parse_refuses(parameter: Parameter, text: str, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        parameter.parse(text)


@pytest.mark.parametrize(
    ("parameter", "value", "expected"),
    [
        (PARAMETERS["eps"], 1, 1.0),
        (PARAMETERS["momentum"], None, None),
        (PARAMETERS["training"], True, True),
        (PARAMETERS["channel_axis"], -2, -2),
        (INTEGERS, 5, "5"),
        (INTEGERS, -1, "-1"),
        (INTEGERS, "+2,3", "2,3"),
        (INTEGERS, None, None),
        (ORDER, 2, "2"),
        (ORDER, 1.0, "1"),
        (ORDER, math.inf, "inf"),
        (ORDER, "inf", "inf"),
        (PARAMETERS["convention"], "onnx", "onnx"),
    ],
)
def test_check_gives_the_value_in_its_own_type(
    parameter: Parameter, value: ParameterValue, expected: ParameterValue
) -> None:
    checked = parameter.check(value)
    assert checked == expected
    assert type(checked) is type(expected)


@pytest.mark.parametrize("value", [3, 1.5, True, math.nan, -math.inf, 10**400, "2.0"])
def test_check_refuses_a_number_that_is_no_choice(value: ParameterValue) -> None:
    with pytest.raises(ParameterError, match="p: expected one of 1, 2, inf"):
        ORDER.check(value)


@pytest.mark.parametrize(
    "value", [5.0, True, "", "a", "2,", 10**18, pytest.param(10**5000, id="large"), "2;3", [], [1.5]]
)
def test_check_refuses_what_are_no_integers(value: ParameterValue) -> None:
    with pytest.raises(ParameterError, match=r'axes: expected an integer, or integers .* such as "2,3", received '):
        INTEGERS.check(value)


@pytest.mark.parametrize("parameter", [PARAMETERS["eps"], PARAMETERS["convention"], WHOLE, INTEGERS])
@pytest.mark.parametrize("value", ["x" * 10**6, 10**5000], ids=["text", "integer"])
def test_a_message_shows_no_more_than_the_start_of_what_came(parameter: Parameter, value: ParameterValue) -> None:
    with pytest.raises(ParameterError) as raised:
        parameter.check(value)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("training", 1),
        ("training", "true"),
        ("training", None),
        ("eps", True),
        ("eps", "1e-5"),
        ("eps", math.nan),
        ("eps", 10**400),
        ("momentum", "default"),
        ("momentum", False),
        ("channel_axis", 1.0),
        ("channel_axis", True),
        ("convention", 1),
    ],
)
def test_check_refuses_another_type(name: str, value: ParameterValue) -> None:
    with pytest.raises(ParameterError, match=name):
        PARAMETERS[name].check(value)


def test_call_returns_all_outputs_that_apply() -> None:
    result = BATCH_NORM(_tensors(), {"training": True})
    assert list(result.outputs) == ["output", "mean", "var", "invstd"]
    state = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "num_batches_tracked": torch.tensor(0)}
    result = BATCH_NORM(_tensors() | state | {"grad_output": torch.ones(8, 3)}, {"training": True})
    assert list(result.outputs) == [output.name for output in BATCH_NORM.outputs]
    assert result.diagnostics == {}


def test_call_returns_the_outputs_named_and_diagnostics() -> None:
    tensors = {"input": _tensors()["input"][:4]}
    result = BATCH_NORM(tensors, {"training": True}, outputs={"mean", "output"})
    assert list(result.outputs) == ["output", "mean"]
    assert result.diagnostics == {"few_values_per_channel": 4}
    assert BATCH_NORM(tensors, {"training": True}, outputs=[]).outputs == {}


@pytest.mark.parametrize("name", METHODS)
def test_call_computes_no_gradient_that_is_not_asked_for(name: str) -> None:
    given: list[str] = []

    def function(**arguments: object) -> SimpleNamespace:
        given.extend(arguments)
        outputs = dict.fromkeys(output.name for output in METHODS[name].outputs) | {"output": torch.ones(1)}
        return SimpleNamespace(**outputs | {"grad_input": torch.ones(1)}, diagnostics=dict)

    method = replace(METHODS[name], function=function)
    tensors = {tensor.name: torch.ones(2, 3) for tensor in method.tensors}
    assert list(method(tensors, {}, outputs=["output"]).outputs) == ["output"]
    assert "grad_output" not in given
    assert list(method(tensors, {}, outputs=["grad_input"]).outputs) == ["grad_input"]
    assert "grad_output" in given


def test_call_checks_a_gradient_that_is_not_needed() -> None:
    with pytest.raises(ShapeError, match=r"grad_output: expected shape \(8, 3\)"):
        BATCH_NORM(_tensors() | {"grad_output": torch.ones(3)}, {"training": True}, outputs=["output"])


def test_call_leaves_a_momentum_not_given_to_the_convention() -> None:
    state = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "num_batches_tracked": torch.tensor(4)}
    batch_mean = _tensors()["input"].mean(0)

    def weight(**parameters: ParameterValue) -> float:
        updated = BATCH_NORM(_tensors() | state, {"training": True} | parameters).outputs["running_mean"]
        return float((updated / batch_mean).mean())

    assert weight() == pytest.approx(0.1, rel=1e-5)
    assert weight(convention="keras") == pytest.approx(0.01, rel=1e-5)
    assert weight(momentum=None) == pytest.approx(0.2, rel=1e-5)
    assert weight(momentum=1, convention="onnx") == 0.0


def test_call_refuses_names_it_does_not_know() -> None:
    known = "input, running_mean, running_var, weight, bias, grad_output, mask, num_batches_tracked"
    with pytest.raises(ParameterError, match=f"tensors: expected for batch_norm among {known}, received 'gamma'"):
        BATCH_NORM(_tensors() | {"gamma": torch.ones(3)}, {})
    with pytest.raises(ParameterError, match=r"parameters: .*training, momentum, .* received 'epsilon'"):
        BATCH_NORM(_tensors(), {"epsilon": 1e-5})
    with pytest.raises(ParameterError, match=r"outputs: .* received 'y'"):
        BATCH_NORM(_tensors(), {"training": True}, outputs=["y"])


def test_call_refuses_a_missing_input_and_a_wrong_value() -> None:
    with pytest.raises(ParameterError, match=r"input: expected a tensor of shape \(N, C, \*\), received none"):
        BATCH_NORM({}, {})
    with pytest.raises(ParameterError, match="training: expected true or false, received 'true'"):
        BATCH_NORM(_tensors(), {"training": "true"})
    with pytest.raises(ShapeError, match="weight"):
        BATCH_NORM(_tensors() | {"weight": torch.ones(1)}, {"training": True})


def test_call_refuses_an_output_that_does_not_apply_and_says_when_it_does() -> None:
    with pytest.raises(
        ParameterError,
        match=r"outputs: expected outputs that apply to this call \(output, mean, var, invstd\), received "
        "'running_mean': updated running mean; only in training with running statistics",
    ):
        BATCH_NORM(_tensors(), {"training": True}, outputs=["output", "running_mean"])
    with pytest.raises(ParameterError, match=r"'mean': .* none for an empty batch in training"):
        BATCH_NORM({"input": torch.empty(0, 3)}, {"training": True}, outputs=["mean"])


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_description_is_json_and_names_what_the_function_takes(method: Method) -> None:
    description = method.describe()
    assert json.loads(json.dumps(description)) == description
    # What takes the output is for callers in the same process alone.
    keywords = {name: own for name, own in inspect.signature(method.function).parameters.items() if name != "out"}
    described = [tensor.name for tensor in method.tensors] + [parameter.name for parameter in method.parameters]
    assert sorted(described) == sorted(keywords)
    for parameter in method.parameters:
        # The function's own default for momentum is that of the convention, which no single value describes.
        if parameter.name != "momentum":
            assert keywords[parameter.name].default == parameter.default
        assert parameter.check(parameter.default) == parameter.default
