# The image of a pod: --build-arg EXTRAS=tpu,gcs (as here) or EXTRAS=cuda,gcs for NVIDIA GPUs.
FROM python:3.12-slim

ARG EXTRAS=tpu,gcs
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /terdit_jax

# The pinned set changes seldom: a layer of its own.
COPY requirements.txt ./
RUN pip install --requirement requirements.txt

COPY pyproject.toml README.md LICENSE ./
COPY terdit_jax terdit_jax
COPY configs configs
COPY launch launch
RUN pip install --editable ".[${EXTRAS}]"

CMD ["python", "-m", "terdit_jax.main", "--help"]
