# One image for the Ray head, routers, denoisers and jobs:
#
#   docker build -t registry.example.com/easel:0.1.0 .
#   docker build -t registry.example.com/easel-cpu:0.1.0 --build-arg LOCK=requirements-cpu.lock .    (without vLLM)
#
# Every package comes from the lock file, by hash, as a wheel; `make lock` writes it. CUDA's libraries are among the
# wheels: the host brings the driver alone.
ARG PYTHON=3.12.12-slim-bookworm

FROM python:${PYTHON} AS build
ARG LOCK=requirements.lock
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python -m venv /opt/easel/venv
# Before the sources, so that a change of ours does not install 10 GB again.
COPY ${LOCK} requirements.lock
RUN /opt/easel/venv/bin/pip install --require-hashes --only-binary :all: --no-deps -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY cluster cluster
COPY deployments deployments
RUN /opt/easel/venv/bin/pip install --no-deps --no-build-isolation . \
 && /opt/easel/venv/bin/pip check

FROM python:${PYTHON}
# KubeRay's commands and probes need bash, wget and openssl. Triton compiles a launcher when it first runs a kernel, for
# which it needs a C compiler and libc's headers.
# hadolint ignore=DL3008,SC2016
RUN apt-get update \
 && apt-get install -y --no-install-recommends bash ca-certificates gcc libc6-dev openssl wget \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 1000 easel \
 && useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash easel \
 # A login shell (KubeRay's ENABLE_LOGIN_SHELL) sets PATH anew, from here.
 && echo 'PATH=/opt/easel/venv/bin:$PATH' > /etc/profile.d/easel.sh
COPY --from=build /opt/easel/venv /opt/easel/venv
COPY models/tiny /opt/easel/models/tiny
ENV PATH=/opt/easel/venv/bin:$PATH \
    HOME=/home/easel \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
USER 1000:1000
WORKDIR /home/easel
# KubeRay puts `ray start` in its place; by itself the image says what it would run with.
CMD ["easel", "config", "--schema"]
