# syntax=docker/dockerfile:1
# Serve a checkpoint, from a volume or from the Hub, with an OpenAI-compatible API.
#
#   docker build --target cpu  -t llmcompress .          transformers' own server, on any machine
#   docker build --target cuda -t llmcompress:cuda .     vLLM, on a machine with an NVIDIA GPU
#
#   docker run -p 8000:8000 -v $PWD/out:/model llmcompress
#   docker run -p 8000:8000 -v $PWD/out:/model -v $PWD/api_key:/run/secrets/api_key:ro llmcompress
#   docker run -p 8000:8000 -e HF_TOKEN llmcompress serve USER/REPO --host 0.0.0.0 --make-api-key
#
# The key is the content of /run/secrets/api_key; where there is none, one is made and said in the log. SIGTERM lets
# running requests finish: give `docker stop` time for them (-t 60).
#
# Pinned by digest: every Python package that is installed here (scripts/constraints_*.txt), but torch, which is pinned by
# version, since its index is the builder's choice (TORCH_INDEX). Pinned by version, and no more: the two base images, as a
# tag can be moved. Whoever ships an image pins them too, by digests that they have checked:
#
#   docker build --build-arg PYTHON_IMAGE=docker.io/library/python:3.11.13-slim-bookworm@sha256:... --target cpu .
#
# vLLM's image brings packages of its own, which its digest pins.

ARG PYTHON_IMAGE=docker.io/library/python:3.11.13-slim-bookworm
ARG VLLM_IMAGE=docker.io/vllm/vllm-openai:v0.33.0

# ---- the package itself, built apart so that no source stays in an image
FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
RUN python3 -m venv /opt/build
COPY scripts/constraints_build.txt /opt/build/
RUN /opt/build/bin/pip install --no-cache-dir --require-hashes --no-deps --requirement /opt/build/constraints_build.txt
COPY . .
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /dist . \
    && /opt/build/bin/pip wheel --no-cache-dir --require-hashes --no-deps --no-build-isolation --wheel-dir /dist \
        --requirement scripts/constraints_sources.txt

# ---- cpu: a layer each for torch, for the other packages and for llmcompress, by how seldom they change
FROM ${PYTHON_IMAGE} AS cpu
# An index with PyTorch built for CPUs alone; the usual one brings CUDA along, which is gigabytes.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PATH=/opt/llmcompress/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/llmcompress \
    && useradd --uid 10001 --create-home llmcompress \
    && mkdir /model && chown llmcompress /model
COPY scripts/constraints_image.txt /opt/llmcompress/
RUN grep '^torch==' /opt/llmcompress/constraints_image.txt > /opt/llmcompress/torch.txt \
    && grep -v '^torch==' /opt/llmcompress/constraints_image.txt > /opt/llmcompress/others.txt \
    && pip install --no-deps --index-url ${TORCH_INDEX} --requirement /opt/llmcompress/torch.txt
# With constraints_sources.txt the list is the whole closure, so nothing is resolved; `pip check` sees that it is.
RUN pip install --require-hashes --no-deps --requirement /opt/llmcompress/others.txt
# Copied and not mounted: a builder may keep a layer whose mounts have changed.
COPY --from=wheel /dist /opt/llmcompress/dist
RUN pip install --no-deps /opt/llmcompress/dist/*.whl && pip check
ENV HF_HOME=/home/llmcompress/.cache/huggingface PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/llmcompress
VOLUME /model
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["llmcompress"]
CMD ["serve", "/model", "--host", "0.0.0.0", "--api-key-file", "/run/secrets/api_key", "--make-api-key"]

# ---- cuda: vLLM's own image, with llmcompress beside it to choose, to put its bounds in front, and to say why
FROM ${VLLM_IMAGE} AS cuda
# Without dependencies: vLLM pins its own, and what `serve` needs of ours is among them or in constraints_cuda.txt.
COPY scripts/constraints_cuda.txt /opt/llmcompress/
COPY --from=wheel /dist /opt/llmcompress/dist
RUN python3 -m pip install --no-cache-dir --require-hashes --no-deps --requirement /opt/llmcompress/constraints_cuda.txt \
    && python3 -m pip install --no-cache-dir --no-deps /opt/llmcompress/dist/llmcompress-*.whl \
    && useradd --uid 10001 --create-home llmcompress && mkdir -p /model && chown llmcompress /model
ENV HF_HOME=/home/llmcompress/.cache/huggingface PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/llmcompress
VOLUME /model
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["llmcompress"]
CMD ["serve", "/model", "--engine", "vllm", "--host", "0.0.0.0", "--api-key-file", "/run/secrets/api_key", "--make-api-key"]
