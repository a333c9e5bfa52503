#!/usr/bin/env bash
# Builds and runs the container files on the engine that `docker` reaches: hardened, non-root, ready, SIGTERM ends with 0;
# then runs COMMAND while the compose project is up. Usage: docker-test.sh [-- COMMAND ...]
set -euo pipefail
cd "$(dirname "$0")/.."
docker info >/dev/null || { echo "docker-test: no container engine; start one or set DOCKER_SMOKE" >&2; exit 1; }
docker build -q -t normserve:test ${TORCH_INDEX_URL:+--build-arg "TORCH_INDEX_URL=$TORCH_INDEX_URL"} \
  ${WHEELS_DIR:+--build-context "wheels=$WHEELS_DIR"} .
name=normserve-test-$$
trap 'docker rm -f -v "$name" >/dev/null 2>&1 || true; docker compose -p "$name" down -v >/dev/null 2>&1 || true' EXIT
docker run -d --name "$name" --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
  -v /data normserve:test >/dev/null
for _ in $(seq 120); do docker exec "$name" python -m service.probe 2>/dev/null && break; sleep .5; done
docker exec "$name" python -m service.probe
[ "$(docker exec "$name" id -u)" != 0 ]
docker stop -t 20 "$name" >/dev/null
[ "$(docker inspect -f '{{.State.ExitCode}}' "$name")" = 0 ]
docker compose -p "$name" up -d --build --wait --wait-timeout 120
if [ "${1:-}" = -- ]; then shift; "$@"; fi
echo "docker-test: ok"
