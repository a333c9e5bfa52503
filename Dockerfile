# normserve on a CPU host. An operator with wheels of their own overrides the empty stage `wheels`
# (docker build --build-context wheels=DIR); TORCH_INDEX_URL adds an index, such as PyTorch's for CPU builds.
ARG BASE=python:3.11-slim

FROM scratch AS wheels

FROM ${BASE} AS build
ARG TORCH_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/normserve
WORKDIR /src
COPY constraints.txt .
RUN --mount=type=bind,from=wheels,target=/wheels \
    /opt/normserve/bin/pip install -q -c constraints.txt --find-links /wheels \
    ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} torch==2.13.0
COPY pyproject.toml README.md LICENSE ./
COPY normcore normcore
COPY service service
RUN /opt/normserve/bin/pip install -q -c constraints.txt .

FROM ${BASE}
LABEL org.opencontainers.image.title="normserve" \
      org.opencontainers.image.description="Computes normalization, folds it into checkpoints with proof, serves them" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --system --uid 10001 --user-group --no-create-home --home-dir /data normserve \
    && install -d -o normserve -g normserve /data
COPY --from=build /opt/normserve /opt/normserve
ENV PATH=/opt/normserve/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    NORMSERVE_HOST=0.0.0.0 NORMSERVE_PORT=8000 NORMSERVE_DATA_DIR=/data
USER normserve
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-m", "service.probe"]
ENTRYPOINT ["python", "-m", "service"]
