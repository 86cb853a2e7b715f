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
# running requests finish: give `docker stop` time for them (-t 60). Every package is pinned (constraints_image.txt).

ARG PYTHON_IMAGE=docker.io/library/python:3.11.13-slim-bookworm
ARG VLLM_IMAGE=docker.io/vllm/vllm-openai:v0.33.0

# ---- the package itself, built apart so that no source stays in an image
FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
RUN python3 -m venv /opt/build
COPY . .
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /dist . \
    && python3 -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        print(*p['dependencies'], *p['optional-dependencies']['serve'], sep='\n')" > requirements.txt

# ---- cpu: a layer each for torch, for the other packages and for llmcompress, by how seldom they change
FROM ${PYTHON_IMAGE} AS cpu
# An index with PyTorch built for CPUs alone; the usual one brings CUDA along, which is gigabytes.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PATH=/opt/llmcompress/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/llmcompress \
    && useradd --uid 10001 --create-home llmcompress \
    && mkdir /model && chown llmcompress /model
COPY scripts/constraints_image.txt /opt/llmcompress/constraints.txt
RUN pip install --constraint /opt/llmcompress/constraints.txt --extra-index-url ${TORCH_INDEX} torch
COPY --from=wheel /src/requirements.txt /opt/llmcompress/
RUN pip install --constraint /opt/llmcompress/constraints.txt --extra-index-url ${TORCH_INDEX} \
        --requirement /opt/llmcompress/requirements.txt
# Copied and not mounted: a builder may keep a layer whose mounts have changed.
COPY --from=wheel /dist /opt/llmcompress/dist
RUN pip install --no-deps /opt/llmcompress/dist/*.whl
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

# ---- cuda: vLLM's own image, with llmcompress beside it to choose, to put the door in front, and to say why
FROM ${VLLM_IMAGE} AS cuda
# Without dependencies: vLLM pins its own, and what `serve` needs of ours is among them or listed here.
COPY --from=wheel /dist /opt/llmcompress/dist
RUN python3 -m pip install --no-cache-dir --no-deps /opt/llmcompress/dist/*.whl \
    && python3 -m pip install --no-cache-dir "typer>=0.16" "pydantic>=2.10" "pyyaml>=6" "rich>=13.9" \
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
