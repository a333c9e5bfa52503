"""What a request says about the state it changes: `If-Match`, `If-None-Match` and `Idempotency-Key`."""

import re
from dataclasses import dataclass

from starlette.datastructures import Headers

from normcore.errors import ParameterError
from service.errors import PayloadMalformedError, PreconditionError
from service.storage.statistics import StatisticsRecord

_TAG = re.compile(r'(W/)?"([\x21\x23-\x7e]*)"')
_KEY = re.compile(r"[\x21-\x7e]+( +[\x21-\x7e]+)*")
_ANY = "*"


@dataclass(frozen=True, slots=True)
class IfMatch:
    """The states that a change was asked for; None is any."""

    tags: frozenset[str] | None = None

    @classmethod
    def of(cls, headers: Headers) -> "IfMatch":
        return cls(_tags(headers, "If-Match", are_weak_equal=False))

    def check(self, record: StatisticsRecord) -> None:
        """Raises PreconditionError where the resource is in another state."""
        if self.tags is not None and _ANY not in self.tags and record.version not in self.tags:
            raise PreconditionError(
                f"If-Match: expected the present state {etag(record)}, received other tags; read the resource again",
                etag=etag(record),
            )


def etag(record: StatisticsRecord) -> str:
    """The strong entity tag of the state a resource is in."""
    return f'"{record.version}"'


def is_known(headers: Headers, record: StatisticsRecord) -> bool:
    """Whether the reader has this state already (If-None-Match)."""
    tags = _tags(headers, "If-None-Match", are_weak_equal=True)
    return tags is not None and (_ANY in tags or record.version in tags)


def idempotency_key(headers: Headers, *, limit: int) -> str | None:
    """The caller's name for this request, under which a retry counts once. Raises ParameterError."""
    key = headers.get("idempotency-key")
    if key is not None and (len(key) > limit or not _KEY.fullmatch(key)):
        raise ParameterError(
            "Idempotency-Key",
            expected=f"1 to {limit} printable ASCII characters (NORMSERVE_MAX_IDEMPOTENCY_KEY_LENGTH)",
            received=f"{len(key)} characters" if len(key) > limit else repr(key[:80]),
        )
    return key


def _tags(headers: Headers, name: str, *, are_weak_equal: bool) -> frozenset[str] | None:
    values = headers.getlist(name)
    if not values:
        return None
    tags = set()
    for item in (part.strip() for value in values for part in value.split(",")):
        found = _TAG.fullmatch(item)
        if item == _ANY:
            tags.add(_ANY)
        elif found is None:
            raise PayloadMalformedError(f"{name}: expected * or tags in double quotes, received {item[:80]!r}")
        elif are_weak_equal or not found[1]:
            tags.add(found[2])
    return frozenset(tags)
