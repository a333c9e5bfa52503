"""What large bodies of many clients do to everyone else, beside an echo that does nothing with them."""

import asyncio
import sys
import time
from array import array

import numpy as np
import orjson

from benchmarks.load import Call, Load, closed_loop, connected, percentiles
from benchmarks.servers import Server, binary_call, peer, service
from benchmarks.timing import compare
from service.codecs import json_numbers, oip

_BODY_BYTES = 8 * 1024**2
_CLIENTS = 32
# For several hundred probes: of a hundred, the 99th percentile would be the worst, which the first moment decides.
_LEAST_S = 8.0
_DECODED_ELEMENTS = 2_100_000
_PATH = "/v2/models/normcore.batch_norm/infer"


def report(_: int, seconds: float) -> None:
    """Goal 7: the liveness probe while 32 clients post bodies of 8 MiB."""
    rows = np.random.default_rng(0).standard_normal((_BODY_BYTES // 32, 8)).astype(np.float32)
    with service(warm_up=True) as ours, peer("echo") as theirs:
        _until_ready(ours)
        binary = binary_call(ours.port, _PATH, "input", rows, training=True)
        text = _json_call(ours.port, rows[: len(rows) * 2 // 5])
        for name, call in (("JSON", text), ("binary", binary), ("bare echo", Call(theirs.port, "/", binary.body))):
            load, latencies_ms = asyncio.run(_probed(call, max(seconds, _LEAST_S)))
            p50, p99 = percentiles(latencies_ms)
            _say(
                f"  {name:<10}{len(call.body) / 1024**2:>5.1f} MiB {load.rate:>6.1f}/s, {load.failures} refused; "
                f"probes: p50 {p50:.1f} ms, p99 {p99:.1f} ms, most {max(latencies_ms):.1f} ms, of {len(latencies_ms)}"
            )
    _report_decoding(seconds)


def _report_decoding(seconds: float) -> None:
    json_numbers.warm_up()
    values = np.random.default_rng(0).standard_normal(_DECODED_ELEMENTS).astype(np.float32)
    for name, text in (
        ("written by orjson", orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)),
        ("by Python, 17 digits", orjson.dumps(values.tolist())),
    ):
        body = _document(text, values.shape)
        found = compare(
            lambda body=body: oip.decode_request(body, None),  # type: ignore[misc]  # mypy infers no default of lambdas
            lambda text=text: np.frombuffer(array("f", orjson.loads(text)), np.float32),  # type: ignore[misc]
            seconds=seconds,
            is_single=True,
        )
        _say(
            f"  {_DECODED_ELEMENTS} fp32 in JSON {name}: {found.ours_ms:.0f} ms, orjson and an array of it "
            f"{found.peer_ms:.0f} ms, ratio {found.ratio:.2f} ({found.low:.2f} to {found.high:.2f})"
        )


def _until_ready(server: Server) -> None:
    while True:
        try:
            server.ask("GET", "/v2/health/ready")
        except RuntimeError:
            time.sleep(0.1)
        else:
            return


def _json_call(port: int, rows: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Call:
    return Call(port, _PATH, _document(orjson.dumps(rows.reshape(-1), option=orjson.OPT_SERIALIZE_NUMPY), rows.shape))


def _document(data: bytes, shape: tuple[int, ...]) -> bytes:
    entry = {"name": "input", "shape": shape, "datatype": "FP32", "data": orjson.Fragment(data)}
    return orjson.dumps({"inputs": [entry], "parameters": {"training": True, "binary_data_output": True}})


async def _probed(call: Call, seconds: float) -> tuple[Load, list[float]]:
    """The load, and how long each probe beside it took."""
    posting = asyncio.create_task(asyncio.to_thread(closed_loop, call, connections=_CLIENTS, seconds=seconds))
    latencies_ms, exchange = list[float](), await connected(call.port)
    request = Call(call.port, "/v2/health/live").to_bytes()
    while not posting.done():
        started = time.perf_counter()
        await exchange.ask(request)
        latencies_ms.append((time.perf_counter() - started) * 1e3)
        await asyncio.sleep(0.01)
    exchange.close()
    return await posting, latencies_ms


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
