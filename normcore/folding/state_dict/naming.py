"""Names: which linear operator a batch norm's name points to, and which pairs are instances of one template."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from normcore.folding.state_dict.modules import Linear, join, leaf_of, parent_of

IN_SEQUENCE = "the element before it in a sequence"
"""The rule by which the numbers of a sequence name both modules, and their order."""

_DIGITS = re.compile(r"\d+")
_WORDS = (
    ("batch_norm", "conv"),
    ("batch_norm", "linear"),
    ("batchnorm", "conv"),
    ("normalization", "convolution"),
    ("norm", "conv"),
    ("norm", "linear"),
    ("bn", "conv"),
    ("bn", "fc"),
    ("bn", "linear"),
)
_PREFIXES = ("bn_", "norm_")
_SUFFIXES = ("_bn", "_BN", "_norm", "_batchnorm")
_CHILDREN = ("norm", "bn")
_TRANSPOSED = re.compile(
    r"deconv|transp|(?<![a-z])up|upsampl|unpool|convt|conv_t|tconv|dec(?:oder)?\d*(?![a-z])|gen", re.I
)

_DOWNWARD = re.compile(r"down|shortcut", re.I)

# Classes whose leaves do not match by name, told apart by the siblings that they have: (linear, norm, with, without).
_CLASSES: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("_conv_stem", "_bn0", (), ()),
    ("_conv_head", "_bn1", (), ("_depthwise_conv",)),
    ("_expand_conv", "_bn0", ("_depthwise_conv",), ()),
    ("_depthwise_conv", "_bn1", ("_project_conv",), ()),
    ("_project_conv", "_bn2", ("_depthwise_conv",), ()),
    ("conv_stem", "bn1", (), ("conv_dw",)),
    ("conv_head", "bn2", (), ("conv_dw",)),
    ("conv_pw", "bn1", ("conv_dw", "conv_pwl"), ()),
    ("conv_dw", "bn2", ("conv_pw", "conv_pwl"), ()),
    ("conv_pwl", "bn3", ("conv_pw", "conv_dw"), ()),
    ("conv_dw", "bn1", ("conv_pw",), ("conv_pwl",)),
    ("conv_pw", "bn2", ("conv_dw",), ("conv_pwl",)),
)


@dataclass(frozen=True, slots=True)
class Counterpart:
    """A linear operator that a name points to, and the rule by which it does."""

    linear: str
    rule: str


def find_counterparts(norm: str, linears: Mapping[str, Linear]) -> list[Counterpart]:
    """Linear operators that exist and that the norm's name points to, without repetition."""
    found: dict[str, Counterpart] = {}
    for linear, rule in _proposals(norm, linears):
        if linear in linears:
            found.setdefault(linear, Counterpart(linear, rule))
    return list(found.values())


def template(norm: str, linear: str) -> str:
    """What all instances of one pair of module definitions share: the two names with every number as #."""
    return f"{_DIGITS.sub('#', linear)} -> {_DIGITS.sub('#', norm)}"


def sounds_transposed(name: str) -> bool:
    """Whether a name has a word that transposed convolutions often have."""
    return _TRANSPOSED.search(name) is not None


def sounds_downward(name: str) -> bool:
    """Whether a name has a word of shortcuts that make images smaller, which transposed convolutions never do."""
    return _DOWNWARD.search(name) is not None


def _proposals(norm: str, linears: Mapping[str, Linear]) -> Iterator[tuple[str, str]]:
    parent, leaf = parent_of(norm), leaf_of(norm)
    if leaf.isdigit():
        yield from _by_number(parent, int(leaf))
        return
    if leaf in _CHILDREN and parent:
        yield parent, "the module it is a child of"
    for other, rule in (*_by_affix(leaf), *_by_word(leaf)):
        yield join(parent, other), rule
    for linear, own, present, absent in _CLASSES:
        has_siblings = all(join(parent, name) in linears for name in present)
        if own == leaf and has_siblings and not any(join(parent, name) in linears for name in absent):
            yield join(parent, linear), "a known class"


def _by_number(parent: str, number: int) -> Iterator[tuple[str, str]]:
    if number > 0:
        yield join(parent, str(number - 1)), IN_SEQUENCE
    if leaf_of(parent) in ("bns", "norms"):
        yield join(join(parent_of(parent), "convs"), str(number)), "the same number in a list of convolutions"


def _by_affix(leaf: str) -> Iterator[tuple[str, str]]:
    for suffix in _SUFFIXES:
        if leaf.endswith(suffix) and len(leaf) > len(suffix):
            yield leaf.removesuffix(suffix), f"the same name without {suffix}"
    for prefix in _PREFIXES:
        if leaf.startswith(prefix) and len(leaf) > len(prefix):
            yield leaf.removeprefix(prefix), f"the same name without {prefix}"


def _by_word(leaf: str) -> Iterator[tuple[str, str]]:
    for word, replacement in _WORDS:
        if word in leaf:
            yield leaf.replace(word, replacement), f"the same name with {replacement} for {word}"


__all__ = ["IN_SEQUENCE", "Counterpart", "find_counterparts", "sounds_downward", "sounds_transposed", "template"]
