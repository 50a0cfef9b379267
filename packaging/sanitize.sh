#!/usr/bin/env bash
# Native tests under sanitizers: packaging/sanitize.sh [address] [undefined] [thread]; all three without arguments.
# KTS_SANITIZE_TESTS: only the tests whose names hold this text. Logs are kept in build/sanitize-<name>/.
# Ends with 1 if a test fails or a sanitizer reports anything.
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
export ASAN_OPTIONS="detect_stack_use_after_return=1:strict_init_order=1${ASAN_OPTIONS:+:$ASAN_OPTIONS}"
export UBSAN_OPTIONS="print_stacktrace=1${UBSAN_OPTIONS:+:$UBSAN_OPTIONS}"
export TSAN_OPTIONS="second_deadlock_stack=1:history_size=4${TSAN_OPTIONS:+:$TSAN_OPTIONS}"
# The thread sanitizer of g++ 12 cannot place its shadow memory where newer systems randomise 32 address bits.
fixed_addresses=()
setarch -R true 2>/dev/null && fixed_addresses=(setarch -R)

failed=0
for name in ${@:-address undefined thread}; do
  folder=build/sanitize-$name
  mkdir -p "$folder"
  started=$SECONDS
  if ! { cmake -G Ninja -S native -B "$folder" -DKTS_SANITIZE="$name" -DKTS_TESTS=ON -DKTS_PYTHON=OFF &&
    cmake --build "$folder" --target kts_tests --parallel "$(nproc)"; } >"$folder/build.log" 2>&1; then
    grep -E -A3 'error|FAILED' "$folder/build.log" | head -40
    echo "sanitize $name: does not build, see $folder/build.log"
    failed=1
    continue
  fi
  built=$SECONDS
  "${fixed_addresses[@]}" "$folder/kts_tests" ${KTS_SANITIZE_TESTS:+"$KTS_SANITIZE_TESTS"} >"$folder/run.log" 2>&1
  status=$?
  reports=$(grep -c -E 'runtime error:|(ERROR|WARNING): [A-Za-z]+Sanitizer' "$folder/run.log")
  if [ $status -ne 0 ] || [ "$reports" -ne 0 ]; then
    grep -E -A25 '^FAIL|runtime error:|(ERROR|WARNING): [A-Za-z]+Sanitizer' "$folder/run.log" | head -120
    failed=1
  fi
  summary=$(grep '^native tests:' "$folder/run.log" || echo 'native tests: did not reach the end')
  echo "sanitize $name: $reports reports, status $status; $summary" \
    "(build $((built - started)) s, run $((SECONDS - built)) s; $folder/run.log)"
done
exit $failed
