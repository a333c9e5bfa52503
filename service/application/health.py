"""Whether the service may be sent work."""

from typing import Literal

from service.errors import ShuttingDownError

Phase = Literal["starting", "serving", "draining"]


class Health:
    """Live as long as the process answers; ready once start-up loads were attempted and until it drains."""

    def __init__(self) -> None:
        self.phase: Phase = "starting"

    @property
    def is_ready(self) -> bool:
        return self.phase == "serving"

    def refuse_while_draining(self) -> None:
        """Long work (folds, loads) does not start in a service that is about to stop."""
        if self.phase == "draining":
            raise ShuttingDownError("the service is shutting down and starts no new fold or load")
