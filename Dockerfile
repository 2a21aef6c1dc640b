# The training framework in an image; docs/how-to/containers.md says how to build and run it. It has not been built yet.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# With the index of PyTorch's CPU wheels, pip installs these. Its default torch is for GPUs and runs on CPUs too.
ARG PIP_EXTRA_INDEX_URL

# No run depends on the version of make.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends make && rm -rf /var/lib/apt/lists/*

WORKDIR /zclip
COPY LICENSE Makefile README.md constraints.txt pyproject.toml zclip_lightning_callback.py ./
COPY zclip ./zclip
RUN PIP_NO_CACHE_DIR=1 make .venv/.train .venv/.eval

COPY common ./common
COPY configs ./configs
COPY data ./data
COPY evaluation ./evaluation
COPY experiments ./experiments
COPY hydra_plugins ./hydra_plugins
COPY models ./models
COPY scripts ./scripts
COPY training ./training
COPY train.py ./

# Runs and caches are made in the folder that a run is started in: mount yours at /work.
ENV PATH=/zclip/.venv/bin:$PATH
WORKDIR /work
CMD ["python", "/zclip/train.py"]
