# shellcheck shell=bash
# What the scripts beside it share: options, every call to gcloud, what its failures mean, and what is billed.
#
# gcloud's commands and flags: `gcloud compute tpus tpu-vm --help`, `gcloud compute tpus queued-resources --help`;
# states: cloud.google.com/tpu/docs/managing-tpus-tpu-vm and cloud.google.com/tpu/docs/queued-resources.
# shellcheck disable=SC2034  # what is set here is used by them
set -euo pipefail
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
    echo "error: these scripts need bash 4.4 or newer, this is $BASH_VERSION (macOS: brew install bash)" >&2
    exit 2
fi

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$HERE")
# Exit codes: what a caller, keep_running.sh for one, can do about it.
readonly FAILED=1 USAGE=2 DENIED=3 GONE=4 UNREACHABLE=5 STOPPED=6 RUNNING=7
NAME="" ZONE="" PROJECT="" DRY=""
SHOWN=""                               # $ERR was shown already
DOING="starting" BESIDES=""            # for the message of an interrupt
POLL=${FTJAX_TPU_POLL:-15}             # seconds between looks
REMOTE=ftjax                           # the folder on each worker, under its home
TMP=$(mktemp -d)
ERR=$TMP/err
: >"$ERR"

say() { printf '%s\n' "$*"; }
warn() { printf '%s\n' "$*" >&2; }
die() { # CODE MESSAGE
    local code=$1
    shift
    warn "error: $*"
    exit "$code"
}

# --help is the comment at the top of the script.
usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

cleanup() { rm -rf "$TMP"; }
interrupted() {
    trap - INT TERM
    # A script that another one started leaves the message to that one.
    if [[ -z ${FTJAX_TPU_CHILD:-} ]]; then
        warn ""
        warn "Interrupted while $DOING.${BESIDES:+ $BESIDES}"
        [[ -z $NAME ]] || last_words
    fi
    exit 130
}
trap cleanup EXIT
trap interrupted INT TERM

# `--key=value` as two words, up to `--`, so that options are read in one way. Sets ARGS.
split_words() {
    ARGS=()
    while (($#)); do
        case $1 in
        --) ARGS+=("$@") && break ;;
        --*=*) ARGS+=("${1%%=*}" "${1#*=}") ;;
        *) ARGS+=("$1") ;;
        esac
        shift
    done
}
# Reads an option that all scripts have, or the name. Sets USED to the words that it took.
common() {
    USED=1
    case $1 in
    -h | --help) usage && exit 0 ;;
    --dry-run) DRY=1 ;;
    --zone) value "$@" && ZONE=$VALUE USED=2 ;;
    --project) value "$@" && PROJECT=$VALUE USED=2 ;;
    -*) die $USAGE "unknown option $1; $(basename "$0") --help lists them" ;;
    *)
        [[ -z $NAME ]] || die $USAGE "the slice is $NAME already, and '$1' is one word too many"
        [[ $1 =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
            die $USAGE "'$1' is no name for a slice: small letters, digits and hyphens, a letter first"
        NAME=$1
        ;;
    esac
}
value() { # of option $1: sets VALUE
    (($# > 1)) && [[ -n $2 && $2 != --* ]] || die $USAGE "$1 needs a value; $(basename "$0") --help"
    VALUE=$2
}
need_name() { [[ -n $NAME ]] || die $USAGE "which slice? $(basename "$0") NAME …; --help says more"; }

# The command to run, and where it is kept: completes COMMAND and sets FOLDER, the run's on the workers.
read_command() {
    [[ ${COMMAND[0]:-} != ftjax ]] || COMMAND=("${COMMAND[@]:1}")
    ((${#COMMAND[@]})) || die $USAGE "what is to be run? $(basename "$0") $NAME … -- sft CONFIG.yaml …"
    FOLDER=""
    [[ -n $BUCKET ]] || return 0
    BUCKET=${BUCKET%/}
    [[ $BUCKET =~ ^gs://[^/]+/[^/] ]] || die $USAGE "--bucket $BUCKET: a folder in a bucket, like gs://BUCKET/RUN"
    local word
    for word in "${COMMAND[@]}"; do
        [[ $word != checkpoint.directory=* ]] || die $USAGE "--bucket says where checkpoints go; $word says it again"
        [[ $word != output=* ]] || FOLDER=${word#output=}
    done
    [[ -n $FOLDER ]] || { FOLDER=runs/$NAME && COMMAND+=("output=$FOLDER"); }
    [[ $FOLDER != /* ]] || die $USAGE "output=$FOLDER: with --bucket a relative path"
    COMMAND+=("checkpoint.directory=$BUCKET/checkpoints")
}

place() { # the words that say where, for gcloud and for ourselves
    PLACE=()
    [[ -z $ZONE ]] || PLACE+=("--zone=$ZONE")
    [[ -z $PROJECT ]] || PLACE+=("--project=$PROJECT")
}
command_for() { # SCRIPT: the command line of another script for this slice
    place
    printf ' %s' "tpu_scripts/$1" "$NAME" "${PLACE[@]}"
}

# -- gcloud

# Run a command that changes something, or print it in a dry run. Its stderr is shown, and kept in $ERR.
change() {
    if [[ -n $DRY ]]; then
        printf '+' && printf ' %q' "$@" && printf '\n'
        return 0
    fi
    SHOWN=1
    { "$@" 2>&1 >&3 | tee "$ERR" >&2; } 3>&1
}
# Run a command that only looks; its stderr is kept in $ERR and not shown.
ask() {
    if [[ -n $DRY ]]; then
        { printf '+' && printf ' %q' "$@" && printf '\n'; } >&2
        return 0
    fi
    "$@" 2>"$ERR"
}
tpu_vm() { gcloud_words tpu-vm "$@"; }
queue() { gcloud_words queued-resources "$@"; }
gcloud_words() { # GROUP VERB ARG…: sets WORDS
    place
    WORDS=(gcloud)
    [[ -z ${ALPHA:-} || $2 != create ]] || WORDS+=(alpha)
    WORDS+=(compute tpus "$1" "$2" "${@:3}" "${PLACE[@]}" --quiet)
}

# What gcloud's message in $ERR means. Sets WHY (an exit code) and ADVICE.
explain() {
    local said
    said=$(cat "$ERR")
    WHY=$FAILED ADVICE="the message above is gcloud's"
    shopt -s nocasematch
    case $said in
    *"setup.sh comes first"*) ADVICE="nothing is set up there yet:$(command_for setup.sh)" ;;
    *"worker.sh failed on "*) ADVICE="the message above is the worker's" ;;
    *"quota"*)
        WHY=$DENIED
        ADVICE="the project's quota does not allow it, and trying again will not either. Ask for more under IAM & Admin >
  Quotas (service: Cloud TPU API), or take another --zone, a smaller --type, or --spot, which has its own quota"
        ;;
    *"permission denied (publickey)"*)
        WHY=$UNREACHABLE ADVICE="ssh refused the key: ssh-add ~/.ssh/google_compute_engine"
        ;;
    *permission* | *forbidden* | *"has not been used in project"* | *SERVICE_DISABLED*)
        WHY=$DENIED
        ADVICE="this account may not do that: 'gcloud services enable tpu.googleapis.com', and the role TPU Admin
  (roles/tpu.admin) for it"
        ;;
    *"gcloud auth login"* | *reauthentication* | *"active account"*)
        WHY=$DENIED ADVICE="gcloud is not signed in: gcloud auth login"
        ;;
    *"--zone"* | *"--project"* | *"property is set"* | *"required property"*)
        WHY=$USAGE ADVICE="say where: --zone ZONE and --project PROJECT, or gcloud config set compute/zone ZONE"
        ;;
    *NOT_FOUND*)
        WHY=$GONE ADVICE="there is no such slice here:$(command_for status.sh) shows what there is"
        ;;
    *"capacity"* | *RESOURCE_EXHAUSTED* | *stockout*)
        WHY=$GONE
        ADVICE="there are none free in this zone now: try later or another --zone, or --queued, which waits in line"
        ;;
    *"terminal state"* | *preempted* | *"cannot be currently connected to"*)
        WHY=$GONE ADVICE="the slice was taken away or is not running:$(command_for status.sh)"
        ;;
    *"return code [255]"* | *"exit status 255"* | *"connection refused"* | *"timed out"* | *"connection reset"* | \
        *"connection closed"* | *UNAVAILABLE* | *"broken pipe"*)
        WHY=$UNREACHABLE
        ADVICE="its workers cannot be reached over ssh. A slice that has just started needs a minute; else see that port 22
  is open for you (gcloud compute firewall-rules list), and that 'ssh-add ~/.ssh/google_compute_engine' was done"
        ;;
    esac
    shopt -u nocasematch
}
give_up() { # WHAT: after a command that failed
    explain
    [[ -n $DRY$SHOWN ]] || cat "$ERR" >&2
    die "$WHY" "$1
  $ADVICE"
}

# -- What there is

# Sets QUEUED and STATE (of the request for capacity and of the slice; empty: there is none), TYPE_FOUND, NODES (the
# slices of a multislice) and WORKERS (of each). STATE is READY where every node is, MISSING where one of several is not
# there, else that of the first that is not READY. Fails where gcloud does.
look() {
    local line count states=() state type node there=0
    QUEUED="" STATE="" TYPE_FOUND="" NODES=("$NAME") WORKERS=1 SHOWN=""
    queue describe "$NAME" '--format=csv[no-heading](state.state,tpu.nodeSpec[0].multisliceParams.nodeCount)'
    if line=$(ask "${WORDS[@]}"); then
        IFS=, read -r QUEUED count <<<"$line"
        if ((${count:-0} > 1)); then
            NODES=()
            for ((node = 0; node < count; node++)); do NODES+=("$NAME-$node"); done
        fi
    else
        is_absent || return 1
    fi
    for node in "${NODES[@]}"; do
        tpu_vm describe "$node" '--format=csv[no-heading](state,acceleratorType,networkEndpoints.len())'
        if line=$(ask "${WORDS[@]}"); then
            IFS=, read -r state TYPE_FOUND WORKERS <<<"$line"
            states+=("$state") && there=1
        else
            is_absent || return 1
            states+=(MISSING)
        fi
    done
    if [[ -n $DRY ]]; then
        STATE=${DRY_STATE:-}
    elif ((there)); then
        STATE=READY
        for state in "${states[@]}"; do
            [[ $STATE != READY ]] || STATE=$state
        done
        [[ $STATE,$QUEUED != READY,SUSPEND* ]] || STATE=PREEMPTED
    fi
}
is_absent() { grep -q NOT_FOUND "$ERR"; }
look_or_give_up() { look || give_up "could not ask what there is of $NAME"; }
need_ready() {
    DRY_STATE=READY look_or_give_up
    [[ $STATE == READY ]] && return
    [[ -n $STATE || -n $QUEUED ]] ||
        die $GONE "there is no slice $NAME${ZONE:+ in $ZONE}:$(command_for create.sh) --type TYPE makes it"
    [[ $STATE != PREEMPTED && $STATE != TERMINATED ]] ||
        die $GONE "$NAME was taken away ($STATE). To have it again:$(command_for create.sh) --type TYPE"
    die $GONE "$NAME is ${STATE:-a request that is $QUEUED}, not READY. To wait for it:
 $(command_for create.sh) --type TYPE"
}

# One line of what costs money, for the state that `look` found.
billed() {
    local delete
    delete=$(command_for delete.sh)
    case $STATE,$QUEUED in
    ,) warn "There is no slice $NAME${ZONE:+ in $ZONE}; nothing is billed." ;;
    ,FAILED | ,SUSPENDED) warn "The request $NAME is $QUEUED and has no slice; nothing is billed. To clear it:$delete" ;;
    ,*)
        warn "The request $NAME is $QUEUED: nothing is billed until it is granted, and then it is. To take it back:
 $delete"
        ;;
    PREEMPTED,* | TERMINATED,*) warn "$NAME was taken away ($STATE). To clear what is left of it:$delete" ;;
    *) warn "$NAME is $STATE and is billed until$delete" ;;
    esac
}

last_words() { # what is billed now
    { look 2>/dev/null && billed; } ||
        warn "What there is of $NAME could not be asked; if it exists it is billed until$(command_for delete.sh)"
}

# Deletes the request with its slices, or the slice. Of a request, --force deletes what it was given too.
delete_slice() {
    if [[ -n $QUEUED || -n $DRY ]]; then
        queue delete "$NAME" --force
        change "${WORDS[@]}" || is_absent || return 1
    fi
    if [[ -z $QUEUED || -n $DRY ]]; then
        tpu_vm delete "$NAME"
        change "${WORDS[@]}" || is_absent || return 1
    fi
}

# -- Workers

# NODE… run a command on every worker of every node, at once. Fails where one of them does, with its status.
on_workers() { # COMMAND
    local node pids=() pid code=0
    for node in "${NODES[@]}"; do
        tpu_vm ssh "$node" --worker=all "--command=$1"
        if ((${#NODES[@]} == 1)) || [[ -n $DRY ]]; then
            change "${WORDS[@]}" || return $?
        else
            { "${WORDS[@]}" 2>&1 >&3 | tee "$TMP/err.$node" >&2; } 3>&1 &
            pids+=($!)
        fi
    done
    for pid in "${pids[@]}"; do
        wait "$pid" || code=$?
    done
    ((${#pids[@]} == 0)) || cat "$TMP"/err.* >"$ERR"
    return $code
}
on_first() { # COMMAND
    tpu_vm ssh "${NODES[0]}" --worker=0 "--command=$1"
    change "${WORDS[@]}"
}
to_workers() { # FILE…: into REMOTE/in of every worker
    local node
    for node in "${NODES[@]}"; do
        tpu_vm scp "$@" "$node:$REMOTE/in/" --worker=all
        change "${WORDS[@]}" || return $?
    done
}
worker() { # VERB ARG…: the command line of worker.sh
    local file=$REMOTE/in/worker.sh
    printf '[ -f %s ] || { echo setup.sh comes first >&2; exit 1; }; bash %s' "$file" "$file" && printf ' %q' "$@"
}
# A command again while workers cannot be reached, a bounded number of times: ssh comes up some time after the slice.
patiently() {
    local try=1 tries=${FTJAX_TPU_SSH_TRIES:-5} code
    while :; do
        code=0
        "$@" || code=$?
        ((code != 0)) || return 0
        explain
        [[ $WHY == "$UNREACHABLE" ]] || return $code
        ((try < tries)) || return $code
        warn "workers of $NAME cannot be reached (try $try of $tries); again in $((POLL * try)) s"
        sleep $((POLL * try))
        try=$((try + 1))
    done
}

# Every worker's state of the run, lines "HOST running|ended|lost|none CODE COMMAND", in $RUNS. Fails where they cannot
# be reached.
runs() {
    SHOWN=""
    RUNS=$(
        for node in "${NODES[@]}"; do
            tpu_vm ssh "$node" --worker=all "--command=$(worker state)"
            ask "${WORDS[@]}" || exit $?
        done
    ) || return $?
    RUNS=$(grep -E '^ftjax-run: ' <<<"$RUNS" | sed 's/^ftjax-run: //' || true)
}

gather_logs() { # every worker's log into a folder here; says where
    local to=${LOGS:-tpu_logs}/$NAME node w got=0 all=0 file
    [[ -n $DRY ]] || mkdir -p "$to"
    for node in "${NODES[@]}"; do
        for ((w = 0; w < WORKERS; w++)); do
            all=$((all + 1)) file=$to/$node-$w.log
            tpu_vm scp "$node:$REMOTE/run/log" "$file" "--worker=$w"
            if [[ -n $DRY ]]; then
                change "${WORDS[@]}"
            elif ask "${WORDS[@]}" >/dev/null; then
                got=$((got + 1))
            else
                warn "no log came from worker $w of $node: $(tail -n 1 "$ERR")"
            fi
        done
    done
    [[ -n $DRY ]] || say "Logs of $got of $all workers are in $to/"
    [[ -n $DRY ]] || ((got > 0))
}

# -- Types

# The user's name of a slice, v5e-16, taken apart: sets KIND and COUNT, and of it CHIPS. v5e and v6e count chips; v4, v5p
# and tpu7x TensorCores, two a chip.
read_type() {
    KIND=${1%-*} COUNT=${1##*-}
    [[ $1 == *-* && $COUNT =~ ^[1-9][0-9]*$ ]] ||
        die $USAGE "--type $1: a generation and a size, like v5e-16, v5p-8, v6e-16 or v4-8"
    case $KIND in
    v5litepod) KIND=v5e ;;
    v7x) KIND=tpu7x ;;
    v4 | v5e | v5p | v6e | tpu7x) ;;
    *) die $USAGE "--type $1: there are v4, v5e (v5litepod), v5p, v6e and, on GKE, v7x (tpu7x), like v5e-16" ;;
    esac
    CHIPS=$COUNT
    case $KIND in
    v4 | v5p | tpu7x) # parts of a cube of 4x4x4 chips, or whole cubes
        CHIPS=$((COUNT / 2))
        [[ " 8 16 32 64 " == *" $COUNT "* ]] || ((COUNT % 128 == 0)) ||
            die $USAGE "--type $1: $KIND counts TensorCores, two a chip, and comes in 8, 16, 32, 64 and multiples of 128"
        ;;
    *) [[ " 1 4 8 16 32 64 128 256 " == *" $COUNT "* ]] ||
        die $USAGE "--type $1: $KIND comes in 1, 4, 8, 16, 32, 64, 128 and 256 chips" ;;
    esac
}
# As Cloud TPU VMs name it: sets ACCELERATOR and RUNTIME. Software versions: cloud.google.com/tpu/docs/runtimes.
resolve_type() {
    read_type "$1"
    ACCELERATOR=$KIND-$COUNT
    case $KIND in
    v5e) ACCELERATOR=v5litepod-$COUNT RUNTIME=v2-alpha-tpuv5-lite ;;
    v5p) RUNTIME=v2-alpha-tpuv5 ;;
    v6e) RUNTIME=v2-alpha-tpuv6e ;;
    v4) RUNTIME=tpu-ubuntu2204-base ;;
    tpu7x) die $USAGE "--type $1: Cloud TPU VMs end with v6e; $1 is had through GKE: tpu_scripts/gke.sh" ;;
    esac
}
