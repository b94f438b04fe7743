# fastalign in a container, for CPUs or for NVIDIA's GPUs:
#
#   docker build --target cpu --build-arg TORCH_INDEX=INDEX -t fastalign:cpu .
#   docker build --target gpu -t fastalign:gpu .
#   docker run --rm -v "$PWD:/work" fastalign:cpu doctor
#   docker run --rm --gpus all -v "$PWD:/work" fastalign:gpu dpo --config run.yaml
#
# INDEX is the package index that has PyTorch's builds for CPUs (PyTorch's page on installation names
# it). Without it, torch is what the default index has: for Linux on x86-64, the build for GPUs.
ARG PYTHON=3.13

# The wheel with native code is for every Python, and for Debian's and Ubuntu's glibc of 2.28 and later.
FROM python:${PYTHON}-slim-trixie AS wheel-cpu
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY MANIFEST.in pyproject.toml setup.py README.md LICENSE ./
COPY csrc csrc
COPY fastalign fastalign
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS wheel-gpu
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-pip \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY MANIFEST.in pyproject.toml setup.py README.md LICENSE ./
COPY csrc csrc
COPY fastalign fastalign
ENV FASTALIGN_GLIBC=2.28
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim-trixie AS base
RUN useradd --create-home --uid 1000 fastalign \
    && mkdir /work \
    && chown fastalign /work
COPY constraints.txt /opt/fastalign/
ENV HF_HUB_DISABLE_TELEMETRY=1 PYTHONUNBUFFERED=1
WORKDIR /work
ENTRYPOINT ["fastalign"]
CMD ["--help"]

FROM base AS cpu
ARG TORCH_INDEX
RUN python -m pip install --no-cache-dir -c /opt/fastalign/constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY --from=wheel-cpu /wheels /wheels
RUN python -m pip install --no-cache-dir -c /opt/fastalign/constraints.txt "$(echo /wheels/*.whl)[compare,lora,report]"
USER 1000:1000

# torch brings CUDA's libraries along, the host's driver comes by the NVIDIA container toolkit; Triton and
# torch.compile call a C++ compiler while they run.
FROM base AS gpu
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY --from=wheel-gpu /wheels /wheels
# A build of torch for GPUs requires the Triton that fits it.
RUN sed -i '/^triton==/d' /opt/fastalign/constraints.txt \
    && python -m pip install --no-cache-dir -c /opt/fastalign/constraints.txt "$(echo /wheels/*.whl)[compare,lora,low-bit,report]"
USER 1000:1000
