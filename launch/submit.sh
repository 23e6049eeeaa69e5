#!/usr/bin/env bash
# Train on a Ray cluster: this directory is packed and sent, the progress is shown, the exit code is the run's.
#
#   RAY_API_SERVER_ADDRESS=http://HEAD:8265 launch/submit.sh CONFIG --workers 8 run.dir=/shared/runs/mine
#
# CONFIG            a file below this directory goes along; an absolute path must exist on the head node
# run.dir, data     absolute paths on storage that every node sees: the packed directory goes with the job
# ray job stop ID   (or Ctrl-C here, then `ray job stop`) saves a checkpoint first; the same command continues the run
# WORKING_DIR       what is packed (default: the current directory); STOP_WAIT_S: how long a stop may take before SIGKILL
# PASS_ENV          names of variables to hand on to the job and its workers, such as "AWS_PROFILE AWS_REGION"
# RAY_JOB_OPTIONS   more options of `ray job submit`, such as "--no-wait --submission-id mine"
set -euo pipefail

[ $# -gt 0 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
here=$(cd "$(dirname "$0")/.." && pwd)
[ -x "$here/.venv/bin/ray" ] && PATH=$here/.venv/bin:$PATH

# Ray's own default gives a stopped job 3 seconds. Excludes are read like .gitignore, which is honoured as well.
runtime_env=$(STOP_WAIT_S=${STOP_WAIT_S:-120} python3 - << 'PYTHON'
import json, os

variables = {name: os.environ[name] for name in os.environ.get("PASS_ENV", "").split()}
variables["RAY_JOB_STOP_WAIT_TIME_S"] = os.environ["STOP_WAIT_S"]
excludes = [".git", ".venv", "/data", "/runs", "/benchmarks", "*.parquet", "*.distcp", "__pycache__"]
print(json.dumps({"excludes": excludes, "env_vars": variables}))
PYTHON
)
# shellcheck disable=SC2086 # RAY_JOB_OPTIONS is several words
exec ray job submit --working-dir "${WORKING_DIR:-.}" --runtime-env-json "$runtime_env" ${RAY_JOB_OPTIONS:-} -- distmtl train "$@"
