#!/usr/bin/env bash
# Delete a slice, its request and all that is on its disks; nothing is billed after. Where it is gone already, says so.
#
# Usage: delete.sh NAME [--yes] [--zone, --project, --dry-run]
#   --yes                do not ask first

# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

YES=""
split_words "$@" && set -- "${ARGS[@]}"
while (($#)); do
    case $1 in
    --yes) YES=1 && shift ;;
    *) common "$@" && shift "$USED" ;;
    esac
done
need_name
DOING="deleting $NAME"
DRY_STATE=READY look_or_give_up
if [[ -z $STATE && -z $QUEUED ]]; then
    billed && exit 0
fi
if [[ -z $YES && -z $DRY ]]; then
    [[ -t 0 ]] ||
        die $USAGE "$NAME is ${STATE:-$QUEUED}: --yes deletes it without asking (there is no terminal to ask on)"
    read -r -p "Delete $NAME (${STATE:-$QUEUED}${TYPE_FOUND:+, $TYPE_FOUND}) and what is on its disks? [y/N] " answer
    [[ $answer == [yY]* ]] || die $FAILED "$NAME is left as it is"
fi
delete_slice || give_up "$NAME could not be deleted and may still be billed"
[[ -n $DRY ]] || say "$NAME is deleted; nothing of it is billed any more."
