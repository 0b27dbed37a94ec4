#!/usr/bin/env bash
# Run an ftjax command on GPU nodes by SLURM, a process a node with all of its GPUs. Where the time limit comes near or
# the job is preempted, the run saves, and the job goes back into the queue and on from the last checkpoint.
#
# Usage: slurm.sh [options] [flags of sbatch] -- VERB ARG…     slurm.sh --nodes 2 --partition=gpu -- sft CONFIG.yaml
#   --nodes N            1
#   --gpus N             of each node; 8
#   --venv FOLDER        with ftjax in it, on a disk that the nodes share; else ftjax is taken from the PATH
#   --tries N            times that the job goes back into the queue; 20
#   --dry-run            print what would be run
#
# The output folder must be on a disk that the nodes share (or a bucket). The log is NAME-JOB.log, a line's process
# first. Ends: scancel JOB. A run that fails by itself (exit code 1 or 2) does not go back into the queue.
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

if [[ -z ${FTJAX_SLURM_TRIES:-} ]]; then # not in the job: submit it
    nodes=1 gpus=8 venv="" tries=20 dry="" flags=()
    while (($#)); do
        case $1 in
        -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0" && exit 0 ;;
        --dry-run) dry=1 && shift ;;
        --nodes=* | --gpus=* | --venv=* | --tries=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        --nodes | --gpus | --venv | --tries)
            (($# > 1)) && [[ -n $2 && $2 != --* ]] || fail "$1 needs a value; slurm.sh --help"
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --) shift && break ;;
        --*=* | -*) flags+=("$1") && shift ;;
        *) fail "'$1': sbatch's flags are written --flag=value here, and the ftjax command comes after --" ;;
        esac
    done
    (($#)) || fail "what is to be run? slurm.sh --nodes 2 -- sft CONFIG.yaml …"
    [[ $1 != ftjax ]] || shift
    for number in "$nodes" "$gpus" "$tries"; do
        [[ $number =~ ^[1-9][0-9]*$ ]] || fail "--nodes, --gpus and --tries are numbers from 1 up, not '$number'"
    done
    [[ -z $venv || -x $venv/bin/ftjax ]] || fail "--venv $venv: there is no $venv/bin/ftjax"
    export FTJAX_SLURM_TRIES=$tries FTJAX_SLURM_VENV=$venv
    # TERM a while before the time limit, to the processes: they save, and end with 143.
    words=(sbatch --job-name=ftjax "--nodes=$nodes" --ntasks-per-node=1 "--gpus-per-node=$gpus" --exclusive
        --signal=TERM@180 --requeue --open-mode=append --output=%x-%j.log --export=ALL "${flags[@]}" "$0" "$@")
    if [[ -n $dry ]]; then
        printf '+' && printf ' %q' "${words[@]}" && printf '\n'
        exit 0
    fi
    command -v sbatch >/dev/null || fail "there is no sbatch here: this is for a login node of a SLURM cluster"
    exec "${words[@]}"
fi

[[ -z ${FTJAX_SLURM_VENV:-} ]] || export PATH=$FTJAX_SLURM_VENV/bin:$PATH
trap : TERM # it is for the processes of srun; this one stays until they have saved
code=0
srun --label ftjax "$@" &
while :; do
    code=0
    wait $! || code=$?
    kill -0 $! 2>/dev/null || break # a signal ends wait before srun ends
done
wait $! 2>/dev/null || code=$?
# 143: it was told to stop; 75: a node was lost; other codes above 128: a signal
if ((code == 75 || code > 128)); then
    if ((${SLURM_RESTART_COUNT:-0} < FTJAX_SLURM_TRIES)); then
        echo "the run ended with $code; the job goes back into the queue and on from its last checkpoint"
        scontrol requeue "$SLURM_JOB_ID"
        sleep 60 # the requeue ends this job
    else
        echo "the run ended with $code, after $FTJAX_SLURM_TRIES restarts; the same command goes on" >&2
    fi
fi
exit $code
