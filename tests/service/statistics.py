"""Posting batches to statistics, in every encoding."""

import io
import json
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from safetensors import numpy as safetensors

from service.codecs import npz

Array = NDArray[Any]
NPY = {"content-type": "application/x-npy"}


async def created(client: httpx.AsyncClient, num_features: int = 3, **options: Any) -> str:
    """The path of a new resource."""
    answer = await client.post("/v1/statistics", json={"num_features": num_features, **options})
    assert answer.status_code == 201, answer.text
    return str(answer.headers["location"])


def npy(array: Array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def protocol(array: Array, **changes: Any) -> dict[str, Any]:
    """A request in the protocol's binary form, as keywords for a client's post; `changes` go to the one input."""
    datatype = {"f4": "FP32", "f8": "FP64", "b1": "BOOL", "i8": "INT64"}[array.dtype.str[1:]]
    entry = {"name": "input", "shape": list(array.shape), "datatype": datatype}
    entry |= {"parameters": {"binary_data_size": array.nbytes}} | changes
    head = json.dumps({"inputs": [entry]}).encode()
    return {"content": head + array.tobytes(), "headers": {"inference-header-content-length": str(len(head))}}


def encodings(array: Array) -> dict[str, dict[str, Any]]:
    """The same tensor in every encoding, as keywords for a client's post."""
    zipped = b"".join(npz.encode("", {"input": array}, {}).chunks)
    packed = safetensors.save({"input": array})
    return {
        "json": {"json": {"input": array.tolist()}},
        "npy": {"content": npy(array), "headers": NPY},
        "npy fortran": {"content": npy(np.asfortranarray(array)), "headers": NPY},
        "npy big-endian": {"content": npy(array.astype(array.dtype.newbyteorder(">"))), "headers": NPY},
        "npz": {"content": zipped, "headers": {"content-type": npz.MEDIA_TYPE}},
        "safetensors": {"content": packed, "headers": {"content-type": "application/vnd.safetensors"}},
        "protocol": protocol(array),
    }


def pooled(array: Array, channel_axis: int = 1) -> tuple[Array, Array]:
    """Mean and biased variance per channel, in extended precision."""
    axes = tuple(axis for axis in range(array.ndim) if axis != channel_axis % array.ndim)
    wide = array.astype(np.longdouble)
    mean = wide.mean(axes, keepdims=True)
    return mean.reshape(-1).astype(float), ((wide - mean) ** 2).mean(axes).astype(float)
