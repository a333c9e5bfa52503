"""Whether two ONNX files compute the same function. It sees the files and nothing else: no rule of folding.

Seeded probes go through both networks, in their own precision (onnxruntime with every optimization off) and in
float64. Two networks are equivalent when the folded one's error against float64 is of the original's size on every
probe, and when every normalization that went into another operator is, by itself, what it was.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import onnxruntime
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no types
from onnx import ModelProto

from normcore.errors import CheckpointError, DeadlineError, NormcoreError
from normcore.execution import ExecutionError
from normcore.folding import probes
from normcore.folding.comparison import Comparison, Evaluations, compare
from normcore.folding.extents import common_tensors, find_extents
from normcore.folding.interfaces import find_difference, find_preactivations
from normcore.folding.networks import Network
from normcore.folding.probes import Feeds, Shapes
from normcore.folding.regions import RegionProof
from normcore.folding.report import Certificate, Probe, Region, Verdict
from normcore.folding.wording import (
    describe_equivalence,
    describe_failed_probe,
    describe_failed_region,
    describe_silent_probe,
)

_MIN_CONCLUSIVE = 4
_MAX_EXTRA = 12
_EXTRA_KINDS = ("random", "small", "impulse")
_REGION_PROBES = 3
_REDRAWS = 8


@dataclass(frozen=True, slots=True)
class ProbeOptions:
    """How hard to try, and what to take for granted.

    Attributes:
        count: number of probes.
        seed: their seed.
        deadline_s: seconds for everything.
        threads: threads of onnxruntime.
        has_kept_names: a tensor of one name is one tensor in both files, so that a difference at any of them is one.
            Otherwise names may have moved, and only outputs have to agree.
    """

    count: int = 6
    seed: int = 0
    deadline_s: float = 60.0
    threads: int = 1
    has_kept_names: bool = True


DEFAULTS = ProbeOptions()


def certify(original: Path, folded: Path, options: ProbeOptions = DEFAULTS) -> Certificate:
    """Compare two ONNX files, whoever made them.

    The verdict is `equivalent` when no probe and no region differs and at least 4 probes could have told; `different`
    when one does; `inconclusive` when the graphs cannot be run, or vary too little, or the time is over.

    Args:
        original: the file before folding.
        folded: the file after.
        options: number of probes, seed, deadline and threads.

    Raises:
        CheckpointError: a file is no ONNX model.
    """
    files = (original.read_bytes(), folded.read_bytes())
    models = [_parse(content, role) for content, role in zip(files, ("original", "folded"), strict=True)]
    proof = _Proof(models[0], models[1], options)
    with _one_torch_thread():
        verdict, sentence = proof.decide()
    return Certificate(
        verdict=verdict,
        sentence=sentence,
        original_sha256=hashlib.sha256(files[0]).hexdigest(),
        folded_sha256=hashlib.sha256(files[1]).hexdigest(),
        probes=tuple(proof.probes),
        inconclusive=tuple(describe_silent_probe(probe) for probe in proof.probes if not probe.conclusive),
        regions=proof.regions,
        reference=f"onnx.reference in float64; onnxruntime {onnxruntime.__version__} without optimizations",
    )


class _Proof:
    """The evidence about two networks, as it is gathered."""

    def __init__(self, original: ModelProto, folded: ModelProto, options: ProbeOptions) -> None:
        self._models = (original, folded)
        self._options = options
        self._deadline = time.monotonic() + options.deadline_s
        self._preactivations = find_preactivations(original, folded)
        self._outputs: list[str] = [output.name for output in original.graph.output]
        self._tensors = [*self._outputs, *dict.fromkeys(self._preactivations.values())]
        self.probes: list[Probe] = []
        self.regions: tuple[Region, ...] = ()

    def decide(self) -> tuple[Verdict, str]:
        obstacle: str | None = None
        try:
            self._gather()
        except _DifferenceError as error:
            return "different", str(error)
        except DeadlineError:
            obstacle = f"the deadline of {self._options.deadline_s:g} s has passed"
        except NormcoreError as error:
            obstacle = str(error)
        return self._conclude(obstacle)

    def _gather(self) -> None:
        difference = find_difference(*self._models)
        if difference:
            raise _DifferenceError(f"The two networks are not called alike: {difference}.")
        original, folded = self._open()
        inputs = probes.read_inputs(self._models[0])
        accept = partial(original.refuses, deadline=self._deadline)
        shapes = probes.find_shapes(self._models[0], accept, seed=self._options.seed)
        for index, kind in enumerate(self._kinds()):
            seed = self._options.seed + index
            feeds = probes.make_probe(inputs, shapes, kind=kind, seed=seed)
            for tensor, comparison in self._compare(original, folded, feeds, seed).items():
                self.probes.append(_record(kind, seed, shapes, tensor, comparison))
        self._prove_regions(
            original,
            folded,
            [
                probes.make_probe(inputs, shapes, kind="random", seed=self._options.seed + index)
                for index in range(_REGION_PROBES)
            ],
        )

    def _prove_regions(self, original: Network, folded: Network, feeds: Sequence[Feeds]) -> None:
        is_cut = None
        if not self._options.has_kept_names:
            names = common_tensors(*self._models)
            kept = original.agreeing(folded, names, feeds[0], deadline=self._deadline) | set(self._outputs)
            is_cut = kept.__contains__
        extents = find_extents(*self._models, is_cut=is_cut)
        if extents:
            proof = RegionProof(original.reference, self._models[1], extents, seed=self._options.seed)
            for probe in feeds:
                proof.add(probe, deadline=self._deadline)
            self.regions = proof.regions()

    def _open(self) -> tuple[Network, Network]:
        original = Network(self._models[0], self._tensors, threads=self._options.threads)
        try:
            return original, Network(self._models[1], self._tensors, threads=self._options.threads)
        except CheckpointError as error:
            raise _DifferenceError(f"The folded network cannot be used: {error}.") from error

    def _kinds(self) -> Iterator[str]:
        """The kinds that were asked for, and more until every output has told enough times."""
        yield from islice(cycle(probes.KINDS), self._options.count)
        for kind in islice(cycle(_EXTRA_KINDS), _MAX_EXTRA):
            if self._silent_output() is None:
                return
            yield kind

    def _compare(self, original: Network, folded: Network, feeds: Feeds, seed: int) -> dict[str, Comparison]:
        """Every tensor of one probe; a difference near the bound is looked at again, with more draws of rounding."""
        found = _compare_once(original, folded, feeds, self._deadline)
        suspects = [tensor for tensor, comparison in found.items() if comparison.is_suspect]
        for redraw in range(_REDRAWS if suspects else 0):
            moved = probes.jitter(feeds, seed=seed * _REDRAWS + redraw)
            again = _compare_once(original, folded, moved, self._deadline)
            found.update({tensor: found[tensor].pool(again[tensor]) for tensor in suspects})
        return found | {output: replace(found[output], is_explained=True) for output in self._explained(found)}

    def _explained(self, found: dict[str, Comparison]) -> list[str]:
        """Outputs near the bound whose preactivation agrees: a saturated output shrinks rounding errors at random."""
        pairs = self._preactivations.items()
        return [output for output, name in pairs if found[output].is_suspect and found[name].equivalent]

    def _silent_output(self) -> str | None:
        """An output that neither itself nor by its preactivation has told enough times."""
        for output in self._outputs:
            names = {output, self._preactivations.get(output)}
            seeds = {probe.seed for probe in self.probes if probe.conclusive and probe.output in names}
            if len(seeds) < _MIN_CONCLUSIVE:
                return output
        return None

    def _conclude(self, obstacle: str | None) -> tuple[Verdict, str]:
        for probe in self.probes:
            if not probe.equivalent:
                return "different", describe_failed_probe(probe)
        for region in self.regions:
            if not region.equivalent:
                return "different", describe_failed_region(region)
        if obstacle is not None:
            return "inconclusive", f"Nothing is proved: {obstacle}."
        silent = self._silent_output()
        if silent is not None:
            count = len({probe.seed for probe in self.probes})
            reasons = dict.fromkeys(probe.reason for probe in self.probes if probe.output == silent and probe.reason)
            return "inconclusive", (
                f"Nothing is proved: fewer than {_MIN_CONCLUSIVE} of {count} probes could tell anything of output "
                f"{silent}; {'; '.join(reasons)}."
            )
        return "equivalent", describe_equivalence(self.probes, self.regions)


class _DifferenceError(NormcoreError):
    """Two networks that cannot be the same, in a sentence."""


def _compare_once(original: Network, folded: Network, feeds: Feeds, deadline: float) -> dict[str, Comparison]:
    native_original = original.run(feeds, deadline=deadline)
    try:
        native_folded = folded.run(feeds, deadline=deadline)
    except ExecutionError as error:
        raise _DifferenceError(f"The folded network fails where the original does not: {error}.") from error
    exact_original = original.evaluate(feeds, deadline=deadline)
    exact_folded = folded.evaluate(feeds, deadline=deadline)
    return {
        name: compare(Evaluations(array, native_folded[name], exact_original[name], exact_folded[name]))
        for name, array in native_original.items()
    }


def _record(kind: str, seed: int, shapes: Shapes, tensor: str, comparison: Comparison) -> Probe:
    return Probe(
        kind=kind,
        seed=seed,
        shapes=dict(shapes),
        output=tensor,
        scale=comparison.scale,
        error_original=comparison.original,
        error_folded=comparison.folded,
        error_between=comparison.between,
        error_exact=comparison.exact,
        bound=comparison.bound,
        conclusive=comparison.conclusive,
        equivalent=comparison.equivalent,
        reason=comparison.reason,
    )


def _parse(content: bytes, role: str) -> ModelProto:
    model = ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError as error:
        raise CheckpointError(f"the {role} file is no ONNX model") from error
    if not model.HasField("graph"):
        raise CheckpointError(f"the {role} file is no ONNX model: it holds no graph")
    return model


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """At the size of probes a second thread gains nothing, and on a busy machine its spinning costs tenfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
