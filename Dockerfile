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

ARG PYTHON_IMAGE=docker.io/library/python:3.11.13-slim-bookworm
ARG VLLM_IMAGE=docker.io/vllm/vllm-openai:v0.33.0

# ---- cpu: what is installed, in a virtual environment that the last stage copies
FROM ${PYTHON_IMAGE} AS cpu-build
# An index with PyTorch built for CPUs alone; the usual one brings CUDA along, which is gigabytes.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python3 -m venv /opt/llmcompress
ENV PATH=/opt/llmcompress/bin:$PATH
COPY scripts/constraints.txt scripts/constraints.txt
RUN pip install --constraint scripts/constraints.txt --extra-index-url ${TORCH_INDEX} torch
# What it depends on changes seldom and is large: a layer of its own, before the source.
COPY pyproject.toml .
RUN python3 -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        print(*p['dependencies'], *p['optional-dependencies']['serve'], sep='\n')" > requirements.txt \
    && pip install --constraint scripts/constraints.txt --extra-index-url ${TORCH_INDEX} -r requirements.txt
COPY . .
RUN pip install --no-deps .

FROM ${PYTHON_IMAGE} AS cpu
RUN useradd --uid 10001 --create-home llmcompress && mkdir /model && chown llmcompress /model
ENV PATH=/opt/llmcompress/bin:$PATH HF_HOME=/home/llmcompress/.cache/huggingface PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/llmcompress
VOLUME /model
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["llmcompress"]
CMD ["serve", "/model", "--host", "0.0.0.0", "--api-key-file", "/run/secrets/api_key", "--make-api-key"]
# The one large layer, last: what stands above it is said once and costs nothing.
COPY --from=cpu-build /opt/llmcompress /opt/llmcompress

# ---- cuda: vLLM's own image, with llmcompress beside it to choose, to put the door in front, and to say why
FROM ${VLLM_IMAGE} AS cuda
COPY pyproject.toml README.md LICENSE /src/
COPY calibration /src/calibration
COPY eval /src/eval
COPY llmcompress /src/llmcompress
# Without dependencies: vLLM pins its own, and what `serve` needs of ours is among them or listed here.
RUN python3 -m pip install --no-cache-dir --no-deps /src \
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
