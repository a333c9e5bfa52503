"""Requests as lines for a shell: what the documentation shows and a reader copies. The tests run every one of them."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlencode

from normcore.normalization import METHODS, Method
from service import datatypes
from service.api.examples import NORMALIZATIONS
from service.application.models import Entry
from service.codecs import json_v1
from service.codecs.body import TensorBody
from service.datatypes import BOOL, BYTES, by_name
from service.engine.normalization import PREFIX
from service.engine.protocol import Tensor, TensorSpec

LOCAL = "http://127.0.0.1:8000"

_MOST_INLINE = 32
_BYTES_PREFIX = 4  # an empty string is its length alone
_ZEROS = {BOOL.name: "false", BYTES.name: '""'}


def infer_lines(entry: Entry, base: str) -> dict[str, str]:
    """Infer requests in JSON and binary: for a method its example, for a checkpoint zeros of a shape that it takes.

    Without a shape known, a free axis is 1.
    """
    url = f"{base.rstrip('/')}/v2/models/{quote(entry.name)}/versions/{entry.version}/infer"
    if entry.record is None:
        return method_infer_lines(entry.name.removeprefix(PREFIX), url)
    shapes = entry.record.shapes or {}
    zeros = [
        (spec, shapes.get(spec.name) or [max(size, 1) for size in spec.shape]) for spec in entry.engine().spec.inputs
    ]
    return {"json": _json_of_zeros(zeros, url), "binary": _binary_of_zeros(zeros, url)}


def method_infer_lines(name: str, url: str) -> dict[str, str]:
    """The example of a method as infer requests."""
    request = _example(METHODS[name])
    document: dict[str, Any] = {"parameters": dict(request.parameters)} if request.parameters else {}
    inputs = [_described(name, tensor) for name, tensor in request.tensors.items()]
    lists = [
        one | {"data": tensor.ravel().tolist()} for one, tensor in zip(inputs, request.tensors.values(), strict=True)
    ]
    raw = [one | _size(tensor.nbytes) for one, tensor in zip(inputs, request.tensors.values(), strict=True)]
    escapes = "".join(f"\\{byte:03o}" for tensor in request.tensors.values() for byte in tensor.tobytes())
    header = _text(document | {"inputs": raw, "parameters": {**request.parameters, "binary_data_output": True}})
    return {
        "json": f"{_post_json(url)} -d {shlex.quote(_text(document | {'inputs': lists}))}",
        "binary": f"{{ printf %s {shlex.quote(header)}; printf '{escapes}'; }} | {_post_binary(url, header)}",
    }


def method_npz_lines(name: str) -> str:
    """The example of a method with numpy's files as bodies; parameters travel in the query string."""
    request = _example(METHODS[name])
    arrays = ", ".join(
        f"{key}=np.array({tensor.ravel().tolist()}, {tensor.dtype.name!r}).reshape{_tuple(tensor.shape)}"
        for key, tensor in request.tensors.items()
    )
    texts = {key: _query_text(value) for key, value in request.parameters.items()}
    query = f"?{urlencode(texts, safe=',')}" if texts else ""
    return (
        f"python3 -c \"import numpy as np; np.savez('input.npz', {arrays})\"\n"
        f"curl -s '{LOCAL}/v1/normalizations/{name}{query}' -H 'Content-Type: application/x-npz' "
        "--data-binary @input.npz -o output.npz"
    )


def block(lines: str) -> str:
    """Lines as a block of a description."""
    return f"\n\n```sh\n{lines}\n```"


def _example(method: Method) -> TensorBody:
    document = {key: value for key, value in NORMALIZATIONS[method.name].items() if key != "outputs"}
    return json_v1.decode(json.dumps(document).encode(), tensor_names=[tensor.name for tensor in method.tensors])


def _json_of_zeros(zeros: Sequence[tuple[TensorSpec, Sequence[int]]], url: str) -> str:
    """Many zeros are written by the shell."""
    pieces, text = [], '{"inputs":['
    for index, (spec, shape) in enumerate(zeros):
        zero, count = _ZEROS.get(spec.datatype, "0"), math.prod(shape)
        opened = _text({"name": spec.name, "datatype": spec.datatype, "shape": list(shape)})[:-1]
        text += f'{"," if index else ""}{opened},"data":['
        if count > _MOST_INLINE:
            pieces += [_printed(text), f"yes {shlex.quote(zero + ',')} | head -n {count - 1} | tr -d '\\n'"]
            text, count = "", 1
        text += ",".join([zero] * count) + "]}"
    pieces.append(_printed(text + "]}"))
    return f"{{ {'; '.join(pieces)}; }} | {_post_json(url)} --data-binary @-"


def _binary_of_zeros(zeros: Sequence[tuple[TensorSpec, Sequence[int]]], url: str) -> str:
    inputs, total = [], 0
    for spec, shape in zeros:
        size = math.prod(shape) * (by_name(spec.datatype).itemsize or _BYTES_PREFIX)
        total += size
        inputs.append({"name": spec.name, "datatype": spec.datatype, "shape": list(shape)} | _size(size))
    header = _text({"inputs": inputs, "parameters": {"binary_data_output": True}})
    return f"{{ {_printed(header)}; head -c {total} /dev/zero; }} | {_post_binary(url, header)}"


def _post_json(url: str) -> str:
    return f"curl -s {shlex.quote(url)} -H 'Content-Type: application/json'"


def _post_binary(url: str, header: str) -> str:
    length = len(header.encode())
    return f"curl -s {shlex.quote(url)} -H 'Inference-Header-Content-Length: {length}' --data-binary @- -o output.bin"


def _described(name: str, tensor: Tensor) -> dict[str, Any]:
    return {"name": name, "datatype": datatypes.of(tensor).name, "shape": list(tensor.shape)}


def _size(size_bytes: int) -> dict[str, Any]:
    return {"parameters": {"binary_data_size": size_bytes}}


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, separators=(",", ":"))


def _printed(text: str) -> str:
    return f"printf %s {shlex.quote(text)}"


def _tuple(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def _query_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
