"""One request per normalization method, shown in the documentation and run by the tests."""

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

BATCH: dict[str, Any] = {"input": [[1, 2], [3, 4], [5, 9]], "mask": [True, True, False]}
