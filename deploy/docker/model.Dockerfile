# syntax=docker/dockerfile:1.7
# The two model services: one image per device, which contains both.
#   docker build -f deploy/docker/model.Dockerfile --target cpu  -t outrider-model:0.1.0-cpu .
#   docker build -f deploy/docker/model.Dockerfile --target cuda -t outrider-model:0.1.0-cuda .
# Packages are pinned by version and hash, except torch's CPU build: its version alone (requirements/torch.txt).
ARG PYTHON_IMAGE=docker.io/library/python:3.11.13-slim-bookworm
# With nvcc, as FlashInfer compiles its kernels for the GPU at hand. CUDA version of model-cuda.txt.
ARG CUDA_IMAGE=docker.io/nvidia/cuda:13.0.1-devel-ubuntu24.04

# ------------------------------------------------------------------ CPU
FROM ${PYTHON_IMAGE} AS cpu-build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/venv
# A layer of its own, first: the largest, and the one that changes least.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements/torch.txt /build/torch.txt
RUN /opt/venv/bin/pip install --no-deps --index-url ${TORCH_INDEX} -r /build/torch.txt
COPY requirements/model-cpu.txt /build/requirements.txt
RUN /opt/venv/bin/pip install --require-hashes --no-deps -r /build/requirements.txt
COPY pyproject.toml README.md /build/
COPY outrider /build/outrider
COPY orchestrator /build/orchestrator
COPY draft_service /build/draft_service
COPY target_service /build/target_service
RUN /opt/venv/bin/pip install --no-deps --no-build-isolation /build \
 && /opt/venv/bin/pip uninstall --yes pip \
 && mkdir /opt/outrider \
 && ln -s /opt/venv/lib/python3.11/site-packages/outrider/quickstart_pair /opt/outrider/pair

FROM ${PYTHON_IMAGE} AS cpu
RUN groupadd --gid 10001 outrider && useradd --uid 10001 --gid 10001 --no-create-home outrider
COPY --from=cpu-build /opt/venv /opt/venv
COPY --from=cpu-build /opt/outrider /opt/outrider
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 50052 50053
CMD ["python", "-m", "target_service"]

# ------------------------------------------------------------------ CUDA
FROM ${CUDA_IMAGE} AS cuda-base
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 python3-venv python3-dev \
 && rm -rf /var/lib/apt/lists/*

FROM cuda-base AS cuda-build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/venv
COPY requirements/model-cuda.txt /build/requirements.txt
RUN /opt/venv/bin/pip install --require-hashes --no-deps -r /build/requirements.txt
COPY pyproject.toml README.md /build/
COPY outrider /build/outrider
COPY orchestrator /build/orchestrator
COPY draft_service /build/draft_service
COPY target_service /build/target_service
RUN /opt/venv/bin/pip install --no-deps --no-build-isolation /build \
 && /opt/venv/bin/pip uninstall --yes pip \
 && mkdir /opt/outrider \
 && ln -s /opt/venv/lib/python3.12/site-packages/outrider/quickstart_pair /opt/outrider/pair

FROM cuda-base AS cuda
RUN groupadd --gid 10001 outrider && useradd --uid 10001 --gid 10001 --no-create-home outrider
COPY --from=cuda-build /opt/venv /opt/venv
COPY --from=cuda-build /opt/outrider /opt/outrider
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 50052 50053
CMD ["python", "-m", "target_service"]
