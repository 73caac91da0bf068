#!/usr/bin/env bash
# Trains on GPU nodes under SLURM, one process a GPU: a bring-up job, then a chain of jobs that each go on where the last ended.
#
#   launch/slurm.sh --name=terdit --workdir=/shared/runs/terdit_4b --config=configs/terdit_4b.py --nodes=8 \
#     [--gpus=8] [--time=24:00:00] [--chain=4] [--partition=P] [--account=A] [--python=.venv/bin/python] \
#     [--cpus=12] [--dry-run] [-- --config.FIELD=VALUE...]
#
#   --workdir   on a file system that every node sees
#   --gpus      of a node
#   --chain     jobs that wait for one another; a run that is complete says so and ends at once
#   after --    options of terdit_jax.main
#
# Two minutes before the time is up SLURM sends SIGTERM: all processes save and end with status 0.
set -euo pipefail
# shellcheck source=launch/steps.sh
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

NAME="" WORKDIR="" CONFIG="" NODES="" GPUS=8 TIME=24:00:00 CHAIN=4 PARTITION="" ACCOUNT="" PYTHON=.venv/bin/python CPUS=12
while [[ $# -gt 0 ]]; do
  case $1 in
    --) shift; break ;;
    --dry-run) DRY_RUN=1 ;;
    *)
      option "$1" name workdir config nodes gpus time chain partition account python cpus || fail "unknown option $1"
      ;;
  esac
  shift
done
needed name workdir config nodes
[[ $WORKDIR == /* ]] || WORKDIR=$PWD/$WORKDIR  # jobs start in the checkout
check_config
for number in "$NODES" "$GPUS" "$CHAIN" "$CPUS"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || fail "$number: --nodes, --gpus, --chain and --cpus are positive numbers"
done

submit() {  # WORKDIR JOB_NAME TIME DEPENDENCY OPTIONS...; prints the job's number last
  local workdir=$1 job=$2 limit=$3 dependency=$4
  shift 4
  run sbatch --parsable --job-name="$job" --nodes="$NODES" --ntasks-per-node="$GPUS" --gpus-per-node="$GPUS" \
    --cpus-per-task="$CPUS" --time="$limit" --signal=TERM@120 --requeue --open-mode=append --chdir="$ROOT" \
    --output="$WORKDIR.slurm/%x-%j.log" ${PARTITION:+--partition="$PARTITION"} ${ACCOUNT:+--account="$ACCOUNT"} \
    ${dependency:+--dependency="$dependency"} \
    --wrap="$(quoted srun --kill-on-bad-exit=1 "$PYTHON" -m terdit_jax.main --config="$CONFIG" --workdir="$workdir" "$@")"
}

run mkdir -p "$WORKDIR.slurm"
echo "# bring-up: random latents, 20 steps, a checkpoint in $WORKDIR.bring-up"
run rm -rf "$WORKDIR.bring-up"
submitted=$(submit "$WORKDIR.bring-up" "$NAME-bring-up" 00:30:00 "" "$@" "${BRING_UP[@]}")
echo "$submitted"
bring_up=${submitted##*$'\n'}
[[ -z $DRY_RUN ]] || bring_up=BRING_UP_JOB
echo "# training in $WORKDIR"
dependency=afterok:$bring_up
for ((job = 0; job < CHAIN; job++)); do
  submit "$WORKDIR" "$NAME" "$TIME" "$dependency" "$@"
  dependency=singleton  # one job of this name at a time
done
