#!/usr/bin/env bash
# Native tests under sanitizers: packaging/sanitize.sh [address] [undefined] [thread]; all three without arguments.
# Under address and undefined the extension is built, too, and takes random calls from Python.
# KTS_SANITIZE_TESTS: only the tests whose names hold this text. KTS_SANITIZE_CALLS: random calls, 12000 unless set.
# Logs are kept in build/sanitize-<name>/. Ends with 1 if a test fails or a sanitizer reports anything.
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
export ASAN_OPTIONS="detect_stack_use_after_return=1:strict_init_order=1${ASAN_OPTIONS:+:$ASAN_OPTIONS}"
export UBSAN_OPTIONS="print_stacktrace=1${UBSAN_OPTIONS:+:$UBSAN_OPTIONS}"
export TSAN_OPTIONS="second_deadlock_stack=1:history_size=4${TSAN_OPTIONS:+:$TSAN_OPTIONS}"
# The thread sanitizer of g++ 12 cannot place its shadow memory where newer systems randomise 32 address bits.
fixed_addresses=()
setarch -R true 2>/dev/null && fixed_addresses=(setarch -R)

# configure_and_build <name> <folder> <targets...>
configure_and_build() {
  local name=$1 folder=$2 module=(-DKTS_PYTHON=OFF)
  shift 2
  if [[ " $* " == *" _native "* ]]; then
    module=(-DKTS_PYTHON=ON "-DPython_EXECUTABLE=$(command -v python)" "-Dpybind11_DIR=$(python -m pybind11 --cmakedir)"
      "-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$PWD/$folder/lib")
  fi
  cmake -G Ninja -S native -B "$folder" -DKTS_SANITIZE="$name" -DKTS_TESTS=ON "${module[@]}" &&
    cmake --build "$folder" --target "$@" --parallel "$(nproc)"
}

# random_calls <name> <folder>: of the sanitized extension, which the interpreter itself knows nothing of.
random_calls() {
  local name=$1 folder=$2 preload=""
  # The runtime has to be the first library, and to find what throws exceptions.
  [ "$name" = address ] && preload="$("${CXX:-g++}" -print-file-name=libasan.so) $("${CXX:-g++}" -print-file-name=libstdc++.so.6)"
  # Python and torch keep memory until the end, which is no leak of ours, and ask for more than there is, which is tested.
  ASAN_OPTIONS="$ASAN_OPTIONS:detect_leaks=0:allocator_may_return_null=1:halt_on_error=1" LD_PRELOAD="$preload" \
    OMP_NUM_THREADS=1 PYTHONPATH="$PWD" python -m tests.helpers.native_calls \
    --library "$folder"/lib/_native*.so --calls "${KTS_SANITIZE_CALLS:-12000}"
}

# Sizes that nothing has are asked for on purpose: that there is no such memory is no report.
reports_of() { grep -v 'Sanitizer failed to allocate' "$1" | grep -E "${@:2}" 'runtime error:|(ERROR|WARNING): [A-Za-z]+Sanitizer'; }
count_reports() { reports_of "$1" -c; }
show_reports() { { grep -A5 '^FAIL' "$1"; reports_of "$1" -A25; } | head -120; }

failed=0
for name in ${@:-address undefined thread}; do
  folder=build/sanitize-$name
  mkdir -p "$folder"
  started=$SECONDS
  targets=(kts_tests)
  [ "$name" != thread ] && targets+=(_native)
  if ! configure_and_build "$name" "$folder" "${targets[@]}" >"$folder/build.log" 2>&1; then
    grep -E -A3 'error|FAILED' "$folder/build.log" | head -40
    echo "sanitize $name: does not build, see $folder/build.log"
    failed=1
    continue
  fi
  built=$SECONDS
  "${fixed_addresses[@]}" "$folder/kts_tests" ${KTS_SANITIZE_TESTS:+"$KTS_SANITIZE_TESTS"} >"$folder/run.log" 2>&1
  status=$?
  reports=$(count_reports "$folder/run.log")
  if [ $status -ne 0 ] || [ "$reports" -ne 0 ]; then
    show_reports "$folder/run.log"
    failed=1
  fi
  summary=$(grep '^native tests:' "$folder/run.log" || echo 'native tests: did not reach the end')
  echo "sanitize $name: $reports reports, status $status; $summary" \
    "(build $((built - started)) s, run $((SECONDS - built)) s; $folder/run.log)"
  [ "$name" = thread ] && continue
  built=$SECONDS
  random_calls "$name" "$folder" >"$folder/calls.log" 2>&1
  status=$?
  reports=$(count_reports "$folder/calls.log")
  if [ $status -ne 0 ] || [ "$reports" -ne 0 ]; then
    show_reports "$folder/calls.log"
    tail -5 "$folder/calls.log"
    failed=1
  fi
  summary=$(grep '^random calls:' "$folder/calls.log" || echo 'random calls: did not reach the end')
  echo "sanitize $name: $reports reports, status $status; $summary ($((SECONDS - built)) s; $folder/calls.log)"
done
exit $failed
