#!/usr/bin/env bash
# What there is of a slice, how the run on each worker is, and what is billed. Without NAME: all slices and requests.
#
# Usage: status.sh [NAME] [--zone, --project, --dry-run]

# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

split_words "$@" && set -- "${ARGS[@]}"
while (($#)); do
    common "$@" && shift "$USED"
done
if [[ -z $NAME ]]; then
    for list in tpu_vm queue; do
        $list list
        change "${WORDS[@]}" || give_up "gcloud could not list them"
    done
    exit 0
fi
DOING="asking about $NAME"
DRY_STATE=READY look_or_give_up
shape=${TYPE_FOUND:+ ($TYPE_FOUND, ${#NODES[@]} × $WORKERS workers)}
say "$NAME: slice ${STATE:-none}$shape${QUEUED:+, request $QUEUED}"
if [[ $STATE == READY ]]; then
    if runs; then
        say "${RUNS:-not set up yet:$(command_for setup.sh)}"
    else
        explain
        warn "$(tail -n 3 "$ERR")
its workers could not be asked how the run is: $ADVICE"
    fi
fi
billed
