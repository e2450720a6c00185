# shellcheck shell=bash
# What the scripts of this directory share. Sourced, never run.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# The checkout these scripts belong to, and where what they fetch and make is kept.
checkout=$(dirname "$here")
# shellcheck disable=SC2034 # used by the scripts that source this file
cache=${MICROVM_CACHE:-$checkout/.cache}
me=$(basename "$0")

say() { printf '%s: %s\n' "$me" "$*" >&2; }
die() {
  say "$*"
  exit 1
}

# usage STATUS: prints the comment at the head of the script that was started, and ends it.
usage() {
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
  exit "$1"
}

# bad_usage MESSAGE: a wrong call ends with status 2.
bad_usage() {
  say "$*"
  say "see '$me --help'"
  exit 2
}

# locked FILE COMMAND…: runs COMMAND (a function, too) while no other process holds FILE.
locked() {
  local file=$1 fd
  shift
  mkdir -p "$(dirname "$file")"
  exec {fd}>"$file"
  flock "$fd"
  "$@"
  exec {fd}>&-
}
