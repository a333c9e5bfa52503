"""Recalibration and drift as use cases: batches of data for a kept checkpoint, worked on in a child process."""

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normcore.errors import DeadlineError, ParameterError
from service.application.checkpoints import Checkpoints, GraphSandbox, Progress
from service.application.jobs import completed, then_keep
from service.engine.admission import ReceiveBudget
from service.engine.protocol import Tensor, Tensors
from service.engine.staged_tensors import Places, lay_out
from service.errors import DeadlineExceededError, PayloadTooLargeError
from service.settings import Settings
from service.storage.blobs import Blobs
from service.storage.metadata import CheckpointRecord, Metadata

_NUMBERED = re.compile(r"(.+)\.([0-9]{1,6})", re.DOTALL)
_MAX_SHOWN = 80


@dataclass(frozen=True, slots=True)
class StagedBatches:
    """Batches of one checkpoint's inputs, in a file for a child process."""

    checkpoint: str
    path: Path
    batches: list[Places]


@dataclass(frozen=True, slots=True)
class RecalibrationOutcome:
    """The new checkpoint (the same one where no statistic was replaced), the report, and whether it is new."""

    checkpoint: CheckpointRecord
    report: dict[str, Any]
    is_new: bool


class Calibration:
    """Recalibrate a kept checkpoint, or measure its drift."""

    def __init__(
        self, *, checkpoints: Checkpoints, blobs: Blobs, metadata: Metadata, sandbox: GraphSandbox, settings: Settings
    ) -> None:
        self._checkpoints = checkpoints
        self._blobs = blobs
        self._metadata = metadata
        self._sandbox = sandbox
        self._settings = settings
        self._budget = ReceiveBudget(settings.calibration_budget_bytes, setting="NORMSERVE_CALIBRATION_BUDGET_BYTES")

    @asynccontextmanager
    async def staged(self, checkpoint_id: str, tensors: Tensors, *, is_unnamed: bool) -> AsyncIterator[StagedBatches]:
        """The tensors as batches in a file that exists until the context ends.

        Args:
            checkpoint_id: whose inputs they are for.
            tensors: by input name, or by input name and number of the batch (`x.0`, `x.1`).
            is_unnamed: the one tensor has a name of its format, and is for the network's only input.

        Raises:
            ParameterError: the names are not those of batches of the network's inputs.
            OverloadedError: other batches take too much room.
        """
        record = await self._checkpoints.get(checkpoint_id)
        inputs = [entry["name"] for entry in record.summary["inputs"]]
        if is_unnamed:
            tensors = _named(tensors, inputs)
        batches = into_batches(tensors, inputs, limit=self._settings.max_calibration_batches)
        places, chunks = lay_out(batches)
        with self._budget.held(sum(map(len, chunks))):
            path = self._blobs.stage_path()
            try:
                await self._blobs.write_scratch(path, chunks)
                del chunks, batches, tensors
                yield StagedBatches(record.id, path, places)
            finally:
                await self._blobs.discard(path)

    async def recalibrate(
        self, staged: StagedBatches, *, freeze_initializers: bool, progress: Progress | None = None
    ) -> RecalibrationOutcome:
        """Recompute the checkpoint's running statistics into a new checkpoint beside it."""
        async with self._checkpoints.used(staged.checkpoint) as source:
            target = self._blobs.stage_path()
            options = {"target": str(target), "freeze_initializers": freeze_initializers}
            try:
                report = await self._run("recalibrate", staged, options, then_keep(progress))
                report["recalibrated_from"] = source.id
                if not report["recalibrated"]:
                    return RecalibrationOutcome(source, report, is_new=False)
                return await completed(self._keep(target, source, report))
            finally:
                await self._blobs.discard(target)

    async def drift(
        self, staged: StagedBatches, *, threshold: float, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Compare the checkpoint's frozen statistics with those of the batches."""
        async with self._checkpoints.used(staged.checkpoint):
            return await self._run("drift", staged, {"threshold": threshold}, progress)

    async def _keep(self, target: Path, source: CheckpointRecord, report: dict[str, Any]) -> RecalibrationOutcome:
        staged = await self._blobs.adopt(target)
        filename = f"{Path(source.filename).stem}.recalibrated.onnx"
        record, is_new = await self._checkpoints.keep(staged, filename=filename, report=report)
        if not is_new:
            await self._metadata.set_report(record.id, folded_from=None, report=report)
            record = await self._checkpoints.get(record.id)
        return RecalibrationOutcome(record, report, is_new=is_new)

    async def _run(
        self, operation: str, staged: StagedBatches, options: Mapping[str, Any], progress: Progress | None
    ) -> dict[str, Any]:
        arguments = {
            "source": str(self._checkpoints.path(staged.checkpoint)),
            "limits": self._checkpoints.limits(),
            "tensors": str(staged.path),
            "batches": staged.batches,
            "threads": 1,  # it must not fight the served models for the cores
            "deadline_s": 0.9 * self._settings.sandbox_deadline_s,  # it tells more of itself than a killed child does
            **options,
        }
        try:
            return await self._sandbox.run(operation, arguments, progress=progress)
        except DeadlineError as error:
            raise DeadlineExceededError(
                f"{operation}: stopped after {error.deadline_s:g} s (NORMSERVE_SANDBOX_DEADLINE_S); send fewer or "
                "smaller batches"
            ) from error


def into_batches(tensors: Tensors, inputs: list[str], *, limit: int) -> list[dict[str, Tensor]]:
    """One batch where the tensors are named as the inputs; else `<input>.<number>`, numbers from 0 without a gap.

    Raises:
        ParameterError: a name is neither, or a batch lacks an input.
        PayloadTooLargeError: there are more batches than `limit`.
    """
    if all(name in inputs for name in tensors):
        batches = {0: dict(tensors)} if tensors else {}
    else:
        batches = _numbered(tensors, inputs)
    if len(batches) > limit:
        raise PayloadTooLargeError(
            f"body: expected at most {limit} batches (NORMSERVE_MAX_CALIBRATION_BATCHES), received {len(batches)}"
        )
    if not batches:
        expected = f"a tensor per input: {', '.join(inputs)}"
        raise ParameterError("body", expected=expected, received="no tensors")
    for number in range(len(batches)):
        for name in inputs:
            if name not in batches.get(number, {}):
                shown = name if len(batches) == 1 and all(known in inputs for known in tensors) else f"{name}.{number}"
                received = f"no such tensor, but {', '.join(sorted(tensors))[:_MAX_SHOWN]}"
                raise ParameterError(shown[:_MAX_SHOWN], expected="a tensor in the body", received=received)
    return [batches[number] for number in range(len(batches))]


def _numbered(tensors: Tensors, inputs: list[str]) -> dict[int, dict[str, Tensor]]:
    batches: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _NUMBERED.fullmatch(name)
        if found is None or found[1] not in inputs or found[2] != str(int(found[2])):
            known = ", ".join(inputs) or "(the network has none)"
            expected = f"one of the inputs {known}, or such a name with a dot and the number of its batch, from 0"
            raise ParameterError(name[:_MAX_SHOWN], expected=expected, received="an unknown name")
        batches.setdefault(int(found[2]), {})[found[1]] = tensor
    return batches


def _named(tensors: Tensors, inputs: list[str]) -> dict[str, Tensor]:
    if len(inputs) != 1:
        expected = f"named tensors for the inputs {', '.join(inputs)}, as in application/x-npz"
        raise ParameterError("body", expected=expected, received="one tensor without a name")
    return dict.fromkeys(inputs, *tensors.values())
