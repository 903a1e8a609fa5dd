#!/usr/bin/env bash
# Every check that needs a GPU, in one command, on a machine that has torch and perhaps no package index:
#   benchmarks/gpu.sh WHEELS RESULTS        WHEELS: folder made by `python -m benchmarks.bundle`, or - for what is installed
# A part that fails does not stop the others; its output lies in RESULTS/<part>.log.
set -uo pipefail
if [ $# -ne 2 ]; then sed -n '2,4s/^# //p' "$0"; exit 2; fi
cd "$(dirname "$0")/.."
python=$(command -v python3)
wheels=$1
mkdir -p "$2"
results=$(cd "$2" && pwd)
if [ "$wheels" != - ]; then
    site=$(mktemp -d)
    "$python" -m pip install --quiet --no-index --no-deps --target "$site" "$wheels"/*.whl || exit 1
    export PYTHONPATH=$site
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

failed=0
part() {
    local name=$1
    shift
    if "$python" "$@" >"$results/$name.log" 2>&1; then echo "$name: done"; else echo "$name: failed, see $results/$name.log"; failed=1; fi
}
part tests -m pytest -q -p no:cacheprovider tests/gpu
part transport -m benchmarks.device_transport --result "$results/device_transport.json"
part forward -m benchmarks.teacher_forward --result "$results/teacher_forward.json"
part speed -m benchmarks.speed --on gpu --out "$(mktemp -d)" --results "$results/speed"
tail -n 20 "$results"/speed.log
exit $failed
