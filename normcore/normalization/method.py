"""What a normalization method takes and gives, in a form that describes it to people and checks its callers."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Literal, Protocol, TypeAlias

from torch import Tensor

from normcore._checks import INTEGERS_RULE, check_integers, check_shape, shown
from normcore.errors import ParameterError

ParameterValue = str | bool | int | float | None
JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

_RULES = {
    "bool": "true or false",
    "int": "an integer",
    "ints": INTEGERS_RULE,
    "float": "a finite number",
    "str": "a name",
}
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class TensorArgument:
    """A tensor that a method takes; its shape is a rule in words, such as (N, C, *)."""

    name: str
    role: str
    shape: str
    is_required: bool = False


@dataclass(frozen=True, slots=True)
class Parameter:
    """A scalar that a method takes. A caller who gives none gets the default; None is a value of its own.

    Attributes:
        kind: ints are integers as a text such as "2,3", or a single integer.
    """

    name: str
    kind: Literal["bool", "int", "ints", "float", "str"]
    default: ParameterValue
    description: str
    is_nullable: bool = False
    minimum: float | None = None
    maximum: float | None = None
    exclusive_minimum: bool = False
    choices: tuple[str, ...] = ()

    def parse(self, text: str) -> ParameterValue:
        """The value that a text of a query string stands for: true, false, a number, a name, or null.

        Raises:
            ParameterError: the text stands for no value of this parameter.

        >>> Parameter("eps", "float", 1e-5, "", minimum=0.0).parse("1e-3")
        0.001
        """
        if self.is_nullable and text == "null":
            return None
        if self.kind in ("str", "ints"):
            return self.check(text)
        if self.kind == "bool" and text in ("true", "false"):
            return text == "true"
        if self.kind == "int" and _INTEGER.fullmatch(text) and len(text) < 20:
            return self.check(int(text))
        if self.kind == "float" and _NUMBER.fullmatch(text):
            return self.check(float(text))
        raise self._refusal(text)

    def check(self, value: ParameterValue) -> ParameterValue:
        """The value in the parameter's own type: an integer serves as a float, a bool never as a number.

        A number whose text is among the choices stands for that choice.

        Raises:
            ParameterError: another type, a number out of bounds or not finite, or none of the choices.
        """
        if value is None:
            if self.is_nullable:
                return None
            raise self._refusal(value)
        if self.kind == "ints":
            return ",".join(map(str, check_integers(self.name, value)))
        if not isinstance(value, bool | str):
            value = next((choice for choice in self.choices if _is_text_of(value, choice)), value)
        if isinstance(value, bool | str):
            is_expected = self.kind == type(value).__name__ and (not self.choices or value in self.choices)
        else:
            is_expected = (self.kind == "float" or type(value).__name__ == self.kind) and self._is_within_bounds(value)
        if not is_expected:
            raise self._refusal(value)
        return float(value) if self.kind == "float" else value

    def _is_within_bounds(self, value: float) -> bool:
        try:
            number = float(value)
        except OverflowError:
            return False
        if not math.isfinite(number) or (self.maximum is not None and number > self.maximum):
            return False
        if self.minimum is None:
            return True
        return number > self.minimum if self.exclusive_minimum else number >= self.minimum

    def _refusal(self, value: ParameterValue) -> ParameterError:
        received = "null" if value is None else f"{shown(value)} ({type(value).__name__})"
        return ParameterError(self.name, expected=self._rule(), received=received)

    def _rule(self) -> str:
        rule = _RULES[self.kind]
        if self.choices:
            rule = f"one of {', '.join(self.choices)}"
        if self.minimum is not None:
            rule += f" {'>' if self.exclusive_minimum else '>='} {self.minimum:g}"
        if self.maximum is not None:
            rule += f"{' and' if self.minimum is not None else ''} <= {self.maximum:g}"
        return f"{rule}, or null" if self.is_nullable else rule


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor that a method gives; the description says when it applies."""

    name: str
    shape: str
    description: str


@dataclass(frozen=True, slots=True)
class MethodResult:
    """The outputs asked for, and what makes them questionable."""

    outputs: dict[str, Tensor]
    diagnostics: dict[str, JSON]


class FunctionResult(Protocol):
    """What a method's function returns: an attribute per output, None where it does not apply, and diagnostics."""

    def diagnostics(self) -> dict[str, JSON]: ...


@dataclass(frozen=True, slots=True)
class Method:
    """A normalization method: its description, and a call that checks against it.

    Attributes:
        formula: what it computes.
        source: where the formula comes from.
        function: takes the tensors and parameters as keywords, under the names of the description.
    """

    name: str
    summary: str
    formula: str
    source: str
    tensors: tuple[TensorArgument, ...]
    parameters: tuple[Parameter, ...]
    outputs: tuple[Output, ...]
    function: Callable[..., FunctionResult]

    def __call__(
        self,
        tensors: Mapping[str, Tensor],
        parameters: Mapping[str, ParameterValue],
        outputs: Collection[str] | None = None,
    ) -> MethodResult:
        """Check everything, compute, and return the outputs named, or all that apply.

        A parameter that is not in the mapping takes its default. Where outputs are named and no gradient is among them,
        none is computed.

        Raises:
            ParameterError: an unknown tensor, parameter or output, a required tensor that is missing, a value that
                does not fit its parameter, or an output that does not apply to this call.
            NormcoreError: whatever the method itself refuses.
        """
        self._check_names("tensors", tensors, [tensor.name for tensor in self.tensors])
        self._check_names("outputs", outputs or (), [output.name for output in self.outputs])
        for tensor in self.tensors:
            if tensor.is_required and tensor.name not in tensors:
                raise ParameterError(tensor.name, expected=f"a tensor of shape {tensor.shape}", received="none")
        values = self.check_parameters(parameters)
        return self._select(self.function(**self._needed(tensors, outputs), **values), outputs)

    def check_parameters(self, parameters: Mapping[str, ParameterValue]) -> dict[str, ParameterValue]:
        """The parameters in their own types; those not given stay absent.

        Raises:
            ParameterError: an unknown parameter, or a value that does not fit.
        """
        known = {parameter.name: parameter for parameter in self.parameters}
        self._check_names("parameters", parameters, known)
        return {name: known[name].check(value) for name, value in parameters.items()}

    def describe(self) -> dict[str, JSON]:
        """The description as JSON, all but the function."""
        return {
            "name": self.name,
            "summary": self.summary,
            "formula": self.formula,
            "source": self.source,
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "parameters": [asdict(parameter) | {"choices": list(parameter.choices)} for parameter in self.parameters],
            "outputs": [asdict(output) for output in self.outputs],
        }

    def _check_names(self, argument: str, given: Collection[str], known: Collection[str]) -> None:
        for name in given:
            if name not in known:
                expected = f"for {self.name} among {', '.join(known)}"
                raise ParameterError(argument, expected=expected, received=repr(name[:60]))

    def _needed(self, tensors: Mapping[str, Tensor], outputs: Collection[str] | None) -> Mapping[str, Tensor]:
        """The tensors without the output's gradient where no gradient is asked for."""
        if outputs is None or "grad_output" not in tensors or any(name.startswith("grad_") for name in outputs):
            return tensors
        check_shape("grad_output", tensors["grad_output"], tensors["input"].shape, meaning="that of the input")
        return {name: tensor for name, tensor in tensors.items() if name != "grad_output"}

    def _select(self, result: FunctionResult, outputs: Collection[str] | None) -> MethodResult:
        asked = [output for output in self.outputs if outputs is None or output.name in outputs]
        found: dict[str, Tensor | None] = {output.name: getattr(result, output.name) for output in asked}
        selected = {name: tensor for name, tensor in found.items() if tensor is not None}
        if outputs is not None and len(selected) < len(asked):
            applicable = (output.name for output in self.outputs if getattr(result, output.name) is not None)
            missing = next(output for output in asked if output.name not in selected)
            expected = f"outputs that apply to this call ({', '.join(applicable)})"
            raise ParameterError("outputs", expected=expected, received=f"{missing.name!r}: {missing.description}")
        return MethodResult(selected, result.diagnostics())


def _is_text_of(number: float, text: str) -> bool:
    return (text == "inf" or _NUMBER.fullmatch(text) is not None) and float(text) == number
