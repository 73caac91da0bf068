#!/usr/bin/env bash
# Trains on GKE through xpk (pip install xpk): cluster, image, a bring-up workload, then the training, restarted when it fails.
#
#   launch/gke_xpk.sh --name=terdit --cluster=C --project=P --zone=us-east5-a --type=v5p-128 --bucket=gs://B \
#     --image=us-docker.pkg.dev/P/terdit/terdit-jax:1 --config=configs/terdit_4b.py \
#     [--slices=1] [--spot=yes] [--restarts=50] [--cluster-exists=yes] [--dry-run] [-- --config.FIELD=VALUE...]
#
#   --slices    several slices are one run: data parallel over the network between them, mesh.data on the outside
#   --image     where the image of this checkout goes
#   after --    options of terdit_jax.main
#
# The run is in BUCKET/NAME; the same command goes on from there. docs/pods.md is the guide.
set -euo pipefail
# shellcheck source=launch/steps.sh
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

NAME="" CLUSTER="" PROJECT="" ZONE="" TYPE="" BUCKET="" IMAGE="" CONFIG="" SLICES=1 SPOT="" RESTARTS=50 CLUSTER_EXISTS=""
while [[ $# -gt 0 ]]; do
  case $1 in
    --) shift; break ;;
    --dry-run) DRY_RUN=1 ;;
    *)
      option "$1" name cluster project zone type bucket image config slices spot restarts cluster-exists ||
        fail "unknown option $1"
      ;;
  esac
  shift
done
needed name cluster project zone type bucket image config
[[ $BUCKET == gs://* ]] || fail "--bucket=$BUCKET: write gs://NAME; all hosts write to it"
check_config

place=(--cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")

workload() {  # NAME RESTARTS OPTIONS...
  local name=$1 restarts=$2
  shift 2
  run xpk workload create "${place[@]}" --workload="$name" --tpu-type="$TYPE" --num-slices="$SLICES" \
    --docker-image="$IMAGE" --max-restarts="$restarts" \
    --command="$(quoted launch/supervise.sh --heartbeat=/tmp/heartbeat.json --restarts=3 -- \
      python -m terdit_jax.main --config="$CONFIG" --heartbeat=/tmp/heartbeat.json "$@")"
}

if [[ -z $CLUSTER_EXISTS ]]; then
  run xpk cluster create "${place[@]}" --tpu-type="$TYPE" --num-slices="$SLICES" ${SPOT:+--spot}
fi
run docker build --build-arg EXTRAS=tpu,gcs --tag "$IMAGE" "$ROOT"
run docker push "$IMAGE"
echo "# bring-up: random latents, 20 steps, a checkpoint in $BUCKET/$NAME-bring-up"
workload "$NAME-bring-up" 0 --workdir="$BUCKET/$NAME-bring-up" "$@" "${BRING_UP[@]}"
run xpk workload list "${place[@]}" --wait-for-job-completion="$NAME-bring-up" --timeout=3600
echo "# training in $BUCKET/$NAME"
workload "$NAME" "$RESTARTS" --workdir="$BUCKET/$NAME" "$@"
