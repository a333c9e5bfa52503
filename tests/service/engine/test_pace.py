import pytest

from service.engine.pace import Pace


@pytest.fixture
def pace() -> Pace:
    found = Pace()
    found.add("a", 1, 1e-5, in_thread=False)
    return found


def test_what_was_brief_is_brief(pace: Pace) -> None:
    assert pace.is_brief("a", 1)


@pytest.mark.parametrize(("group", "rows"), [("b", 1), ("a", 2), ("a", 1000)])
def test_what_never_ran_is_not(pace: Pace, group: str, rows: int) -> None:
    assert not pace.is_brief(group, rows)


def test_one_long_run_ends_it_and_several_brief_ones_bring_it_back(pace: Pace) -> None:
    pace.add("a", 1, 0.01, in_thread=False)
    assert not pace.is_brief("a", 1)
    for _ in range(20):
        pace.add("a", 1, 1e-5, in_thread=False)
    assert pace.is_brief("a", 1)


def test_a_run_in_a_thread_counts_for_less_until_one_without_tells(pace: Pace) -> None:
    pace.add("b", 1, 5e-4, in_thread=True)
    assert pace.is_brief("b", 1)
    pace.add("b", 1, 5e-3, in_thread=False)
    assert not pace.is_brief("b", 1)


def test_only_the_latest_kinds_are_kept(pace: Pace) -> None:
    for number in range(255):
        pace.add(number, 1, 1e-5, in_thread=False)
    pace.add("a", 1, 1e-5, in_thread=False)
    pace.add("new", 1, 1e-5, in_thread=False)
    assert pace.is_brief("a", 1)
    assert not pace.is_brief(0, 1)
