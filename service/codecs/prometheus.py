"""Prometheus' text format, version 0.0.4.

Written here because the client library appends `_total` to the names of counters, and the names are Triton's.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: samples are (suffix of the name, labels, value)."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    samples: list[tuple[str, Labels, float]] = field(default_factory=list)

    def add(self, value: float, labels: Labels | None = None) -> None:
        self.samples.append(("", labels or {}, value))

    def add_histogram(self, labels: Labels, *, bounds: Iterable[float], counts: Iterable[int], total: float) -> None:
        """Counts per bucket, one more than bounds, become cumulative ones with their upper bounds."""
        running = 0
        for bound, count in zip((*bounds, float("inf")), counts, strict=True):
            running += count
            self.samples.append(("_bucket", {**labels, "le": _number(bound)}, running))
        self.samples.append(("_sum", labels, total))
        self.samples.append(("_count", labels, running))


def encode(families: Iterable[Family]) -> bytes:
    lines: list[str] = []
    for family in families:
        lines += (f"# HELP {family.name} {_escaped(family.help)}", f"# TYPE {family.name} {family.kind}")
        for suffix, labels, value in family.samples:
            pairs = ",".join(f'{name}="{_escaped(text, quote=True)}"' for name, text in labels.items())
            lines.append(f"{family.name}{suffix}{f'{{{pairs}}}' if pairs else ''} {_number(value)}")
    return "\n".join([*lines, ""]).encode()


def _number(value: float) -> str:
    if value == float("inf"):
        return "+Inf"
    return str(int(value)) if value == int(value) else repr(float(value))


def _escaped(text: str, *, quote: bool = False) -> str:
    escaped = text.replace("\\", "\\\\").replace("\n", "\\n")
    return escaped.replace('"', '\\"') if quote else escaped
