"""`python -m service`: run the service until it is told to stop."""

import asyncio
import logging
import os
import sys

from pydantic import ValidationError

from service.app import serve
from service.errors import StartError
from service.preflight import check_start, unknown_variables
from service.settings import Settings
from service.telemetry import configure_logging

log = logging.getLogger(__name__)


def main() -> int:
    try:
        settings = Settings()
    except ValidationError as error:
        for problem in error.errors():
            name = "NORMSERVE_" + "_".join(str(part) for part in problem["loc"]).upper()
            sys.stderr.write(f"{name}: {problem['msg']}\n")
        return 2
    configure_logging(settings.log_level)
    for sentence in unknown_variables(os.environ):
        log.warning(sentence)
    try:
        asyncio.run(check_start(settings))
    except StartError as error:
        sys.stderr.write(f"{error}\n")
        return 3
    return serve(settings)


if __name__ == "__main__":
    sys.exit(main())
