# The main job in a container, on CPUs. Not built here: no Docker daemon was available.
#   docker build -t perceiver-train .
#   docker run --rm --shm-size=4g -v "$PWD/work:/work" perceiver-train
# Another command:  docker run ... perceiver-train perceiver train /opt/perceiver/recipes/train/notes.yaml
# The image of a cluster's nodes is another one: `perceiver cluster render docker`.
FROM python:3.11-slim
# g++ for the CPU kernels.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 perceiver && install -d -o perceiver /work
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true
WORKDIR /opt/perceiver
COPY . .
RUN pip install -c constraints.txt '.[train,s3]'
USER perceiver
WORKDIR /work
CMD ["sh", "-c", "perceiver prepare digits data/digits && perceiver train /opt/perceiver/recipes/train/quickstart.yaml"]
