# ftjax for TPUs, GPUs or neither:
#   docker build --build-arg EXTRAS=tpu,gcs  -t ftjax:tpu .
#   docker build --build-arg EXTRAS=cuda,gcs -t ftjax:cuda .     run with --gpus all
#   docker run --rm -v "$PWD/data:/work/data" -v "$PWD/runs:/work/runs" ftjax:tpu sft configs/qwen3-0.6b-sft.yaml
# jax[cuda12] brings CUDA as wheels, so the image needs none; the host needs NVIDIA's driver and container toolkit.
FROM python:3.12-slim

ARG EXTRAS=tpu,gcs
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY ftjax ftjax
RUN pip install --no-cache-dir ".[${EXTRAS}]" && rm -rf /src

WORKDIR /work
COPY configs configs
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["ftjax"]
CMD ["--help"]
