"""/metrics: what Prometheus scrapes. Triton's names where there are any, and histograms."""

import os
import resource
import time
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from fastapi import APIRouter, Response

from normcore.compilation import compiled_here
from service.api.dependencies import ServicesDep
from service.application.models import Entry
from service.application.usage import FailureReason, Histogram
from service.codecs import prometheus
from service.codecs.prometheus import Family
from service.state import Services

router = APIRouter(tags=["operations"])

_REASONS = get_args(FailureReason)
_TRITON_PARTS = {
    "request": ("success", "Cumulative inference request duration in microseconds (includes cached requests)"),
    "queue": ("queue", "Cumulative inference queuing duration in microseconds (includes cached requests)"),
    "compute_input": ("compute_input", "Cumulative compute input duration in microseconds"),
    "compute_infer": ("compute_infer", "Cumulative compute inference duration in microseconds"),
    "compute_output": ("compute_output", "Cumulative inference compute output duration in microseconds"),
}
_HELP = {
    "request": "Duration of successful requests, from the whole body to the encoded answer, in seconds",
    "queue": "Time that requests waited for their turn, in seconds",
    "decode": "Time to decode a request, in seconds",
    "compute": "Time of the execution that a request was in, in seconds",
    "encode": "Time to encode an answer, in seconds",
}
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_STARTED = time.time()


@router.get("/metrics", response_class=Response)
async def read_metrics(services: ServicesDep) -> Response:
    """Counters, gauges and histograms of models and of the process, in Prometheus' text format.

    A served model is there from its load on, a built-in one from its first call on.
    """
    entries = [entry for entry in services.models.entries() if entry.loaded is not None and _is_shown(entry)]
    families = [*_counters(entries), *_histograms(entries), *_gauges(entries, services), *_process()]
    return Response(prometheus.encode(families), media_type=prometheus.CONTENT_TYPE)


def _is_shown(entry: Entry) -> bool:
    """A served model from its load on; of the many that are built in, those that were called."""
    return entry.record is not None or entry.usage.execution_count > 0 or entry.usage.failures.total() > 0


def _counters(entries: Iterable[Entry]) -> Iterable[Family]:
    success = Family(
        "nv_inference_request_success", "counter", "Number of successful inference requests, all batch sizes"
    )
    failure = Family("nv_inference_request_failure", "counter", "Number of failed inference requests, all batch sizes")
    count = Family("nv_inference_count", "counter", "Number of inferences performed (does not include cached requests)")
    executions = Family("nv_inference_exec_count", "counter", "Number of model executions performed")
    received = Family("normserve_request_bytes_total", "counter", "Bytes of the bodies of successful requests")
    sent = Family("normserve_response_bytes_total", "counter", "Bytes of the bodies of their answers")
    durations = {
        name: Family(f"nv_inference_{name}_duration_us", "counter", text) for name, (_, text) in _TRITON_PARTS.items()
    }
    for entry in entries:
        labels, usage = _labels(entry), entry.usage
        parts = usage.to_dict()["inference_stats"]
        success.add(parts["success"]["count"], labels)
        for reason in _REASONS:
            failure.add(usage.failures[reason], {**labels, "reason": reason})
        count.add(usage.inference_count, labels)
        executions.add(usage.execution_count, labels)
        received.add(usage.request_bytes, labels)
        sent.add(usage.response_bytes, labels)
        for name, (part, _) in _TRITON_PARTS.items():
            durations[name].add(parts[part]["ns"] // 1000, labels)
    return [success, failure, count, executions, received, sent, *durations.values()]


def _histograms(entries: Iterable[Entry]) -> Iterable[Family]:
    durations = {part: Family(f"normserve_{part}_duration_seconds", "histogram", text) for part, text in _HELP.items()}
    sizes = Family("normserve_batch_size", "histogram", "Rows of executions")
    for entry in entries:
        labels = _labels(entry)
        for part, family in durations.items():
            _add(family, labels, entry.usage.durations[part], unit=1e9)
        _add(sizes, labels, entry.usage.batch_sizes, unit=1)
    return [*durations.values(), sizes]


def _add(family: Family, labels: dict[str, str], histogram: Histogram, *, unit: float) -> None:
    bounds = [bound / unit for bound in histogram.bounds]
    family.add_histogram(labels, bounds=bounds, counts=histogram.counts, total=histogram.total / unit)


def _gauges(entries: Iterable[Entry], services: Services) -> Iterable[Family]:
    pending = Family(
        "nv_inference_pending_request_count", "gauge", "Instantaneous number of pending requests awaiting execution"
    )
    for entry in entries:
        pending.add(entry.loaded.waiting if entry.loaded is not None else 0, _labels(entry))
    held = Family("normserve_receive_budget_used_bytes", "gauge", "Bytes of request bodies that are held")
    held.add(services.budget.used_bytes)
    limit = Family("normserve_receive_budget_bytes", "gauge", "Bytes of request bodies that may be held")
    limit.add(services.budget.limit_bytes)
    kept = Family("normserve_kernels_kept", "gauge", "Whether all kernels are compiled and on the disk")
    kept.add(int(services.compiler.has_all))
    compiled = Family(
        "normserve_kernels_compiled_total", "counter", "Kernels compiled by the service itself, amid requests"
    )
    compiled.add(compiled_here())
    return [pending, held, limit, kept, compiled]


def _process() -> Iterable[Family]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu = Family("process_cpu_seconds_total", "counter", "CPU time of the process in seconds")
    cpu.add(usage.ru_utime + usage.ru_stime)
    memory = Family("process_resident_memory_bytes", "gauge", "Resident memory of the process in bytes")
    memory.add(int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES)
    started = Family("process_start_time_seconds", "gauge", "When the service was imported, in seconds since the epoch")
    started.add(_STARTED)
    return [cpu, memory, started]


def _labels(entry: Entry) -> dict[str, str]:
    return {"model": entry.name, "version": str(entry.version)}
