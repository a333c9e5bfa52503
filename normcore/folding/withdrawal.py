"""Which folds to take back when a proof fails: those of the region that failed, or, where none did, by halving."""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from normcore.folding.report import Certificate, Region

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Trial(Generic[Result]):
    """One fold and its proof.

    Attributes:
        result: what was folded, in the caller's own terms.
        outputs: names of the normalizations that were folded.
        certificate: None where nothing had to be proven.
    """

    result: Result
    outputs: tuple[str, ...]
    certificate: Certificate | None

    @property
    def is_wrong(self) -> bool:
        return self.certificate is not None and self.certificate.verdict == "different"


Attempt = Callable[[Collection[str]], Trial[Result]]


def fold_what_is_proven(attempt: Attempt[Result], *, deadline: float) -> tuple[Trial[Result], dict[str, str]]:
    """Fold without what fails its proof.

    A region that fails costs the folds in it. When only the network as a whole fails, halves of the folds are tried
    until the wrong ones are found, for as long as there is time; what is left untried then is withdrawn.

    Args:
        attempt: folds all normalizations but those it is given, and proves the result.
        deadline: time.monotonic() after which no more halves are tried.

    Returns:
        The last attempt, and the reason of every withdrawn fold by the name of its normalization's output.
    """
    withdrawn: dict[str, str] = {}
    trial = attempt(withdrawn)
    while trial.is_wrong:
        blamed = _blamed(trial)
        withdrawn |= blamed or _search(attempt, trial, withdrawn, deadline)
        trial = attempt(withdrawn)
    return trial, withdrawn


def _blamed(trial: Trial[Result]) -> dict[str, str]:
    """The folds of every failed region."""
    assert trial.certificate is not None
    failed = [region for region in trial.certificate.regions if not region.equivalent]
    return {name: _reason(region) for region in failed for name in region.tensors if name in trial.outputs}


def _reason(region: Region) -> str:
    where = f"its proof failed: {region.output!r}"
    if region.error == float("inf"):
        return f"{where} has another shape, or is NaN or infinite at other places"
    return f"{where} differs by {region.error:.3g} where the largest value is {region.scale:.3g}"


def _search(
    attempt: Attempt[Result], trial: Trial[Result], withdrawn: Mapping[str, str], deadline: float
) -> dict[str, str]:
    """The folds without which the network as a whole is proven, found by halving."""
    assert trial.certificate is not None
    reason = f"the proof of the whole network failed: {trial.certificate.sentence}"
    untried = _halves(trial.outputs)
    if not untried:
        return dict.fromkeys(trial.outputs, reason)
    accepted: set[str] = set()
    guilty: dict[str, str] = {}
    while untried:
        chunk = untried.pop(0)
        started = time.monotonic()
        others = set(trial.outputs) - accepted - set(chunk)
        certificate = attempt({*withdrawn, *others}).certificate
        if certificate is not None and certificate.verdict == "equivalent":
            accepted.update(chunk)
        else:
            halves = _halves(chunk)
            untried = halves + untried
            guilty |= {} if halves else dict.fromkeys(chunk, reason)
        if deadline - time.monotonic() < 2 * (time.monotonic() - started):  # the last attempt needs its time too
            break
    guilty |= {name: reason for chunk in untried for name in chunk}
    return guilty or dict.fromkeys(trial.outputs, reason)  # each half is right, and together they are not


def _halves(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Two parts, or none of a single name."""
    middle = len(names) // 2
    return [names[:middle], names[middle:]] if middle else []


__all__ = ["Trial", "fold_what_is_proven"]
