"""How long executions take, so that those too brief to be worth a thread can run where they are asked for."""

from collections.abc import Hashable

_BRIEF_S = 250e-6  # about what two changes of thread cost, and the fight for the interpreter with them
_KEPT = 256
_WEIGHT = 0.25


class Pace:
    """Running means of durations by group and order of magnitude of the rows."""

    def __init__(self) -> None:
        self._means_s: dict[tuple[Hashable, int], float] = {}

    def is_brief(self, group: Hashable, rows: int) -> bool:
        """Whether executions of this kind are known, and have been brief lately."""
        return self._means_s.get((group, rows.bit_length()), _BRIEF_S) < _BRIEF_S

    def add(self, group: Hashable, rows: int, elapsed_s: float) -> None:
        kind = (group, rows.bit_length())
        mean_s = self._means_s.pop(kind, None)  # and back at the end: the first are those longest not seen
        self._means_s[kind] = elapsed_s if mean_s is None else mean_s + _WEIGHT * (elapsed_s - mean_s)
        if len(self._means_s) > _KEPT:
            del self._means_s[next(iter(self._means_s))]
