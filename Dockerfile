# The server and its small models in one image. `docker compose up` builds it; docs/deployment.md describes its use.
#
#   PYTHON_IMAGE  the base image: any image with Python 3.11 or newer as `python`
#   PIP_ARGS      arguments for pip install, as in the Makefile; for example the index of torch's CPU wheels
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE}

WORKDIR /app
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore

# Packages depend on these two files only, so a change of the sources rebuilds in seconds.
COPY pyproject.toml constraints.txt ./
ARG PIP_ARGS=""
# hadolint ignore=DL3013,SC2086
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > /tmp/requirements.txt \
    && python -m pip install -c constraints.txt ${PIP_ARGS} setuptools -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt

# Files that change least come first.
COPY checkpoints checkpoints
COPY router_weights router_weights
COPY LICENSE README.md ./
COPY models models
COPY service service
# Installed in place, as in a checkout, so that files beside the modules are found. Compiled now, because the user of the
# container may not write.
RUN python -m pip install --no-deps --no-build-isolation -e . \
    && python -m compileall -q models service

RUN groupadd --system --gid 10001 elastic \
    && useradd --system --uid 10001 --gid elastic --no-create-home --home-dir /tmp elastic
USER 10001:10001

# A container listens on all of its addresses; the host decides which ports to publish. Nothing is downloaded.
ENV ELASTIC_HOST=0.0.0.0 \
    HF_HUB_OFFLINE=1 \
    PYTHONUNBUFFERED=1
EXPOSE 8000

# This asks whether the server is alive, not whether it is ready: a server that drains, or whose store is unreachable,
# must not be killed. /readyz tells whether it is ready.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('ELASTIC_PORT', '8000')), timeout=4); c.request('GET', '/healthz'); sys.exit(c.getresponse().status != 200)"]

# After SIGTERM the server finishes accepted jobs for ELASTIC_GRACE_S (30 s), and sends the answers for some more seconds.
# `docker stop` kills after 10 s by default: use docker stop --time 60, or stop_grace_period as in the compose file.
STOPSIGNAL SIGTERM
CMD ["elastic-dit", "serve"]
