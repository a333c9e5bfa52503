"""`python -m service`: run the service until it is told to stop."""

import sys

from pydantic import ValidationError

from service.app import serve
from service.settings import Settings
from service.telemetry import configure_logging


def main() -> int:
    try:
        settings = Settings()
    except ValidationError as error:
        for problem in error.errors():
            name = "NORMSERVE_" + "_".join(str(part) for part in problem["loc"]).upper()
            sys.stderr.write(f"{name}: {problem['msg']}\n")
        return 2
    configure_logging(settings.log_level)
    return serve(settings)


if __name__ == "__main__":
    sys.exit(main())
