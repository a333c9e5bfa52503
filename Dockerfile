# normserve for CPU hosts (DEVICE=cpu) and for hosts with NVIDIA GPUs (DEVICE=gpu: CUDA 13.0 and cuDNN 9 come as wheels).
# An operator with wheels of their own overrides the empty stage `wheels` (docker build --build-context wheels=DIR);
# TORCH_INDEX_URL adds an index, such as PyTorch's for CPU builds: the plain index has the CUDA build, gigabytes.
ARG BASE=python:3.11-slim

FROM scratch AS wheels

FROM ${BASE} AS build
ARG DEVICE=cpu
ARG TORCH_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
ENV INSTALL="python3 -m pip --python /opt/normserve/bin/python install -q"
RUN python3 -m venv --without-pip /opt/normserve
WORKDIR /src
COPY constraints.txt ./
# What is large and what changes rarely comes first, in layers of its own that a rebuild finds again.
RUN --mount=type=bind,from=wheels,target=/wheels \
    $INSTALL -c constraints.txt --find-links /wheels \
    ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} torch==2.13.0
COPY pyproject.toml deploy/requirements.py ./
RUN python3 requirements.py "$DEVICE" > requirements.txt && $INSTALL -c constraints.txt -r requirements.txt
COPY README.md LICENSE ./
COPY normcore normcore
COPY service service
RUN $INSTALL --no-deps .
# Headers, static libraries, tests of others and installers: nothing of it is read at run time.
RUN cd /opt/normserve/lib/python3*/site-packages \
    && rm -rf torch/include torch/share torch/test torch/lib/*.a onnx/backend/test/data setuptools setuptools-* \
    && find torch/bin -type f ! -name torch_shm_manager -delete \
    && find sympy networkx sqlalchemy -type d -name tests -prune -exec rm -rf {} + \
    && find . -name '*.pyi' -delete
# The device that was asked for must be the one that both libraries are built for.
RUN /opt/normserve/bin/python -c "import onnxruntime, torch; \
built = (torch.version.cuda is not None, 'CUDAExecutionProvider' in onnxruntime.get_available_providers()); \
assert built[1] == ('$DEVICE' == 'gpu') and built[0] >= built[1], f'DEVICE=$DEVICE, built for CUDA: {built}'"

FROM ${BASE}
ARG VERSION=0.1.0
ARG REVISION=
LABEL org.opencontainers.image.title="normserve" \
      org.opencontainers.image.description="Computes normalization, folds it into checkpoints with proof, serves them" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN useradd --system --uid 10001 --user-group --no-create-home --home-dir /data normserve \
    && install -d -o normserve -g normserve /data
COPY --from=build /opt/normserve /opt/normserve
# Compiled kernels are kept beside the data, so that a restart on a read-only root finds them.
ENV PATH=/opt/normserve/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    NUMBA_CACHE_DIR=/data/cache/numba \
    NORMSERVE_HOST=0.0.0.0 NORMSERVE_PORT=8000 NORMSERVE_DATA_DIR=/data
USER normserve
WORKDIR /data
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-m", "service.probe"]
ENTRYPOINT ["python", "-m", "service"]
