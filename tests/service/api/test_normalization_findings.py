"""Diagnostics over HTTP: every finding, of every method that it applies to, with its number, in every encoding."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from tests.service.edges import of, post

pytestmark = pytest.mark.asyncio(loop_scope="session")

BATCH_KIN = ("batch_norm", "batch_renorm", "ghost_batch_norm", "synchronized_batch_norm")
STATE = {"running_mean": of([0, 0, 0]), "running_var": of([1, 1, 1])}


def image(change: Any = None, *, datatype: str = "FP32", samples: int = 4) -> dict[str, Any]:
    """Standard normal values (samples, 3, 5), as they are or changed."""
    values = np.random.default_rng(5).standard_normal((samples, 3, 5))
    return of((values if change is None else change(values)).reshape(-1).tolist(), samples, 3, 5, datatype=datatype)


def poisoned(values: Any) -> Any:
    values[0, 0, :2] = np.nan
    return np.where(np.isnan(values), "NaN", values.astype(object))


def spiked(values: Any) -> Any:
    """A twentieth of one channel far out."""
    values[:1, 0, 0] = 1e3
    return values


Case = tuple[str, dict[str, Any], dict[str, Any]]


def of_batches() -> Iterator[Case]:
    for method in BATCH_KIN:
        extra: dict[str, Any] = {"training": True, **STATE}
        if method == "synchronized_batch_norm":
            extra["shard_sizes"] = of([1, 3], datatype="INT64")
        few = extra | ({"shard_sizes": of([1, 0], datatype="INT64")} if "shard_sizes" in extra else {})
        yield method, few | {"input": image(samples=1)}, {"few_values_per_channel": 5}
        yield method, extra | {"input": image(lambda x: x * 0 + 7)}, {"constant_channels": 3}
        yield method, extra | {"input": image(lambda x: x * 1e-4)}, {"eps_dominated_channels": 3}
        half = image(lambda x: x + 300, datatype="BF16")
        yield method, extra | {"input": half}, {"unresolved_channels": 3}
        found = {"non_finite_channels": 1, "non_finite_values": 2, "nan_policy": "skip_update"}
        yield method, extra | {"input": image(poisoned), "nan_policy": "skip_update"}, found
        yield method, extra | {"input": image(lambda x: x + 7)}, {"running_mean_distance": pytest.approx(7, abs=0.7)}
        yield method, extra | {"input": image(lambda x: x * 10)}, {"running_var_ratio": pytest.approx(100, rel=0.5)}
        # Renormalization brings the whole channel far out.
        after = pytest.approx(1 / 3 if method == "batch_renorm" else 1 / 60, rel=1e-6)
        shares = {"share_beyond_4_before": pytest.approx(1 / 60, rel=1e-6), "share_beyond_4_after": after}
        yield method, extra | {"input": image(spiked)}, shares


def of_groups() -> Iterator[Case]:
    groups: dict[str, dict[str, Any]] = {"group_norm": {"num_groups": 3}, "mean_variance_norm": {"axes": "2"}}
    for method in ("group_norm", "instance_norm", "layer_norm", "mean_variance_norm"):
        options = groups.get(method, {})
        yield method, options | {"input": image()}, {"few_values_per_group": 5}
        yield method, options | {"input": image(lambda x: x * 0 + 7)}, {"constant_groups": 12}
        small = 1e-12 if method == "mean_variance_norm" else 1e-4
        yield method, options | {"input": image(lambda x, by=small: x * by)}, {"eps_dominated_groups": 12}
        half = image(lambda x: x * 0.1 + np.arange(5) + 600, datatype="BF16")
        yield method, options | {"input": half}, {"unresolved_groups": 12}
        yield method, options | {"input": image(poisoned)}, {"non_finite_groups": 1, "non_finite_values": 2}
        if method != "mean_variance_norm":
            affine: dict[str, Any] = {"weight": of([9] * (5 if method == "layer_norm" else 3))}
            found = {"share_beyond_4_before": 0.0, "share_beyond_4_after": pytest.approx(0.65, abs=0.1)}
            yield method, options | affine | {"input": image()}, found
    yield "rms_norm", {"input": image(poisoned)}, {"non_finite_groups": 1, "non_finite_values": 2}
    yield "rms_norm", {"input": image(lambda x: x * 1e-4), "eps": 1e-5}, {"eps_dominated_groups": 12}


def of_running() -> Iterator[Case]:
    running: dict[str, Any] = {"training": True, **STATE}
    far = {"running_mean_distance": pytest.approx(7, abs=0.7)}
    yield "instance_norm", running | {"input": image(lambda x: x + 7)}, far
    wide = {"running_var_ratio": pytest.approx(100, rel=0.5)}
    yield "instance_norm", running | {"input": image(lambda x: x * 10)}, wide
    clipped = {"r_clipped_channels": 3, "d_clipped_channels": 3}
    yield "batch_renorm", running | {"input": image(lambda x: x * 10 + 100)}, clipped


def of_others() -> Iterator[Case]:
    covariance = of([1, 0, 0, 0, 1, 0, 0, 0, 1], 1, 3, 3)
    whitening = {"training": True, "running_mean": STATE["running_mean"], "running_covariance": covariance}
    yield "whitening", whitening | {"input": image(samples=1)}, {"few_values_per_channel": 5}
    yield "whitening", whitening | {"input": image(lambda x: x * 0 + 7)}, {"constant_channels": 3}
    yield "whitening", whitening | {"input": image(lambda x: x * 1e-4)}, {"eps_dominated_channels": 3}
    yield "whitening", whitening | {"input": image(poisoned)}, {"non_finite_values": 2, "non_finite_groups": 1}
    yield (
        "whitening",
        whitening | {"input": image(lambda x: x + 7)},
        {"running_mean_distance": pytest.approx(7, abs=0.7)},
    )
    yield "weight_standardization", {"input": image(poisoned)}, {"non_finite_filters": 1}
    yield "weight_norm", {"input": image(poisoned)}, {"non_finite_norms": 1}
    yield "weight_standardization", {"input": image(lambda x: x * 1e-4)}, {"eps_dominated_filters": 4}
    yield "weight_standardization", {"input": image(lambda x: x * 0 + 7)}, {"constant_filters": 4}
    yield "weight_standardization", {"input": of(list(range(12)), 4, 3)}, {"few_values_per_filter": 3}
    half = image(lambda x: x * 0.1 + np.tile(np.arange(5), (3, 1)) + 600, datatype="BF16")
    yield "weight_standardization", {"input": half}, {"unresolved_filters": 4}
    spread = {"share_beyond_4_before": 0.0, "share_beyond_4_after": pytest.approx(0.65, abs=0.1)}
    yield "weight_standardization", {"input": image(), "gain": of([9] * 4)}, spread
    yield "group_norm", {"input": of(list(range(6)), 2, 3), "num_groups": 3}, {"single_value_groups": 6}
    yield "rms_norm", {"input": image(lambda x: x * 0)}, {"zero_groups": 12}
    yield "lp_norm", {"input": image(lambda x: x * 0)}, {"zero_vectors": 12}
    yield "weight_norm", {"input": image(lambda x: x * 0)}, {"zero_rows": 4}
    yield "lp_norm", {"input": image(poisoned)}, {"non_finite_norms": 1}
    yield "lp_norm", {"input": image(lambda x: x * 1e-4), "eps": 1}, {"eps_dominated_vectors": 12}
    yield "local_response_norm", {"input": image(poisoned)}, {"non_finite_values": 6}
    yield "spectral_norm", {"input": image(poisoned)}, {"non_finite_sigma": 1}


CASES = [
    pytest.param(*case, id=f"{case[0]}-{next(iter(case[2]))}")
    for case in (*of_batches(), *of_groups(), *of_running(), *of_others())
]


@pytest.mark.parametrize(("method", "request_", "expected"), CASES)
async def test_a_finding_is_reported_with_its_number_everywhere(
    client: httpx.AsyncClient, method: str, request_: dict[str, Any], expected: dict[str, Any]
) -> None:
    own, protocol = await post(client, method, request_)
    assert own.status_code == 200, own.text
    diagnostics = own.json()["diagnostics"]
    assert {name: diagnostics.get(name) for name in expected} == expected, diagnostics
    assert protocol.status_code == 200, protocol.text
    assert json.loads(protocol.json()["parameters"]["diagnostics"]) == diagnostics
    if request_["input"]["datatype"] != "BF16":  # which npy has not
        npy = await client.post(f"/v1/normalizations/{method}", json=request_, headers={"accept": "application/x-npy"})
        assert json.loads(npy.headers["normserve-diagnostics"]) == diagnostics
