"""What a caller may ask of a fold of a state_dict."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from normcore.errors import FoldError
from normcore.folding.state_dict.report import Form, Kind

KINDS: tuple[Kind, ...] = ("conv", "conv_transpose", "linear")
FORMS: tuple[Form, ...] = ("deploy", "shape_preserving")


@dataclass(frozen=True, slots=True)
class Told:
    """A pairing that the caller vouches for.

    Attributes:
        linear: prefix of the operator's keys, as `layer1.0.conv1`.
        eps: of the batch norm; the options' `eps` where None.
        kind: what the operator is, needed where the weight's shape fits several.
    """

    linear: str
    eps: float | None = None
    kind: Kind | None = None


@dataclass(frozen=True, slots=True)
class StateDictOptions:
    """How to fold a state_dict.

    Attributes:
        form: `deploy` (batch norms gone, biases added) or `shape_preserving` (loads into the unchanged class).
        eps: what every batch norm adds to its variance, where nothing better is known; it is not in the file.
        accept_assumed: fold what rests on evidence alone; needs `eps`.
        pairs: by prefix of a batch norm, what it folds into.
        architecture: class that the file belongs to, such as `torchvision/resnet18`.
        group: which state_dict of the file, where it has several.
        bake: replace every weight norm and spectral norm by the weight it computes.
    """

    form: Form = "deploy"
    eps: float | None = None
    accept_assumed: bool = False
    pairs: Mapping[str, Told] = field(default_factory=dict)
    architecture: str | None = None
    group: str | None = None
    bake: bool = False

    def check(self) -> None:
        """Raises FoldError where options are unknown or contradict one another."""
        if self.form not in FORMS:
            raise FoldError(f"form: expected one of {', '.join(FORMS)}, received {self.form!r}")
        if self.accept_assumed and self.eps is None:
            raise FoldError("accept_assumed: expected together with eps, which a state_dict does not hold")
        for name, eps in [("eps", self.eps), *((f"pairs[{key!r}].eps", told.eps) for key, told in self.pairs.items())]:
            if eps is not None and not (math.isfinite(eps) and eps >= 0):
                raise FoldError(f"{name}: expected a finite number of at least 0, received {eps}")
        for key, told in self.pairs.items():
            if told.kind is not None and told.kind not in KINDS:
                raise FoldError(f"pairs[{key!r}].kind: expected one of {', '.join(KINDS)}, received {told.kind!r}")


__all__ = ["FORMS", "KINDS", "StateDictOptions", "Told"]
