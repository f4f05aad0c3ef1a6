#!/bin/bash
# Starts the ranks of one pod, which join the ranks of the other pods: bash launch/k8s/ranks.sh CONFIG [--section.key=value ...]
# They run launch/pretrain.py; use PROGRAM=launch/finetune.py for fine-tuning, which has other defaults.
# Kubernetes sets this pod's index (JOB_COMPLETION_INDEX); PODS, RANKS_PER_POD, MASTER_ADDR and MASTER_PORT come from job.yaml. The
# trainer of compose.yaml is the only pod.
#
# Why not torchrun: it ends with 1 for every exit code of its ranks, and also if it gets a signal itself, but job.yaml uses the code to
# decide whether a pod starts again. This script passes the ranks' codes on. torchrun also kills the ranks 30 seconds after SIGTERM, even
# if they have not saved yet.

set -uo pipefail

ranks=() stopping=
pass_on() {
    stopping=yes
    ((${#ranks[@]} == 0)) || kill -TERM "${ranks[@]}" 2>/dev/null
}
# The ranks save, inform the ranks of the other pods, and all end with 75. The trap is set first, because signals have no default effect on
# process 1.
trap pass_on TERM INT

for name in JOB_COMPLETION_INDEX PODS RANKS_PER_POD MASTER_ADDR MASTER_PORT; do
    case $name in
        MASTER_ADDR) pattern=. expected="a host" ;;
        PODS | RANKS_PER_POD) pattern='^[1-9][0-9]*$' expected="a number from 1 on" ;;
        *) pattern='^(0|[1-9][0-9]*)$' expected="a number from 0 on" ;;
    esac
    if ! [[ ${!name:-} =~ $pattern ]]; then
        echo "ranks.sh: $name is '${!name:-}', expected $expected; see launch/k8s/job.yaml" >&2
        exit 2
    fi
done
export WORLD_SIZE=$((PODS * RANKS_PER_POD)) LOCAL_WORLD_SIZE=$RANKS_PER_POD

for ((local_rank = 0; local_rank < RANKS_PER_POD; local_rank++)); do
    [[ -z $stopping ]] || break
    RANK=$((JOB_COMPLETION_INDEX * RANKS_PER_POD + local_rank)) LOCAL_RANK=$local_rank \
        "${PYTHON:-python}" "${PROGRAM:-launch/pretrain.py}" "$@" &
    ranks+=($!)
done
[[ -z $stopping ]] || pass_on # the signal may have come after the last rank started, but before it was in the list

end_of() { # the exit code of a rank; a signal to this script interrupts `wait`, too
    wait "$1"
    while kill -0 "$1" 2>/dev/null; do wait "$1"; done
    wait "$1"
}

# The ranks watch each other: if one fails, the others end within their timeout with 69 or 75, so any other code is the cause.
code=0 cause=
((${#ranks[@]})) || code=143 # a signal came before the first rank started
for rank in "${ranks[@]}"; do
    end_of "$rank"
    status=$?
    case $status in
        0) ;;
        69 | 75) code=$status ;;
        *) cause=${cause:-$status} ;;
    esac
done
exit "${cause:-$code}"
