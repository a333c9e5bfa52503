"""What the lifespan makes and every handler may use."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from service.application.batches import Batches
from service.application.calibration import Calibration
from service.application.checkpoints import Checkpoints
from service.application.folding import Folding
from service.application.health import Health
from service.application.inference import Inference
from service.application.jobs import Jobs
from service.application.models import Models
from service.application.statistics import Statistics
from service.engine.admission import ReceiveBudget
from service.engine.compiler import Compiler
from service.settings import Settings


@dataclass(frozen=True, slots=True)
class Services:
    """The use cases and the shared bounds of one running service."""

    settings: Settings
    threads: int
    health: Health
    compiler: Compiler
    budget: ReceiveBudget
    json_thread: ThreadPoolExecutor
    checkpoints: Checkpoints
    folding: Folding
    calibration: Calibration
    jobs: Jobs
    models: Models
    inference: Inference
    statistics: Statistics
    batches: Batches
