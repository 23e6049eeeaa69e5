#!/usr/bin/env bash
# A Ray cluster of several "nodes" on this machine: a head without workers, and NODES worker nodes. To try jobs, and node failures.
#
#   launch/local_cluster.sh start [NODES] [CPUS_PER_NODE]     # default: 2 nodes of 1 CPU; prints what to export
#   launch/local_cluster.sh run COMMAND…                      # with that exported, on the head node
#   launch/local_cluster.sh kill NODE                         # kill -9 worker node 1, 2 …, as if its machine had died
#   launch/local_cluster.sh add [CPUS]                        # one more worker node
#   launch/local_cluster.sh cut NODE                          # only with NETNS: its network goes silent, its processes go on
#   launch/local_cluster.sh mend NODE                         # … and speaks again
#   launch/local_cluster.sh stop                              # this cluster only; other Ray instances go on
#
# CLUSTER_DIR (default ./runs/local_cluster) holds pids and logs, RAY_PORT (6379) and RAY_DASHBOARD_PORT (8265) the ports (below 10001 or above 20000).
# NETNS=NAME (root only) gives every node a network namespace and an address of its own, as if they were machines: namespaces and links are
# called NAME-head, NAME-node1 …, the addresses come from SUBNET (10.77.0.0/24). Nothing outside reaches them: use `run`, for drivers and submit.sh too.
# Several such clusters need a NETNS, a SUBNET and a CLUSTER_DIR each.
set -euo pipefail

dir=$(realpath -m "${CLUSTER_DIR:-runs/local_cluster}")
port=${RAY_PORT:-6379}
dashboard=${RAY_DASHBOARD_PORT:-8265}
netns=${NETNS:-}
subnet=${SUBNET:-10.77.0.0/24}
here=$(cd "$(dirname "$0")/.." && pwd)
[ -x "$here/.venv/bin/ray" ] && PATH=$here/.venv/bin:$PATH # jobs find `distmtl` there, too
export RAY_DISABLE_IMPORT_WARNING=1 RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token} # Ray's default for a head; what connects to it must be told
unset RAY_ADDRESS

fail() { echo "local_cluster.sh: $*" >&2; exit 1; }

address() { # NAME — the first address of SUBNET for the head, the following ones for the nodes
  local n=${1#node} net=${subnet%/*}
  [ -n "$netns" ] || { echo 127.0.0.1 && return; }
  [ "$1" = head ] && n=0
  echo "${net%.*}.$((${net##*.} + 1 + n))"
}

launch() { # NAME ARGUMENT… — a node in a process group of its own, so that it can be killed whole
  local name=$1
  shift
  [ -z "$netns" ] || plug "$name"
  setsid ${netns:+ip netns exec "$netns-$name"} ray start --block --object-store-memory "${OBJECT_STORE_BYTES:-200000000}" \
    ${netns:+--node-ip-address "$(address "$name")"} "$@" > "$dir/$name.log" 2>&1 &
  echo $! > "$dir/$name.pid"
  for _ in $(seq 600); do
    grep -qs "Ray runtime started" "$dir/$name.log" && return
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
  launch "node$n" --address "$head:$port" --num-cpus "$1"
  echo "node $n: $1 CPU(s)${netns:+, $(address "node$n")}"
}

end() { # NAME; not SIGTERM, which Ray answers by waiting for half a minute
  kill -KILL -- "-$(cat "$dir/$1.pid")" 2> /dev/null || true
  [ -z "$netns" ] || kill_all "$netns-$1"
  rm -f "$dir/$1.pid"
}

is_node() { [ -e "$dir/node$1.pid" ] || fail "no node $1 in $dir"; } # NODE

# With NETNS only.

plug() { # NAME — a namespace, with eth0 on the cluster's bridge; the bridge has no address here, so clusters cannot meet
  local ns=$netns-$1
  ip netns add "$ns"
  ip link add "$ns" type veth peer name eth0 netns "$ns"
  ip link set "$ns" master "$netns-bridge" up
  ip -n "$ns" address add "$(address "$1")/${subnet#*/}" dev eth0
  ip -n "$ns" link set eth0 up
  ip -n "$ns" link set lo up
}

namespaces() { ip netns list | sed -nE "s/^($netns-(head|node[0-9]+))( .*)?$/\1/p"; }
links() { ip -o link show | sed -nE "s/^[0-9]+: ($netns-(head|node[0-9]+|bridge))[@:].*/\1/p"; }

kill_all() { # NAMESPACE — again until nothing is left: a process may have started another meanwhile
  local pids
  for _ in $(seq 100); do
    pids=$(ip netns pids "$1")
    [ -n "$pids" ] || return 0
    xargs kill -KILL <<< "$pids" 2> /dev/null || true
    sleep 0.1
  done
  fail "processes in $1 survive kill -9: $pids"
}

unplug() { # whatever bears this cluster's name, even after a start that failed half-way
  local name
  for name in $(namespaces); do kill_all "$name"; done
  for name in $(links); do ip link delete "$name"; done
  for name in $(namespaces); do ip netns delete "$name"; done
}

if [ -n "$netns" ]; then
  if ! command -v ip > /dev/null || [ "$EUID" != 0 ]; then fail "NETNS needs root and the command ip (package iproute2)"; fi
  [[ $netns =~ ^[a-z][a-z0-9]{0,7}$ ]] || fail "NETNS=$netns: at most 8 small letters and digits, a letter first"
  [[ $subnet =~ ^([0-9]+\.){3}[0-9]+/[0-9]+$ ]] || fail "SUBNET=$subnet is not of the form 10.77.0.0/24"
fi
head=$(address head)
settings="${netns:+NETNS=$netns SUBNET=$subnet }RAY_ADDRESS=$head:$port RAY_API_SERVER_ADDRESS=http://$head:$dashboard RAY_AUTH_MODE=$RAY_AUTH_MODE"

case ${1:-} in
  start)
    [ -e "$dir/head.pid" ] && fail "a cluster of $dir is running; stop it first"
    if [ -n "$netns" ]; then
      for name in $(namespaces); do [ -z "$(ip netns pids "$name")" ] || fail "there are processes in $name; NETNS=$netns $0 stop ends them"; done
      unplug
      ip link add "$netns-bridge" type bridge
      ip link set "$netns-bridge" up
    fi
    mkdir -p "$dir"
    rm -f "$dir"/*.log
    if [ "$RAY_AUTH_MODE" = token ]; then ray get-auth-token --generate > /dev/null; fi
    launch head --head --port "$port" --num-cpus 0 --dashboard-host "$head" --dashboard-port "$dashboard" \
      ${RAY_TEMP_DIR:+--temp-dir "$RAY_TEMP_DIR"}
    for _ in $(seq "${2:-2}"); do add "${3:-1}"; done
    echo "export $settings"
    [ -z "$netns" ] || echo "on the head: $0 run COMMAND…"
    ;;
  run)
    [ $# -gt 1 ] || fail "run what?"
    [ -z "$netns" ] || [ -e "$dir/head.pid" ] || fail "no cluster in $dir"
    shift
    # shellcheck disable=SC2086 # several words
    exec ${netns:+ip netns exec "$netns-head"} env $settings "$@"
    ;;
  add) add "${2:-1}" ;;
  kill)
    is_node "${2:?which node}"
    end "node$2"
    ;;
  cut | mend)
    [ -n "$netns" ] || fail "$1 needs a cluster with NETNS"
    is_node "${2:?which node}"
    ip link set "$netns-node$2" "$([ "$1" = cut ] && echo down || echo up)"
    ;;
  stop)
    [ -e "$dir/head.pid" ] || { [ -n "$netns" ] && [ -n "$(namespaces)$(links)" ]; } || fail "no cluster in $dir"
    for pid in "$dir"/node*.pid "$dir/head.pid"; do
      if [ -e "$pid" ]; then end "$(basename "$pid" .pid)"; fi
    done
    [ -z "$netns" ] || unplug
    last=${RAY_TEMP_DIR:-/tmp/ray}/ray_current_cluster # where drivers of this machine look first: 20 s of waiting and warnings if nobody is there
    if [ "$(cat "$last" 2> /dev/null)" = "$head:$port" ]; then rm -f "$last"; fi
    ;;
  *) sed -n '2,16s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
