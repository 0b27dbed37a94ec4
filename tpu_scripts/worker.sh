#!/usr/bin/env bash
# What the other scripts run on a TPU VM: setup.sh brings it there. It keeps everything under ~/ftjax:
# in/ (what was sent), src/ (the package), venv/, work/ (where runs are started), run/ (log, pid, code), secrets.
# Usage: worker.sh install COMMIT EXTRAS PYTHON    make the environment; nothing where it is there
#        worker.sh keep BUCKET FOLDER              this worker has the run folder: fetch it from the bucket
#        worker.sh start BUCKET FOLDER VERB ARG…   start `ftjax VERB ARG…`, detached; nothing where it is running. BUCKET
#                                                  and FOLDER are those of keep, or -
#        worker.sh state                           one line: ftjax-run: HOST running|ended|stopped|lost|none CODE COMMAND
#        worker.sh follow [LINES]                  the log, until the run ends
#        worker.sh stop [SECONDS]                  SIGTERM, so that it saves; SIGKILL after so many seconds
set -euo pipefail
case ${1:-} in
install | keep | start | attend | state | follow | stop) ;;
*) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0" && exit $(($# == 1 ? 0 : 2)) ;;
esac
trap '(($? == 0)) || echo "worker.sh failed on $(hostname)" >&2' EXIT
cd ~/ftjax
export PATH=$HOME/.local/bin:$PATH

fail() {
    echo "$(hostname): $*" >&2
    exit 1
}

install() { # COMMIT EXTRAS PYTHON
    mkdir -p work run
    if [[ -f in/secrets ]]; then
        chmod 600 in/secrets
        mv in/secrets secrets
    fi
    if [[ -f in/sent.tar ]]; then
        tar -xf in/sent.tar -C work
        rm in/sent.tar
    fi
    local want="$1 $2 $3"
    if [[ $(cat installed 2>/dev/null) == "$want" ]]; then
        echo "$(hostname): $1 is installed"
        return
    fi
    rm -rf installed src
    mkdir src
    tar -xzf in/src.tar.gz -C src
    # TPU VMs bring Python 3.10; uv brings the one that is asked for.
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv || fail "uv could not be installed"
    [[ -x venv/bin/python && $(cat venv/version 2>/dev/null) == "$3" ]] || {
        rm -rf venv
        uv venv --quiet --python "$3" venv || fail "there is no Python $3"
        echo "$3" >venv/version
    }
    local try
    for try in 1 2 3; do # a download that breaks off is no reason to give a slice back
        ! uv pip install --quiet --python venv/bin/python "./src[$2]" || break
        ((try < 3)) || fail "the package could not be installed"
        sleep 2
    done
    ln -sfn ../src/configs work/configs
    venv/bin/ftjax --version
    echo "$want" >installed
    echo "$(hostname): installed $1"
}

# The process is the run's own only if it has the run's mark: after a reboot the number may be another's.
is_running() {
    [[ -f run/parent && ! -f run/code ]] || return 1
    local pid
    pid=$(cat run/parent)
    kill -0 "$pid" 2>/dev/null || return 1
    [[ ! -r /proc/$pid/environ ]] || grep -qzx "FTJAX_RUN=$(cat run/id)" "/proc/$pid/environ"
}

# The run folder is of small files, on the disk of the worker that has process 0; in the bucket it is beside checkpoints/,
# which ftjax itself writes. Its config.yaml marks it as a run's, so it is there last.
keep() { # BUCKET FOLDER
    echo "$1 $2" >keep
    is_running && return
    local said
    if ! said=$(gcloud storage ls "$1/config.yaml" 2>&1); then
        [[ $said == *"matched no objects"* ]] || fail "cannot read $1: $said"
        return
    fi
    mkdir -p "work/$2"
    gcloud storage rsync --recursive "--exclude=^checkpoints/" "$1" "work/$2"
    echo "$(hostname): the run folder is as it was kept in $1"
}
push() { # BUCKET FOLDER
    [[ -d work/$2 ]] || return 0
    gcloud storage rsync --recursive "--exclude=^checkpoints/|^config.yaml$" "work/$2" "$1" &&
        gcloud storage rsync --recursive "--exclude=^checkpoints/" "work/$2" "$1"
}

start() { # BUCKET|- FOLDER|- VERB ARG…
    [[ -f installed ]] || fail "the package is not installed here: setup.sh comes first"
    local command
    command=$(printf '%q ' "${@:3}")
    if is_running; then
        [[ $(cat run/command) == "$command" ]] ||
            fail "another run is going on: ftjax $(cat run/command)(stop.sh ends it)"
        echo "$(hostname): running already"
        return
    fi
    rm -f run/code run/pid run/stop
    [[ ! -f run/log ]] || mv run/log run/log.before
    echo "$command" >run/command
    date +%s.%N >run/id
    set -a
    # shellcheck disable=SC1091
    [[ ! -f secrets ]] || source secrets
    set +a
    FTJAX_RUN=$(cat run/id)
    export FTJAX_RUN
    # Of its own session, and holding nothing of this one's, so that it outlives it.
    nohup setsid bash in/worker.sh attend "$@" >run/log 2>&1 </dev/null &
    echo $! >run/parent
    for _ in $(seq 50); do
        [[ ! -f run/pid ]] || break
        sleep 0.1
    done
    [[ -f run/pid ]] || fail "the run did not start: $(cat run/log)"
    echo "$(hostname): started"
}
# Beside the run until it has ended: its exit status is in run/code when its folder is in the bucket.
attend() { # BUCKET|- FOLDER|- VERB ARG…
    local pid code=0 try ticks=${FTJAX_KEEP_TICKS:-75} # 15 s
    # A machine that is taken away tells every process to end, and is off 30 s later: wait up to 20 s for the run, which
    # saves, and copy a last time.
    trap 'try=0 ticks=100' TERM
    (cd work && exec ../venv/bin/ftjax "${@:3}") &
    pid=$!
    echo $pid >run/pid
    if [[ $(cat keep 2>/dev/null) == "$1 $2" ]]; then
        while kill -0 $pid 2>/dev/null; do
            for ((try = 0; try < ticks; try++)); do
                ! kill -0 $pid 2>/dev/null || sleep 0.2 || true # which may be told to end
            done
            push "$1" "$2" &>run/keep.log || echo "the run folder could not be copied to $1: $(tail -n 1 run/keep.log)"
        done
        wait $pid || code=$?
        trap : TERM
        for try in 1 2 3; do
            ! push "$1" "$2" &>run/keep.log || break
            ((try < 3)) || {
                echo "error: the run folder could not be copied to $1 and is on $(hostname) only: $(tail -n 1 run/keep.log)"
                ((code)) || code=74
            }
        done
    else
        while kill -0 $pid 2>/dev/null; do sleep 0.2 || true; done # a signal would end wait, and spoil its status
        wait $pid || code=$?
    fi
    echo $code >run/code
}

state() {
    local what=none
    if [[ -f run/code ]]; then
        what="ended $(cat run/code) $(cat run/command)"
        [[ ! -f run/stop ]] || what="stopped ${what#ended }"
    elif [[ -f run/parent ]]; then
        if is_running; then what="running - $(cat run/command)"; else what="lost - $(cat run/command)"; fi
    fi
    echo "ftjax-run: $(hostname) $what"
}

follow() {
    [[ -f run/parent ]] || fail "nothing was started here: run.sh does"
    if is_running; then
        tail -n "${1:-20}" --pid="$(cat run/parent)" -F run/log 2>/dev/null
    else
        tail -n "${1:-20}" run/log
    fi
}

stop() {
    if ! is_running; then
        state
        return
    fi
    local grace=${1:-300}
    touch run/stop
    kill -TERM "$(cat run/pid)" 2>/dev/null || true # it may have ended, and its folder be on its way to the bucket
    for ((i = 0; i < grace * 5; i++)); do
        [[ ! -f run/code ]] || break
        sleep 0.2
    done
    if [[ ! -f run/code ]]; then
        echo "$(hostname): it did not end within $grace s and is killed; it goes on from its last checkpoint" >&2
        kill -KILL "$(cat run/pid)" 2>/dev/null || true
        for ((i = 0; i < 300; i++)); do
            [[ ! -f run/code ]] || break
            sleep 0.2
        done
    fi
    state
}

"$@"
