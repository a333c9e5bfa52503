"""Which folds are taken back, with a proof that is told which of them are wrong."""

import time
from collections.abc import Callable, Collection

import pytest

from normcore.folding.report import Certificate, Region, Verdict
from normcore.folding.withdrawal import Trial, fold_what_is_proven

NAMES = tuple("abcdefgh")
Judge = Callable[[Collection[str]], Certificate]


def certificate(verdict: Verdict, *regions: Region) -> Certificate:
    return Certificate(verdict, "words", "", "", (), (), regions, "")


def settle(judge: Judge, *, seconds: float = 10.0) -> tuple[set[str], dict[str, str], int]:
    """What stays folded, what was withdrawn, and how many proofs it took."""
    proofs = []

    def attempt(exclude: Collection[str]) -> Trial[None]:
        folded = tuple(name for name in NAMES if name not in exclude)
        proofs.append(folded)
        return Trial(None, folded, judge(folded) if folded else None)

    trial, withdrawn = fold_what_is_proven(attempt, deadline=time.monotonic() + seconds)
    assert set(trial.outputs) | set(withdrawn) == set(NAMES)
    return set(trial.outputs), withdrawn, len(proofs)


def blind(*wrong: str) -> Judge:
    """A proof that only sees that something is wrong."""
    return lambda folded: certificate("different" if set(wrong) & set(folded) else "equivalent")


@pytest.mark.parametrize("wrong", ["a", "d", "h", "be", "abcdefgh"])
def test_halving_finds_the_wrong_folds(wrong: str) -> None:
    folded, withdrawn, proofs = settle(blind(*wrong))
    assert folded == set(NAMES) - set(wrong)
    assert set(withdrawn) == set(wrong)
    assert all(reason == "the proof of the whole network failed: words" for reason in withdrawn.values())
    assert proofs <= (8 if len(wrong) == 1 else 16)


def test_a_failed_region_costs_the_folds_in_it_at_once() -> None:
    def judge(folded: Collection[str]) -> Certificate:
        bad = Region("z", 0.5, 2.0, equivalent=False, tensors=("c", "d", "z"))
        good = Region("a", 0.0, 1.0, equivalent=True, tensors=("a",))
        is_wrong = "c" in folded or "d" in folded
        return certificate("different", bad, good) if is_wrong else certificate("equivalent", good)

    folded, withdrawn, proofs = settle(judge)
    assert folded == set(NAMES) - {"c", "d"}
    assert withdrawn["c"] == "its proof failed: 'z' differs by 0.5 where the largest value is 2"
    assert proofs == 2


def test_a_region_of_another_shape_is_said_so() -> None:
    bad = Region("a", float("inf"), 0.0, equivalent=False, tensors=("a",))
    _, withdrawn, _ = settle(
        lambda folded: certificate("different", bad) if "a" in folded else certificate("equivalent")
    )
    assert withdrawn["a"].endswith("'a' has another shape, or is NaN or infinite at other places")


def test_without_time_everything_untried_is_withdrawn() -> None:
    folded, withdrawn, proofs = settle(blind("a"), seconds=0.0)
    assert (folded, set(withdrawn)) == (set(), set(NAMES))
    assert proofs == 3


def test_folds_that_are_wrong_only_together_do_not_stay_together() -> None:
    folded, withdrawn, _ = settle(
        lambda folded: certificate("different" if {"a", "h"} <= set(folded) else "equivalent")
    )
    assert set(withdrawn) == {"h"}
    assert folded == set(NAMES) - {"h"}


def test_what_nobody_can_prove_in_halves_is_withdrawn() -> None:
    folded, _, _ = settle(lambda folded: certificate("different" if len(folded) > 5 else "inconclusive"))
    assert folded == set()


def test_an_inconclusive_proof_withdraws_nothing() -> None:
    folded, withdrawn, proofs = settle(lambda _: certificate("inconclusive"))
    assert (folded, withdrawn, proofs) == (set(NAMES), {}, 1)
