#!/usr/bin/env bash
# Both stages as a chain of dependent jobs: stage 1, evaluation, stage 2, evaluation, export.
#   slurm/curriculum.sh [--eval=DATA] [--export-to=FOLDER] [--dry-run] [--SBATCH-OPTION=VALUE ...] RECIPE.yaml [key=value ...]
#
# Runs on a login node, from the checkout. Options of sbatch go to the training jobs. A stage that stops (time limit,
# preemption, lost node) goes back into the queue by itself and the chain waits for it; one that fails takes the jobs after
# it out of the queue. The same command again goes on where the chain stopped.
set -euo pipefail

# shellcheck source=slurm/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
rim_site

data="" export_to="" dry="" training=()
while [[ ${1:-} == --* ]]; do
    case $1 in
        --eval=*) data=${1#*=} ;;
        --export-to=*) export_to=${1#*=} ;;
        --dry-run) dry=1 ;;
        --*=*) training+=("$1") ;;
        *)
            echo "curriculum.sh: $1: write --name=value" >&2
            exit 2
            ;;
    esac
    shift
done
if [[ $# -eq 0 ]]; then
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi

venv=${RIM_VENV:-$RIM_HOME/.venv}
if [[ -d $venv/bin ]]; then PATH="$venv/bin:$PATH"; fi
if [[ -d $RIM_HOME/rim_dist ]]; then export PYTHONPATH="$RIM_HOME${PYTHONPATH:+:$PYTHONPATH}"; fi
answer=$(python -m rim_dist.cluster plan "$@")
run="" stages=() options=()
while IFS='=' read -r key value; do
    case $key in
        RUN) run=$value ;;
        STAGE) stages+=("$value") ;;
        EVALUATE) options+=("$value") ;;
        DATA) data=${data:-$value} ;;
    esac
done <<<"$answer"
if [[ -z $data ]]; then
    echo "curriculum.sh: nothing to evaluate with; give --eval=FILE (or evaluation.data in the recipe)" >&2
    exit 2
fi
mapfile -t site < <(rim_site_arguments)
# The short jobs take the site's account and partition, not the shape of a training job.
short=()
for argument in "${site[@]}"; do
    case $argument in --ntasks-per-node=* | --cpus-per-task=* | --gpus-per-node=* | --nodes=*) ;; *) short+=("$argument") ;; esac
done

jobs=()
cancel() {
    if [[ $? -ne 0 && ${#jobs[@]} -gt 0 ]]; then
        scancel "${jobs[@]}"
        echo "curriculum.sh: not all jobs could be submitted; ${jobs[*]} cancelled" >&2
    fi
}
trap cancel EXIT

# Submit a job after the one before it. kill-on-invalid-dep: a job whose turn can never come leaves the queue.
submit() {
    local name=$1 id
    local arguments=(--parsable --kill-on-invalid-dep=yes "--job-name=$name" "--output=$run/logs/slurm-%j.out")
    shift
    if [[ ${#jobs[@]} -gt 0 ]]; then arguments+=("--dependency=afterok:${jobs[-1]}"); fi
    if [[ -n $dry ]]; then
        jobs+=("${#jobs[@]}")
        printf '%q ' sbatch "${arguments[@]}" "$@"
        echo
        return
    fi
    id=$(sbatch "${arguments[@]}" "$@")
    jobs+=("${id%%;*}")
    printf '%-24s job %s\n' "$name" "${jobs[-1]}"
}

[[ -n $dry ]] || mkdir -p "$run/logs"
export RIM_SLURM RIM_HOME RIM_SITE
base=${run##*/}
for stage in "${stages[@]}"; do
    until=()
    if [[ $stage != "${stages[-1]}" ]]; then until=(--until "$stage"); fi
    submit "$base-$stage" "${site[@]}" "${training[@]}" "$RIM_SLURM/train.sbatch" "$@" "${until[@]}"
    submit "$base-$stage-evaluate" "${short[@]}" "$RIM_SLURM/evaluate.sbatch" "$run" "$data" "${options[@]}"
done
submit "$base-export" "${short[@]}" "$RIM_SLURM/convert.sbatch" "$run" "${export_to:-$run/exports/final}"
if [[ -z $dry ]]; then echo "to cancel: scancel ${jobs[*]}"; fi
