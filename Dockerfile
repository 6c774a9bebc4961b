# For CPUs:        docker build --tag svdit .
# For NVIDIA GPUs: docker build --tag svdit:cuda --target cuda .    (docker run --gpus all --shm-size 8g …)
# docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD":/data svdit sample --ckpt digits

ARG PYTHON=3.11
FROM python:${PYTHON}-slim AS wheel
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# Any user can run it: what is cached goes with the container.
FROM python:${PYTHON}-slim AS base
ENV PIP_CONSTRAINT=/constraints.txt PIP_NO_CACHE_DIR=1 HOME=/tmp
COPY constraints.txt /
COPY --from=wheel /wheels /wheels
WORKDIR /data
ENTRYPOINT ["svdit"]

# The driver is the host's, CUDA's libraries come with torch, and Triton needs a C compiler.
FROM base AS cuda
ARG EXTRAS=all
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install torch && pip install "$(echo /wheels/*.whl)[$EXTRAS]" && svdit selftest --quiet
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM base AS cpu
ARG EXTRAS=all
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN pip install torch && pip install "$(echo /wheels/*.whl)[$EXTRAS]" && svdit selftest --quiet
