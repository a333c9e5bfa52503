"""Both forms compute what the original computes, for every kind of operator and layout of keys."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from normcore.errors import FoldError
from normcore.folding.state_dict.fold import MANIFEST_KEY, fold_state_dict, plan_state_dict
from normcore.folding.state_dict.loader import load_folded
from normcore.folding.state_dict.options import StateDictOptions, Told
from normcore.folding.state_dict.report import Form, Kind
from tests.normcore.folding.state_dict.networks import Pair, difference, folded, save, trained

README = Path(__file__).parents[4] / "README.md"
FORMS = pytest.mark.parametrize("form", ["deploy", "shape_preserving"])


def channels_last(conv: nn.Conv2d) -> nn.Module:
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    return conv


def whole_weight_norm() -> nn.Module:
    dim: Any = None  # one length for the whole tensor; torch annotates int
    conv: nn.Module = parametrizations.weight_norm(nn.Conv2d(3, 20, 3), dim=dim)
    return conv


OPERATORS: list[tuple[str, Callable[[], nn.Module], int, tuple[int, ...], Kind | None]] = [
    ("conv1d", lambda: nn.Conv1d(3, 20, 3, bias=False), 20, (2, 3, 9), None),
    ("conv2d", lambda: nn.Conv2d(3, 20, 3, padding=1), 20, (2, 3, 7, 9), None),
    ("conv3d", lambda: nn.Conv3d(2, 6, 3), 6, (1, 2, 5, 6, 7), "conv"),
    ("square", lambda: nn.Conv2d(8, 8, 3, bias=False), 8, (2, 8, 7, 9), "conv"),
    ("grouped", lambda: nn.Conv2d(8, 12, 3, groups=4), 12, (2, 8, 7, 9), "conv"),
    ("depthwise", lambda: nn.Conv2d(8, 8, 3, groups=8), 8, (2, 8, 7, 9), None),
    ("transposed", lambda: nn.ConvTranspose2d(6, 10, 3), 10, (2, 6, 5, 7), "conv_transpose"),
    ("transposed-square", lambda: nn.ConvTranspose2d(8, 8, 4, 2, bias=False), 8, (2, 8, 5, 7), "conv_transpose"),
    ("transposed-grouped", lambda: nn.ConvTranspose2d(8, 12, 3, groups=4), 12, (2, 8, 5, 7), "conv_transpose"),
    ("transposed-1d", lambda: nn.ConvTranspose1d(5, 7, 3), 7, (2, 5, 9), "conv_transpose"),
    ("linear", lambda: nn.Linear(5, 9), 9, (4, 5), None),
    ("channels-last", lambda: channels_last(nn.Conv2d(3, 20, 3)), 20, (2, 3, 7, 9), None),
]


@FORMS
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize(
    ("operator", "channels", "shape", "kind"), [pytest.param(*row[1:], id=row[0]) for row in OPERATORS]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_computes_the_same(
    operator: Callable[[], nn.Module],
    channels: int,
    shape: tuple[int, ...],
    kind: Kind | None,
    affine: bool,
    form: str,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    def build() -> nn.Module:
        norm = Pair(operator(), channels, affine=affine)
        dimensions = {3: nn.BatchNorm1d, 5: nn.BatchNorm3d}.get(len(shape))
        if dimensions is not None:
            norm.bn = dimensions(channels, affine=affine)
        return norm

    model = trained(build()).to(dtype)
    pairs = {"bn": Told("conv", eps=1e-5, kind=kind)}
    other, report = folded(model, tmp_path, build, form=form, pairs=pairs)
    assert [entry.status for entry in report.entries] == ["folded"]
    x = torch.randn(shape, dtype=dtype)
    with torch.inference_mode():
        expected = model(x)
        assert (other(x) - expected).abs().max() / expected.abs().max() < (1e-12 if dtype == torch.float64 else 2e-6)
    assert difference(other, model, x) < (1e-14 if dtype == torch.float64 else 3e-7)


@pytest.mark.parametrize(("weight", "mean"), [(2, 3e4), (0.5, 3e4), (2, 3)], ids=["up", "down", "near"])
def test_shape_preserving_multiplies_nothing_up_in_float16(weight: float, mean: float, tmp_path: Path) -> None:
    """4e4 * 2 - 6e4 is small, and 4e4 * 2 is infinite: the deploy form subtracts where it multiplies."""
    norm = nn.BatchNorm2d(20)
    for values, value in ((norm.weight, weight), (norm.running_mean, mean)):
        assert values is not None
        values.data.fill_(value)
    model = nn.ModuleDict({"conv": nn.Conv2d(1, 20, 1).half(), "bn": norm})
    source, target = save(model, tmp_path / "half.safetensors"), tmp_path / "folded.safetensors"
    pairs = {"bn": Told("conv", eps=1e-5)}
    kept = StateDictOptions(form="shape_preserving", pairs=pairs)
    if weight > 1 and mean > 32:
        with pytest.raises(FoldError, match="in float16 the output of conv, 2 times what it was in channel 0"):
            fold_state_dict(source, target, options=kept)
        assert not target.exists()
    else:
        assert [entry.status for entry in fold_state_dict(source, target, options=kept).entries] == ["folded"]
    deployed = fold_state_dict(source, target, options=StateDictOptions(pairs=pairs))
    assert [entry.status for entry in deployed.entries] == ["folded"]


class Chain(nn.Module):
    """Sequences by number, pairs by name, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 20, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(20)
        self.layer = nn.Sequential(
            nn.Conv2d(20, 24, 3, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 28, 1, bias=False),
            nn.BatchNorm2d(28),
        )  # fmt: skip
        self.fc = nn.Linear(28, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.layer(torch.relu(self.bn1(self.conv1(x)))).mean((2, 3)))
        return y


IMAGE = torch.randn(2, 3, 11, 12, generator=torch.Generator().manual_seed(1))


@FORMS
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_folds_assumed_pairs_on_request(form: str, suffix: str, tmp_path: Path) -> None:
    model = trained(Chain())
    other, report = folded(model, tmp_path, Chain, suffix=suffix, form=form, accept_assumed=True, eps=1e-5)
    assert [(entry.normalization, entry.into) for entry in sorted(report.entries, key=lambda e: e.normalization)] == [
        ("bn1", "conv1"),
        ("layer.1", "layer.0"),
        ("layer.4", "layer.3"),
    ]
    assert all(entry.standing == "assumed" and entry.eps_source == "given by the caller" for entry in report.entries)
    assert difference(other, model, IMAGE) < 1e-6


@FORMS
def test_wrong_eps_is_seen_by_the_comparison(form: str, tmp_path: Path) -> None:
    model = trained(Chain())
    if form == "deploy":
        with pytest.raises(ValueError, match=r"bn1 has eps 1e-05, and was folded with 0\.1"):
            folded(model, tmp_path, Chain, form=form, accept_assumed=True, eps=0.1)
    else:
        other, _ = folded(model, tmp_path, Chain, form=form, accept_assumed=True, eps=0.1)
        assert difference(other, model, IMAGE) > 1e-2


def test_does_not_fold_assumed_pairs_unasked(tmp_path: Path) -> None:
    _, report = folded(trained(Chain()), tmp_path, Chain)
    assert not report.written
    assert {entry.standing for entry in report.entries} == {"assumed"}
    assert all("accept_assumed" in (entry.reason or "") for entry in report.entries)
    assert any("rest on evidence alone" in note for note in report.notes)


def test_accept_assumed_without_eps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FoldError, match="accept_assumed: expected together with eps"):
        folded(trained(Chain()), tmp_path, Chain, accept_assumed=True)
    assert not (tmp_path / "folded.safetensors").exists()


def test_manifest_names_every_change(tmp_path: Path) -> None:
    _, report = folded(trained(Chain()), tmp_path, Chain, accept_assumed=True, eps=1e-5)
    with safetensors.safe_open(tmp_path / "folded.safetensors", "np") as file:
        manifest = json.loads(file.metadata()[MANIFEST_KEY])
        written = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no dict
    assert {change["key"] for change in manifest["changes"]} == {
        "conv1.weight", "conv1.bias", "layer.0.weight", "layer.0.bias", "layer.3.weight", "layer.3.bias",
    }  # fmt: skip
    for change in manifest["changes"]:
        assert change["sha256"] == hashlib.sha256(written[change["key"]].tobytes()).hexdigest()
        assert change["eps"] == 1e-5
    gone = set(Chain().state_dict()) - set(written)
    assert gone == set(report.removed)
    assert "bn1.running_var" in gone
    first = report.entries[0]
    original = torch.load(tmp_path / "source.pth")
    before = {each.name: each.sha256 for each in first.before}
    assert before["conv1.weight"] == hashlib.sha256(original["conv1.weight"].numpy().tobytes()).hexdigest()
    assert {each.name for each in first.after} == {"conv1.weight", "conv1.bias"}
    assert first.residual is not None
    assert 0 < first.residual < 2**-23


def test_printed_loader_loads(tmp_path: Path) -> None:
    model = trained(Chain())
    _, report = folded(model, tmp_path, Chain, accept_assumed=True, eps=1e-5)
    assert report.loader is not None
    names: dict[str, Callable[[nn.Module, str], nn.Module]] = {}
    exec(report.loader, names)  # the text that users copy
    other = names["load_folded"](Chain(), str(tmp_path / "folded.safetensors")).eval()
    assert isinstance(other.get_submodule("bn1"), nn.Identity)
    assert difference(other, model, IMAGE) < 1e-6


class ActivatedNorm(nn.BatchNorm2d):
    """A batch norm that carries an activation, as timm's do: Identity would drop it."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(super().forward(input))


def test_loader_refuses_a_norm_that_does_more(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = Chain()
        model.bn1 = ActivatedNorm(20)
        return model

    with pytest.raises(TypeError, match="bn1 or conv1 is of a class that does more than its keys say"):
        folded(trained(build()), tmp_path, build, accept_assumed=True, eps=1e-5)


class Standardized(nn.Conv2d):
    """A convolution that changes its weight at every call."""

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(input, self.weight - self.weight.mean(), self.bias)
        return output


def test_loader_refuses_an_operator_that_does_more(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = Chain()
        model.conv1 = Standardized(3, 20, 3, bias=False)
        return model

    with pytest.raises(TypeError, match="bn1 or conv1 is of a class that does more than its keys say"):
        folded(trained(build()), tmp_path, build, accept_assumed=True, eps=1e-5)


def test_spectral_norm_with_foreign_vectors_is_refused(tmp_path: Path) -> None:
    """A u that is not W v normalized belongs to another axis, or to nothing known."""
    model = trained(Pair(nn.utils.spectral_norm(nn.Conv2d(3, 20, 3)), 20))
    vector = model.state_dict()["conv.weight_u"]
    vector[:10] += 0.05 * vector.norm()
    vector /= vector.norm()
    source = save(model, tmp_path / "in.pth")
    with pytest.raises(FoldError, match="do not tell which axis"):
        fold_state_dict(
            source, tmp_path / "out.safetensors", options=StateDictOptions(pairs={"bn": Told("conv", eps=1e-5)})
        )
    report = fold_state_dict(source, tmp_path / "out.safetensors", options=StateDictOptions(bake=True))
    assert not report.written
    assert any("conv is not baked" in note for note in report.notes)
    assert list(tmp_path.iterdir()) == [source]


def test_shape_preserving_keeps_an_activated_norm_right(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = Chain()
        model.bn1 = ActivatedNorm(20)
        return model

    model = trained(build())
    other, _ = folded(model, tmp_path, build, form="shape_preserving", accept_assumed=True, eps=1e-5)
    assert difference(other, model, IMAGE) < 1e-6


class Compiled(nn.Module):
    """The names that torch.compile gives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


@FORMS
@pytest.mark.parametrize("wrap", [nn.DataParallel, Compiled], ids=["module.", "_orig_mod."])
def test_wrappers_prefixes(form: str, wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = trained(Chain())
    wrapped = wrap(model)
    source = save(wrapped, tmp_path / "wrapped.pth")
    options = StateDictOptions(form=form, pairs={"bn1": Told("conv1", eps=1e-5)})  # type: ignore[arg-type]  # a parameter
    report = fold_state_dict(source, tmp_path / "out.safetensors", options=options)
    assert report.folded == 1
    if form == "shape_preserving":
        wrap(Chain()).load_state_dict(safetensors.torch.load_file(tmp_path / "out.safetensors"), strict=True)
    else:
        other = load_folded(Chain(), str(tmp_path / "out.safetensors")).eval()
        assert difference(other, model, IMAGE) < 1e-6


@pytest.mark.parametrize("name", ["state_dict", "model", "model_state_dict", "ema", "net.g"])
def test_groups_are_found(name: str, tmp_path: Path) -> None:
    model = trained(Chain())
    state: dict[str, object] = {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}
    outer, _, inner = name.partition(".")
    state[outer] = {inner: model.state_dict()} if inner else model.state_dict()
    source = save(state, tmp_path / "source.pth")
    report = fold_state_dict(
        source, tmp_path / "out.safetensors", options=StateDictOptions(accept_assumed=True, eps=1e-5)
    )
    assert report.folded == 3
    assert report.contents.group == name


def test_one_of_several_groups_must_be_named(tmp_path: Path) -> None:
    model = trained(Chain())
    source = save({"model": model.state_dict(), "ema": model.state_dict()}, tmp_path / "source.pth")
    with pytest.raises(ValueError, match=r"several groups of tensors \('model', 'ema'\)"):
        plan_state_dict(source)
    assert plan_state_dict(source, options=StateDictOptions(group="ema")).contents.group == "ema"
    with pytest.raises(FoldError, match="has no group 'teacher'"):
        plan_state_dict(source, options=StateDictOptions(group="teacher"))


REPARAMETRIZED: list[tuple[str, Callable[[], nn.Module], Kind]] = [
    ("weight-norm", lambda: parametrizations.weight_norm(nn.Conv2d(3, 20, 3)), "conv"),
    ("weight-norm-dim1", lambda: parametrizations.weight_norm(nn.ConvTranspose2d(3, 20, 3), dim=1), "conv_transpose"),
    ("weight-norm-whole", whole_weight_norm, "conv"),
    ("spectral-norm", lambda: parametrizations.spectral_norm(nn.Conv2d(3, 20, 3)), "conv"),
    ("spectral-norm-t", lambda: parametrizations.spectral_norm(nn.ConvTranspose2d(3, 20, 3)), "conv_transpose"),
    ("old-spectral-norm", lambda: nn.utils.spectral_norm(nn.Conv2d(3, 20, 3)), "conv"),
]


def with_old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="deprecated"):
        conv: nn.Module = nn.utils.weight_norm(nn.Conv2d(3, 20, 3))
    return conv


@pytest.mark.parametrize(
    ("operator", "kind"),
    [pytest.param(*row[1:], id=row[0]) for row in REPARAMETRIZED]
    + [pytest.param(with_old_weight_norm, "conv", id="old-weight-norm")],
)
def test_bakes_reparametrized_weights(operator: Callable[[], nn.Module], kind: Kind, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return Pair(operator(), 20)

    model = trained(build())
    model.train()
    for _ in range(30):  # until the spectral norm's vectors have converged
        model(torch.randn(2, 3, 9, 10))
    trained(model)
    pairs = {"bn": Told("conv", eps=1e-5, kind=kind)}
    other, report = folded(model, tmp_path, build, pairs=pairs)
    assert report.folded == 1
    assert difference(other, model, IMAGE) < 1e-6
    assert set(safetensors.torch.load_file(tmp_path / "folded.safetensors")) == {"conv.weight", "conv.bias"}


@pytest.mark.parametrize(
    ("operator", "kind", "is_possible"),
    [
        pytest.param(REPARAMETRIZED[0][1], "conv", True, id="weight-norm"),
        pytest.param(REPARAMETRIZED[1][1], "conv_transpose", True, id="weight-norm-dim1"),
        pytest.param(REPARAMETRIZED[2][1], "conv", False, id="weight-norm-whole"),
        pytest.param(REPARAMETRIZED[3][1], "conv", False, id="spectral-norm"),
    ],
)
def test_shape_preserving_scales_the_gain_or_refuses(
    operator: Callable[[], nn.Module], kind: Kind, is_possible: bool, tmp_path: Path
) -> None:
    def build() -> nn.Module:
        return Pair(operator(), 20)

    model = trained(build())
    pairs = {"bn": Told("conv", eps=1e-5, kind=kind)}
    if not is_possible:
        with pytest.raises(FoldError, match="cannot take a scale per output channel; the deploy form bakes it"):
            folded(model, tmp_path, build, pairs=pairs, form="shape_preserving")
        assert not (tmp_path / "folded.safetensors").exists()
        return
    other, _ = folded(model, tmp_path, build, pairs=pairs, form="shape_preserving")
    assert difference(other, model, IMAGE) < 1e-6


def test_bakes_on_request_alone(tmp_path: Path) -> None:
    model = parametrizations.weight_norm(nn.Conv2d(3, 20, 3)).eval()
    report = fold_state_dict(
        save(model, tmp_path / "in.pth"), tmp_path / "out.safetensors", options=StateDictOptions(bake=True)
    )
    assert [change.key for change in report.manifest] == ["weight"]
    assert report.manifest[0].sha256 != "0" * 64
    other = nn.Conv2d(3, 20, 3)
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "out.safetensors"), strict=True)
    assert difference(other, model, IMAGE) < 1e-6


def test_progress_is_reported(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    fold_state_dict(
        save(trained(Chain()), tmp_path / "in.pth"),
        tmp_path / "out.safetensors",
        progress=lambda step, done, total: seen.append((step, done, total)),
    )
    assert seen == [("study", 0, 2), ("write", 1, 2), ("done", 2, 2)]


def test_the_ten_lines_of_the_readme_load_the_deploy_form(tmp_path: Path) -> None:
    (lines,) = re.findall(r"```python\n(import json, safetensors.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(lines, names)
    model = trained(nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1)))
    image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = model(image)
    target = tmp_path / "deploy.safetensors"
    fold_state_dict(save(model, tmp_path / "in.pt"), target, options=StateDictOptions(pairs={"1": Told("0", eps=1e-5)}))
    deployed = names["load_deployed"](model, str(target))
    assert [type(module).__name__ for module in deployed] == ["Conv2d", "Identity", "ReLU", "Conv2d"]
    torch.testing.assert_close(deployed(image), expected)


def test_weight_norm_of_no_direction_is_refused(tmp_path: Path) -> None:
    state = Pair(parametrizations.weight_norm(nn.Conv2d(3, 20, 3)), 20).state_dict()
    state["conv.parametrizations.weight.original1"][4] = 0
    source, target = save(state, tmp_path / "source.safetensors"), tmp_path / "folded.safetensors"
    with pytest.raises(FoldError, match="divides by the length of a direction that is zero"):
        fold_state_dict(source, target, options=StateDictOptions(pairs={"bn": Told("conv", eps=1e-5)}))
    assert not target.exists()


@FORMS
def test_bias_of_another_length_is_refused(form: str, tmp_path: Path) -> None:
    state = {**Pair(nn.Conv2d(3, 20, 3), 20).state_dict(), "conv.bias": torch.zeros(7)}
    source, target = save(state, tmp_path / "source.safetensors"), tmp_path / "folded.safetensors"
    options = StateDictOptions(form=cast("Form", form), pairs={"bn": Told("conv", eps=1e-5)})
    with pytest.raises(FoldError, match=re.escape("the bias of conv has shape [7]")):
        fold_state_dict(source, target, options=options)
    assert not target.exists()
