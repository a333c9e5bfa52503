"""How a rule says no."""


class Refusal(Exception):  # noqa: N818  # an answer of a rule to the one who asks it, never an error of a caller
    """Why a normalization is kept, in words for the owner of the network."""


class ShiftRefusal(Refusal):
    """A map whose multiplication could go on, and whose addition could not."""


__all__ = ["Refusal", "ShiftRefusal"]
