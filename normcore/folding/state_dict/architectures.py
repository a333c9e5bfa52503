"""Known classes: their graph says what feeds what, and their batch norms say what eps is.

The class is built without weights, its keys and shapes are compared with the file's, and its forward is traced. Only
torchvision's own builders, by exact name; nothing in a file or a request chooses what is imported.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from normcore.checkpoints.tensors import Tensor
from normcore.errors import FoldError
from normcore.folding.state_dict.report import Evidence, Kind, Pairing

# fmt: off
ARCHITECTURES: tuple[str, ...] = tuple(f"torchvision/{name}" for name in (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2", "densenet121", "densenet161", "densenet169",
    "densenet201", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn", "mobilenet_v2", "mobilenet_v3_small",
    "mobilenet_v3_large", "efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3",
    "efficientnet_b4", "efficientnet_b5", "efficientnet_b6", "efficientnet_b7", "efficientnet_v2_s",
    "efficientnet_v2_m", "efficientnet_v2_l", "googlenet", "inception_v3", "mnasnet0_5", "mnasnet0_75", "mnasnet1_0",
    "mnasnet1_3", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0",
    "regnet_x_400mf", "regnet_x_800mf", "regnet_x_1_6gf", "regnet_x_3_2gf", "regnet_x_8gf", "regnet_x_16gf",
    "regnet_x_32gf", "regnet_y_400mf", "regnet_y_800mf", "regnet_y_1_6gf", "regnet_y_3_2gf", "regnet_y_8gf",
    "regnet_y_16gf", "regnet_y_32gf",
))
# fmt: on
"""Names that `architecture` may have."""

_CLASSES = 1000
_OPERATORS: dict[type[nn.Module], Kind] = {
    nn.Conv1d: "conv",
    nn.Conv2d: "conv",
    nn.Conv3d: "conv",
    nn.ConvTranspose1d: "conv_transpose",
    nn.ConvTranspose2d: "conv_transpose",
    nn.ConvTranspose3d: "conv_transpose",
}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INITIALIZED = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}


@dataclass(frozen=True, slots=True)
class Site:
    """Where a batch norm of a class stands: what it folds into, or why it does not."""

    eps: float
    linear: str | None
    kind: Kind | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class Architecture:
    """A class that a file belongs to. `build` makes another one of it on the meta device."""

    name: str
    sites: Mapping[str, Site]
    build: Callable[[], nn.Module]

    def settle(self, entry: Pairing, norm: str, *, prefix: str) -> Pairing:
        """What the graph says of a batch norm; it says everything, so nothing is left to evidence."""
        site = self.sites[norm]
        if entry.standing == "refused":
            return entry
        source = f"the class {self.name}"
        if site.linear is None:
            return replace(
                entry,
                standing="kept",
                status="kept",
                reason=site.reason,
                eps=site.eps,
                eps_source=source,
                into=None,
                kind=None,
                settles=None,
            )
        return replace(
            entry,
            standing="class-verified",
            status="foldable",
            into=prefix + site.linear,
            kind=site.kind,
            eps=site.eps,
            eps_source=source,
            reason=None,
            settles=None,
            evidence=(Evidence("graph", True, f"the forward of {self.name}: {site.linear} feeds {norm} alone"),),
        )


def match_architecture(name: str, tensors: Mapping[str, Tensor], *, prefix: str) -> Architecture:
    """The class of that name, traced, once the file's keys and shapes are known to be its own.

    Raises:
        FoldError: the name is unknown, its package is not installed, or the file belongs to another class.
    """
    if name not in ARCHITECTURES:
        raise FoldError(f"architecture: {name!r} is not known; known are {', '.join(ARCHITECTURES)}")
    shapes = {key.removeprefix(prefix): tensor.shape for key, tensor in tensors.items()}
    options: dict[str, Any] = {}
    model = _build(name, options)
    head = next((key for key, value in model.state_dict().items() if _is_head(value.shape, shapes.get(key))), None)
    if head is not None:
        options = {"num_classes": shapes[head][0]}
        model = _build(name, options)
    _check_keys(name, {key: tuple(value.shape) for key, value in model.state_dict().items()}, shapes)
    return Architecture(name, _sites(model), lambda: _build(name, options))


def _is_head(expected: torch.Size, found: tuple[int, ...] | None) -> bool:
    return bool(
        found and len(expected) == len(found) > 1 and expected[0] == _CLASSES != found[0] and expected[1:] == found[1:]
    )


def _build(name: str, options: Mapping[str, Any]) -> nn.Module:
    builder = name.rpartition("/")[2]
    models = import_torchvision()
    with _WithoutWeights():
        model = getattr(models, builder)(weights=None, **options, **_INITIALIZED.get(builder, {}))
    assert isinstance(model, nn.Module)
    return model.eval()


class _WithoutWeights(TorchFunctionMode):
    """Parameters have shapes and no memory; small tensors that a builder computes with stay real."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        own = {**(kwargs or {}), "device": "meta"} if func is torch.empty else kwargs or {}
        return func(*args, **own)


def import_torchvision() -> Any:
    """torchvision.models. Raises FoldError where torchvision is not installed.

    A torchvision built for CUDA imports on a CPU build of torch once its compiled operators have a schema; the models
    do not call them. https://github.com/pytorch/vision/issues/9077
    """
    try:
        with contextlib.suppress(RuntimeError):
            return importlib.import_module("torchvision.models")
        _operator_schemas()
        return importlib.import_module("torchvision.models")
    except ImportError:
        raise FoldError(
            "architecture: torchvision is not installed; install normserve with its extra `architectures`"
        ) from None


@functools.cache
def _operator_schemas() -> torch.library.Library:
    """Definitions that live as long as the library they are in, hence the cache."""
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch ships no types
    for operator in ("nms", "qnms"):
        schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library.define(schema)  # type: ignore[no-untyped-call]  # as above
    return library


def _check_keys(name: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    counters = {key for key in expected if key.endswith(".num_batches_tracked")}  # files older than torch 0.4.1
    missing = sorted(expected.keys() - found.keys() - counters)
    extra = sorted(found.keys() - expected.keys())
    if missing or extra:
        which, key = ("lacks", missing[0]) if missing else ("also has", extra[0])
        count = len(missing) + len(extra)
        raise FoldError(f"architecture: the checkpoint is no {name}: it {which} {key!r}, {count} such keys in all")
    for key, shape in found.items():
        if shape != expected[key]:
            raise FoldError(
                f"architecture: the checkpoint is no {name}: {key!r} has shape {list(shape)}, "
                f"expected {list(expected[key])}"
            )


def _sites(model: nn.Module) -> dict[str, Site]:
    """Every batch norm of the class, by name."""
    modules = dict(model.named_modules())
    graph = torch.fx.symbolic_trace(model).graph
    calls: dict[str, list[torch.fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
        elif node.op == "get_attr":  # a parameter that the forward reads by itself counts as a use of its module
            calls.setdefault(str(node.target).rpartition(".")[0], []).append(node)
    return {
        name: _site(modules, calls, name, float(module.eps))
        for name, module in modules.items()
        if isinstance(module, _NORMS) and module.track_running_stats
    }


def _site(modules: Mapping[str, nn.Module], calls: Mapping[str, list[torch.fx.Node]], name: str, eps: float) -> Site:
    def kept(reason: str) -> Site:
        return Site(eps, None, None, reason)

    own = calls.get(name, [])
    if not own:
        return kept("the class does not run it in inference mode")
    if len(own) > 1 or type(modules[name]) not in _NORMS:
        return kept("the class uses it in several places")
    producer = own[0].args[0]
    if not isinstance(producer, torch.fx.Node) or producer.op != "call_module":
        target = producer.target if isinstance(producer, torch.fx.Node) else producer
        return kept(f"its input is produced by {getattr(target, '__name__', target)}")
    linear = str(producer.target)
    kind = _OPERATORS.get(type(modules[linear]))
    if kind is None:
        return kept(f"its input is produced by {linear}, a {type(modules[linear]).__name__}")
    if len(producer.users) > 1 or len(calls[linear]) > 1:
        return kept(f"the output of {linear} is used elsewhere, or {linear} is used twice")
    return Site(eps, linear, kind, None)


__all__ = ["ARCHITECTURES", "Architecture", "Site", "import_torchvision", "match_architecture"]
