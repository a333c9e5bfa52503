"""The errors that normcore raises for a caller's mistakes.

NormcoreError (a ValueError)
├── ArgumentError        names an argument, what was expected and what came
│   ├── ShapeError       a shape, rank, element count or channel count
│   ├── DtypeError       a datatype
│   ├── ParameterError   a scalar option such as eps or momentum
│   └── StatisticsError  running or batch statistics that cannot be used
├── CheckpointError      a file that is not a usable checkpoint
├── FoldError            an explicit fold option that cannot be honoured
├── NotSupportedError    a sound request that normcore has no implementation of
└── DeadlineError        a run that did not end in time
"""


class NormcoreError(ValueError):
    """Base of every error that a caller can cause."""


class ArgumentError(NormcoreError):
    """An argument that does not fit; the message names it, what was expected and what came."""

    def __init__(self, argument: str, *, expected: str, received: str) -> None:
        super().__init__(f"{argument}: expected {expected}, received {received}")
        self.argument = argument
        self.expected = expected
        self.received = received


class ShapeError(ArgumentError):
    """A tensor whose shape, rank or number of channels does not fit."""


class DtypeError(ArgumentError):
    """A tensor whose datatype does not fit."""


class ParameterError(ArgumentError):
    """A scalar parameter that is unknown, of the wrong type or out of bounds."""


class StatisticsError(ArgumentError):
    """Statistics that are missing, impossible (a negative variance) or cannot be computed."""


class CheckpointError(NormcoreError):
    """A file that is not a usable checkpoint; the message says why and what to upload instead."""


class FoldError(NormcoreError):
    """An explicit option of a fold that cannot be honoured."""


class NotSupportedError(NormcoreError):
    """A request that makes sense and that normcore has no implementation of; the message says what to do instead."""


class DeadlineError(NormcoreError):
    """A run that was stopped because it took longer than its deadline."""

    def __init__(self, subject: str, *, deadline_s: float) -> None:
        super().__init__(f"{subject}: stopped after its deadline of {deadline_s:g} s")
        self.deadline_s = deadline_s
