"""Which codec reads a Content-Type and which one writes for an Accept header."""

from collections.abc import Mapping
from types import MappingProxyType

from service.codecs import json_v1, npy, npz, safetensors
from service.codecs.body import Codec
from service.errors import MediaTypeError, NotAcceptableError

CODECS: Mapping[str, Codec] = MappingProxyType({codec.MEDIA_TYPE: codec for codec in (json_v1, safetensors, npy, npz)})
_LISTED = ", ".join(CODECS)


def request_codec(content_type: str | None) -> Codec:
    """Return the codec of a Content-Type; JSON without one."""
    if not content_type:
        return json_v1
    codec = CODECS.get(content_type.partition(";")[0].strip().lower())
    if codec is None:
        # what curl says of a body where it is not told
        hint = "; with curl add -H 'Content-Type: application/json'" if "x-www-form-urlencoded" in content_type else ""
        raise MediaTypeError(f"Content-Type: expected one of {_LISTED}, received {content_type[:80]!r}{hint}")
    return codec


def response_codec(accept: str | None, *, default: Codec = json_v1) -> Codec:
    """Return the codec that an Accept header likes best, `default` among equals."""
    if not accept or not accept.strip():
        return default
    ranges = [_media_range(item) for item in accept.split(",")[:64] if item.strip()]
    candidates = (default, *(codec for codec in CODECS.values() if codec is not default))
    best = max(candidates, key=lambda codec: _quality(codec.MEDIA_TYPE, ranges))
    if _quality(best.MEDIA_TYPE, ranges) <= 0:
        raise NotAcceptableError(f"Accept: expected one of {_LISTED}, received {accept[:80]!r}")
    return best


def select_outputs(codec: Codec, requested: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Narrow the requested outputs to what the response format can hold: before the computation, not after."""
    only = codec.ONLY_OUTPUT
    if only is None or requested == (only,):
        return requested
    if requested is None:
        return (only,)
    raise NotAcceptableError(
        f"{codec.MEDIA_TYPE}: holds the one tensor {only}, requested were {', '.join(requested)[:80]}; "
        f"accept {npz.MEDIA_TYPE}"
    )


def _media_range(item: str) -> tuple[str, float]:
    name, *parameters = (part.strip().lower() for part in item.split(";"))
    quality = 1.0
    for parameter in parameters:
        key, _, text = parameter.partition("=")
        if key.strip() == "q":
            quality = _weight(text.strip())
    return name, quality


def _weight(text: str) -> float:
    # a weight that is not one, such as "inf" or "high", must not win
    digits = text.replace(".", "", 1)
    return min(float(text), 1.0) if digits.isascii() and digits.isdigit() and len(text) <= 8 else 0.0


def _quality(media_type: str, ranges: list[tuple[str, float]]) -> float:
    kind = media_type.partition("/")[0]
    for specific in (media_type, f"{kind}/*", "*/*"):
        matching = [quality for name, quality in ranges if name == specific]
        if matching:
            return max(matching)
    return 0.0
