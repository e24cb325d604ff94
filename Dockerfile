# Runs `make demo`. This file has not been built or run yet.
#
#     docker build -t madtp .
#     docker run --rm --shm-size=1g -v "$PWD/output:/madtp/output" madtp
#
# The report is then in output/demo/report.html. Another task: append `make demo TASK=vqa` to the second command.

FROM python:3.12-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1

WORKDIR /madtp
COPY . .
RUN make setup

CMD ["make", "demo"]
