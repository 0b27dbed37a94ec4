#!/usr/bin/env bash
# Put the package as it is at a commit, with its Python, on every worker of a slice. Done again it does nothing, but for
# the files and secrets, which are sent anew. While a run is going on there it changes nothing, and ends with 7.
#
# Usage: setup.sh NAME [options]
#   --commit REV     which commit of this repository; HEAD, and then nothing of the package may be uncommitted
#   --secret VAR     an environment variable to have there too, like HF_TOKEN: goes by scp in a file that only you may
#                    read, never on a command line, and is never printed. May be repeated
#   --send PATH      a file or folder to have there too, under the same relative path. May be repeated
#   --extras LIST    of the package; tpu,gcs
#   --python VERSION 3.12
#   --zone, --project, --dry-run

# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

COMMIT="" SECRETS=() SEND=() EXTRAS=tpu,gcs PYTHON=3.12
split_words "$@" && set -- "${ARGS[@]}"
while (($#)); do
    case $1 in
    --commit) value "$@" && COMMIT=$VALUE && shift 2 ;;
    --secret) value "$@" && SECRETS+=("$VALUE") && shift 2 ;;
    --send) value "$@" && SEND+=("$VALUE") && shift 2 ;;
    --extras) value "$@" && EXTRAS=$VALUE && shift 2 ;;
    --python) value "$@" && PYTHON=$VALUE && shift 2 ;;
    *) common "$@" && shift "$USED" ;;
    esac
done
need_name

DOING="packing what is sent"
umask 077
if [[ -z $COMMIT ]]; then
    changed=$(git -C "$ROOT" status --porcelain -- ftjax configs pyproject.toml) ||
        die $FAILED "$ROOT is no git repository: the package is sent from one"
    [[ -z $changed ]] || die $USAGE "there are uncommitted changes, which would not be sent:
$changed
  commit them, or say --commit HEAD to do without"
    COMMIT=HEAD
fi
sha=$(git -C "$ROOT" rev-parse --short=12 --verify --quiet "$COMMIT^{commit}") ||
    die $USAGE "--commit $COMMIT: there is no such commit in $ROOT"
git -C "$ROOT" archive --format=tar.gz -o "$TMP/src.tar.gz" "$sha"
cp "$HERE/worker.sh" "$TMP/worker.sh"
files=("$TMP/src.tar.gz" "$TMP/worker.sh")
if ((${#SECRETS[@]})); then
    for name in "${SECRETS[@]}"; do
        [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] ||
            die $USAGE "--secret takes the name of an environment variable, not its value"
        [[ -n ${!name:-} ]] || die $USAGE "--secret $name: it is not set here; export it first"
        printf '%s=%q\n' "$name" "${!name}" >>"$TMP/secrets"
    done
    files+=("$TMP/secrets")
fi
if ((${#SEND[@]})); then
    for path in "${SEND[@]}"; do
        [[ $path != /* && /$path/ != */../* ]] ||
            die $USAGE "--send $path: a path below this folder, as it is kept there"
        [[ -e $path ]] || die $USAGE "--send $path: there is no such file"
    done
    tar -cf "$TMP/sent.tar" "${SEND[@]}"
    files+=("$TMP/sent.tar")
fi

DOING="setting up $NAME"
need_ready
say "Setting up $NAME: commit $sha, Python $PYTHON, [$EXTRAS]"
say "  secrets: ${SECRETS[*]:-none}; files: ${SEND[*]:-none}"
patiently on_workers "mkdir -p -m 700 $REMOTE $REMOTE/in" || give_up "no folder could be made on the workers of $NAME"
# A run reads its data, and imports what it has not needed yet, as it goes.
patiently runs || grep -q 'setup.sh comes first' "$ERR" || give_up "the workers of $NAME could not be asked how the run is"
if [[ $RUNS == *" running "* ]]; then
    warn "A run is going on on $NAME, and nothing is changed under it:
$RUNS
 $(command_for attach.sh) follows it,$(command_for stop.sh) ends it"
    exit $RUNNING
fi
patiently to_workers "${files[@]}" || give_up "files could not be copied to $NAME"
patiently on_workers "$(worker install "$sha" "$EXTRAS" "$PYTHON")" ||
    give_up "the package could not be installed on every worker of $NAME; the same command tries again"
say "$NAME is set up. Next:$(command_for run.sh) -- sft CONFIG.yaml …"
[[ -n $DRY${FTJAX_TPU_CHILD:-} ]] || billed
