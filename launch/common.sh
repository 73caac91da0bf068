# shellcheck shell=bash
# Sourced by all launch scripts: where the checkout is, how they fail, and --help, which prints the head of the script.

# shellcheck disable=SC2034
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  echo "error: $*" >&2
  exit 2
}

for argument in "$@"; do
  case $argument in
    --) break ;;
    -h | --help)
      sed -n '2,$ { /^#/!q; s/^# \{0,1\}//p; }' "$0"
      exit 0
      ;;
  esac
done
