"""The errors of the service itself; each class has one row in api/errors.py, which alone knows HTTP.

Errors of the numerical library (normcore.errors) pass through the service unchanged.
"""

from typing import Any


class ServiceError(Exception):
    """Base of the service's errors: a sentence for the caller and data for a program."""

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


class PayloadMalformedError(ServiceError):
    """A body that cannot be decoded; the message names the field or the byte count at fault."""


class PayloadTooLargeError(ServiceError):
    """A body, tensor or file over a limit of the settings; the message names the setting."""


class BodyTimeoutError(ServiceError):
    """A body that stopped arriving."""


class MediaTypeError(ServiceError):
    """A Content-Type or Content-Encoding that the endpoint does not read."""


class NotAcceptableError(ServiceError):
    """An Accept header that the endpoint cannot satisfy."""


class NotFoundError(ServiceError):
    """Base of everything that is not there."""


class ModelNotFoundError(NotFoundError):
    """No model, or no such version of it, under this name."""


class CheckpointNotFoundError(NotFoundError):
    """No checkpoint under this id."""


class StatisticsNotFoundError(NotFoundError):
    """No statistics resource under this id."""


class MethodNotFoundError(NotFoundError):
    """No normalization method under this name."""


class JobNotFoundError(NotFoundError):
    """No job under this id: it never was, was deleted, or is forgotten."""


class ForbiddenError(ServiceError):
    """A request from an origin or for a host that the settings do not allow."""


class ConflictError(ServiceError):
    """A request against the present state: a reserved name, a version that exists, a checkpoint in use."""


class PreconditionError(ServiceError):
    """A change under the condition of a state (If-Match) that the resource is not in any more."""


class OverloadedError(ServiceError):
    """A queue or the receive budget is full; try again after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelNotReadyError(ServiceError):
    """The model exists but is not loaded."""


class ShuttingDownError(ServiceError):
    """The service drains and takes no new work."""


class DeadlineExceededError(ServiceError):
    """The work was stopped, or dropped from the queue, because its time was over."""


class UnsupportedError(ServiceError):
    """Something the protocol names that this service does not do."""


class StorageFullError(ServiceError):
    """The data directory has no room for the upload."""


class SchemaTooNewError(ServiceError):
    """The database was written by a newer program; it is left as it is."""


class StartError(ServiceError):
    """The service cannot start as it is set; the message names the setting."""

    def __init__(self, setting: str, problem: str) -> None:
        super().__init__(f"{setting}: {problem}", setting=setting)
