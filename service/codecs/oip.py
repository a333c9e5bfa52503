"""Requests and responses of the Open Inference Protocol, JSON with or without binary tensors behind it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import orjson

from service import datatypes
from service.codecs import json_pieces, json_tensors, oip_binary
from service.codecs.body import EncodedBody
from service.codecs.buffers import Buffer, check_shape
from service.codecs.json_text import (
    describe,
    expect_list,
    expect_object,
    expect_scalar,
    expect_string,
    parse_object,
    printable,
)
from service.datatypes import Datatype
from service.engine.protocol import Parameters, ParameterValue, Tensor, Tensors
from service.errors import PayloadMalformedError, UnsupportedError

HEADER = "Inference-Header-Content-Length"
# Heads of requests that are kept: the most of them, and bytes of the longest.
_REMEMBERED = 256
_REMEMBERED_BYTES = 2048
_RESERVED_PREFIX = "triton_"
_SHARED_MEMORY = "shared_memory_region"


class RequestedOutput(NamedTuple):
    """An output that the client named, and whether it wants its data behind the JSON."""

    name: str
    is_binary: bool


class InferRequest(NamedTuple):
    """A decoded request. `raw`: a body without JSON, for `oip_binary.decode_raw`; then everything else is empty."""

    id: str
    parameters: dict[str, ParameterValue]
    inputs: dict[str, Tensor]
    outputs: tuple[RequestedOutput, ...] = ()
    wants_binary: bool = False
    raw: Buffer | None = None


@dataclass(frozen=True, slots=True)
class _Head:
    """The JSON of a request, read but for the bytes of its tensors: `inputs` by name, in the order of those bytes."""

    id: str
    parameters: dict[str, ParameterValue]
    inputs: dict[str, "_Place | Tensor"]
    outputs: tuple[RequestedOutput, ...]
    wants_binary: bool


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor behind the JSON."""

    datatype: Datatype
    shape: tuple[int, ...]
    size_bytes: int
    field: str


def decode_request(body: Buffer, header_length: int | str | None) -> InferRequest:
    """Decode a request; tensors are views on the body. `header_length` as the header brought it, None without."""
    json_length = _json_length(header_length, len(body))
    if json_length == 0 and header_length is not None:
        return InferRequest("", {}, {}, wants_binary=True, raw=body)
    text = memoryview(body)[:json_length]
    # Clients send the same JSON before ever new tensors; without tensors behind it, it is seldom the same.
    is_repeated = json_length < len(body) and json_length <= _REMEMBERED_BYTES
    head = _remembered_head(bytes(text)) if is_repeated else json_pieces.decode(text, _head)
    inputs: dict[str, Tensor] = {}
    offset = json_length
    for name, place in head.inputs.items():
        if isinstance(place, _Place):
            inputs[name] = oip_binary.cut(
                body, offset, place.size_bytes, place.datatype, place.shape, field=place.field
            )
            offset += place.size_bytes
        else:
            inputs[name] = place
    if offset != len(body):
        raise PayloadMalformedError(
            f"body: expected {offset} bytes (the JSON and every binary_data_size), received {len(body)}"
        )
    return InferRequest(head.id, head.parameters, inputs, head.outputs, head.wants_binary)


def _head(document: dict[str, object]) -> _Head:
    parameters = _parameters(document.get("parameters"), "parameters")
    for name in parameters:
        if name.startswith(_RESERVED_PREFIX):
            raise PayloadMalformedError(
                f"parameters: names that begin with triton_ are reserved, received {name[:60]!r}"
            )
    wants_binary = _flag(parameters.pop("binary_data_output", False), "parameters.binary_data_output")
    request_id = document.get("id")
    return _Head(
        id="" if request_id is None else expect_string(request_id, field="id"),
        parameters=parameters,
        inputs=_inputs(document),
        outputs=_outputs(document.get("outputs"), wants_binary=wants_binary),
        wants_binary=wants_binary,
    )


@lru_cache(maxsize=_REMEMBERED)
def _remembered_head(text: bytes) -> _Head:
    head = _head(parse_object(text))
    for array in head.inputs.values():
        if not isinstance(array, _Place):
            array.flags.writeable = False  # several requests will share it
    return head


def encode_response(
    model_name: str,
    model_version: str,
    outputs: Tensors,
    *,
    id: str = "",
    parameters: Parameters | None = None,
    requested: tuple[RequestedOutput, ...] = (),
    wants_binary: bool = False,
) -> EncodedBody:
    """Encode the requested outputs in the order of the request, or all; binary ones behind the JSON."""
    selected = requested or [(name, wants_binary) for name in outputs]
    arrays = [(name, _output(outputs, name), is_binary) for name, is_binary in selected]
    binary = [oip_binary.encode(array) for _, array, is_binary in arrays if is_binary]
    texts: Sequence[bytes]
    if len(binary) < len(arrays) or parameters or not arrays:
        texts = _texts(model_name, model_version, arrays, binary, id, parameters)
    else:
        pairs = zip(arrays, binary, strict=True)
        behind = tuple([(name, array.dtype, array.shape, len(chunk)) for (name, array, _), chunk in pairs])
        text = _remembered_text(model_name, model_version, behind)
        texts = [text if not id else b'{"id":' + orjson.dumps(id) + b"," + text[1:]]
    if binary:
        return EncodedBody([*texts, *binary], "application/octet-stream", json_length=sum(map(len, texts)))
    return EncodedBody([*texts], "application/json")


def _texts(
    model_name: str,
    model_version: str,
    arrays: Sequence[tuple[str, Tensor, bool]],
    binary: Sequence[bytes | memoryview],
    id: str,
    parameters: Parameters | None,
) -> Sequence[bytes]:
    document: dict[str, object] = {"id": id} if id else {}
    document |= {"model_name": model_name, "model_version": model_version}
    if parameters:
        document["parameters"] = printable(parameters, are_tokens_bare=True)
    entries: list[dict[str, object]] = []
    writer, chunks = json_tensors.Writer(are_tokens_bare=True), iter(binary)
    for name, array, is_binary in arrays:
        entry = _entry(name, array.dtype, array.shape)
        if is_binary:
            entry["parameters"] = {"binary_data_size": len(next(chunks))}
        else:
            entry["data"] = writer.data(array)
        entries.append(entry)
    return writer.chunks(document | {"outputs": entries})


@lru_cache(maxsize=_REMEMBERED)
def _remembered_text(
    model_name: str, model_version: str, binary: tuple[tuple[str, np.dtype[Any], tuple[int, ...], int], ...]
) -> bytes:
    """The JSON of an answer whose tensors all stand behind it: the same for every request of a shape."""
    entries = [
        _entry(name, dtype, shape) | {"parameters": {"binary_data_size": size_bytes}}
        for name, dtype, shape, size_bytes in binary
    ]
    return orjson.dumps({"model_name": model_name, "model_version": model_version, "outputs": entries})


def _entry(name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> dict[str, object]:
    return {"name": name, "datatype": datatypes.of_numpy(dtype).name, "shape": shape}


def _json_length(header_length: int | str | None, body_length: int) -> int:
    if header_length is None:
        return body_length
    text = str(header_length)
    # int() would also take "1_000", "+3" and digits of other scripts
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise PayloadMalformedError(f"{HEADER}: expected a number of bytes, received {text[:40]!r}")
    length = int(text)
    if length > body_length:
        raise PayloadMalformedError(
            f"{HEADER}: expected at most the {body_length} bytes of the body, received {length}"
        )
    return length


def _parameters(value: object, place: str) -> dict[str, ParameterValue]:
    if value is None:
        return {}
    found = expect_object(value, field=place)
    return {name: expect_scalar(item, field=f"{place}.{name[:60]}") for name, item in found.items()}


def _flag(value: ParameterValue, place: str) -> bool:
    if not isinstance(value, bool):
        raise PayloadMalformedError(f"{place}: expected true or false, received {describe(value)}")
    return value


def _inputs(document: dict[str, object]) -> dict[str, _Place | Tensor]:
    inputs: dict[str, _Place | Tensor] = {}
    for item in expect_list(document.get("inputs"), field="inputs"):
        entry = expect_object(item, field=f"inputs[{len(inputs)}]")
        name = expect_string(entry.get("name"), field=f"inputs[{len(inputs)}].name")
        place = f"input {name[:60]!r}"
        if name in inputs:
            raise PayloadMalformedError(f"{place}: expected once, received twice")
        inputs[name] = _input(entry, place)
    return inputs


def _input(entry: dict[str, object], place: str) -> _Place | Tensor:
    datatype = datatypes.by_name(entry.get("datatype"), field=f"{place}.datatype")
    shape = check_shape(entry.get("shape"), field=f"{place}.shape")
    parameters = _parameters(entry.get("parameters"), f"{place}.parameters")
    if _SHARED_MEMORY in parameters:
        raise UnsupportedError(f"{place}: shared memory is not offered, send data or binary_data_size")
    if ("data" in entry) == ("binary_data_size" in parameters):
        raise PayloadMalformedError(f"{place}: expected exactly one of data and parameters.binary_data_size")
    if "data" in entry:
        return json_tensors.to_array(entry["data"], datatype, shape, field=f"{place}.data")
    size_bytes = parameters["binary_data_size"]
    if type(size_bytes) is not int or size_bytes < 0:
        raise PayloadMalformedError(
            f"{place}.parameters.binary_data_size: expected a number of bytes, received {describe(size_bytes)}"
        )
    return _Place(datatype, shape, size_bytes, place)


def _outputs(value: object, *, wants_binary: bool) -> tuple[RequestedOutput, ...]:
    if value is None:
        return ()
    outputs: dict[str, RequestedOutput] = {}
    for item in expect_list(value, field="outputs"):
        entry = expect_object(item, field=f"outputs[{len(outputs)}]")
        name = expect_string(entry.get("name"), field=f"outputs[{len(outputs)}].name")
        place = f"output {name[:60]!r}"
        if name in outputs:
            raise PayloadMalformedError(f"{place}: expected once, received twice")
        parameters = _parameters(entry.get("parameters"), f"{place}.parameters")
        for refused in ("classification", _SHARED_MEMORY):
            if refused in parameters:
                raise UnsupportedError(f"{place}: the parameter {refused} is not offered")
        is_binary = _flag(parameters.pop("binary_data", wants_binary), f"{place}.parameters.binary_data")
        outputs[name] = RequestedOutput(name, is_binary)
    return tuple(outputs.values())


def _output(outputs: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in outputs:
        raise PayloadMalformedError(f"output {name[:60]!r}: expected one of {', '.join(outputs)}")
    return outputs[name]
