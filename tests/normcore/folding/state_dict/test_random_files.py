"""Any file of tensors is planned and folded, or refused by name; what is written can be read again."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from normcore.checkpoints.tensor_file import open_tensors
from normcore.errors import NormcoreError
from normcore.folding.state_dict.fold import fold_state_dict, plan_state_dict
from normcore.folding.state_dict.options import StateDictOptions, Told
from normcore.folding.state_dict.report import Form
from tests.normcore.folding.state_dict.networks import save

LEAVES = (
    "weight", "bias", "running_mean", "running_var", "num_batches_tracked", "weight_g", "weight_v", "weight_orig",
    "weight_u", "weight_v", "parametrizations.weight.original0", "parametrizations.weight.original1",
    "parametrizations.weight.original", "parametrizations.weight.0._u", "parametrizations.weight.0._v", "gain",
)  # fmt: skip
MODULES = ("", "0", "1", "conv", "bn", "conv1", "bn1", "norm", "a.conv", "a.bn", "a.0", "a.1", "module.conv", "deconv")
SHAPES = ((), (1,), (2,), (3,), (0,), (2, 2), (2, 3), (2, 1, 1, 1), (2, 2, 2, 2), (3, 2, 1, 1), (2, 3, 1), (1, 2, 2, 2))
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool)
KEYS = st.tuples(st.sampled_from(MODULES), st.sampled_from(LEAVES)).map(lambda pair: ".".join(filter(None, pair)))


SOUND = {
    "weight": torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]]),
    "weight_g": torch.ones(2, 1, 1),
    "weight_v": torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]]),
    "running_mean": -torch.ones(2),
    "running_var": torch.tensor([2.0, 3.0]),
}
"""What makes `X.conv` and `X.bn` a pair."""


def sound(module: str, recipe: tuple[str, ...]) -> dict[str, torch.Tensor]:
    own = {f"{module}conv.{leaf}": SOUND[leaf].clone() for leaf in recipe}
    return own | {f"{module}bn.{leaf}": SOUND[leaf].clone() for leaf in ("running_mean", "running_var")}


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES))
    if draw(st.booleans()):
        return (torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))) - 1).to(dtype)
    return torch.full(shape, draw(st.sampled_from([0.0, 1.0, -1.0, 6e4, 1e-7, float("nan"), float("inf")]))).to(dtype)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    base=st.just({})
    | st.builds(
        sound, st.sampled_from(["", "a.", "module."]), st.sampled_from([("weight",), ("weight_g", "weight_v")])
    ),
    noise=st.dictionaries(KEYS, tensors(), min_size=1, max_size=8),
    suffix=st.sampled_from([".pth", ".safetensors"]),
    form=st.sampled_from(["deploy", "shape_preserving"]),
    bake=st.booleans(),
    told=st.none() | st.none() | st.tuples(st.sampled_from(MODULES), st.sampled_from(MODULES)),
)
def test_any_state_dict_is_folded_or_refused(
    base: dict[str, torch.Tensor],
    noise: dict[str, torch.Tensor],
    suffix: str,
    form: Form,
    bake: bool,
    told: Sequence[str] | None,
    tmp_path: Path,
) -> None:
    state = base | noise
    source, target = save(state, tmp_path / f"in{suffix}"), tmp_path / "out.safetensors"
    target.unlink(missing_ok=True)
    pairs = {told[0]: Told(told[1])} if told else {}
    options = StateDictOptions(form=form, accept_assumed=True, eps=1e-5, bake=bake, pairs=pairs)
    try:
        plan = plan_state_dict(source, options=options)
        report = fold_state_dict(source, target, options=options)
    except NormcoreError:
        assert not target.exists()
        return
    assert report.folded == plan.foldable
    assert report.written == target.exists()
    if report.written:
        written = open_tensors(target)
        assert set(state) - set(report.removed) <= set(written.tensors)
        changed = {change.key for change in report.manifest}
        for key in set(state) & set(written.tensors) - changed:
            assert written.read(key).tobytes() == open_tensors(source).read(key).tobytes()


def test_a_pair_is_found_among_random_keys(tmp_path: Path) -> None:
    state = {"conv.weight": torch.randn(2, 3, 1), "bn.running_mean": -torch.ones(2), "bn.running_var": torch.ones(2)}
    report = fold_state_dict(
        save(state, tmp_path / "in.pth"),
        tmp_path / "out.safetensors",
        options=StateDictOptions(accept_assumed=True, eps=1e-5),
    )
    assert report.folded == 1
    with pytest.raises(NormcoreError):
        plan_state_dict(tmp_path / "in.pth", options=StateDictOptions(pairs={"bn": Told("bn", eps=1e-5)}))
