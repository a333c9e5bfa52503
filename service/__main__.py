"""`python -m service`: run the service until it is told to stop; `python -m service selftest`: check what is installed.

The settings are environment variables with the prefix NORMSERVE_, listed in README.md.
"""

import asyncio
import logging
import os
import sys

from pydantic import ValidationError

from service.app import serve
from service.errors import StartError
from service.preflight import check_start, sole_user, unknown_variables
from service.selftest import selftest
from service.settings import Settings
from service.telemetry import configure_logging

log = logging.getLogger(__name__)

_USAGE = """\
usage: python -m service            run the service; SIGTERM ends it
       python -m service selftest   check every normalization, a fold and an inference on every device of this host
Settings are environment variables with the prefix NORMSERVE_, such as NORMSERVE_PORT (8000).
"""


def main(arguments: list[str]) -> int:
    if arguments == ["selftest"]:
        return selftest()
    if arguments in (["--help"], ["-h"]):
        sys.stdout.write(_USAGE)
        return 0
    if arguments:
        sys.stderr.write(_USAGE)
        return 2
    return _run()


def _run() -> int:
    try:
        settings = Settings()
    except ValidationError as error:
        for problem in error.errors():
            name = "NORMSERVE_" + "_".join(str(part) for part in problem["loc"]).upper()
            sys.stderr.write(f"{name}: {problem['msg']}, received {str(problem['input'])[:80]!r}\n")
        return 2
    configure_logging(settings.log_level)
    for sentence in unknown_variables(os.environ):
        log.warning(sentence)
    try:
        with sole_user(settings.data_dir):
            asyncio.run(check_start(settings))
            return serve(settings)
    except StartError as error:
        sys.stderr.write(f"{error}\n")
        return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
