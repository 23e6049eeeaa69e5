#!/usr/bin/env bash
# A Ray cluster of several "nodes" on this machine: a head without workers, and NODES worker nodes. To try jobs, and node failures.
#
#   launch/local_cluster.sh start [NODES] [CPUS_PER_NODE]     # default: 2 nodes of 1 CPU; prints what to export
#   launch/local_cluster.sh kill NODE                         # kill -9 worker node 1, 2 …, as if its machine had died
#   launch/local_cluster.sh add [CPUS]                        # one more worker node
#   launch/local_cluster.sh stop                              # this cluster only; other Ray instances go on
#
# CLUSTER_DIR (default ./runs/local_cluster) holds pids and logs, RAY_PORT (6379) and RAY_DASHBOARD_PORT (8265) the ports (below 10001 or above 20000).
set -euo pipefail

dir=$(realpath -m "${CLUSTER_DIR:-runs/local_cluster}")
port=${RAY_PORT:-6379}
dashboard=${RAY_DASHBOARD_PORT:-8265}
here=$(cd "$(dirname "$0")/.." && pwd)
[ -x "$here/.venv/bin/ray" ] && PATH=$here/.venv/bin:$PATH # jobs find `distmtl` there, too
export RAY_DISABLE_IMPORT_WARNING=1 RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token} # Ray's default for a head; what connects to it must be told
unset RAY_ADDRESS

fail() { echo "local_cluster.sh: $*" >&2; exit 1; }

launch() { # NAME ARGUMENT… — a node in a process group of its own, so that it can be killed whole
  local name=$1
  shift
  setsid ray start --block --object-store-memory "${OBJECT_STORE_BYTES:-200000000}" "$@" > "$dir/$name.log" 2>&1 &
  echo $! > "$dir/$name.pid"
  for _ in $(seq 600); do
    grep -q "Ray runtime started" "$dir/$name.log" && return
    kill -0 "$(cat "$dir/$name.pid")" 2> /dev/null || break
    sleep 0.2
  done
  tail -5 "$dir/$name.log" >&2
  rm -f "$dir/$name.pid"
  fail "node $name did not start; its log is $dir/$name.log"
}

add() { # CPUS
  local n=1
  while [ -e "$dir/node$n.log" ]; do n=$((n + 1)); done
  launch "node$n" --address "127.0.0.1:$port" --num-cpus "$1"
  echo "node $n: $1 CPU(s)"
}

end() { # NAME; not SIGTERM, which Ray answers by waiting for half a minute
  kill -KILL -- "-$(cat "$dir/$1.pid")" 2> /dev/null || true
  rm -f "$dir/$1.pid"
}

case ${1:-} in
  start)
    [ -e "$dir/head.pid" ] && fail "a cluster of $dir is running; stop it first"
    mkdir -p "$dir"
    rm -f "$dir"/*.log
    if [ "$RAY_AUTH_MODE" = token ]; then ray get-auth-token --generate > /dev/null; fi
    launch head --head --port "$port" --num-cpus 0 --dashboard-host 127.0.0.1 --dashboard-port "$dashboard" \
      ${RAY_TEMP_DIR:+--temp-dir "$RAY_TEMP_DIR"}
    for _ in $(seq "${2:-2}"); do add "${3:-1}"; done
    echo "export RAY_ADDRESS=127.0.0.1:$port RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard RAY_AUTH_MODE=$RAY_AUTH_MODE"
    ;;
  add) add "${2:-1}" ;;
  kill)
    [ -e "$dir/node${2:?which node}.pid" ] || fail "no node $2 in $dir"
    end "node$2"
    ;;
  stop)
    [ -e "$dir/head.pid" ] || fail "no cluster in $dir"
    for pid in "$dir"/node*.pid "$dir/head.pid"; do
      if [ -e "$pid" ]; then end "$(basename "$pid" .pid)"; fi
    done
    ;;
  *) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
