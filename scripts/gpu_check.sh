#!/usr/bin/env bash
# On a machine with a GPU, in at most --minutes (9): the tests that need one, all benchmarks with their memory, then
# rows of the tables, the most valuable first, with the teachers that ship, compiled: what limits such small networks
# is the processor that starts the kernels. What comes out goes to --out (gpu_check/). --rehearse: the same on the CPU,
# as small as it can be. Run it again to go on: what is in --out is not done again. One run at a time: ten on one GPU
# each took twice as long as four. Exit code 1 if a test, a benchmark or a row failed; rows that the time cut off have
# not.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
minutes=9 out=gpu_check bench=() rows=(--compile) failed=0
tests=(-n 4 tests/test_data.py tests/test_compile.py tests/test_gpu.py -k "on_a_gpu or compiled or test_gpu")
while [ $# -gt 0 ]; do
  case $1 in
    --minutes) minutes=${2-} && shift ;;
    --out) out=${2-} && shift ;;
    --rehearse)
      bench=(--device cpu --precision fp32 --batch_size 4 --repeats 2 --steps 1)
      rows=(--device cpu --dataset none --n_epochs 1 --ep_steps 1 --kd_steps 1 --batch_size 4 --synthesis_batch_size 4)
      ;;
    *) minutes= ;;
  esac
  shift || true
done
if ! [[ $minutes =~ ^[0-9]+$ && -n $out ]]; then
  echo "usage: bash scripts/gpu_check.sh [--minutes N] [--out DIR] [--rehearse]" >&2 && exit 2
fi
setup requirements-dev.txt
mkdir -p "$out"
SECONDS=0 # what is installed once does not count
left() { echo $((minutes * 60 - SECONDS)); }
fails() { echo "failed: $*" && failed=1; }
if [ ! -e "$out/tests.txt" ]; then
  if timeout "$(left)" "$PY" -m pytest -q "${tests[@]}" 2>&1 | tee "$out/tests-failed.txt"; then
    mv "$out/tests-failed.txt" "$out/tests.txt"
  else
    fails "tests: $out/tests-failed.txt"
  fi
fi
for setting in mnist cifar10 dfad_mnist dfad_cifar camvid fast_wrn fast_wrn16 fast_resnet teacher; do
  [ ! -e "$out/bench-$setting.json" ] || continue
  [ "$(left)" -gt 90 ] || break
  timeout 90 "$PY" bench.py --setting $setting --json "$out/bench-$setting.json" "${bench[@]}" || fails "bench $setting"
done
for setting in mnist fast_wrn; do
  json=$out/bench-$setting-compiled.json
  [ ! -e "$json" ] || continue
  [ "$(left)" -gt 120 ] || break
  timeout 120 "$PY" bench.py --setting $setting --compile --json "$json" "${bench[@]}" || fails "compiled bench $setting"
done
# WRN-40-2 -> WRN-16-1 on CIFAR-10: Fast-10, -5, -2, DFQ, ZSKT; then ResNet-34 -> ResNet-18.
cells=(fast-53 fast-48 fast-43 fast-38 fast-33)
if [ -e checkpoints/cifar10-resnet34-fast.pt ]; then
  cells+=(fast-51)
else
  echo "ResNet-34 -> ResNet-18 is left out: no teacher ships (reproduce.sh fast-51 trains one)"
fi
[ "${rows[0]}" = --compile ] || cells=(fast-53)
for cell in "${cells[@]}"; do
  [ "$(left)" -gt 60 ] || break
  code=0
  "$PY" reproduce.py $cell --time_limit $(($(left) / 60)) --out "$out/runs" "${rows[@]}" || code=$?
  [ $code -eq 0 ] || [ $code -eq 75 ] || fails "$cell, exit code $code"
done
exit $failed
