#!/usr/bin/env bash
# End the run on every worker: it saves first, and goes on from there when it is started again. The slice stays, and is
# billed; delete.sh ends that.
#
# Usage: stop.sh NAME [--grace SECONDS] [--zone, --project, --dry-run]
#   --grace SECONDS      for saving, after which it is killed; 300

# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

GRACE=300
split_words "$@" && set -- "${ARGS[@]}"
while (($#)); do
    case $1 in
    --grace) value "$@" && GRACE=$VALUE && shift 2 ;;
    *) common "$@" && shift "$USED" ;;
    esac
done
need_name
[[ $GRACE =~ ^[0-9]+$ ]] || die $USAGE "--grace $GRACE: a number of seconds"
DOING="stopping the run on $NAME"
DRY_STATE=READY look_or_give_up
if [[ $STATE != READY ]]; then
    say "No run to stop: $NAME is ${STATE:-not there}." && billed && exit 0
fi
patiently on_workers "$(worker stop "$GRACE")" || give_up "the run could not be stopped on every worker of $NAME"
billed
