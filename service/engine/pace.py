"""How long executions compute, so that those too brief to be worth a thread can run where they are asked for."""

from collections.abc import Hashable

_BRIEF_S = 250e-6  # about what two changes of thread cost, and the fight for the interpreter with them
_FIGHT = 4  # what that fight multiplies the processor time of a brief execution by (measured: 3 to 10)
_KEPT = 256
_WEIGHT = 0.25


class Pace:
    """Running means of processor time by group and order of magnitude of the rows.

    Not of the wall's: a thread that waits for the interpreter, or for a processor, would seem to compute.
    """

    def __init__(self) -> None:
        self._means_s: dict[tuple[Hashable, int], float] = {}

    def is_brief(self, group: Hashable, rows: int) -> bool:
        """Whether executions of this kind are known, and have been brief lately."""
        return self._means_s.get((group, rows.bit_length()), _BRIEF_S) < _BRIEF_S

    def add(self, group: Hashable, rows: int, computed_s: float, *, in_thread: bool) -> None:
        """An execution in a thread counts less; where that was too little, the next, in the event loop, tells."""
        kind = (group, rows.bit_length())
        if in_thread:
            computed_s /= _FIGHT
        mean_s = self._means_s.pop(kind, None)  # and back at the end: the first are those longest not seen
        self._means_s[kind] = computed_s if mean_s is None else mean_s + _WEIGHT * (computed_s - mean_s)
        if len(self._means_s) > _KEPT:
            del self._means_s[next(iter(self._means_s))]
