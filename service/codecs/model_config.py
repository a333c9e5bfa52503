"""The parameters of a load in the model repository extension: a model configuration and files."""

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from service.codecs.json_text import describe
from service.engine.protocol import ModelOptions
from service.errors import PayloadMalformedError, UnsupportedError

_FILE = re.compile(r"file:([1-9][0-9]{0,8})/model\.onnx")
# What a configuration may say beside the options that it changes; the file decides these.
_DESCRIPTIVE = frozenset(
    (
        "input",
        "output",
        "model_transaction_policy",
        "default_model_filename",
    )
)
# What it may say in one way only: as our own configurations do, or not at all.
_FIXED: Mapping[str, tuple[object, ...]] = {
    "platform": ("onnxruntime_onnx", ""),
    "backend": ("onnxruntime", ""),
    "parameters": ({},),
    "model_warmup": ([],),
}
_MAX_VERSION = 10**9 - 1
_KINDS = ("KIND_AUTO", "KIND_CPU")


@dataclass(frozen=True, slots=True)
class Overrides:
    """Fields of ModelOptions to replace, and the content of `model.onnx` by version."""

    options: dict[str, Any]
    files: dict[int, bytes]


def decode_overrides(parameters: Mapping[str, object], *, model: str) -> Overrides | None:
    """Read `config` (a JSON text) and `file:<version>/model.onnx` (base64); None where there are neither.

    Raises:
        PayloadMalformedError: a parameter has another form, or files come without a configuration.
        UnsupportedError: a parameter, or something in the configuration, that no model here can do.
    """
    files: dict[int, bytes] = {}
    config: dict[str, Any] | None = None
    for name, value in parameters.items():
        if name == "config":
            config = _config(value)
        elif name.startswith("file:"):
            files.update([_file(name, value)])
        else:
            raise UnsupportedError(f"parameters: expected config or file:<version>/model.onnx, received {name[:80]!r}")
    if config is None and files:
        raise PayloadMalformedError("parameters.config: expected the configuration that belongs to the files")
    return None if config is None else Overrides(_options(config, model), files)


def _config(value: object) -> dict[str, Any]:
    if isinstance(value, dict):  # what the protocol wants is a text; many send the object itself
        return value
    try:
        document = orjson.loads(value) if isinstance(value, str) else None
    except orjson.JSONDecodeError as error:
        raise PayloadMalformedError(f"parameters.config: expected JSON, received a text that is not: {error}") from None
    if not isinstance(document, dict):
        raise PayloadMalformedError("parameters.config: expected a JSON object as a text")
    return document


def _file(name: str, value: object) -> tuple[int, bytes]:
    found = _FILE.fullmatch(name)
    if found is None:
        raise PayloadMalformedError(f"parameters: expected file:<version>/model.onnx, received {name[:80]!r}")
    if not isinstance(value, str):
        raise PayloadMalformedError(f"parameters.{name}: expected base64 as a text")
    try:
        return int(found[1]), base64.b64decode(value, validate=True)
    except ValueError as error:  # binascii's own, or its refusal of what is not ASCII
        raise PayloadMalformedError(f"parameters.{name}: expected base64: {error}") from None


def _options(config: Mapping[str, Any], model: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, value in config.items():
        if name == "max_batch_size":
            options["max_batch_size"] = _number(value, "max_batch_size", limit=65536)
        elif name == "dynamic_batching":
            delay = _object(value, name).get("max_queue_delay_microseconds", 0)
            place = "dynamic_batching.max_queue_delay_microseconds"
            options["max_queue_delay_us"] = _number(delay, place, limit=10_000_000)
        elif name == "instance_group":
            options["instances"] = _instances(value)
        elif name == "version_policy":
            options |= _policy(value)
        elif name == "name":
            if value not in (model, ""):
                expected = f"the model's own name {model!r}"
                raise PayloadMalformedError(f"parameters.config.name: expected {expected}, received {describe(value)}")
        elif name in _FIXED:
            _check_fixed(name, value)
        elif name not in _DESCRIPTIVE:
            raise UnsupportedError(f"parameters.config.{name[:80]}: no model here can do this")
    return options


def encode_policy(options: ModelOptions) -> dict[str, Any]:
    """The `version_policy` of a configuration."""
    if options.specific_versions:
        return {"specific": {"versions": list(options.specific_versions)}}
    if options.latest_versions:
        return {"latest": {"num_versions": options.latest_versions}}
    return {"all": {}}


def _policy(value: object) -> dict[str, Any]:
    policy = _object(value, "version_policy")
    if len(policy) != 1 or not policy.keys() <= {"all", "latest", "specific"}:
        raise PayloadMalformedError("parameters.config.version_policy: expected one of all, latest and specific")
    ((name, content),) = policy.items()
    place = f"version_policy.{name}"
    limits = _object(content, place)
    chosen: dict[str, Any] = {"latest_versions": 0, "specific_versions": ()}
    if name == "latest":
        count = _number(limits.get("num_versions", 1), f"{place}.num_versions", limit=_MAX_VERSION)
        return chosen | {"latest_versions": max(1, count)}
    if name == "specific":
        versions = limits.get("versions")
        if not isinstance(versions, list) or not versions:
            raise PayloadMalformedError(f"parameters.config.{place}.versions: expected a list of version numbers")
        numbers = {_number(version, f"{place}.versions", limit=_MAX_VERSION) for version in versions}
        return chosen | {"specific_versions": sorted(numbers)}
    return chosen


def _check_fixed(name: str, value: object) -> None:
    if value not in _FIXED[name]:
        only = orjson.dumps(_FIXED[name][0]).decode()
        raise UnsupportedError(f"parameters.config.{name}: every model here has {only}, received {describe(value)}")


def _instances(value: object) -> int:
    groups = value if isinstance(value, list) else []
    if len(groups) != 1:
        raise PayloadMalformedError("parameters.config.instance_group: expected a list of one group")
    group = _object(groups[0], "instance_group")
    kind = group.get("kind", "KIND_AUTO")
    if kind not in _KINDS:
        raise UnsupportedError(
            f"parameters.config.instance_group.kind: expected {' or '.join(_KINDS)}, received {describe(kind)}; "
            "the device is chosen where a model is registered"
        )
    return max(1, _number(group.get("count", 1), "instance_group.count", limit=64))


def _object(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PayloadMalformedError(f"parameters.config.{place}: expected an object")
    return value


def _number(value: object, place: str, *, limit: int) -> int:
    # the JSON form of a protobuf writes 64-bit numbers as texts
    number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 18 else value
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= limit:
        raise PayloadMalformedError(
            f"parameters.config.{place}: expected a whole number from 0 to {limit}, received {str(value)[:40]!r}"
        )
    return number
