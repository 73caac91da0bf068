# shellcheck shell=bash
# Sourced by the launch scripts: options written --name=value, and commands that --dry-run prints instead of running.

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
DRY_RUN=""

# run COMMAND...: prints it as it could be typed, then runs it unless this is a dry run.
run() {
  local line
  printf -v line '%q ' "$@"
  echo "+ ${line% }"
  [[ -n $DRY_RUN ]] || "$@"
}

# option ARGUMENT NAME...: sets the upper-case variable of the option that ARGUMENT gives a value to, with a leading ~/
# expanded, which shells do not do there; 1 if it is none of them.
option() {
  local argument=$1 name value
  shift
  for name in "$@"; do
    if [[ $argument == "--$name="* ]]; then
      value=${argument#*=}
      # shellcheck disable=SC2088
      [[ $value != "~/"* ]] || value=$HOME/${value#"~/"}
      printf -v "$(tr 'a-z-' 'A-Z_' <<<"$name")" '%s' "$value"
      return 0
    fi
  done
  return 1
}

# needed NAME...: fails unless each option has a value.
needed() {
  local name variable
  for name in "$@"; do
    variable=$(tr 'a-z-' 'A-Z_' <<<"$name")
    [[ -n ${!variable:-} ]] || fail "--$name is needed; the head of $0 says what it is"
  done
}

# check_config: fails unless CONFIG is a file of this checkout, or the name of one of its configurations.
check_config() {
  [[ -f $ROOT/$CONFIG || -f $ROOT/configs/$CONFIG.py ]] || fail "--config=$CONFIG is no file of this checkout"
}

# quoted WORDS...: one line that a shell reads back as these words.
quoted() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}

# What a bring-up run adds to a run's command line: random latents, a few steps, everything written once.
# shellcheck disable=SC2034
BRING_UP=(
  --config.data.synthetic=True --config.train.num_steps=20 --config.log.every=5
  --config.log.heldout_every=0 --config.log.samples_every=0 --config.checkpoint.every=10 --config.optimizer.drop_step=0
)
