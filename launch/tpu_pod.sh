#!/usr/bin/env bash
# Trains on a Cloud TPU slice: asks for it, installs on all its hosts, brings it up, trains, and does so again when preempted.
#
#   launch/tpu_pod.sh --name=terdit --project=P --zone=us-east5-a --type=v5p-128 --bucket=gs://B --config=configs/terdit_4b.py \
#     [--runtime=v2-alpha-tpuv5] [--spot=yes] [--restarts=50] [--only=bring-up|train] [--dry-run] [-- --config.FIELD=VALUE...]
#
#   --type      as Google writes it: v5p by TensorCores (v5p-128 is 64 chips), v5litepod-256 and v6e-256 by chips
#   --runtime   the image of the hosts; found from the type if left out
#   --spot      yes: capacity that may be taken away at any time
#   --only      one part of it
#   after --    options of terdit_jax.main, such as --config.data.dir=gs://B/imagenet256
#
# The run is in BUCKET/NAME; the same command goes on from there. docs/pods.md is the guide.
set -euo pipefail
# shellcheck source=launch/steps.sh
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

NAME="" PROJECT="" ZONE="" TYPE="" BUCKET="" CONFIG="" RUNTIME="" SPOT="" RESTARTS=50 ONLY="" PAUSE=60 SHORT=300
while [[ $# -gt 0 ]]; do
  case $1 in
    --) shift; break ;;
    --dry-run) DRY_RUN=1 ;;
    *) option "$1" name project zone type bucket config runtime spot restarts only pause short || fail "unknown option $1" ;;
  esac
  shift
done
needed name project zone type bucket config
[[ $BUCKET == gs://* ]] || fail "--bucket=$BUCKET: write gs://NAME; all hosts write to it"
check_config
[[ -z $ONLY || $ONLY == bring-up || $ONLY == train ]] || fail "--only=$ONLY: write bring-up or train"
if [[ -z $RUNTIME ]]; then
  case $TYPE in
    v4-*) RUNTIME=tpu-ubuntu2204-base ;;
    v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
    v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
    v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
    *) fail "--type=$TYPE: v4-N, v5litepod-N, v5p-N or v6e-N; for others give --runtime" ;;
  esac
fi

place=(--project="$PROJECT" --zone="$ZONE")
archive=$(mktemp -u "${TMPDIR:-/tmp}/terdit_jax.XXXXXX").tar.gz
[[ -z $DRY_RUN ]] || archive=/tmp/terdit_jax.tar.gz
trap 'rm -f "$archive"' EXIT

state() {  # ACTIVE, WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDED, FAILED, ... or nothing
  gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format='value(state.state)' 2>/dev/null || true
}

on_all_hosts() {
  run gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=all --command="$1"
}

acquire() {
  local found=""
  [[ -n $DRY_RUN ]] || found=$(state)
  case $found in
    SUSPENDED | SUSPENDING | FAILED)
      run gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
      found=""
      ;;
  esac
  if [[ -z $found ]]; then
    run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${place[@]}" \
      --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${SPOT:+--spot}
  fi
  if [[ -n $DRY_RUN ]]; then
    echo "# waits until the state is ACTIVE:"
    run gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format='value(state.state)'
    return
  fi
  until found=$(state) && [[ $found == ACTIVE ]]; do
    [[ $found != FAILED && $found != SUSPENDED ]] || return 1
    echo "$(date +%T) $NAME: ${found:-unknown}"
    sleep "$PAUSE"
  done
}

# The hosts' own Python is older than 3.11: uv brings one.
install="mkdir -p ~/terdit_jax && tar -xzf ~/terdit_jax.tar.gz -C ~/terdit_jax && python3 -m pip install --quiet --user uv \
&& ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 ~/venv && cd ~/terdit_jax \
&& ~/.local/bin/uv pip install --quiet --python ~/venv/bin/python --requirement requirements.txt --editable '.[tpu,gcs]'"

install_on_all_hosts() {
  run git -C "$ROOT" archive --format=tar.gz --output="$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$NAME:terdit_jax.tar.gz" "${place[@]}" --worker=all
  on_all_hosts "$install"
}

# Each host watches its own process: when one dies the others end within two minutes, and all start again.
train_on_all_hosts() {
  local heartbeat=/tmp/terdit_heartbeat.json command
  command=$(quoted launch/supervise.sh "--heartbeat=$heartbeat" --restarts=20 --pause=20 -- \
    ../venv/bin/python -m terdit_jax.main --config="$CONFIG" "--heartbeat=$heartbeat" "$@")
  on_all_hosts "cd ~/terdit_jax && $command"
}

bring_up() {
  echo "# bring-up: random latents, 20 steps, a checkpoint in $BUCKET/$NAME-bring-up"
  run gcloud storage rm --recursive --quiet "$BUCKET/$NAME-bring-up/**" || true  # none yet, the first time
  train_on_all_hosts --workdir="$BUCKET/$NAME-bring-up" "$@" "${BRING_UP[@]}"
}

training() {
  echo "# training in $BUCKET/$NAME"
  train_on_all_hosts --workdir="$BUCKET/$NAME" "$@"
}

quick=0
for ((attempt = 0; attempt <= RESTARTS; attempt++)); do
  begun=$SECONDS
  status=0
  set +e  # and on again within: after `if` or `||` bash would pass over every failure inside
  (set -e; acquire; install_on_all_hosts; [[ $ONLY == train ]] || bring_up "$@")
  status=$?
  if [[ $status == 0 && $ONLY != bring-up ]]; then
    ONLY=train  # a slice that comes back need not be brought up again
    (set -e; training "$@")
    status=$?
  fi
  set -e
  [[ -z $DRY_RUN ]] || exit 0
  found=$(state)
  if [[ $status == 0 && $found == ACTIVE ]]; then
    echo "done; delete the slice when you have looked: $(quoted gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force)"
    exit 0
  fi
  if [[ $found == ACTIVE ]] && ((SECONDS - begun < SHORT)); then
    quick=$((quick + 1))
    ((quick < 3)) || fail "three attempts in a row ended within $SHORT s on a slice that is there: see the lines above"
  else
    quick=0
  fi
  echo "$(date +%T) status $status, slice ${found:-gone}: attempt $((attempt + 2)) in $PAUSE s" >&2
  sleep "$PAUSE"
done
fail "given up after $RESTARTS restarts"
