# Sourced by the *_cifar.sh scripts:   . scripts/cifar_rows.sh PAPER METHOD[,METHOD...] "$@"
# Hands the CIFAR cells of these methods in a paper's tables over to reproduce.py.

. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
paper=$1 methods=$2
select=("paper=$paper" dataset=cifar10,cifar100 "method=$methods")
shift 2
while [ $# -gt 0 ]; do
  case $1 in
    cifar10 | cifar100) select+=("dataset=$1") ;;
    [0-9]*) select+=("method=${methods%%-*}-$1") ;;
    -h | --help)
      echo "usage: bash scripts/$(basename "$0") [cifar10|cifar100] [TEACHER-STUDENT] [STEPS] [flags]"
      echo
      echo "The CIFAR cells of $methods (paper $paper): all data sets, pairs and steps that are not named. Pairs:"
      echo "resnet34-resnet18 vgg11-resnet18 wrn40_2-wrn16_1 wrn40_2-wrn40_1 wrn40_2-wrn16_2. Flags go to reproduce.py"
      echo "(--dry-run, --seeds 3, --check ...; see its --help) and to the cells' script (--n_epochs 1 ...)."
      exit
      ;;
    -*) break ;;
    *-*) select+=("teacher=${1%-*}" "student=${1#*-}") ;;
    *)
      echo "$(basename "$0"): '$1' is no data set, pair or number of steps (see --help)" >&2
      exit 2
      ;;
  esac
  shift
done
setup
exec "$PY" reproduce.py --select "${select[@]}" "$@"
