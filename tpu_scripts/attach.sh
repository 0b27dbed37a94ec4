#!/usr/bin/env bash
# Follow a run's log until it ends, and gather the logs of all workers. Ctrl-C leaves the run going.
#
# Usage: attach.sh NAME [--worker N] [--logs FOLDER] [--zone, --project, --dry-run]
#
# Exit code: the run's own, of the first worker that failed; 4 where the slice was taken away, 5 where it cannot be
# reached, 6 where stop.sh ended it.

# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

WORKER=0 LOGS=""
split_words "$@" && set -- "${ARGS[@]}"
while (($#)); do
    case $1 in
    --worker) value "$@" && WORKER=$VALUE && shift 2 ;;
    --logs) value "$@" && LOGS=$VALUE && shift 2 ;;
    *) common "$@" && shift "$USED" ;;
    esac
done
need_name
[[ $WORKER =~ ^[0-9]+$ ]] || die $USAGE "--worker $WORKER: a number from 0 up"

DOING="following the run on $NAME"
BESIDES="The run itself goes on;$(command_for attach.sh) looks again,$(command_for stop.sh) ends it."
need_ready
failed=0
while :; do
    tpu_vm ssh "${NODES[0]}" "--worker=$WORKER" "--command=$(worker follow)"
    change "${WORDS[@]}" || true # whatever it was, the states say how the run is
    [[ -z $DRY ]] || break
    if runs; then
        failed=0
        [[ -n $RUNS ]] || die $FAILED "nothing was set up on $NAME:$(command_for setup.sh)"
        # The other workers end within a minute of the first: one that died takes them along.
        grep -q ' running ' <<<"$RUNS" || break
    else
        cp "$ERR" "$TMP/ssh"
        look_or_give_up
        cp "$TMP/ssh" "$ERR"
        explain
        [[ $STATE == READY ]] || die $GONE "$NAME was taken away (it is ${STATE:-gone}). From its last checkpoint in a
  bucket the run goes on when it is started on a new slice:$(command_for create.sh) …, setup.sh, run.sh;
  keep_running.sh does so by itself"
        [[ $WHY == "$UNREACHABLE" || $WHY == "$GONE" ]] || give_up "the workers of $NAME could not be asked how the run is"
        failed=$((failed + 1))
        ((failed < ${FTJAX_TPU_SSH_TRIES:-5})) ||
            give_up "$NAME is READY, but its workers cannot be reached (tried $failed times); whether the run goes on
  is not known"
        warn "workers of $NAME cannot be reached; again in $((POLL * failed)) s"
    fi
    sleep $((failed ? POLL * failed : POLL))
done
[[ -z $DRY ]] || { gather_logs && exit 0; }

gather_logs || warn "no worker's log could be fetched"
say "$RUNS"
code=0
while read -r host what status command; do
    case $what in
    none) die $FAILED "on $host nothing was started:$(command_for run.sh) -- VERB …" ;;
    lost) warn "on $host the run ended without a status (the VM was restarted?): ftjax $command" && code=137 ;;
    stopped) code=$STOPPED && break ;;
    ended) ((status == 0 || code != 0)) || code=$status ;;
    esac
done <<<"$RUNS"
if ((code == 0)); then
    say "The run is done."
elif ((code == STOPPED)); then
    say "The run was stopped by stop.sh; started again it goes on."
else
    warn "The run ended with $code (2: something to set right, 74: its folder is not in the bucket, 143: it was told to
  stop; the log says more)."
fi
[[ -n ${FTJAX_TPU_CHILD:-} ]] || billed # keep_running.sh says it last
exit "$code"
