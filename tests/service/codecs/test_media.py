import pytest

from service.codecs import media
from service.codecs.media import CODECS, request_codec, response_codec, select_outputs
from service.errors import MediaTypeError, NotAcceptableError

JSON, SAFETENSORS, NPY, NPZ = CODECS


def test_four_media_types_are_read_and_written() -> None:
    assert list(CODECS) == ["application/json", "application/vnd.safetensors", "application/x-npy", "application/x-npz"]


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        (None, JSON),
        ("", JSON),
        ("application/json", JSON),
        ("Application/JSON; charset=utf-8", JSON),
        (NPY, NPY),
        (f" {NPZ} ;q=1", NPZ),
        (SAFETENSORS, SAFETENSORS),
    ],
)
def test_request_codec_by_content_type(content_type: str | None, expected: str) -> None:
    assert request_codec(content_type) is CODECS[expected]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "*/*", ";"])
def test_request_codec_refuses_others_and_lists_what_is_read(content_type: str) -> None:
    with pytest.raises(MediaTypeError, match=f"expected one of {JSON}, {SAFETENSORS}, {NPY}, {NPZ}, received"):
        request_codec(content_type)


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, NPZ),
        ("", NPZ),
        ("*/*", NPZ),
        ("application/*", NPZ),
        ("application/json", JSON),
        ("APPLICATION/JSON ; Q=0.5", JSON),
        ("application/json;q=0.5, application/x-npy;q=0.9", NPY),
        ("application/json, */*;q=0.1", JSON),
        ("application/x-npz;q=0.2, */*;q=0.1", NPZ),
        ("application/x-npz;q=0, */*", JSON),
        ("text/html, application/xhtml+xml, */*;q=0.8", NPZ),
        ("application/json;version=1;q=0.4", JSON),
        ("application/json;q=inf, application/x-npy;q=0.1", NPY),
        ("application/json;q=9, application/x-npz", NPZ),
    ],
)
def test_response_codec_by_accept(accept: str | None, expected: str) -> None:
    assert response_codec(accept, default=CODECS[NPZ]) is CODECS[expected]


@pytest.mark.parametrize(
    "accept", ["text/html", "text/*", "application/json;q=0", "*/*;q=0", "application/json;q=high", ",", ";;"]
)
def test_response_codec_refuses_others_and_lists_what_is_written(accept: str) -> None:
    with pytest.raises(NotAcceptableError, match=f"expected one of {JSON}, {SAFETENSORS}, {NPY}, {NPZ}, received"):
        response_codec(accept)


def test_outputs_are_narrowed_where_the_format_holds_one() -> None:
    assert select_outputs(CODECS[NPY], None) == ("output",)
    assert select_outputs(CODECS[NPY], ("output",)) == ("output",)
    for name in (JSON, SAFETENSORS, NPZ):
        assert select_outputs(CODECS[name], None) is None
        assert select_outputs(CODECS[name], ("mean", "var")) == ("mean", "var")


@pytest.mark.parametrize("requested", [("mean",), ("output", "mean")])
def test_outputs_that_the_format_cannot_hold_are_refused(requested: tuple[str, ...]) -> None:
    with pytest.raises(
        NotAcceptableError, match=f"{NPY}: holds the one tensor output, requested were .*; accept {NPZ}"
    ):
        media.select_outputs(CODECS[NPY], requested)
