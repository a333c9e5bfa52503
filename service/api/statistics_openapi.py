"""The documentation of posts to statistics, a plain ASGI route."""

from typing import Any

from normcore.statistics import NAN_POLICIES
from service.api.statistics_schemas import Posted
from service.codecs.media import CODECS

PATH = "/v1/statistics/{statistics_id}/batches"
_JSON = "application/json"
_TENSORS = {
    "input": "Values (N, C, *), with the channels on the resource's axis.",
    "mask": "BOOL, true where a position counts; broadcasts to the input's shape, with or without the channel axis.",
    "count": "Of a worker's own moments: values per channel, one number or (C,).",
    "mean": "Of a worker's own moments: their mean (C,); a plain list is FP64.",
    "m2": "Of a worker's own moments: sum of squared deviations from the mean (C,); a plain list is FP64.",
}
_DESCRIPTION = """Count a batch: the tensor `input` (with `mask`, where tensors have names), or the moments `count`,
`mean` and `m2` of a batch that a worker reduced itself. All of it counts or nothing; what was answered is on the disk.

npy and the protocol's binary form (JSON of one input `input`, its length in `Inference-Header-Content-Length`, then its
bytes) are read as streams of that one tensor in bounded memory, up to NORMSERVE_MAX_STREAM_BYTES. A mask needs an
encoding that names tensors: JSON, npz or safetensors, up to NORMSERVE_MAX_BODY_BYTES. A batch with one value per
channel enters `pooled` only, one without values nothing."""


def operation() -> dict[str, Any]:
    binary = {media: {"schema": {"type": "string", "format": "binary"}} for media in CODECS if media != _JSON}
    binary["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
    properties = {name: {"description": text} for name, text in _TENSORS.items()}
    return {
        "tags": ["statistics"],
        "operationId": "post_batch",
        "summary": "Count a batch",
        "description": _DESCRIPTION,
        "parameters": [
            {
                "name": "statistics_id",
                "in": "path",
                "required": True,
                "schema": {"type": "string"},
            },
            {
                "name": "nan_policy",
                "in": "query",
                "required": False,
                "description": "A batch with values that are not finite: raise refuses it, skip_update leaves it "
                "uncounted, propagate makes its channels NaN for ever.",
                "schema": {"type": "string", "enum": list(NAN_POLICIES), "default": "raise"},
            },
            _header(
                "Idempotency-Key",
                "Name of this post: sent again, it counts once and gets the first answer, for as long as the resource "
                "lives; with another body it is a 409. At most NORMSERVE_MAX_IDEMPOTENCY_KEY_LENGTH characters.",
            ),
            _header("If-Match", "Count only in this state of the resource, named by its ETag; 412 where it moved on."),
            _header("Inference-Header-Content-Length", "Bytes of JSON before the data, in the protocol's binary form.")
            | {"schema": {"type": "integer", "minimum": 0}},
        ],
        "requestBody": {
            "required": True,
            "content": {_JSON: {"schema": {"type": "object", "properties": properties}}} | binary,
        },
        "responses": {
            "200": {
                "description": "The batch is counted, or was before (then the header `Idempotent-Replayed` is true).",
                "content": {_JSON: {"schema": Posted.model_json_schema()}},
            }
        },
    }


def _header(name: str, description: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "header",
        "required": False,
        "description": description,
        "schema": {"type": "string"},
    }
