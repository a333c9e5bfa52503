import pytest

from service.engine.admission import ReceiveBudget
from service.errors import OverloadedError, PayloadTooLargeError


def test_reserve_counts_until_it_is_released() -> None:
    budget = ReceiveBudget(100)
    budget.reserve(60)
    budget.reserve(40)
    assert budget.used_bytes == 100
    budget.release(60)
    budget.reserve(50)
    assert budget.used_bytes == 90


def test_reserve_refuses_what_does_not_fit_now_and_says_when_to_try_again() -> None:
    budget = ReceiveBudget(100)
    budget.reserve(60)
    with pytest.raises(OverloadedError, match="60 of 100 bytes") as caught:
        budget.reserve(41)
    assert caught.value.retry_after_s == 1
    assert budget.used_bytes == 60


def test_reserve_refuses_for_good_what_never_fits() -> None:
    with pytest.raises(PayloadTooLargeError, match="NORMSERVE_RECEIVE_BUDGET_BYTES"):
        ReceiveBudget(100).reserve(101)
