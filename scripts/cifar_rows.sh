# Sourced by the *_cifar.sh scripts:   . scripts/cifar_rows.sh; cifar_rows METHOD "STEPS" "$@"
#
# Runs the CIFAR tables' rows of one method, pair after pair: trains the teacher if neither
# checkpoints/ nor pretrained/ has it, skips rows whose result.json is there, resumes those that
# were stopped. STEPS are the g_steps of the method's rows, or "" for the method's own.

. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

PAIRS="resnet34-resnet18 vgg11-resnet18 wrn40_2-wrn16_1 wrn40_2-wrn40_1 wrn40_2-wrn16_2"

cifar_help() {
  echo "usage: bash scripts/$(basename "$0") [cifar10|cifar100] [pair] ${2:+[${2// /|}] }[flags of datafree_kd.py]"
  echo
  echo "The rows of $1 in the tables of Fast-Datafree: all data sets, pairs${2:+ and steps} that are not named."
  echo "Pairs, teacher-student: $PAIRS"
  echo
  echo "A teacher is taken from checkpoints/<dataset>-<teacher>.pt or pretrained/, else trained (200"
  echo "epochs). Finished rows are skipped, stopped ones resumed. Results: runs/<row>/result.json."
}

cifar_rows() {
  local method=$1 steps=$2 datasets="cifar10 cifar100" pairs=$PAIRS flags=() dataset pair step
  local teacher student weights run root
  local known_steps=$steps
  shift 2
  while [ $# -gt 0 ]; do
    case " cifar10 cifar100 " in *" $1 "*) datasets=$1; shift; continue ;; esac
    case " $PAIRS " in *" $1 "*) pairs=$1; shift; continue ;; esac
    case " $known_steps " in *" $1 "*) steps=$1; shift; continue ;; esac
    case $1 in
      -h | --help) cifar_help "$method" "$known_steps"; exit ;;
      --*) flags=("$@"); break ;;
      *)
        echo "$(basename "$0"): '$1' is no data set, pair${known_steps:+ or number of steps} of this table (see --help)" >&2
        exit 2
        ;;
    esac
  done
  root=$(value_of --data_root ${flags[@]+"${flags[@]}"})
  setup
  for dataset in $datasets; do
    for pair in $pairs; do
      teacher=${pair%-*} student=${pair#*-}
      weights=checkpoints/$dataset-$teacher.pt
      if [ ! -e "$weights" ] && [ -e "pretrained/$dataset-$teacher.pt" ]; then
        weights=pretrained/$dataset-$teacher.pt
      fi
      if [ ! -e "$weights" ]; then
        echo "== $weights is missing: training it (your own file in its place saves that)"
        "$PY" teacher_train.py --dataset "$dataset" --model "$teacher" --recipe fast --resume \
          ${root:+--data_root "$root"}
      fi
      for step in ${steps:-own}; do
        run=datafree_kd-$dataset-$teacher-$student-$method
        [ "$step" = own ] || [[ $method != fast* ]] || run+=$step
        if [ -e "runs/$run/result.json" ] && [ ${#flags[@]} -eq 0 ]; then
          echo "== $run is finished: runs/$run/result.json"
          continue
        fi
        echo "== $run"
        # What the user adds comes last and wins.
        set -- --method "$method" --dataset "$dataset" --teacher "$teacher" --student "$student" \
          --teacher_ckpt "$weights" --resume
        [ "$step" = own ] || set -- "$@" --g_steps "$step"
        "$PY" datafree_kd.py "$@" ${flags[@]+"${flags[@]}"}
      done
    done
  done
}
