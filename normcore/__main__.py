"""`python -m normcore`: fold, plan and compare checkpoints from a shell.

Everything runs in this process: for files of your own, not of strangers.

exit status:
  0  equivalent, or nothing to fold; a plan was made
  1  different
  2  wrong arguments
  3  inconclusive: the proof could not tell
  4  folded, but not proven: named tensors of an unknown class, or --no-verify
  5  a file that is no usable checkpoint, or an option that cannot be honoured
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from normcore.checkpoints.onnx import GraphLimits
from normcore.errors import NormcoreError
from normcore.folding.checkpoint import Limits, Options, fold_file, plan_file, verdict_of
from normcore.folding.compare import compare_checkpoints
from normcore.folding.state_dict.options import Told
from normcore.folding.verify import ProbeOptions

STATUS = {"equivalent": 0, "unchanged": 0, "different": 1, "inconclusive": 3, "unproven": 4}
REFUSED = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    wanted = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = wanted.run
    torch.set_num_threads(wanted.threads)
    try:
        return run(wanted)
    except (NormcoreError, OSError) as error:
        sys.stderr.write(f"{error}\n")
    except MemoryError:
        sys.stderr.write("the checkpoint needs more memory than there is\n")
    return REFUSED


def _fold(wanted: argparse.Namespace) -> int:
    verify = None if wanted.no_verify else _probes(wanted)
    report = fold_file(wanted.source, wanted.target, limits=_limits(wanted), options=_options(wanted), verify=verify)
    if wanted.report is not None:
        wanted.report.write_text(json.dumps(report, indent=1) + "\n")
    verdict = verdict_of(report)
    sys.stdout.write(f"{verdict}: {report['folded']} of {report['normalizations']} normalizations folded\n")
    _tell(report)
    return STATUS[verdict]


def _plan(wanted: argparse.Namespace) -> int:
    plan = plan_file(wanted.source, limits=_limits(wanted), options=_options(wanted))
    if wanted.json:
        sys.stdout.write(json.dumps(plan, indent=1) + "\n")
        return 0
    for entry in plan["normalizations"]:
        said = f"into {entry['into']}" if entry["status"] == "foldable" else entry["reason"] or ""
        if entry.get("settles"):
            said += f"; what would settle it: {entry['settles']}"
        sys.stdout.write(f"{entry['status']:<10}{entry['normalization']}: {said}\n")
    foldable = sum(entry["status"] == "foldable" for entry in plan["normalizations"])
    sys.stdout.write(f"{foldable} of {len(plan['normalizations'])} normalizations would fold\n")
    for note in plan["notes"]:
        sys.stderr.write(f"{note}\n")
    return 0


def _compare(wanted: argparse.Namespace) -> int:
    found = compare_checkpoints(
        wanted.first, wanted.second, limits=_limits(wanted).graph, options=_probes(wanted)
    ).to_dict()
    if wanted.report is not None:
        wanted.report.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(f"{found['verdict']}: {found['sentence']}\n")
    return STATUS[found["verdict"]]


def _tell(report: Mapping[str, Any]) -> None:
    proof = report.get("certificate") or report.get("proof")
    lines = [proof["sentence"]] if proof else []
    lines += [
        f"{entry['normalization']} is {entry['status']}: {entry['reason']}"
        for entry in report["entries"]
        if entry["status"] != "folded"
    ]
    for line in (*lines, *report["notes"]):
        sys.stderr.write(f"{line}\n")


def _probes(wanted: argparse.Namespace) -> ProbeOptions:
    return ProbeOptions(count=wanted.probes, seed=wanted.seed, deadline_s=wanted.deadline_s, threads=wanted.threads)


def _limits(wanted: argparse.Namespace) -> Limits:
    limits = Limits(graph=GraphLimits(max_nodes=wanted.max_nodes, max_tensor_bytes=wanted.max_tensor_bytes))
    return replace(limits, tensors=replace(limits.tensors, max_tensors=wanted.max_tensors))


def _options(wanted: argparse.Namespace) -> Options:
    names = Options.__dataclass_fields__
    return Options(**{name: getattr(wanted, name) for name in names})


def _pairs(text: str) -> dict[str, Told]:
    """What NORM=LINEAR[,NORM=LINEAR...] says."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(norm and sign and linear for norm, sign, linear in pairs):
        raise argparse.ArgumentTypeError(f"expected NORM=LINEAR[,NORM=LINEAR...], received {text!r}")
    return {norm: Told(linear) for norm, _, linear in pairs}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m normcore", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    fold = commands.add_parser("fold", help="fold a checkpoint into another file, with a proof")
    fold.add_argument("source", type=Path, help="ONNX, safetensors or PyTorch (zip) file")
    fold.add_argument("target", type=Path, help="folded file: ONNX, or safetensors for named tensors")
    fold.add_argument("--report", type=Path, help="write the report here, as JSON")
    fold.add_argument("--no-verify", action="store_true", help="write an unproven file")
    fold.set_defaults(run=_fold)
    plan = commands.add_parser("plan", help="list every normalization with what it would fold into, or why not")
    plan.add_argument("source", type=Path)
    plan.add_argument("--json", action="store_true", help="print the whole plan as JSON")
    plan.set_defaults(run=_plan)
    compare = commands.add_parser("compare", help="prove two ONNX files equivalent, whoever made them")
    compare.add_argument("first", type=Path, help="the file that counts as right")
    compare.add_argument("second", type=Path)
    compare.add_argument("--report", type=Path, help="write the certificate here, as JSON")
    compare.set_defaults(run=_compare)
    for command in (fold, plan):
        _add_options(command)
    for command in (fold, compare):
        _add_probes(command)
    for command in (fold, plan, compare):
        _add_limits(command)
    return parser


def _add_options(command: argparse.ArgumentParser) -> None:
    graph = command.add_argument_group("ONNX files")
    graph.add_argument("--freeze-initializers", action="store_true", help="fold initializers that are also inputs")
    graph.add_argument("--zero-padding", choices=("auto", "pad", "map", "offset", "refuse"), default="auto")
    graph.add_argument("--cross-activations", action="store_true", help="move positive scales through Relu and its kin")
    graph.add_argument("--move-gains", action="store_true", help="move gains of layer and RMS norms forward")
    graph.add_argument("--affine", action="store_true", help="turn batch norms that stay into Mul and Add")
    tensors = command.add_argument_group("files of named tensors")
    tensors.add_argument("--form", choices=("deploy", "shape_preserving"), default="deploy")
    tensors.add_argument("--eps", type=float, help="what every batch norm adds to its variance")
    tensors.add_argument("--accept-assumed", action="store_true", help="fold what rests on evidence alone")
    tensors.add_argument("--pairs", type=_pairs, default={}, metavar="NORM=LINEAR,...", help="pairs you vouch for")
    tensors.add_argument("--architecture", help="class of the file, such as torchvision/resnet18")
    tensors.add_argument("--group", help="which state_dict of a file with several")
    tensors.add_argument("--bake", action="store_true", help="replace weight norm and spectral norm by their weights")


def _add_probes(command: argparse.ArgumentParser) -> None:
    defaults = ProbeOptions()
    proof = command.add_argument_group("proof")
    proof.add_argument("--probes", type=_at_least(4), default=defaults.count)
    proof.add_argument("--seed", type=_at_least(0), default=defaults.seed)
    proof.add_argument("--deadline-s", type=float, default=600.0, help="seconds for the whole proof")


def _add_limits(command: argparse.ArgumentParser) -> None:
    limits = Limits()
    bounds = command.add_argument_group("limits")
    bounds.add_argument("--max-nodes", type=_at_least(1), default=limits.graph.max_nodes)
    bounds.add_argument("--max-tensor-bytes", type=_at_least(1), default=limits.graph.max_tensor_bytes)
    bounds.add_argument("--max-tensors", type=_at_least(1), default=limits.tensors.max_tensors)
    bounds.add_argument("--threads", type=_at_least(1), default=1)


def _at_least(minimum: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"expected at least {minimum}, received {value}")
        return value

    return integer


if __name__ == "__main__":
    sys.exit(main())
