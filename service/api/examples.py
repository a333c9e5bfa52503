"""The requests that the documentation shows: one story, which a test runs from the first to the last.

`answers.json` beside this file holds what the service answers; `python -m tests.service.api.story` writes it anew.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

_ROWS = [[1, 2], [3, 4], [5, 9]]
_IMAGES = {"shape": [2, 4, 3], "datatype": "FP32", "data": [value * value % 7 for value in range(24)]}
_ONES = {"shape": [2, 4, 3], "datatype": "FP32", "data": [1, 0, 0] * 8}
_FILTERS = [[[1, 2], [0, 1]], [[3, 1], [2, 2]], [[0, 1], [5, 4]]]

NORMALIZATIONS: dict[str, dict[str, Any]] = {
    "batch_norm": {
        "input": _ROWS,
        "training": True,
        "eps": 1e-5,
        "momentum": 0.1,
        "running_mean": [0, 0],
        "running_var": [1, 1],
        "outputs": ["output", "mean", "var", "running_mean", "running_var"],
    },
    "layer_norm": {"input": _IMAGES, "normalized_shape": [3], "weight": [1, 2, 3], "grad_output": _ONES},
    "rms_norm": {"input": _IMAGES, "normalized_shape": [4, 3], "eps": 1e-6, "outputs": ["output", "invstd"]},
    "group_norm": {"input": _IMAGES, "num_groups": 2, "bias": [0, 1, 0, 1]},
    "instance_norm": {"input": _IMAGES, "eps": 1e-5, "outputs": ["output"]},
    "local_response_norm": {"input": _IMAGES, "size": 3, "alpha": 1e-4, "beta": 0.75, "k": 1, "window": "torch"},
    "lp_norm": {"input": _ROWS, "p": 2, "axis": 1, "eps": 1e-12},
    "mean_variance_norm": {"input": _IMAGES, "axes": [0, 2]},
    "weight_norm": {"input": _FILTERS, "g": [1, 2, 3], "axis": 0},
    "weight_standardization": {"input": _FILTERS, "gain": [1, 1, 2]},
    "spectral_norm": {"input": [[3, 0], [0, 1]], "exact": True},
    "whitening": {"input": [[1, 2], [3, 5], [5, 1], [0, 3]], "mode": "zca", "training": True},
    "batch_renorm": {
        "input": _ROWS,
        "training": True,
        "running_mean": [1, 2],
        "running_var": [4, 4],
        "rmax": 3,
        "dmax": 5,
    },
    "ghost_batch_norm": {"input": [[1, 2], [3, 4], [5, 9], [2, 2]], "training": True, "virtual_batch_size": 2},
    "synchronized_batch_norm": {
        "input": _ROWS,
        "shard_sizes": {"shape": [2], "datatype": "INT64", "data": [1, 2]},
        "training": True,
    },
}

# A convolution of kernel 1 and a batch norm: x (N, 2, L) to y (N, 2, L).
NETWORK = (
    "CAg68wEKDwoBeAoBdxIBYyIEQ29udgo5CgFjCgFnCgFiCgFtCgF2EgF5IhJCYXRjaE5vcm1hbGl6YXRpb24qEQoHZXBzaWxvbhVvEoM6oAEBEgR0"
    "aW55Kh0IAggCCAEQAUIBd0oQAACAPwAAAEAAAIC/AACAPyoRCAIQAUIBZ0oIAACAPwAAAEAqEQgCEAFCAWJKCAAAAAAAAIA/KhEIAhABQgFtSggA"
    "AEBAAAAAACoRCAIQAUIBdkoIAACAQAAAgD9aGQoBeBIUChIIARIOCgMSAU4KAggCCgMSAUxiGQoBeRIUChIIARIOCgMSAU4KAggCCgMSAUxCBAoA"
    "EBE="
)
BATCH: dict[str, Any] = {"input": _ROWS, "mask": [True, True, False]}
BATCHES = {"x.0": [[[1, 2, 3], [3, 5, 1]], [[4, 4, 9], [0, 2, 6]]], "x.1": [[[0, 2, 2], [1, 7, 5]]]}
INFER: dict[str, Any] = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2, 3], "data": [1, 2, 3, 3, 5, 1]}]}

# Where the service makes an id up, the documentation shows one of these.
CHECKPOINT = hashlib.sha256(base64.b64decode(NETWORK)).hexdigest()
STATISTICS = "7d1f0c86a5b34e2f9c40d2a8e61b9357"
_OTHER_STATISTICS = "c2a9e41b70d84f63b5e8130f6a7dc924"
_FROZEN = "0be57d93f1424c6a8e29c7b4053fad18"
_MERGED = "94c6a0f27e5b4d1ba3782e90cd16f5b3"
_FOLDED = "f01ded0000000000000000000000000000000000000000000000000000000001"
_RECALIBRATED = "ca1b7a7ed0000000000000000000000000000000000000000000000000000001"
_JOB = "3f8b25d7c06a49e1b7d4902ce5f1a68d"

MODEL = "tiny"
_NAME = {"name": MODEL}
_VERSION = {"name": MODEL, "version": 1}
_OF_CHECKPOINT = {"checkpoint_id": CHECKPOINT}
_OF_STATISTICS = {"statistics_id": STATISTICS}


@dataclass(frozen=True)
class Exchange:
    """A request, and the status of its answer.

    Attributes:
        operation: the operationId.
        body: a JSON document, or the bytes of a file.
        values: parameters by name, wherever they travel.
        makes: the id that the documentation shows for what this creates.
    """

    operation: str
    body: Any = None
    values: Mapping[str, object] = field(default_factory=dict)
    status: int = 200
    makes: str | None = None


_COMPUTE = (
    Exchange("is_live"),
    Exchange("is_ready"),
    Exchange("read_server_metadata"),
    Exchange("read_info"),
    Exchange("list_methods"),
    Exchange("describe_method", values={"method": "lp_norm"}),
    *(Exchange(f"normalize_{name}", body) for name, body in NORMALIZATIONS.items()),
    Exchange(
        "infer",
        {
            "id": "1",
            "inputs": [{"name": "input", "datatype": "FP32", "shape": [3, 2], "data": [1, 2, 3, 4, 5, 9]}],
            "outputs": [{"name": "output"}],
            "parameters": {"training": True},
        },
        {"name": "normcore.batch_norm"},
    ),
)
_COLLECT = (
    Exchange(
        "create_statistics",
        {"name": "stem", "num_features": 2, "momentum": 0.1, "convention": "torch"},
        status=201,
        makes=STATISTICS,
    ),
    Exchange("create_statistics", {"num_features": 2}, status=201, makes=_OTHER_STATISTICS),
    Exchange("post_batch", BATCH, _OF_STATISTICS),
    Exchange("list_statistics"),
    Exchange("read_statistics", values=_OF_STATISTICS),
    Exchange("read_histogram", values=_OF_STATISTICS | {"bins": 4, "channel": 0}),
    Exchange("freeze_statistics", values=_OF_STATISTICS, status=201, makes=_FROZEN),
    Exchange("merge_statistics", {"ids": [STATISTICS, _OTHER_STATISTICS]}, status=201, makes=_MERGED),
)
_FOLD = (
    Exchange("upload_checkpoint", base64.b64decode(NETWORK), {"filename": "model.onnx"}, 201, CHECKPOINT),
    Exchange("list_checkpoints"),
    Exchange("read_checkpoint", values=_OF_CHECKPOINT),
    Exchange("download_checkpoint", values=_OF_CHECKPOINT),
    Exchange("plan_fold", values=_OF_CHECKPOINT),
    Exchange("fold_checkpoint", {"verify": {"probes": 6, "seed": 0}}, _OF_CHECKPOINT, 201, _FOLDED),
    Exchange("read_report", values={"checkpoint_id": _FOLDED}),
    Exchange("compare_checkpoints", {"probes": 6, "seed": 0}, _OF_CHECKPOINT | {"other_id": _FOLDED}),
    Exchange("fold_file", base64.b64decode(NETWORK)),
    Exchange("measure_drift", BATCHES, _OF_CHECKPOINT | {"threshold": 0.5}),
    Exchange("recalibrate_checkpoint", BATCHES, _OF_CHECKPOINT, 201, _RECALIBRATED),
    Exchange("fold_checkpoint", {}, _OF_CHECKPOINT | {"prefer": "respond-async"}, 202, _JOB),
    Exchange("read_job", values={"job_id": _JOB}),
    Exchange("list_jobs"),
    Exchange("delete_job", values={"job_id": _JOB}),
)
_SERVE = (
    Exchange("serve_model", {"name": MODEL, "checkpoint": CHECKPOINT, "fold": True}, status=201),
    Exchange("list_models"),
    Exchange("read_model", values=_NAME),
    Exchange("list_ready_models"),
    Exchange("is_model_ready", values=_NAME),
    Exchange("is_model_ready_version", values=_VERSION),
    Exchange("read_model_metadata", values=_NAME),
    Exchange("read_model_metadata_version", values=_VERSION),
    Exchange("read_config", values=_NAME),
    Exchange("read_config_version", values=_VERSION),
    Exchange("infer_version", INFER, _VERSION),
    Exchange("read_model_statistics", values=_NAME),
    Exchange("read_model_statistics_version", values=_VERSION),
    Exchange("read_all_statistics"),
    Exchange("read_metrics"),
    Exchange("unload_model", {"parameters": {"unload_dependents": False}}, _NAME),
    Exchange("load_model", {"parameters": {"config": '{"max_batch_size": 8}'}}, _NAME),
    Exchange("index_repository", {"ready": True}),
)
_DELETE = (
    Exchange("delete_model_version", values=_VERSION, status=204),
    Exchange("delete_checkpoint", values=_OF_CHECKPOINT, status=204),
    Exchange("delete_statistics", values=_OF_STATISTICS, status=204),
)
STORY = (*_COMPUTE, *_COLLECT, *_FOLD, *_SERVE, *_DELETE)

# Of these answers the documentation shows the entry of this name, or the lines with it.
ABRIDGED = {
    "list_methods": "lp_norm",
    "list_models": MODEL,
    "read_all_statistics": MODEL,
    "index_repository": MODEL,
    "read_metrics": "normserve_receive_budget_bytes",
}


def answers() -> dict[str, dict[str, Any]]:
    """What the service answers, by operation and status; null where it answers nothing."""
    found: dict[str, dict[str, Any]] = json.loads(resources.files(__package__).joinpath("answers.json").read_text())
    return found
