#!/usr/bin/env bash
# Create a slice, set it up and run on it, and whenever it is taken away do that again: the run goes on from its last
# checkpoint. Started again it takes up where things are.
#
# Usage: keep_running.sh NAME --type v5e-16 [options] -- VERB ARG…
#   --bucket gs://B/RUN  where the run is kept, as run.sh has it; needed, as the disks of a slice go with it
#   --tries N            slices taken away, and failures to get one, before it gives up; 20
#   --delete             delete the slice when the run is done, or when this gives up; else it stays, and is billed
#   --type, --spot, --reserved, --reservation, --queued, --within, --slices, --runtime    as create.sh has them
#   --commit, --secret, --send, --extras, --python                                        as setup.sh has them
#   --logs FOLDER, --zone, --project, --dry-run
#
# A run that fails by itself (exit code 1 or 2) is not started again.

# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

TRIES=20 DELETE="" CREATE=() SETUP=() RUN=() BUCKET="" COMMAND=()
split_words "$@" && set -- "${ARGS[@]}"
while (($#)); do
    case $1 in
    --tries) value "$@" && TRIES=$VALUE && shift 2 ;;
    --delete) DELETE=1 && shift ;;
    --spot | --reserved | --queued) CREATE+=("$1") && shift ;;
    --type | --reservation | --within | --slices | --runtime) value "$@" && CREATE+=("$1" "$VALUE") && shift 2 ;;
    --commit | --secret | --send | --extras | --python) value "$@" && SETUP+=("$1" "$VALUE") && shift 2 ;;
    --bucket) value "$@" && BUCKET=$VALUE && shift 2 ;;
    --logs) value "$@" && RUN+=("$1" "$VALUE") && shift 2 ;;
    --) shift && COMMAND=("$@") && break ;;
    *) common "$@" && shift "$USED" ;;
    esac
done
need_name
[[ $TRIES =~ ^[1-9][0-9]*$ ]] || die $USAGE "--tries $TRIES: a number from 1 up"
[[ -n $BUCKET ]] ||
    die $USAGE "a slice that is taken away takes its disks along: --bucket gs://BUCKET/RUN says where the run is kept"

place
child() { # SCRIPT ARG…
    local code=0
    DOING="running $1" BESIDES="The same command takes up where things are."
    FTJAX_TPU_CHILD=1 "$HERE/$1" "$NAME" "${PLACE[@]}" ${DRY:+--dry-run} "${@:2}" || code=$?
    ((code != 130)) || interrupted
    return $code
}
finish() { # CODE
    if [[ -n $DELETE ]]; then child delete.sh --yes || exit $?; else last_words; fi
    exit "$1"
}

# What run.sh and setup.sh would complain of, before a slice is made.
(read_command)
"$HERE/setup.sh" "$NAME" --dry-run "${SETUP[@]}" &>"$TMP/setup" || { code=$? && cat "$TMP/setup" >&2 && exit $code; }
# Every slice gets the same commit, whatever is done here meanwhile.
[[ " ${SETUP[*]} " == *" --commit "* ]] || SETUP+=(--commit "$(git -C "$ROOT" rev-parse HEAD)")

wait_s=${FTJAX_TPU_BACKOFF:-30}
for ((try = 1; ; try++)); do
    code=0 doing=create.sh
    child create.sh "${CREATE[@]}" || code=$?
    if ((code == 0)); then
        doing=setup.sh
        child setup.sh "${SETUP[@]}" || code=$?
        ((code != RUNNING)) || code=0 # it was set up, and run.sh follows the run
    fi
    if ((code == 0)); then
        doing=run.sh
        child run.sh --bucket "$BUCKET" "${RUN[@]}" -- "${COMMAND[@]}" || code=$?
        wait_s=${FTJAX_TPU_BACKOFF:-30} # it was had and set up, so the next may be had soon
    fi
    [[ -z $DRY ]] || exit "$code"
    case $doing,$code in
    run.sh,0) finish 0 ;;
    run.sh,"$STOPPED") finish "$STOPPED" ;;
    run.sh,74)
        warn "The run is done, and its folder is on the slice only, which is therefore kept."
        DELETE="" finish 74
        ;;
    *,"$GONE" | *,"$UNREACHABLE") ;; # taken away, none to be had, or not to be reached: a new one
    # by a signal, its own (143: the slice is about to be taken) or that of a worker that died; 75 is ftjax's own
    # exit code for that
    run.sh,1?? | run.sh,75) ;;
    *)
        warn "$doing failed with $code, which trying again does not mend; the messages above say what would."
        finish "$code"
        ;;
    esac
    if ((try >= TRIES)); then
        warn "Gave up after $TRIES tries. The same command goes on from the last checkpoint."
        finish "$GONE"
    fi
    DOING="waiting to try again" BESIDES="The same command goes on from the last checkpoint."
    warn "$(date +%H:%M:%S) try $try of $TRIES ended ($doing: $code); again in $wait_s s"
    sleep "$wait_s"
    wait_s=$((wait_s * 2 < 900 ? wait_s * 2 : 900))
done
