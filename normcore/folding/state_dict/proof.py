"""Proof for a file whose class is known: both files in that class, in float64, pair by pair and as a whole.

Each folded operator is given the input that it has in the original network, and its output is compared with the batch
norm's. Rounding the stored weights may move it by `ulp (|W'| * |x| + |b'|)`, which is computed, not guessed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normcore.checkpoints.tensor_file import open_tensors
from normcore.checkpoints.tensors import TensorFile
from normcore.folding.state_dict.architectures import Architecture
from normcore.folding.state_dict.loader import load_folded
from normcore.folding.state_dict.report import Form, Proof
from normcore.folding.state_dict.rewrite import Fold

_INPUT_SHAPES = ((2, 3, 96, 112),)
_ULP = {"F64": 2.0**-50, "F32": 2.0**-22, "F16": 2.0**-9, "BF16": 2.0**-6}  # twice the rounding, of weight and of norm
_OUTPUT_TOLERANCE = 1e-3  # of the whole network; the pairs are what proves


@dataclass(slots=True)
class _Worst:
    pair: float = 0.0
    name: str = ""
    pairs: int = 0


def prove(
    architecture: Architecture, source: TensorFile, folded: Path, folds: Sequence[Fold], *, prefix: str, form: Form
) -> Proof:
    """Compare the folded file with the original, as a whole and at each of the folds."""
    original = _load(architecture.build(), source, prefix=prefix)
    other = architecture.build()
    if form == "deploy":
        load_folded(other, str(folded))
    else:
        _load(other, open_tensors(folded), prefix=prefix)
    other.double().eval()
    worst = _Worst()
    output_error = 0.0
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for shape in _INPUT_SHAPES:
            image = torch.randn(shape, generator=generator, dtype=torch.float64)
            with _compared(folds, original, other, prefix, worst):
                expected = _tensors(original(image))
            found = _tensors(other(image))
            for mine, theirs in zip(found, expected, strict=True):
                scale = float(theirs.abs().max())
                output_error = max(output_error, _known(float((mine - theirs).abs().max()) / (scale or 1.0)))
    is_equal = worst.pair <= 1.0 and output_error <= _OUTPUT_TOLERANCE
    return Proof(
        architecture=architecture.name,
        verdict="equivalent" if is_equal else "different",
        sentence=_sentence(worst, output_error, is_equal=is_equal),
        pairs=worst.pairs,
        pair_error=worst.pair,
        output_error=output_error,
        input_shapes=_INPUT_SHAPES,
    )


def _load(model: nn.Module, source: TensorFile, *, prefix: str) -> nn.Module:
    state = model.state_dict()  # carries the versions of the modules, which some classes ask for
    for key, tensor in source.tensors.items():
        array = source.read(key)
        is_float = tensor.datatype in _ULP
        state[key.removeprefix(prefix)] = torch.from_numpy(array.astype("float64") if is_float else array.copy())
    for key, value in state.items():
        if value.is_meta:  # num_batches_tracked, which old files lack and inference does not read
            state[key] = torch.zeros(value.shape, dtype=value.dtype)
    model.load_state_dict(state, strict=True, assign=True)
    return model.double().eval()


@contextmanager
def _compared(
    folds: Sequence[Fold], original: nn.Module, other: nn.Module, prefix: str, worst: _Worst
) -> Iterator[None]:
    """While the original runs, give each folded operator the same input and compare at the batch norm."""
    handles = []
    pending: dict[str, tuple[Tensor, Tensor]] = {}
    for fold in folds:
        norm, linear = (name.removeprefix(prefix) for name in (fold.norm.name, fold.linear.name))
        ulp = _ULP[fold.linear.datatype]
        before, after = original.get_submodule(linear), original.get_submodule(norm)
        new_linear = other.get_submodule(linear)
        new_norm = other.get_submodule(norm)
        handles.append(before.register_forward_hook(_keep(norm, new_linear, new_norm, ulp, pending)))
        handles.append(after.register_forward_hook(_compare(norm, pending, worst)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep(
    name: str, linear: nn.Module, norm: nn.Module, ulp: float, pending: dict[str, tuple[Tensor, Tensor]]
) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        result = norm(linear(inputs[0]))
        state = {key: value.abs() for key, value in linear.state_dict().items()}
        sizes = torch.func.functional_call(linear, state, (inputs[0].abs(),))
        if isinstance(norm, nn.BatchNorm2d) and norm.bias is not None:
            sizes = sizes + norm.bias.abs().reshape(-1, 1, 1)
        pending[name] = result, ulp * sizes

    return hook


def _compare(name: str, pending: dict[str, tuple[Tensor, Tensor]], worst: _Worst) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        result, allowed = pending.pop(name)
        tiny = torch.finfo(torch.float32).tiny
        error = _known(float(((result - output).abs() / (allowed + tiny)).max()))
        worst.pairs += 1
        if error > worst.pair:
            worst.pair, worst.name = error, name

    return hook


def _known(error: float) -> float:
    """NaN is larger than any error, and no comparison with it says so."""
    return math.inf if math.isnan(error) else error


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [each for each in output if isinstance(each, Tensor)]


def _sentence(worst: _Worst, output_error: float, *, is_equal: bool) -> str:
    if is_equal:
        return (
            f"In the class itself, in float64, each of {worst.pairs} folded pairs gives what it gave before, within "
            f"{worst.pair:.2f} of what rounding its stored weights allows; the output differs by {output_error:.1e}."
        )
    return (
        f"In the class itself, in float64, {worst.name or 'the output'} differs by {worst.pair:.3g} times what "
        f"rounding its stored weights allows; the output differs by {output_error:.1e}. Nothing was written."
    )


__all__ = ["prove"]
