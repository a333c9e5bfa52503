"""The examples in normcore's numerical docstrings."""

import doctest
import importlib

import pytest

MODULES = [
    "normcore.decimals",
    "normcore.normalization.batch_norm",
    "normcore.normalization.group_norm",
    "normcore.normalization.instance_norm",
    "normcore.normalization.inverse_root",
    "normcore.normalization.layer_norm",
    "normcore.normalization.local_response_norm",
    "normcore.normalization.lp_norm",
    "normcore.normalization.mean_variance_norm",
    "normcore.normalization.method",
    "normcore.normalization.rms_norm",
    "normcore.normalization.spectral_norm",
    "normcore.normalization.weight_norm",
    "normcore.normalization.weight_standardization",
    "normcore.normalization.whitening",
    "normcore.statistics.conversion",
    "normcore.statistics.covariance",
    "normcore.statistics.histogram",
    "normcore.statistics.moments",
    "normcore.statistics.population",
    "normcore.statistics.running",
    "normcore.statistics.stream",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted > 0
    assert results.failed == 0
