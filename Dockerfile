# CPU image: docker build -t glance . && docker run --rm -it -v "$PWD/photos:/photos" glance
# On a machine with a card: docker run --gpus all --shm-size 2g (for the processes that decode pictures), and build with a base image
# that has CUDA and Python 3.11.
FROM python:3.11-slim

RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /glance
COPY . .
RUN make .venv/bin/.installed
ENV PATH=/glance/.venv/bin:$PATH HF_HUB_OFFLINE=1
CMD ["bash"]
