"""Slurm: one allocation is one Ray cluster; when its time is up the run saves, and the job is queued again."""

import math

from cluster.deploy.settings import Settings, train_nodes
from cluster.deploy.source import Source, job_command

SCRIPT = """#!/bin/bash
# {recipe} on Slurm, rendered by `perceiver cluster render slurm`. Not tried on a cluster.
# Submit it from a folder that all nodes share, which holds recipe, data and runs:  sbatch {file}
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={cpus}
{gpus}#SBATCH --mem={memory}G
#SBATCH --partition={partition}
{account}#SBATCH --time={time}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# TERM to this script so many seconds before the end: the run saves and the job goes back into the queue.
#SBATCH --signal=B:TERM@{drain}
set -euo pipefail
{setup}

# A token of this job alone, in a file that only its user can read.
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
export RAY_AUTH_TOKEN_PATH="$HOME/.ray/token-$SLURM_JOB_ID"
umask 077
mkdir -p "$HOME/.ray"
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"

trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${{nodes[0]}}"
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{{print $1}}')
# Outside the ports that Ray gives its workers (10002 to 19999), and another one for each job.
port=$((20000 + SLURM_JOB_ID % 10000))
export RAY_ADDRESS="$head_ip:$port"

# srun does not take over --cpus-per-task of the job (Slurm 22.05 and later); without it a node would have one CPU.
srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --nodelist="$head" --overlap \\
    ray start --head --block --node-ip-address="$head_ip" --port="$port" --dashboard-host=127.0.0.1 \\
    --num-cpus="$SLURM_CPUS_PER_TASK" &
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    sleep 10
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) \\
        --cpus-per-task="$SLURM_CPUS_PER_TASK" --exclude="$head" --overlap \\
        ray start --block --address="$RAY_ADDRESS" --num-cpus="$SLURM_CPUS_PER_TASK" &
fi

# Wait until every node has joined, at most five minutes.
python - "$SLURM_JOB_NUM_NODES" <<'PYTHON'
import sys
import time

import ray

until = time.monotonic() + 300
while time.monotonic() < until:
    try:
        ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
        if len([node for node in ray.nodes() if node["Alive"]]) >= int(sys.argv[1]):
            sys.exit(0)
        ray.shutdown()
    except (ConnectionError, RuntimeError):
        pass
    time.sleep(2)
sys.exit("the nodes did not join within 5 minutes")
PYTHON

# Starts the run, or goes on with it if this job has been queued again.
{command} &
driver=$!
asked=0
trap 'asked=1; kill -TERM "$driver" 2>/dev/null || true' TERM
code=0
wait "$driver" || code=$?
while kill -0 "$driver" 2>/dev/null; do
    code=0
    wait "$driver" || code=$?
done
if [ "$asked" = 1 ] && [ "$code" != 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def render(kind: str, source: Source, settings: Settings) -> dict[str, str]:
    """Return ``train.sbatch``."""
    machine, slurm = settings.train, settings.slurm
    text = SCRIPT.format(
        recipe=source.file,
        file="train.sbatch",
        name=source.recipe.name,
        nodes=train_nodes(source.recipe, settings),
        cpus=machine.cpus,
        gpus=f"#SBATCH --gpus-per-node={machine.gpus}\n" if machine.gpus else "",
        memory=math.floor(machine.memory_gb),
        partition=slurm.partition,
        account=f"#SBATCH --account={slurm.account}\n" if slurm.account else "",
        time=slurm.time,
        drain=settings.drain_s,
        setup=slurm.setup,
        # The nodes of an allocation are alike, so no labels here.
        command=job_command(source, source.file, source.overrides),
    )
    return {"train.sbatch": text}
