"""A valid request per normalization method, and posting it to both surfaces."""

import math
from typing import Any

import httpx

from service.application.methods import METHODS


def of(values: list[Any], *shape: int, datatype: str = "FP32") -> dict[str, Any]:
    """A tensor of these values, a vector where no shape is given."""
    return {"shape": list(shape or (len(values),)), "datatype": datatype, "data": values}


def ramp(*shape: int, datatype: str = "FP32") -> dict[str, Any]:
    """A tensor that is neither constant nor singular."""
    values = [(7 * index * index + 3 * index) % 11 for index in range(math.prod(shape))]
    is_bool = datatype == "BOOL"
    return {
        "shape": list(shape),
        "datatype": datatype,
        "data": [bool(value % 2) for value in values] if is_bool else values,
    }


ZEROS, ONES = of([0, 0, 0]), of([1, 1, 1])
RUNNING = {"running_mean": ZEROS, "running_var": ONES}
AFFINE = {"weight": ONES, "bias": ZEROS}
BATCH = {"input": ramp(4, 3), **RUNNING, **AFFINE, "training": True}
COUNTED = {"mask": of([True, True, True, False], datatype="BOOL"), "num_batches_tracked": of([3], datatype="INT64")}
IMAGES = ramp(2, 4, 2, 2)
OF_IMAGES = {"weight": of([1, 1, 1, 1]), "bias": of([0, 0, 0, 0]), "grad_output": IMAGES}
MASK_OF_IMAGES = {"mask": of([True, False, True, True], 2, 2, datatype="BOOL")}

# A request per method that is answered, with every tensor that the method takes.
VALID: dict[str, dict[str, Any]] = {
    "batch_norm": BATCH | COUNTED | {"grad_output": ramp(4, 3)},
    "batch_renorm": BATCH | {"mask": COUNTED["mask"], "grad_output": ramp(4, 3)},
    "ghost_batch_norm": BATCH
    | COUNTED
    | {"mask": of([True] * 4, datatype="BOOL"), "grad_output": ramp(4, 3), "virtual_batch_size": 2},
    "synchronized_batch_norm": BATCH
    | {
        "grad_output": ramp(4, 3),
        "shard_sizes": of([1, 3], datatype="INT64"),
        **COUNTED,
    },
    "layer_norm": {
        "input": ramp(2, 4, 3),
        **AFFINE,
        "grad_output": ramp(2, 4, 3),
        "mask": of([True, False, True], datatype="BOOL"),
    },
    "rms_norm": {
        "eps": 1e-5,
        "input": ramp(2, 4, 3),
        "weight": ONES,
        "grad_output": ramp(2, 4, 3),
        "mask": of([True, False, True], datatype="BOOL"),
    },
    "group_norm": {"input": IMAGES, **OF_IMAGES, **MASK_OF_IMAGES, "num_groups": 2},
    "instance_norm": {
        "input": IMAGES,
        **OF_IMAGES,
        **MASK_OF_IMAGES,
        "running_mean": of([0, 0, 0, 0]),
        "running_var": of([1, 1, 1, 1]),
        "training": True,
    },
    "local_response_norm": {"input": IMAGES, "grad_output": IMAGES},
    "lp_norm": {"input": ramp(4, 3), "grad_output": ramp(4, 3)},
    "mean_variance_norm": {"input": IMAGES, "grad_output": IMAGES},
    "weight_norm": {"input": ramp(4, 3), "g": of([1, 2, 3, 4]), "grad_output": ramp(4, 3)},
    "weight_standardization": {"input": ramp(4, 3), "gain": of([1, 2, 3, 4]), "grad_output": ramp(4, 3)},
    "spectral_norm": {"input": ramp(4, 3), "u": of([1, 0, 0, 0]), "v": of([1, 0, 0]), "grad_output": ramp(4, 3)},
    "whitening": {
        "input": ramp(8, 2),
        "running_mean": of([0, 0]),
        "running_covariance": of([1, 0, 0, 1], 1, 2, 2),
        "weight": of([1, 1]),
        "bias": of([0, 0]),
        "num_batches_tracked": of([3], datatype="INT64"),
        "grad_output": ramp(8, 2),
        "training": True,
    },
}
LEAST_RANK = dict.fromkeys(VALID, 2) | dict.fromkeys(
    ("layer_norm", "rms_norm", "lp_norm", "mean_variance_norm", "weight_norm", "spectral_norm"), 1
)


async def post(client: httpx.AsyncClient, method: str, request: dict[str, Any]) -> tuple[httpx.Response, ...]:
    """The answers of /v1 and of /v2 to one request; None stands for a tensor that is not given."""
    tensors = [tensor.name for tensor in METHODS[method].tensors]
    parameters = [parameter.name for parameter in METHODS[method].parameters]
    given = {name: value for name, value in request.items() if value is not None or name in parameters}
    document = {
        "inputs": [{"name": name, **given[name]} for name in tensors if name in given],
        "parameters": {
            name: ",".join(map(str, value)) if isinstance(value, list) else value
            for name, value in given.items()
            if name not in tensors and name != "outputs"
        },
    }
    if "outputs" in given:
        document["outputs"] = [{"name": name} for name in given["outputs"]]
    return (
        await client.post(f"/v1/normalizations/{method}", json=given),
        await client.post(f"/v2/models/normcore.{method}/infer", json=document),
    )
