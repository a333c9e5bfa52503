"""`python -m service.probe`: exit 0 when the service on this host is ready; the container's health check."""

import os
import sys
import urllib.error
import urllib.request


def main() -> int:
    url = f"http://127.0.0.1:{os.environ.get('NORMSERVE_PORT', '8000')}/v2/health/ready"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a host's http_proxy leads elsewhere
    try:
        with direct.open(url, timeout=4) as answer:
            return 0 if answer.status == 200 else 1
    except (urllib.error.URLError, OSError) as error:
        sys.stderr.write(f"{url}: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
