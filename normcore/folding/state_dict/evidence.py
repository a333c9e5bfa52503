"""Evidence for a pairing of a batch norm with a linear operator, where no graph says what feeds what.

Names and shapes are judged over a whole template: the pairs whose names differ in numbers only come from the same
lines of code, so what rules out one of them rules out all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from normcore.folding.state_dict.modules import Linear, Modules, Norm, join, leaf_of, parent_of
from normcore.folding.state_dict.naming import sounds_downward, sounds_transposed
from normcore.folding.state_dict.report import Evidence

_FEW_CHANNELS = 16
_SMOOTH_MINIMUM = -0.376  # HardSwish reaches -0.375, Mish -0.31, SiLU -0.28, GELU -0.17: no mean of theirs is lower


@dataclass(frozen=True, slots=True)
class Instance:
    """One pair of a template, with the running mean of its norm, and whether numbers of a sequence name the two."""

    norm: Norm
    linear: Linear
    mean: NDArray[np.float64]
    is_in_sequence: bool


class Family:
    """All pairs of one template, and what can be said of them together.

    Attributes:
        shapes: whether every operator has as many outputs as its norm has channels.
        inputs: whether some operator cannot have as many inputs, so that the norm does not precede it.
        misplaced: a pair whose norm comes first in the file, if there is one.
        blocked: a pair whose running means may be those of an activation's output, if there is one.
        low: share of the norms that have a running mean below what smooth activations give.
        biased: how many operators have a bias.
        convolutions: by last part of the name, an operator that no transposed convolution can be.
        kinds: by last part of the name, and of all under "", whether all operators may be transposed convolutions.
    """

    def __init__(self, instances: Sequence[Instance], modules: Modules) -> None:
        places = modules.positions
        self.size = len(instances)
        self.by_norm = {each.norm.name: each for each in instances}
        self.shapes = _shapes(instances)
        self.inputs = _inputs(instances)
        self.misplaced = next((each for each in instances if places[each.norm.name] < places[each.linear.name]), None)
        self.blocked = next((each for each in instances if len(each.mean) >= _FEW_CHANNELS and _low(each) >= 0), None)
        self.low = sum(_low(each) < _SMOOTH_MINIMUM for each in instances) / len(instances)
        self.biased = sum(each.linear.bias is not None for each in instances)
        self.convolutions = {leaf_of(each.linear.name): each.linear.name for each in instances if _is_convolution(each)}
        leaves = {leaf_of(each.linear.name) for each in instances}
        self.kinds = {
            leaf: _may_be_transposed([each for each in instances if leaf in ("", leaf_of(each.linear.name))])
            for leaf in ("", *leaves)
        }


def judge(instance: Instance, family: Family, modules: Modules, *, keeps_order: bool) -> list[Evidence]:
    """Every check of one pair."""
    return [
        family.shapes,
        _kind(instance, family, modules),
        _order(instance, family, modules, keeps_order=keeps_order),
        _activation(instance, family),
        _bias(instance, family),
    ]


def could_be_transposed(linear: Linear, channels: int) -> bool:
    """Whether a transposed convolution of this weight, grouped or not, has that many outputs."""
    return (
        len(linear.shape) > 2
        and channels % linear.shape[1] == 0
        and linear.shape[0] % (channels // linear.shape[1]) == 0
    )


def _shapes(family: Sequence[Instance]) -> Evidence:
    wrong = [each for each in family if each.linear.shape[0] != each.norm.num_features]
    total = len(family)
    if not wrong:
        return Evidence("template", True, f"all {total} pairs of this template have as many outputs as channels")
    each = wrong[0]
    return Evidence(
        "template",
        False,
        f"in {len(wrong)} of {total} pairs of this template the shapes do not fit: {each.linear.name} has a weight of "
        f"shape {list(each.linear.shape)} and {each.norm.name} has {each.norm.num_features} channels",
    )


def _kind(instance: Instance, family: Family, modules: Modules) -> Evidence:
    """A square weight scaled along the wrong axis gives no error, so its kind must be known from its siblings."""
    linear, channels = instance.linear, instance.norm.num_features
    kernel = linear.shape[2:]
    if len(linear.shape) == 2:
        detail = "a weight of rank 2 is a linear layer's; whether its batch norm sees (N, C) alone cannot be told"
        return Evidence("kind", None, detail)
    if linear.shape[0] != channels:
        return Evidence("kind", None, "its shape does not fit a convolution")
    if linear.shape[1] == 1:
        return Evidence("kind", True, "a depthwise filter is scaled alike whether or not it is transposed")
    if any(size % 2 == 0 for size in kernel) and could_be_transposed(linear, channels):
        return Evidence("kind", False, f"a kernel of {list(kernel)} fits a transposed convolution as well")
    if sounds_transposed(linear.name) and could_be_transposed(linear, channels):
        return Evidence("kind", False, f"the name {linear.name} may be that of a transposed convolution")
    if not could_be_transposed(linear, channels):
        return Evidence("kind", True, f"{list(linear.shape)} with {channels} outputs is a convolution's")
    return _kind_by_siblings(instance, family, modules)


def _kind_by_siblings(instance: Instance, family: Family, modules: Modules) -> Evidence:
    """What operators of the same lines of code are, this one is; elements of a sequence come from different ones."""
    linear = instance.linear
    shape, own = list(linear.shape), leaf_of(linear.name)
    sibling = family.convolutions.get(own) if own.isdigit() else next(iter(family.convolutions.values()), None)
    if sibling is not None:
        return Evidence("kind", True, f"{shape} fits both kinds, but {sibling} of the same template is a convolution")
    if not family.kinds[own if own.isdigit() else ""]:
        return Evidence(
            "kind",
            True,
            f"{shape} fits both kinds, but transposed convolutions of this template would "
            "have different numbers of groups",
        )
    before = _outputs_before(linear.name, modules)
    if linear.shape[1] == before != linear.shape[0]:
        return Evidence("kind", True, f"{shape} fits both kinds, but the sequence has {before} channels before it")
    groups = instance.norm.num_features // linear.shape[1]
    if groups > 1 and sounds_downward(linear.name):
        return Evidence(
            "kind", True, f"{shape} fits both kinds, but the name {linear.name} is none of a transposed one"
        )
    square = "is square, and " if groups == 1 else ""
    grouped = "" if groups == 1 else f" in {groups} groups"
    return Evidence("kind", False, f"the weight {shape} {square}could be a transposed convolution's{grouped} as well")


def _outputs_before(name: str, modules: Modules) -> int | None:
    """Outputs of the operator before this one in a sequence."""
    parent, leaf = parent_of(name), leaf_of(name)
    for number in range(int(leaf) - 1 if leaf.isdigit() else -1, -1, -1):
        linear = modules.linears.get(join(parent, str(number)))
        if linear is not None:
            return linear.shape[0]
    return None


def _is_convolution(instance: Instance) -> bool:
    linear, channels = instance.linear, instance.norm.num_features
    is_fitting = len(linear.shape) > 2 and linear.shape[0] == channels
    return is_fitting and not could_be_transposed(linear, channels)


def _may_be_transposed(instances: Sequence[Instance]) -> bool:
    """Whether one definition of a transposed convolution, of a fixed number or size of groups, can make them all."""
    sizes = {each.linear.shape[1] for each in instances}
    groups = {each.norm.num_features // each.linear.shape[1] for each in instances}
    is_possible = all(could_be_transposed(each.linear, each.norm.num_features) for each in instances)
    return is_possible and (len(groups) == 1 or len(sizes) == 1)


def _order(instance: Instance, family: Family, modules: Modules, *, keeps_order: bool) -> Evidence:
    """Code that applies the norm first mostly registers it first, and the elements of a sequence run in its order."""
    if instance.is_in_sequence:
        return Evidence("order", True, "the numbers of the sequence put the norm directly after the operator")
    if not keeps_order:
        return family.inputs
    places = modules.positions
    if family.misplaced is not None:
        norm, linear = family.misplaced.norm.name, family.misplaced.linear.name
        return Evidence("order", False, f"{norm} comes before {linear} in the file")
    between = places[instance.norm.name] - places[instance.linear.name] - 1
    if not between:
        return Evidence("order", True, "the batch norm follows the operator directly in the file")
    detail = f"{between} modules lie between the two in the file; {family.inputs.detail}"
    return Evidence("order", family.inputs.holds, detail)


def _inputs(instances: Sequence[Instance]) -> Evidence:
    """Where every operator might have as many inputs as channels, the norm may come before it (pre-activation)."""
    groups = {each.norm.num_features / each.linear.shape[1] for each in instances}
    widths = {each.linear.shape[1] for each in instances}
    is_possible = all(ratio.is_integer() for ratio in groups) and (len(groups) == 1 or len(widths) == 1)
    if is_possible:
        detail = "every operator of this template may have as many inputs as channels, so the norm may precede it"
        return Evidence("inputs", False, detail)
    return Evidence("inputs", True, "the operators of this template have other numbers of inputs than channels")


def _low(instance: Instance) -> float:
    return float(instance.mean.min(initial=np.inf))


def _activation(instance: Instance, family: Family) -> Evidence:
    """The running mean of what a ReLU or a similar function gives is bounded from below."""
    if family.blocked is not None:
        is_fresh = not family.blocked.mean.any()
        detail = "are all 0: it was never trained" if is_fresh else "are all at least 0, as after a ReLU"
        return Evidence("statistics", False, f"the running means of {family.blocked.norm.name} {detail}")
    own = _low(instance)
    if own < _SMOOTH_MINIMUM:
        return Evidence(
            "statistics", True, f"a running mean of {own:.3g} excludes ReLU, GELU, SiLU and Mish in between"
        )
    if own < 0 and family.low >= 0.5:
        detail = f"a running mean of {own:.3g} excludes ReLU, and most norms of this template exclude GELU and SiLU"
        return Evidence("statistics", True, detail)
    return Evidence("statistics", False, f"the lowest running mean is {own:.3g}, which an activation may have given")


def _bias(instance: Instance, family: Family) -> Evidence:
    if not family.biased:
        return Evidence("bias", True, "the operators of this template have no bias, which a batch norm makes needless")
    if family.biased == family.size:
        return Evidence("bias", None, "the operators of this template have a bias, which a batch norm makes needless")
    has = "has a" if instance.linear.bias is not None else "has no"
    return Evidence("bias", False, f"{instance.linear.name} {has} bias, unlike others of its template")


def uniqueness(claims: Mapping[str, Sequence[str]], norm: str, proposals: Sequence[str]) -> Evidence:
    """One operator by name, which no other batch norm claims."""
    if len(proposals) > 1:
        return Evidence("name", False, f"its name points to several operators: {', '.join(proposals[:4])}")
    rivals = [name for name in claims[proposals[0]] if name != norm]
    if rivals:
        return Evidence("name", False, f"{proposals[0]} is also the operator that {rivals[0]} points to by name")
    return Evidence("name", True, f"no other batch norm points to {proposals[0]}")


__all__ = ["Family", "Instance", "could_be_transposed", "judge", "uniqueness"]
