#!/usr/bin/env bash
# chartlm's front door: makes .venv once (again when pyproject.toml changes), then runs a verb.
set -euo pipefail

root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
venv=$root/.venv
log=$root/.venv.log

die() {
  printf 'chartlm: %s\n' "$1" >&2
  exit 2
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      command -v "$candidate"
      return
    fi
  done
  die "needs Python 3.11 or newer; on Debian or Ubuntu: sudo apt-get install python3 python3-venv"
}

# The stamp is written last: a .venv without it is half made and is made anew.
set_up() {
  local stamp wanted python
  stamp=$venv/chartlm.stamp
  wanted="$(sha256sum <"$root/pyproject.toml") $root"
  [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]] && return
  python=$(find_python)
  "$python" -c 'import ensurepip, venv' 2>/dev/null || die "Python lacks venv; install it: sudo apt-get install python3-venv"
  command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
    die "needs a C++ compiler; on Debian or Ubuntu: sudo apt-get install g++"
  exec 9>"$root/.venv.lock"
  flock 9 # a second launch waits for the first and finds the work done
  [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]] && return
  printf 'chartlm: setting up %s, once; about two minutes and 2 GB (log: %s)\n' "$venv" "$log" >&2
  [[ -x $venv/bin/python && -f $stamp ]] || rm -rf "$venv"
  rm -f "$stamp"
  {
    [[ -d $venv ]] || "$python" -m venv "$venv"
    # pip would compile one file after the other, half of the time of all; a file that cannot be compiled is none of ours
    "$venv/bin/pip" install --disable-pip-version-check --no-compile -e "${root}[dev]" &&
      { "$venv/bin/python" -m compileall -q -j 0 -x 'site-packages/.*/tests?/' "$venv"/lib/python3*/site-packages || true; }
  } >"$log" 2>&1 || {
    tail -n 15 "$log" >&2
    die "setting up failed; the lines above say why (all of it: $log). Mend it and run the same command again"
  }
  printf '%s' "$wanted" >"$stamp"
  exec 9>&-
}

verb=${1:-help}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
case $verb in
  test)
    set_up
    cd "$root"
    # else pyproject.toml leaves the long proofs out
    [[ ${2:-} != slow && ${2:-} != cluster ]] || set -- test -m "$2" "${@:3}"
    exec "$venv/bin/python" -m pytest "${@:2}"
    ;;
  lint)
    set_up
    cd "$root"
    "$venv/bin/ruff" check .
    "$venv/bin/ruff" format --check .
    "$venv/bin/mypy"
    exec "$venv/bin/shellcheck" launch.sh .ci/run deploy/slurm.sh
    ;;
  demo | hospital | shard | check | verify | stats | pretrain | find-lr | evaluate | compare | generate | plot | finetune | predict | explain | annotate | view | score | up | down | submit | status | logs | stop | resume)
    set_up
    exec "$venv/bin/python" -m cluster.cli "$@"
    ;;
  *) # help, or a verb that does not exist: needs no installation
    python=$(find_python)
    exec "$python" -m cluster.cli "$@"
    ;;
esac
