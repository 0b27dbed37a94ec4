#!/usr/bin/env bash
# Make a TPU slice and wait until it can be used. Where it is there already, nothing happens; a slice that was
# preempted, and a request that failed, are cleared and made anew.
#
# Usage: create.sh NAME --type v5e-16 [options] [-- flags of gcloud's create]
#   --type TYPE          v4-8, v5e-16 (= v5litepod-16), v5p-8, v6e-16 …
#   --spot               cheap, and may be taken away at any time
#   --reserved           from the project's reservations
#   --reservation NAME   from this reservation (queued; gcloud's alpha)
#   --queued             wait in line for capacity, instead of failing where there is none
#   --within DURATION    the queued request lapses when it was not granted within, like 6h
#   --slices N           N slices, joined by the data centre's network (queued): NAME-0, NAME-1 …
#   --runtime VERSION    the TPU software version, where not the type's usual one
#   --zone, --project    where; else gcloud's own settings
#   --dry-run            print what would be run
#
# It is billed from the moment it is READY until delete.sh. Exit codes: 3 no quota or no permission, 4 no capacity now.

# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

TYPE="" TIER=() QUEUE="" WITHIN="" SLICES=1 RUNTIME_GIVEN="" EXTRA=() ALPHA=""
split_words "$@" && set -- "${ARGS[@]}"
while (($#)); do
    case $1 in
    --type) value "$@" && TYPE=$VALUE && shift 2 ;;
    --spot | --reserved) TIER+=("$1") && shift ;;
    --reservation) value "$@" && TIER+=("--reservation=$VALUE") && QUEUE=1 ALPHA=1 && shift 2 ;;
    --queued) QUEUE=1 && shift ;;
    --within) value "$@" && WITHIN=$VALUE && shift 2 ;;
    --slices) value "$@" && SLICES=$VALUE && shift 2 ;;
    --runtime) value "$@" && RUNTIME_GIVEN=$VALUE && shift 2 ;;
    --) shift && EXTRA=("$@") && break ;;
    *) common "$@" && shift "$USED" ;;
    esac
done
need_name
[[ -n $TYPE ]] || die $USAGE "--type says which slice, like v5e-16"
((${#TIER[@]} <= 1)) || die $USAGE "${TIER[*]}: one of --spot, --reserved and --reservation"
[[ $SLICES =~ ^[1-9][0-9]*$ ]] || die $USAGE "--slices $SLICES: a number from 1 up"
((SLICES == 1)) || QUEUE=1
[[ -z $WITHIN || -n $QUEUE ]] || die $USAGE "--within is for a request that waits in line: give --queued too"
resolve_type "$TYPE"
RUNTIME=${RUNTIME_GIVEN:-$RUNTIME}

clear_away() {
    warn "$NAME is ${STATE:-$QUEUED}; it is cleared and made anew"
    delete_slice || give_up "$NAME, which is ${STATE:-$QUEUED}, could not be cleared"
    QUEUED="" STATE=""
}

DOING="asking what there is of $NAME"
look_or_give_up
[[ -z $TYPE_FOUND || $TYPE_FOUND == "$ACCELERATOR" ]] ||
    die $FAILED "$NAME is there and is $TYPE_FOUND, not $ACCELERATOR: take another name, or delete it first:
 $(command_for delete.sh)"
case $STATE,$QUEUED in
READY,*) say "$NAME is READY ($TYPE_FOUND)" && billed && exit 0 ;;
PREEMPTED,* | TERMINATED,* | ,FAILED | ,SUSPEND* | MISSING,ACTIVE | MISSING,SUSPEND*) clear_away ;;
STOPPED,* | STOPPING,*)
    die $FAILED "$NAME is $STATE: gcloud compute tpus tpu-vm start $NAME, or$(command_for delete.sh)"
    ;;
esac

if [[ -z $STATE && -z $QUEUED ]]; then
    DOING="creating $NAME"
    say "Creating $NAME: ${SLICES} × $ACCELERATOR, $RUNTIME ${TIER[*]}"
    if [[ -n $QUEUE ]]; then
        nodes=("--node-id=$NAME")
        ((SLICES == 1)) || nodes=("--node-count=$SLICES" "--node-prefix=$NAME")
        queue create "$NAME" "${nodes[@]}" "--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME" \
            "${TIER[@]}" ${WITHIN:+"--valid-until-duration=$WITHIN"} "${EXTRA[@]}"
    else
        tpu_vm create "$NAME" "--accelerator-type=$ACCELERATOR" "--version=$RUNTIME" "${TIER[@]}" "${EXTRA[@]}"
    fi
    change "${WORDS[@]}" || grep -qiE 'ALREADY_EXISTS|already exists' "$ERR" || give_up "$NAME could not be created"
    [[ -z $DRY ]] || exit 0
fi

DOING="waiting for $NAME"
said=""
while :; do
    look_or_give_up
    now="${STATE:-no slice yet}${QUEUED:+, its request $QUEUED}"
    [[ $now == "$said" ]] || say "$(date +%H:%M:%S) $NAME: $now"
    said=$now
    case $STATE,$QUEUED in
    READY,ACTIVE | READY,) break ;;
    PREEMPTED,* | TERMINATED,*) die $GONE "$NAME was taken away before it was used; the same command makes it anew" ;;
    ,) die $GONE "$NAME is gone: it was not created, or somebody deleted it" ;;
    *,FAILED | *,SUSPENDED)
        queue describe "$NAME" '--format=value(state.failedData.error.message)'
        ask "${WORDS[@]}" | tee "$ERR" >&2 || true
        explain
        [[ $WHY != "$FAILED" ]] || WHY=$GONE
        die "$WHY" "the request $NAME is $QUEUED
  ${ADVICE}. The same command makes it anew,$(command_for delete.sh) clears it"
        ;;
    esac
    sleep "$POLL"
done
say "$NAME is READY ($TYPE_FOUND, ${#NODES[@]} × $WORKERS workers). Next:$(command_for setup.sh)"
billed
