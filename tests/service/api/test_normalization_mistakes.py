"""Mistakes that are a method's own, over HTTP on both surfaces: status, code and a sentence that names them."""

from typing import Any

import httpx
import pytest

from tests.service.api.test_normalization_edges import DTYPE, PARAMETER, SHAPE, STATISTICS, is_refused
from tests.service.edges import of, ramp

pytestmark = pytest.mark.asyncio(loop_scope="session")


def bad(method: str, name: str, code: str, *words: str, **changes: Any) -> Any:
    return pytest.param(method, changes, code, words, id=f"{method}-{name}")


NO_GRAD: dict[str, Any] = {"grad_output": None}
NO_RUNNING: dict[str, Any] = {"running_mean": None, "running_var": None, "num_batches_tracked": None}
INFERENCE: dict[str, Any] = NO_GRAD | {"training": False, "mask": None}
NAN = of(["NaN", *range(11)], 4, 3)
BATCH_KIN = ("batch_norm", "batch_renorm", "ghost_batch_norm", "synchronized_batch_norm")
NONE_COUNT = of([False] * 4, datatype="BOOL")

OF_BATCHES = [
    case
    for method in BATCH_KIN
    for case in (
        bad(method, "eps-0", PARAMETER, "eps", "> 0 in training", "0.0", eps=0),
        bad(method, "negative-variance", STATISTICS, "running_var", ">= 0", "-1", running_var=of([1, -1, 1])),
        bad(method, "nan-variance", STATISTICS, "running_var", ">= 0", "nan", running_var=of([1, "NaN", 1])),
        bad(method, "nan-raise", STATISTICS, "input", "nan_policy raise", "1", input=NAN, nan_policy="raise"),
        bad(method, "channels", SHAPE, "running_mean", "one value per channel", "(4,)", running_mean=ramp(4)),
        bad(method, "axis-2", PARAMETER, "channel_axis", "-2 to 1", "2", channel_axis=2),
        bad(method, "axis--3", PARAMETER, "channel_axis", "-2 to 1", "-3", channel_axis=-3),
        bad(method, "bias-alone-per-sample", SHAPE, "bias", "(3,)", "(4, 3)", bias=ramp(4, 3)),
        bad(method, "not-in-inference", PARAMETER, "outputs", "running_mean", **INFERENCE, outputs=["running_mean"]),
        bad(method, "no-gradient", PARAMETER, "outputs", "grad_input", **NO_GRAD, outputs=["grad_input"]),
    )
]
OF_RUNNING = [
    case
    for method in ("batch_norm", "ghost_batch_norm", "synchronized_batch_norm")
    for case in (
        bad(method, "none-in-inference", STATISTICS, "running_mean", "none", **INFERENCE | NO_RUNNING),
        bad(method, "mean-alone", STATISTICS, "running_var", "together with running_mean", running_var=None),
        bad(method, "var-alone", STATISTICS, "running_mean", "together with running_var", running_mean=None),
        bad(
            method,
            "no-count",
            STATISTICS,
            "num_batches_tracked",
            "momentum null",
            momentum=None,
            num_batches_tracked=None,
        ),
        bad(method, "count--1", STATISTICS, "num_batches_tracked", ">= 0", num_batches_tracked=of([-1])),
        bad(method, "count-2.5", STATISTICS, "num_batches_tracked", "whole", num_batches_tracked=of([2.5])),
        bad(method, "count-nan", STATISTICS, "num_batches_tracked", "nan", num_batches_tracked=of(["NaN"])),
        bad(method, "count-inf", STATISTICS, "num_batches_tracked", "inf", num_batches_tracked=of(["Infinity"])),
        bad(method, "counts", SHAPE, "num_batches_tracked", "single", num_batches_tracked=of([1, 2])),
    )
]
ALONE: dict[str, dict[str, Any]] = {
    **{method: {"mask": None, "grad_output": None} for method in BATCH_KIN},
    "synchronized_batch_norm": {"shard_sizes": of([0, 1], datatype="INT64"), "mask": None, "grad_output": None},
}
OF_ONE_VALUE = [
    bad(
        method, "one-value", STATISTICS, "input", "more than 1 value per channel", "(1, 3)", input=ramp(1, 3), **changes
    )
    for method, changes in ALONE.items()
]
OF_MASKS = [
    bad("batch_norm", "mask-of-nothing", STATISTICS, "mask", "more than 1", "0", mask=NONE_COUNT),
    bad("batch_renorm", "mask-of-nothing", STATISTICS, "mask", "more than 1", "0", mask=NONE_COUNT),
    bad("synchronized_batch_norm", "mask-of-nothing", STATISTICS, "mask", "more than 1", "0", mask=NONE_COUNT),
    bad("ghost_batch_norm", "mask-of-nothing", STATISTICS, "mask", "more than 1", "0", mask=NONE_COUNT),
    bad(
        "ghost_batch_norm",
        "mask-of-one-part",
        STATISTICS,
        "mask",
        mask=of([True, True, False, False], datatype="BOOL"),
    ),
    *(
        bad(
            method,
            "mask-of-nothing",
            STATISTICS,
            "mask",
            "at least one value",
            mask=of([False] * size, datatype="BOOL"),
        )
        for method, size in {"layer_norm": 3, "rms_norm": 3, "group_norm": 2}.items()
    ),
    bad(
        "instance_norm",
        "mask-of-one",
        STATISTICS,
        "mask",
        "more than 1",
        "1",
        mask=of([True, False, False, False], 2, 2, datatype="BOOL"),
    ),
]
OF_SHARDS = [
    bad("synchronized_batch_norm", name, code, "shard_sizes", *words, shard_sizes=of(sizes, datatype=datatype))
    for name, sizes, datatype, code, words in (
        ("too-few", [1, 2], "INT64", PARAMETER, ("4", "[1, 2]")),
        ("too-many", [4, 4], "INT64", PARAMETER, ("4", "[4, 4]")),
        ("negative", [5, -1], "INT64", PARAMETER, ("[5, -1]",)),
        ("wrapped", [2**62, 2**62, 2**62, 2**62, 4], "INT64", PARAMETER, ("4",)),
        ("floats", [1.0, 3.0], "FP32", DTYPE, ("int64", "float32")),
        ("none", [], "INT64", SHAPE, ("one shard or more",)),
    )
]
OF_OPTIONS = [
    bad("batch_norm", "inverse-training", PARAMETER, "inverse", "training", inverse=True, **NO_GRAD),
    bad("batch_norm", "inverse-gradient", PARAMETER, "inverse", "grad_output", inverse=True, training=False),
    bad("batch_norm", "inverse-zero", PARAMETER, "weight", "1 zeros", **INFERENCE, inverse=True, weight=of([1, 0, 1])),
    bad("ghost_batch_norm", "part-of-one", STATISTICS, "more than 1 value", virtual_batch_size=1),
    bad(
        "ghost_batch_norm",
        "channels-first",
        PARAMETER,
        "channel_axis",
        "0",
        channel_axis=0,
        input=ramp(3, 3),
        grad_output=None,
        mask=None,
    ),
    *(
        bad(method, f"shape-{text}", code, *words, normalized_shape=text)
        for method in ("layer_norm", "rms_norm")
        for text, code, words in (
            ("", PARAMETER, ("normalized_shape", "integers")),
            ("3,", PARAMETER, ("normalized_shape",)),
            ("a", PARAMETER, ("normalized_shape", "'a'")),
            ("3.0", PARAMETER, ("normalized_shape",)),
            (3.0, PARAMETER, ("normalized_shape", "an integer, or integers", "3.0")),
            (True, PARAMETER, ("normalized_shape", "an integer, or integers", "True")),
            (10**18, PARAMETER, ("normalized_shape", "an integer, or integers")),
            (5, SHAPE, ("input", "(*, 5)", "(2, 4, 3)")),
            ("5", SHAPE, ("input", "(*, 5)", "(2, 4, 3)")),
            ("0", SHAPE, ("input", "(*, 0)")),
            ("-1", SHAPE, ("input", "-1")),
            ("1,2,4,3", SHAPE, ("input", "(2, 4, 3)")),
            ("4,3", SHAPE, ("weight", "(4, 3)", "(3,)")),
        )
    ),
    bad("group_norm", "groups", PARAMETER, "num_groups", "divides the input's 4 channels", "3", num_groups=3),
    bad("group_norm", "too-many-groups", PARAMETER, "num_groups", "8", num_groups=8),
    bad("group_norm", "affine", SHAPE, "bias", "weight's shape", bias=ramp(2, 4)),
    bad(
        "instance_norm",
        "one-position",
        STATISTICS,
        "input",
        "more than 1 position",
        "(2, 4)",
        input=ramp(2, 4),
        grad_output=None,
        mask=None,
    ),
    bad("instance_norm", "mean-alone", STATISTICS, "running_var", running_var=None),
    bad("instance_norm", "var-alone", STATISTICS, "running_mean", running_mean=None),
    bad("instance_norm", "negative", STATISTICS, "running_var", "-2", running_var=of([1, 1, -2, 1])),
    bad("lp_norm", "p-3", PARAMETER, "p", "1, 2, inf", "3", p=3),
    bad("lp_norm", "p-0", PARAMETER, "p", "1, 2, inf", p=0),
    bad("lp_norm", "p-true", PARAMETER, "p", p=True),
    bad("lp_norm", "eps-1e308", PARAMETER, "eps", "3.40282e+38", "1e+308", eps=1e308),
    bad("lp_norm", "axis", PARAMETER, "axis", "-2 to 1", "2", axis=2),
    bad("weight_norm", "axis", PARAMETER, "axis", "-2 to 1", "-3", axis=-3),
    bad("weight_norm", "g", SHAPE, "g", "one length per row", "(3,)", g=ramp(3)),
    bad("spectral_norm", "axis", PARAMETER, "axis", "-2 to 1", axis=9),
    *(
        bad("mean_variance_norm", f"axes-{text}", PARAMETER, "axes", axes=text)
        for text in ("", "a", "0,0", "0,-4", "4", "-5", "0;1", "0,,1", "1" * 19, 4, -5, 1.0, False)
    ),
    bad("weight_standardization", "fan-in-1", STATISTICS, "input", "fan_in", "(4, 1)", input=ramp(4, 1)),
    bad("weight_standardization", "fan-in-0", STATISTICS, "input", "fan_in", "(4, 0)", input=ramp(4, 0)),
    bad("spectral_norm", "empty", SHAPE, "input", "not empty", "(0, 3)", input=ramp(0, 3)),
    bad("spectral_norm", "no-state", STATISTICS, "u", "iterations 0", iterations=0, u=None, v=None),
    bad("spectral_norm", "exact-state", STATISTICS, "u", "exact", exact=True),
    bad("spectral_norm", "exact-nan", STATISTICS, "input", "finite", exact=True, u=None, v=None, input=NAN),
    bad("spectral_norm", "zero-state", STATISTICS, "v", "orthogonal", iterations=0, u=of([0, 0, 0, 0])),
    bad("whitening", "groups", PARAMETER, "groups", "divisor", "3", groups=3),
    bad("whitening", "no-channels", SHAPE, "input", "at least 1 channel", input=ramp(4, 0)),
    bad("whitening", "one-value", STATISTICS, "input", "more than 1 value", input=ramp(1, 2), grad_output=None),
    bad("whitening", "singular", STATISTICS, "input", "positive definite", input=ramp(2, 2), eps=0, grad_output=None),
    bad("whitening", "no-count", STATISTICS, "num_batches_tracked", momentum=None, num_batches_tracked=None),
    bad("whitening", "mean-alone", STATISTICS, "running_covariance", running_covariance=None),
    bad("whitening", "covariance-alone", STATISTICS, "running_mean", running_mean=None),
    bad(
        "whitening",
        "none-in-inference",
        STATISTICS,
        "running_mean",
        training=False,
        running_mean=None,
        running_covariance=None,
    ),
    bad(
        "whitening",
        "negative",
        STATISTICS,
        "running_covariance",
        training=False,
        running_covariance=of([1, 0, 0, -1], 1, 2, 2),
    ),
    bad(
        "whitening",
        "asymmetric",
        STATISTICS,
        "running_covariance",
        training=False,
        running_covariance=of([1, 0, 0.5, 1], 1, 2, 2),
    ),
    bad("whitening", "pca-gradient", "not_implemented", "grad_output", "pca", "zca", mode="pca"),
    bad("whitening", "iternorm-gradient", "not_implemented", "grad_output", "iternorm", "zca", mode="iternorm"),
]

_ALONE = NO_GRAD | NO_RUNNING | {"mask": None, "weight": None, "bias": None}

# A small request must not ask for long work or for gigabytes.
OF_LONG_WORK = [
    bad(
        "whitening",
        "wide-group",
        PARAMETER,
        "groups",
        "4096",
        **dict.fromkeys(("grad_output", "running_mean", "running_covariance", "weight", "bias")),
        num_batches_tracked=None,
        input=of([0] * 10_000, 2, 5_000),
        groups=1,
    ),
    bad(
        "ghost_batch_norm",
        "parts",
        PARAMETER,
        "virtual_batch_size",
        **_ALONE,
        virtual_batch_size=2,
        input=of([0] * 8_194, 8_194, 1),
    ),
    bad(
        "synchronized_batch_norm",
        "parts",
        SHAPE,
        "shard_sizes",
        "4096",
        **_ALONE,
        input=ramp(2, 1),
        shard_sizes=of([2] + [0] * 4_096, datatype="INT64"),
    ),
]


@pytest.mark.parametrize(
    ("method", "changes", "code", "words"),
    [*OF_LONG_WORK, *OF_BATCHES, *OF_RUNNING, *OF_ONE_VALUE, *OF_MASKS, *OF_SHARDS, *OF_OPTIONS],
)
async def test_a_mistake_is_refused_and_named(
    client: httpx.AsyncClient, method: str, changes: dict[str, Any], code: str, words: tuple[str, ...]
) -> None:
    await is_refused(client, method, changes, code, *words)
