# The trainer on top of an image that brings Python >= 3.11 with pip, and PyTorch >= 2.9 (which is kept; without one it is installed).
#   docker build -t relora_mora .
#   buildah bud --format docker -t relora_mora .     (the OCI format has no health checks)
# pip's settings are the builder's: --build-arg PIP_INDEX_URL=..., or --secret id=pip.conf,src=FILE. Nothing of them stays in the image.
ARG BASE_IMAGE=pytorch/pytorch:2.9.0-cuda12.8-cudnn9-runtime

FROM ${BASE_IMAGE} AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
WORKDIR /build

# --without-pip: the base image's pip installs into the environment, which needs none of its own
RUN python3 -m venv --system-site-packages --without-pip /opt/venv

# The kernels are compiled here.
# Which version there is depends on the base image's distribution, and nothing of it is kept.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

# dependencies first: this layer changes only with setup.cfg
COPY setup.cfg ./
RUN python3 -c "import configparser as c; p = c.ConfigParser(); p.read('setup.cfg'); print(p['options']['install_requires'])" > requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -m pip --python /opt/venv/bin/python install -r requirements.txt

COPY setup.py pyproject.toml README.md LICENSE ./
COPY relora_mora relora_mora
# relora_mora/configs is a link
COPY configs configs
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -m pip --python /opt/venv/bin/python install --no-deps .

# without a compiler the package installs as well, only slower; -P: the installed package, not the sources in this folder
RUN /opt/venv/bin/python -P -c "from relora_mora.kernels import available, describe; assert available(), describe()"


FROM ${BASE_IMAGE}
RUN useradd --no-log-init --uid 10001 --user-group --no-create-home trainer \
    && mkdir -p /app/runs \
    && chown trainer:trainer /app/runs
WORKDIR /app

COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH}

# On a GPU Triton compiles at run time, with gcc and Python's headers (200 MB); an image for CPUs needs no compiler.
# hadolint ignore=DL3008
RUN if python -c "import sys, torch; sys.exit(torch.version.cuda is None)"; then \
        set -- gcc libc6-dev; \
        headers=$(python -c "import sysconfig; print(sysconfig.get_path('include'))"); \
        test -e "$headers/Python.h" || set -- "$@" python3-dev; \
        apt-get update && apt-get install -y --no-install-recommends "$@" && rm -rf /var/lib/apt/lists/*; \
    fi

# --chmod: the modes of a checkout that was made with umask 077 are for its owner alone
COPY --chmod=0755 launch launch
COPY --chmod=0755 configs configs
COPY --chmod=0755 tokenizer tokenizer

# PYTHONNOUSERSITE: apptainer mounts the user's home, and packages in its ~/.local would come before the image's
# HOME and USER also for `docker run --user`, whose id has no entry in /etc/passwd; HEALTH_MINUTES: see below
ENV PYTHONNOUSERSITE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    USER=trainer \
    HEALTH_MINUTES=30
USER 10001:10001

# healthy: a run below runs/ has written a line of metrics in the last HEALTH_MINUTES minutes
HEALTHCHECK --interval=1m --timeout=10s --start-period=30m --retries=3 \
    CMD ["sh", "-c", "test -n \"$(find runs -name checkpoints -prune -o -name metrics.jsonl -mmin -${HEALTH_MINUTES} -print -quit)\""]

# one process; for several GPUs: compose.yaml
ENTRYPOINT ["python", "launch/pretrain.py"]
CMD ["--help"]
