# The server and its small models in one image: `docker compose up` builds it, docs/deployment.md tells the rest.
#
#   PYTHON_IMAGE  what to build on: any image with Python 3.11 or newer as `python`
#   PIP_ARGS      goes to pip install, as in the Makefile, for example to name the index of torch's CPU wheels
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE}

WORKDIR /app
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore

# What is installed changes with these two files only, so a change of the sources takes seconds.
COPY pyproject.toml constraints.txt ./
ARG PIP_ARGS=""
# hadolint ignore=DL3013,SC2086
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > /tmp/requirements.txt \
    && python -m pip install -c constraints.txt ${PIP_ARGS} setuptools -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt

# Rarest change first.
COPY checkpoints checkpoints
COPY router_weights router_weights
COPY LICENSE README.md ./
COPY models models
COPY service service
# In place, as in a checkout, so that files beside the modules are found; compiled now, since the user may write nothing.
RUN python -m pip install --no-deps --no-build-isolation -e . \
    && python -m compileall -q models service

RUN groupadd --system --gid 10001 elastic \
    && useradd --system --uid 10001 --gid elastic --no-create-home --home-dir /tmp elastic
USER 10001:10001

# Inside a container, all of its addresses are its own; what is published is decided outside. Nothing is downloaded.
ENV ELASTIC_HOST=0.0.0.0 \
    HF_HUB_OFFLINE=1 \
    PYTHONUNBUFFERED=1
EXPOSE 8000

# Alive, not ready: a server that drains or whose store is away is not to be killed. For the latter ask /readyz.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('ELASTIC_PORT', '8000')), timeout=4); c.request('GET', '/healthz'); sys.exit(c.getresponse().status != 200)"]

# After SIGTERM the server finishes what it accepted, for ELASTIC_GRACE_S (30 s) and some seconds to send the answers.
# `docker stop` kills after 10 s unless told otherwise: docker stop --time 60, or stop_grace_period as in the compose file.
STOPSIGNAL SIGTERM
CMD ["elastic-dit", "serve"]
