#!/usr/bin/env bash
# Runs a command again until it ends with status 0, and ends it when its heartbeat file falls silent.
#
#   launch/supervise.sh --heartbeat=FILE [--stale=1800] [--restarts=1000] [--pause=10] [--dry-run] -- COMMAND...
#
#   --heartbeat  the file that COMMAND renews, as terdit_jax.main does with the --heartbeat of the same name
#   --stale      seconds of silence, from the start of COMMAND on, after which it is stopped: TERM first, then KILL
#   --restarts   how often it is started again
#   --pause      seconds between an end and the next start
#
# Status 2 is bad input: it is not tried again. TERM is passed on, and its outcome is the end.
set -euo pipefail
# shellcheck source=launch/steps.sh
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

HEARTBEAT="" STALE=1800 RESTARTS=1000 PAUSE=10 GRACE=60
while [[ $# -gt 0 ]]; do
  case $1 in
    --) shift; break ;;
    --dry-run) DRY_RUN=1 ;;
    *) option "$1" heartbeat stale restarts pause grace || fail "unknown option $1" ;;
  esac
  shift
done
needed heartbeat
[[ $# -gt 0 ]] || fail "no command: write it after --"
for number in "$STALE" "$RESTARTS" "$PAUSE" "$GRACE"; do
  [[ $number =~ ^[0-9]+$ ]] || fail "$number is not a number of seconds or restarts"
done

if [[ -n $DRY_RUN ]]; then
  run "$@"
  echo "# again after $PAUSE s, at most $RESTARTS times, unless it ends with status 0 or 2"
  echo "# ended when $HEARTBEAT has not been renewed for $STALE s"
  exit 0
fi

child="" asked=""
pass_on() {
  asked=1
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}
trap pass_on TERM INT

silence() {  # seconds since the heartbeat, or since the start if that is later
  local last=$started renewed
  renewed=$(stat -c %Y "$HEARTBEAT" 2>/dev/null || stat -f %m "$HEARTBEAT" 2>/dev/null || echo 0)
  ((renewed > last)) && last=$renewed
  echo $(($(date +%s) - last))
}

stop_child() {
  kill -TERM "$child" 2>/dev/null || true
  for ((i = 0; i < GRACE; i++)); do
    kill -0 "$child" 2>/dev/null || return 0
    sleep 1
  done
  kill -KILL "$child" 2>/dev/null || true
}

for ((attempt = 0; ; attempt++)); do
  started=$(date +%s)
  "$@" &
  child=$!
  stale=""
  while kill -0 "$child" 2>/dev/null; do
    if [[ -z $asked ]] && (($(silence) > STALE)); then
      echo "supervise: no heartbeat for $(silence) s, ending process $child" >&2
      stale=1
      stop_child
      break
    fi
    sleep 1 &
    wait $! || true  # a wait is interrupted by TERM, a sleep is not
  done
  status=0
  wait "$child" || status=$?
  child=""
  [[ -z $stale || $status != 0 ]] || status=1
  if [[ -n $asked || $status == 0 || $status == 2 ]]; then
    exit "$status"
  fi
  ((attempt < RESTARTS)) || fail "the command has ended with status $status after $RESTARTS restarts"
  echo "supervise: status $status, starting again in $PAUSE s (restart $((attempt + 1)))" >&2
  sleep "$PAUSE" &
  wait $! || true
  [[ -z $asked ]] || exit "$status"
done
