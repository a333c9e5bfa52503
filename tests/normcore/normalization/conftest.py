"""What tests of several normalizations share."""

from collections.abc import Callable, Iterator

import pytest
import torch

from normcore import _plan


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets limits that plans are made by, such as `limits(_PART=16)`; no plan outlives the test."""

    def set_limits(**values: int) -> None:
        for name, value in values.items():
            monkeypatch.setattr(_plan, name, value)
        _plan._cached.cache_clear()

    yield set_limits
    _plan._cached.cache_clear()


@pytest.fixture
def threads_set_back() -> Iterator[None]:
    """For a test that sets torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
