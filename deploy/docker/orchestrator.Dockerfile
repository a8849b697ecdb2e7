# syntax=docker/dockerfile:1.7
# The orchestrator and the command line, without torch.
#   docker build -f deploy/docker/orchestrator.Dockerfile -t outrider-orchestrator:0.1.0 .
# Everything is pinned: the base by its tag (give its digest with --build-arg PYTHON_IMAGE=…@sha256:…),
# packages by version and hash.
ARG PYTHON_IMAGE=docker.io/library/python:3.11.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/venv
COPY requirements/orchestrator.txt /build/requirements.txt
RUN /opt/venv/bin/pip install --require-hashes --no-deps -r /build/requirements.txt
COPY pyproject.toml README.md /build/
COPY outrider /build/outrider
COPY orchestrator /build/orchestrator
COPY draft_service /build/draft_service
COPY target_service /build/target_service
COPY outrider_bench /build/outrider_bench
RUN /opt/venv/bin/pip install --no-deps --no-build-isolation /build /build/outrider_bench \
 && /opt/venv/bin/pip uninstall --yes setuptools pip \
 && mkdir /opt/outrider \
 && ln -s /opt/venv/lib/python3.11/site-packages/outrider/quickstart_pair /opt/outrider/pair

FROM ${PYTHON_IMAGE}
# No pip and no compiler. The program is in /opt/venv, owned by root, readable by 10001.
RUN groupadd --gid 10001 outrider && useradd --uid 10001 --gid 10001 --no-create-home outrider
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/outrider /opt/outrider
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 50051 8000
# Exec form, so that the program receives SIGTERM.
CMD ["python", "-m", "orchestrator"]
