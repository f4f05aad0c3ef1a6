#!/bin/bash
# The ranks of one pod, joined to those of the other pods: bash launch/k8s/ranks.sh CONFIG [--section.key=value ...]
# They run launch/pretrain.py; PROGRAM=launch/finetune.py is for fine-tuning, which has other defaults.
# Kubernetes says which pod this is (JOB_COMPLETION_INDEX); PODS, RANKS_PER_POD, MASTER_ADDR and MASTER_PORT come from job.yaml. The
# trainer of compose.yaml is the only pod.
#
# Why not torchrun: it ends with 1 whatever its ranks end with, and with 1 when it is signalled itself, but job.yaml decides by the
# code whether a pod is started again. Here the ranks' codes come through. And 30 seconds after SIGTERM it kills them, saved or not.

set -uo pipefail

ranks=() stopping=
pass_on() {
    stopping=yes
    ((${#ranks[@]} == 0)) || kill -TERM "${ranks[@]}" 2>/dev/null
}
# the ranks save, tell those of the other pods, and all end with 75; from the start on, because to process 1 nothing happens by itself
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
[[ -z $stopping ]] || pass_on # the signal may have come when the last one had been started and was not in the list

end_of() { # the exit code of a rank; a signal that is passed on ends a `wait`, too
    wait "$1"
    while kill -0 "$1" 2>/dev/null; do wait "$1"; done
    wait "$1"
}

# The ranks watch each other: when one has failed, the others end within their bound. They end with 69 or 75, so another code is the cause.
code=0 cause=
((${#ranks[@]})) || code=143 # signalled before there was one
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
