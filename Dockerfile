# proxsparse with all it needs; without arguments it runs the demo.
#
#   docker build -t proxsparse .                                            for CPUs
#   docker build -t proxsparse --build-arg BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04 \
#       --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .    for GPUs, with our kernels
#   docker run --rm proxsparse
#   docker run --rm --gpus all -v "$PWD:/work" proxsparse prune MODEL --output OUT
ARG BASE=ubuntu:24.04
FROM ${BASE}

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH OMP_WAIT_POLICY=passive

# Before the sources, so that a change of these does not fetch torch again.
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch>=2.10"
COPY . /src
RUN pip install --no-cache-dir -v /src peft && proxsparse env

WORKDIR /work
ENTRYPOINT ["proxsparse"]
CMD ["demo"]
