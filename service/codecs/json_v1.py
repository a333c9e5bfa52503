"""`application/json` on /v1: tensors as nested lists or as objects of shape, datatype and data, among parameters."""

from collections.abc import Collection, Mapping

from service import datatypes
from service.codecs import json_pieces, json_tensors
from service.codecs.body import EncodedBody, TensorBody
from service.codecs.buffers import Buffer, check_shape
from service.codecs.json_text import describe, expect_list, expect_scalar, expect_string, printable
from service.datatypes import BYTES, FP32, FP64, Datatype
from service.engine.protocol import ParameterValue, Tensor, Tensors
from service.errors import PayloadMalformedError

MEDIA_TYPE = "application/json"
ONLY_OUTPUT: str | None = None


def decode(
    body: Buffer,
    /,
    *,
    tensor_names: Collection[str],
    query_parameters: Mapping[str, str] | None = None,
    exact_names: Collection[str] = (),
) -> TensorBody:
    """Decode an object whose fields are tensors, `outputs`, and else parameters; a tensor that is null is absent.

    A plain list takes the datatype of `input`, FP32 if that is a plain list too; a list of booleans is BOOL;
    for the tensors named exact it is FP64. A parameter that is a list of integers becomes the text it has in a query
    string: [2, 3] is "2,3".
    """
    for name in query_parameters or {}:
        raise PayloadMalformedError(f"query parameter {name[:60]!r}: expected as a field of the JSON body")
    return json_pieces.decode(body, lambda document: _decode(document, tensor_names, exact_names))


def _decode(document: dict[str, object], tensor_names: Collection[str], exact_names: Collection[str]) -> TensorBody:
    default = _default_datatype(document.get("input") if "input" in tensor_names else None)
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, ParameterValue] = {}
    outputs: tuple[str, ...] | None = None
    for name, value in document.items():
        if name in tensor_names:
            if value is not None:
                tensors[name] = _tensor(value, FP64 if name in exact_names else default, field=name)
        elif name == "outputs":
            outputs = _outputs(value)
        else:
            parameters[name] = _parameter(value, field=name[:60])
    return TensorBody(tensors, parameters, outputs)


def encode(method: str, outputs: Tensors, diagnostics: Mapping[str, object]) -> EncodedBody:
    """Encode outputs as objects of shape, datatype and flat data; NaN and infinities are strings."""
    writer = json_tensors.Writer(are_tokens_bare=False)
    document = {
        "method": method,
        "outputs": {
            name: {
                "shape": array.shape,
                "datatype": datatypes.of(array).name,
                "data": writer.data(array),
            }
            for name, array in outputs.items()
        },
        "diagnostics": printable(diagnostics, are_tokens_bare=False),
    }
    return EncodedBody([*writer.chunks(document)], MEDIA_TYPE)


def _default_datatype(value: object) -> Datatype:
    return _datatype(value, field="input") if isinstance(value, dict) else FP32


def _datatype(entry: dict[str, object], *, field: str) -> Datatype:
    datatype = datatypes.by_name(entry.get("datatype"), field=f"{field}.datatype")
    if datatype is BYTES:
        raise PayloadMalformedError(f"{field}.datatype: expected a number or BOOL, received BYTES")
    return datatype


def _tensor(value: object, default: Datatype, *, field: str) -> Tensor:
    if not isinstance(value, dict):
        return json_tensors.to_nested_array(value, default, field=field)
    if value.keys() != {"shape", "datatype", "data"}:
        raise PayloadMalformedError(
            f"{field}: expected nested lists or an object of shape, datatype and data, received an object of "
            f"{', '.join(sorted(key[:20] for key in value)[:6]) or 'nothing'}"
        )
    shape = check_shape(value["shape"], field=f"{field}.shape")
    return json_tensors.to_array(value["data"], _datatype(value, field=field), shape, field=f"{field}.data")


def _outputs(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    return tuple(expect_string(name, field="outputs") for name in expect_list(value, field="outputs"))


def _parameter(value: object, *, field: str) -> ParameterValue:
    if not isinstance(value, list):
        return expect_scalar(value, field=field)
    for element in value:
        if type(element) is not int:
            raise PayloadMalformedError(
                f"{field}: expected a list of integers, as no tensor has this name, received {describe(element)} in it"
            )
    return ",".join(map(str, value))
