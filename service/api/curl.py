"""Requests as lines for a shell: what the documentation shows and a reader copies. The tests run every one of them."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np

from normcore.normalization import METHODS, Method
from service import datatypes
from service.api.examples import BATCH, BATCHES, CHECKPOINT, INFER, MODEL, NORMALIZATIONS, STATISTICS
from service.application.models import Entry
from service.codecs import json_v1, npy, npz, safetensors
from service.codecs.body import TensorBody
from service.datatypes import BOOL, BYTES, by_name
from service.engine.normalization import PREFIX
from service.engine.protocol import Tensor, Tensors, TensorSpec

LOCAL = "http://127.0.0.1:8000"

_MOST_INLINE = 32
_BYTES_PREFIX = 4  # an empty string is its length alone
_MEDIA_TYPES = {"npz": npz.MEDIA_TYPE, "safetensors": safetensors.MEDIA_TYPE, "npy": npy.MEDIA_TYPE}
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
    lists = [_described(name, tensor) | {"data": tensor.ravel().tolist()} for name, tensor in request.tensors.items()]
    return {
        "json": f"{_post_json(url)} -d {shlex.quote(_text(document | {'inputs': lists}))}",
        "binary": _binary(request.tensors, url, parameters={**request.parameters, "binary_data_output": True}),
    }


def method_file_lines(name: str) -> str:
    """The example of a method in each binary encoding; parameters travel in the query string."""
    request, method = _example(METHODS[name]), METHODS[name]
    texts = {key: _query_text(value) for key, value in request.parameters.items()}
    query = f"?{urlencode(texts, safe=',')}" if texts else ""
    url = f"{LOCAL}/v1/normalizations/{name}{query}"
    return _files(request.tensors, url, suffixes=_suffixes(method), writes_output=True)


def story_lines() -> dict[str, str]:
    """The requests of the story that carry tensors, in their binary encodings, by operation."""
    statistics = f"{LOCAL}/v1/statistics/{STATISTICS}/batches"
    batch = _decoded(BATCH, ("input", "mask"))
    batches = _decoded(BATCHES, tuple(BATCHES))
    checkpoint = f"{LOCAL}/v1/checkpoints/{CHECKPOINT}"
    inputs = {spec["name"]: np.array(spec["data"], np.float32).reshape(spec["shape"]) for spec in INFER["inputs"]}
    return {
        "post_batch": _files(batch, statistics) + "\n" + _binary({"input": batch["input"]}, statistics, output=""),
        "measure_drift": _files(batches, f"{checkpoint}/drift?threshold=0.5"),
        "recalibrate_checkpoint": _files(batches, f"{checkpoint}/recalibrate"),
        "infer_version": _binary(
            inputs, f"{LOCAL}/v2/models/{MODEL}/versions/1/infer", parameters={"binary_data_output": True}
        ),
    }


def file_media_types(method: Method) -> list[str]:
    """The binary encodings that can hold a call of the method: a .npy file holds one tensor."""
    return [_MEDIA_TYPES[suffix] for suffix in _suffixes(method)]


def _suffixes(method: Method) -> list[str]:
    needed = [tensor.name for tensor in method.tensors if tensor.is_required]
    return [suffix for suffix in _MEDIA_TYPES if suffix != "npy" or needed == ["input"]]


def block(lines: str) -> str:
    """Lines as a block of a description."""
    return f"\n\n```sh\n{lines}\n```"


def _example(method: Method) -> TensorBody:
    document = {key: value for key, value in NORMALIZATIONS[method.name].items() if key != "outputs"}
    return json_v1.decode(json.dumps(document).encode(), tensor_names=[tensor.name for tensor in method.tensors])


def _decoded(document: Mapping[str, Any], names: Sequence[str]) -> Tensors:
    return json_v1.decode(json.dumps(document).encode(), tensor_names=names).tensors


def _files(
    tensors: Tensors, url: str, *, suffixes: Sequence[str] = tuple(_MEDIA_TYPES), writes_output: bool = False
) -> str:
    """Write tensors into a file of each encoding and post them; a .npy file holds the first."""
    arrays = ", ".join(
        f"{key!r}: np.array({tensor.ravel().tolist()}, {tensor.dtype.name!r}).reshape{_tuple(tensor.shape)}"
        for key, tensor in tensors.items()
    )
    script = (
        "import numpy as np; from safetensors.numpy import save_file; "
        f"tensors = {{{arrays}}}; save_file(tensors, 'input.safetensors'); np.savez('input.npz', **tensors)"
    )
    if "npy" in suffixes:
        script += f"; np.save('input.npy', tensors[{next(iter(tensors))!r}])"
    posts = [
        f"curl -s '{url}' -H 'Content-Type: {_MEDIA_TYPES[suffix]}' --data-binary @input.{suffix}"
        + (f" -o output.{suffix}" if writes_output else "")
        for suffix in suffixes
    ]
    return "\n".join([f'python3 -c "{script}"', *posts])


def _binary(
    tensors: Tensors, url: str, *, parameters: Mapping[str, Any] | None = None, output: str = " -o output.bin"
) -> str:
    """The protocol's binary form: JSON, then the bytes of the tensors."""
    raw = [_described(name, tensor) | _size(tensor.nbytes) for name, tensor in tensors.items()]
    header = _text({"inputs": raw} | ({"parameters": dict(parameters)} if parameters else {}))
    escapes = "".join(f"\\{byte:03o}" for tensor in tensors.values() for byte in tensor.tobytes())
    return f"{{ printf %s {shlex.quote(header)}; printf '{escapes}'; }} | {_post_binary(url, header, output=output)}"


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


def _post_binary(url: str, header: str, *, output: str = " -o output.bin") -> str:
    length = len(header.encode())
    return f"curl -s {shlex.quote(url)} -H 'Inference-Header-Content-Length: {length}' --data-binary @-{output}"


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
