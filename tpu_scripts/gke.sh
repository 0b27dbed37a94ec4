#!/usr/bin/env bash
# Run an ftjax command on TPUs of a GKE cluster, as a JobSet: a pod a host, all started anew when one is lost, going on
# from the last checkpoint. The cluster needs JobSet (jobset.sigs.k8s.io) and a node pool of the type; this makes none.
#
# Usage: gke.sh NAME --type v5e-16 --image IMAGE [options] -- VERB ARG…
#        gke.sh NAME --delete
#   --type TYPE          v4-8, v5e-16, v5p-8, v6e-16, v7x-8 …
#   --image IMAGE        of the Dockerfile, built with EXTRAS=tpu,gcs
#   --slices N           so many of them, joined by the data centre's network
#   --spot               on spot nodes
#   --bucket BUCKET      mounted at /bucket by Cloud Storage FUSE, for data and the run folder:
#                        data.train=/bucket/train.jsonl output=/bucket/run
#   --secret NAME        a Secret of the cluster, whose keys become environment variables: kubectl create secret generic
#                        NAME --from-env-file=FILE, the file with a line HF_TOKEN=…
#   --account NAME       the Kubernetes service account, which may read and write the buckets
#   --topology AxBxC     where not the type's usual one
#   --tries N            restarts before it gives up; 20
#   --namespace NAME
#   --delete             delete the JobSet and its pods
#   --dry-run            print the manifest
#
# A run that fails by itself (exit code 1 or 2) is not started again. Disks go with the pods: the output must be below
# /bucket, and the checkpoints in a bucket (checkpoint.directory=gs://…), which ftjax writes to without FUSE.

# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
NAMESPACE=() TYPE="" IMAGE="" SLICES=1 SPOT="" BUCKET="" SECRET="" ACCOUNT="" TOPOLOGY="" TRIES=20 DELETE="" COMMAND=()
split_words "$@" && set -- "${ARGS[@]}"
while (($#)); do
    case $1 in
    --type) value "$@" && TYPE=$VALUE && shift 2 ;;
    --image) value "$@" && IMAGE=$VALUE && shift 2 ;;
    --slices) value "$@" && SLICES=$VALUE && shift 2 ;;
    --spot) SPOT=1 && shift ;;
    --bucket) value "$@" && BUCKET=$VALUE && shift 2 ;;
    --secret) value "$@" && SECRET=$VALUE && shift 2 ;;
    --account) value "$@" && ACCOUNT=$VALUE && shift 2 ;;
    --topology) value "$@" && TOPOLOGY=$VALUE && shift 2 ;;
    --tries) value "$@" && TRIES=$VALUE && shift 2 ;;
    --namespace) value "$@" && NAMESPACE=("--namespace=$VALUE") && shift 2 ;;
    --delete) DELETE=1 && shift ;;
    --zone | --project) die $USAGE "$1: kubectl's context says which cluster (gcloud container clusters get-credentials)" ;;
    --) shift && COMMAND=("$@") && break ;;
    *) common "$@" && shift "$USED" ;;
    esac
done
need_name
trap 'warn "Interrupted; what there is: kubectl get jobset $NAME ${NAMESPACE[*]}" && exit 130' INT TERM
if [[ -n $DELETE ]]; then
    change kubectl delete jobset "$NAME" --ignore-not-found "${NAMESPACE[@]}" || die $FAILED "$NAME could not be deleted"
    exit 0
fi
[[ -n $TYPE && -n $IMAGE ]] || die $USAGE "--type and --image say on what and what; gke.sh --help"
((${#COMMAND[@]})) || die $USAGE "what is to be run? gke.sh $NAME … -- sft CONFIG.yaml …"
[[ ${COMMAND[0]} != ftjax ]] || COMMAND=("${COMMAND[@]:1}")
[[ $SLICES =~ ^[1-9][0-9]*$ ]] || die $USAGE "--slices $SLICES: a number from 1 up"
[[ $TRIES =~ ^[0-9]+$ ]] || die $USAGE "--tries $TRIES: a number from 0 up"
BUCKET=${BUCKET#gs://}
[[ -n $BUCKET && " ${COMMAND[*]}" == *" output=/bucket/"* && " ${COMMAND[*]}" == *" checkpoint.directory=gs://"* ]] ||
    die $USAGE "pods that are lost take their disks along: give --bucket BUCKET, and after the config output=/bucket/RUN
  checkpoint.directory=gs://BUCKET/RUN/checkpoints"
read_type "$TYPE"

# Labels, chips a host and topologies: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
HOST=4
case $KIND in
v4) LABEL=tpu-v4-podslice ;;
v5e) LABEL=tpu-v5-lite-podslice ;;
v5p) LABEL=tpu-v5p-slice ;;
v6e) LABEL=tpu-v6e-slice ;;
tpu7x) LABEL=tpu7x ;;
esac
case $KIND,$CHIPS in
v5e,1 | v6e,1) SHAPE=1x1 HOST=1 ;;
v5e,4 | v6e,4) SHAPE=2x2 ;;
v5e,8 | v6e,8) SHAPE=2x4 HOST=8 ;;
v5e,16 | v6e,16) SHAPE=4x4 ;;
v5e,32 | v6e,32) SHAPE=4x8 ;;
v5e,64 | v6e,64) SHAPE=8x8 ;;
v5e,128 | v6e,128) SHAPE=8x16 ;;
v5e,256 | v6e,256) SHAPE=16x16 ;;
*,4) SHAPE=2x2x1 ;;
*,8) SHAPE=2x2x2 ;;
*,16) SHAPE=2x2x4 ;;
*,32) SHAPE=2x4x4 ;;
*,64) SHAPE=4x4x4 ;;
*,128) SHAPE=4x4x8 ;;
*,256) SHAPE=4x8x8 ;;
*) SHAPE="" ;;
esac
TOPOLOGY=${TOPOLOGY:-$SHAPE}
[[ $TOPOLOGY =~ ^[0-9]+x[0-9]+(x[0-9]+)?$ ]] || die $USAGE "--type $TYPE: say its --topology, like 4x8x8"
((${TOPOLOGY//x/*} == CHIPS)) || die $USAGE "--topology $TOPOLOGY is $((${TOPOLOGY//x/*})) chips, $TYPE is $CHIPS"
HOSTS=$((CHIPS / HOST))

json() { # a word as a JSON string, which YAML reads too
    local word=${1//\\/\\\\}
    word=${word//\"/\\\"}
    word=${word//$'\n'/\\n}
    printf '"%s"' "${word//$'\t'/\\t}"
}
words=""
for word in "${COMMAND[@]}"; do words+="${words:+, }$(json "$word")"; done

cat >"$TMP/jobset.yaml" <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $TRIES
    rules:
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: $SLICES
    template:
      spec:
        parallelism: $HOSTS
        completions: $HOSTS
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: ftjax, operator: In, values: [1, 2]}
        template:
          metadata:
            annotations: {gke-gcsfuse/volumes: "true"}
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
            serviceAccountName: ${ACCOUNT:-default}
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $LABEL
              cloud.google.com/gke-tpu-topology: $TOPOLOGY
${SPOT:+              cloud.google.com/gke-spot: \"true\"
            tolerations:
            - {key: cloud.google.com/gke-spot, operator: Equal, value: \"true\", effect: NoSchedule\}
}            containers:
            - name: ftjax
              image: $(json "$IMAGE")
              args: [$words]
${SECRET:+              envFrom:
              - secretRef: {name: $SECRET\}
}              resources:
                requests: {google.com/tpu: $HOST}
                limits: {google.com/tpu: $HOST}
              volumeMounts:
              - {name: bucket, mountPath: /bucket}
            volumes:
            - name: bucket
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes: {bucketName: $BUCKET}
END
if [[ -n $DRY ]]; then
    cat "$TMP/jobset.yaml"
    exit 0
fi
if ! change kubectl apply -f "$TMP/jobset.yaml" "${NAMESPACE[@]}"; then
    case $(cat "$ERR") in
    *"no matches for kind"*) die $FAILED "the cluster has no JobSet: jobset.sigs.k8s.io/docs/installation says how to add it" ;;
    *immutable*) die $FAILED "$NAME is there with other settings: gke.sh $NAME --delete first" ;;
    *"connection refused"* | *"was refused"* | *"Unable to connect"*)
        die $UNREACHABLE "the cluster cannot be reached: gcloud container clusters get-credentials CLUSTER" ;;
    *) die $FAILED "$NAME was not started; the message above is kubectl's" ;;
    esac
fi
say "Applied $NAME: $SLICES × $LABEL $TOPOLOGY, $HOSTS pods each. What follows:"
say "  kubectl get jobset,pods -l jobset.sigs.k8s.io/jobset-name=$NAME ${NAMESPACE[*]}"
say "  kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=$NAME --max-log-requests=$((HOSTS * SLICES)) ${NAMESPACE[*]}"
say "  tpu_scripts/gke.sh $NAME --delete        (nodes are billed as long as the pool has them)"
