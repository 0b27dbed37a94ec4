#!/usr/bin/env bash
# Start an ftjax command on every worker of a slice, follow it, and gather the workers' logs when it ends. The run does
# not depend on this terminal: attach.sh looks again, stop.sh ends it. Started again with the same command, it goes on
# from its last checkpoint; while it is running, nothing is started.
#
# Usage: run.sh NAME [options] -- VERB ARG…      run.sh demo -- sft configs/llama-3.1-8b-v5e-16.yaml
#   --bucket gs://B/RUN  keep the run there: its checkpoints, and a copy of its folder, made every 15 s and at the end. A
#                        run that is kept there already goes on from there, on this slice or another
#   --detach             start it, and do not follow
#   --logs FOLDER        where the logs go; tpu_logs/NAME
#   --zone, --project, --dry-run
#
# Paths are those on the workers: configs/ of the package, and what setup.sh sent. Exit code: the run's own.

# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

DETACH="" COMMAND=() LOGS="" BUCKET=""
split_words "$@" && set -- "${ARGS[@]}"
while (($#)); do
    case $1 in
    --bucket) value "$@" && BUCKET=$VALUE && shift 2 ;;
    --detach) DETACH=1 && shift ;;
    --logs) value "$@" && LOGS=$VALUE && shift 2 ;;
    --) shift && COMMAND=("$@") && break ;;
    *) common "$@" && shift "$USED" ;;
    esac
done
need_name
read_command

DOING="starting the run on $NAME"
need_ready
if [[ -n $BUCKET ]]; then # process 0 is worker 0 of the first slice
    patiently on_first "$(worker keep "$BUCKET" "$FOLDER")" || give_up "the run folder could not be fetched from $BUCKET"
fi
patiently on_workers "$(worker start "${BUCKET:--}" "${FOLDER:--}" "${COMMAND[@]}")" ||
    give_up "the run was not started on every worker of $NAME; workers that started wait some minutes for the others: the
  same command starts those that are missing,$(command_for stop.sh) ends those that run"
say "Started on $NAME: ftjax ${COMMAND[*]}"
if [[ -n $DETACH ]]; then
    say "To follow it:$(command_for attach.sh)"
    [[ -n $DRY ]] || billed
    exit 0
fi
place
cleanup
exec "$HERE/attach.sh" "$NAME" "${PLACE[@]}" ${LOGS:+--logs "$LOGS"} ${DRY:+--dry-run}
