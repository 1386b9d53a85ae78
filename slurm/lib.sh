# shellcheck shell=bash
# What the job scripts share. Sourced; needs bash 4, SLURM's commands and the package.
#
# Everything a site differs in comes from site.env (site.env.example says what there is). A job goes through
#   rim_site -> rim_begin -> rim_check_nodes -> rim_launch -> rim_end
# and ends with the exit status of the command line: 0 done, 1 and 2 not worth another start, 75 started again.

rim_say() { printf '%s rim-dist job %s: %s\n' "$(date -u +%FT%TZ)" "${SLURM_JOB_ID:-?}" "$*" >&2; }

# ---- the site --------------------------------------------------------------------------------------------

# The checkout (or installed package) these scripts belong to, site.env, modules and the environment's programs.
rim_site() {
    RIM_SLURM=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    RIM_HOME=${RIM_HOME:-$(dirname "$RIM_SLURM")}
    RIM_SITE=${RIM_SITE:-$RIM_SLURM/site.env}
    RIM_SBATCH_EXTRA=()
    RIM_CONTAINER=()
    if [[ -f $RIM_SITE ]]; then
        # The ranks see the site's settings; what was set for this job goes before them.
        local given
        given=$(export -p | grep '^declare -x RIM_' | sed 's/^declare -x/declare -gx/' || true)
        set -a
        # shellcheck disable=SC1090  # the user's file
        source "$RIM_SITE"
        set +a
        eval "$given"
    fi
    export RIM_SLURM RIM_HOME RIM_SITE
}

# What a site's settings mean as sbatch arguments, one a line.
rim_site_arguments() {
    [[ -z ${RIM_ACCOUNT:-} ]] || printf '%s\n' "--account=$RIM_ACCOUNT"
    [[ -z ${RIM_PARTITION:-} ]] || printf '%s\n' "--partition=$RIM_PARTITION"
    [[ -z ${RIM_QOS:-} ]] || printf '%s\n' "--qos=$RIM_QOS"
    [[ -z ${RIM_CONSTRAINT:-} ]] || printf '%s\n' "--constraint=$RIM_CONSTRAINT"
    [[ -z ${RIM_RANKS_PER_NODE:-} ]] || printf '%s\n' "--ntasks-per-node=$RIM_RANKS_PER_NODE"
    [[ -z ${RIM_CPUS_PER_RANK:-} ]] || printf '%s\n' "--cpus-per-task=$RIM_CPUS_PER_RANK"
    [[ -z ${RIM_GPUS_PER_NODE:-} ]] || printf '%s\n' "--gpus-per-node=$RIM_GPUS_PER_NODE"
    [[ ${#RIM_SBATCH_EXTRA[@]} -eq 0 ]] || printf '%s\n' "${RIM_SBATCH_EXTRA[@]}"
}

rim_environment() {
    if [[ -n ${RIM_MODULES:-} ]]; then
        # shellcheck disable=SC2086  # a list of modules
        module load $RIM_MODULES
    fi
    local venv=${RIM_VENV:-$RIM_HOME/.venv}
    if [[ -d $venv/bin ]]; then export PATH="$venv/bin:$PATH"; fi
    if [[ -n ${RIM_SCRATCH:-} ]]; then export HF_HOME="${HF_HOME:-$RIM_SCRATCH/huggingface}"; fi
    # One task a rank as asked for, or a task a node that starts its ranks.
    RIM_LAUNCHER=${RIM_LAUNCHER:-srun}
    RIM_NODES=${SLURM_JOB_NUM_NODES:-1}
    # SLURM's own count goes before a template's tasks a node, which is then the most. Nodes may have one rank more than others.
    RIM_RANKS=${SLURM_NTASKS:-$((RIM_NODES * ${SLURM_NTASKS_PER_NODE:-1}))}
    RIM_LOCAL_RANKS=$(((RIM_RANKS + RIM_NODES - 1) / RIM_NODES))
    rim_check_counts || exit 2
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
    # The last task of an array has the array's own number as its job id, which scontrol takes for all of the tasks.
    RIM_JOB=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    RIM_JOB=${RIM_JOB:-${SLURM_JOB_ID:-}}
    # The batch host is the first node of the allocation, and rank 0 runs there.
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    export RIM_LAUNCHER RIM_NODES RIM_LOCAL_RANKS RIM_RANKS MASTER_ADDR
    # Submitted from elsewhere, the package is still the one beside these scripts.
    if [[ -d $RIM_HOME/rim_dist ]]; then export PYTHONPATH="$RIM_HOME${PYTHONPATH:+:$PYTHONPATH}"; fi
}

# Counts that a launcher cannot start are refused by name.
rim_check_counts() {
    if [[ -n ${SLURM_HET_SIZE:-} ]]; then
        rim_say "SLURM_HET_SIZE=$SLURM_HET_SIZE: heterogeneous jobs are not supported; ask for equal nodes in one component"
    elif [[ $RIM_RANKS -lt $RIM_NODES ]]; then
        rim_say "$RIM_RANKS tasks leave some of the $RIM_NODES nodes without one; ask for fewer nodes or more tasks"
    elif [[ $((RIM_RANKS % RIM_NODES)) -ne 0 && $RIM_LAUNCHER =~ ^(torchrun|deepspeed)$ ]]; then
        rim_say "$RIM_RANKS tasks on $RIM_NODES nodes: RIM_LAUNCHER=$RIM_LAUNCHER starts equally many on each; use srun"
    else
        return 0
    fi
    return 1
}

# ---- steps of the job ------------------------------------------------------------------------------------

# A command once, on the batch host, in the container if there is one.
rim_once() {
    srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="$MASTER_ADDR" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
        "${RIM_CONTAINER[@]}" "$@"
}

# A command once a node, with the cores that the job has on every node.
rim_on_every_node() {
    local fewest=$((RIM_RANKS / RIM_NODES))
    srun --overlap --nodes="$RIM_NODES" --ntasks="$RIM_NODES" --ntasks-per-node=1 \
        --cpus-per-task=$((fewest * ${SLURM_CPUS_PER_TASK:-1})) "$@"
}

# Check the recipe and earlier attempts, record this one, choose the port. Sets RIM_RUN, RIM_ATTEMPT, MASTER_PORT.
rim_begin() {
    local answer line
    answer=$(rim_once python -m rim_dist.cluster begin "$@") || return
    while IFS= read -r line; do
        case $line in RIM_RUN=* | RIM_ATTEMPT=* | MASTER_PORT=*) export "${line?}" ;; esac
    done <<<"$answer"
    rim_say "attempt ${RIM_ATTEMPT##*/} of $RIM_RUN: $RIM_RANKS ranks on $SLURM_JOB_NODELIST, head $MASTER_ADDR:$MASTER_PORT"
}

# Every node reaches the head's port and sees the run's folder, or is named.
rim_check_nodes() {
    [[ $RIM_NODES -gt 1 ]] || return 0
    local nodes
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    rim_on_every_node --kill-on-bad-exit=0 "${RIM_CONTAINER[@]}" python -m rim_dist.cluster check-nodes "${nodes[@]}"
}

# Start the ranks with the launcher. rim_dist.cluster.rank supervises each of them.
#
# Signals: launchers and containers that know nothing of USR1 would die of it, so the tasks ignore it; rim_dist sets its own
# handlers, and the file `stop` reaches the first rank where no signal does. A rank that ends does not end the step: the
# others notice, say so in their logs and end by themselves, after --wait seconds they are made to.
rim_launch() {
    local step=(--distribution=block --kill-on-bad-exit=0 --wait="${RIM_WAIT_SECONDS:-60}")
    local rank=(rim_dist.cluster.rank "$@")
    # shellcheck disable=SC2016  # for the task's shell
    local quiet=(bash -c 'trap "" USR1; exec "$@"' task)
    case $RIM_LAUNCHER in
        srun | mpi)
            local mpi=()
            if [[ $RIM_LAUNCHER == mpi ]]; then mpi=(--mpi="${RIM_MPI:-pmix}"); fi
            exec srun "${step[@]}" "${mpi[@]}" --nodes="$RIM_NODES" --ntasks="$RIM_RANKS" --ntasks-per-node="$RIM_LOCAL_RANKS" \
                --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --cpu-bind="${RIM_CPU_BIND:-cores}" \
                "${quiet[@]}" "${RIM_CONTAINER[@]}" python -m "${rank[@]}"
            ;;
        torchrun)
            rim_per_node "${quiet[@]}" "${RIM_CONTAINER[@]}" torchrun --nnodes "$RIM_NODES" --nproc-per-node "$RIM_LOCAL_RANKS" \
                --node-rank RIM_NODE_RANK --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --max-restarts 0 -m "${rank[@]}"
            ;;
        deepspeed)
            scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$RIM_LOCAL_RANKS/" >"$RIM_ATTEMPT/hostfile"
            rim_per_node "${quiet[@]}" "${RIM_CONTAINER[@]}" deepspeed --hostfile "$RIM_ATTEMPT/hostfile" --no_ssh \
                --node_rank RIM_NODE_RANK --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --module "${rank[@]}"
            ;;
        mpirun)
            # One rank a slot; mpirun starts its daemons with srun.
            exec mpirun -n "$RIM_RANKS" "${RIM_CONTAINER[@]}" python -m "${rank[@]}"
            ;;
        *)
            rim_say "RIM_LAUNCHER: $RIM_LAUNCHER is not allowed; allowed: srun, torchrun, deepspeed, mpi, mpirun"
            exit 2
            ;;
    esac
}

# A launcher once a node. The word RIM_NODE_RANK becomes the node's number in the task: it differs from node to node.
rim_per_node() {
    # shellcheck disable=SC2016  # for the task's shell
    local number=(bash -c 'a=(); for w in "$@"; do [[ $w == RIM_NODE_RANK ]] && w=$SLURM_NODEID; a+=("$w"); done; exec "${a[@]}"' node)
    exec srun "${step[@]}" --nodes="$RIM_NODES" --ntasks="$RIM_NODES" --ntasks-per-node=1 \
        --cpus-per-task=$((RIM_LOCAL_RANKS * ${SLURM_CPUS_PER_TASK:-1})) --cpu-bind="${RIM_CPU_BIND:-cores}" "${number[@]}" "$@"
}

# ---- the end ---------------------------------------------------------------------------------------------

# What a job does once its run is complete; sweep.sbatch has its own.
rim_done() { :; }

# The exit status that the ranks recorded: 2 and 1 come before 75, and that before what a launcher made of it.
rim_status() {
    local given=$1 status
    for status in 2 1; do
        if [[ -e $RIM_ATTEMPT/ended-$status ]]; then
            echo "$status"
            return
        fi
    done
    if [[ $given -eq 0 ]]; then echo 0; else echo 75; fi
}

# scontrol, again for two minutes while the controller does not answer: it may be starting anew.
rim_scontrol() {
    local answer status end=$((SECONDS + 120))
    while :; do
        status=0
        answer=$(scontrol "$@" 2>&1) || status=$?
        if [[ $status -eq 0 || $answer != *"Unable to contact slurm controller"* || $SECONDS -ge $end ]]; then break; fi
        sleep 10
    done
    if [[ $status -eq 0 ]]; then printf '%s' "$answer"; else printf '%s\n' "$answer" >&2; fi
    return "$status"
}

# Leave for the next job of a chain, or go back into the queue without the nodes that gave reason to.
rim_end() {
    local status=$1 state bad
    if [[ -n ${RIM_ATTEMPT:-} ]]; then printf '%s\n' "$status" >"$RIM_ATTEMPT/status" || true; fi
    if [[ $status -ne 75 ]]; then
        rim_say "ended with $status"
        exit "$status"
    fi
    state=$(rim_scontrol -o show job "$RIM_JOB" | grep -oE '(JobState|Restarts)=[A-Z_0-9]+' | head -n 2 | tr '\n' ' ') || true
    if [[ $state != "JobState=RUNNING Restarts=${SLURM_RESTART_COUNT:-0} " ]]; then
        # Requeued or cancelled already; or this script runs on a node that SLURM gave up, and the job elsewhere.
        rim_say "ended with 75; SLURM has already decided what follows (${state:-it does not answer})"
    elif [[ ${RIM_REQUEUE:-1} != 1 ]]; then
        rim_say "ended with 75; left to the next start of the same command"
    else
        bad=$(rim_once python -m rim_dist.cluster suspects "$RIM_ATTEMPT" || true)
        rim_say "ended with 75; going back into the queue${bad:+, if there are enough nodes without $bad}"
        trap '' TERM USR1 # SLURM ends this script while it requeues it; the lines below are to be run
        if ! rim_scontrol requeue "$RIM_JOB"; then
            rim_say "SLURM does not requeue this job; start the same command again"
        elif [[ -n $bad ]]; then
            rim_exclude "$bad"
        fi
    fi
    exit 75
}

# Keep the requeued job off nodes, together with those it is kept off already, unless too few would be left.
rim_exclude() {
    local bad=$1 before left
    before=$(rim_scontrol -o show job "$RIM_JOB" | grep -o 'ExcNodeList=[^ ]*' | head -n 1)
    before=${before#ExcNodeList=}
    if [[ -n $before && $before != "(null)" ]]; then bad=$before,$bad; fi
    left=$(comm -23 <(sinfo -h -N -p "$SLURM_JOB_PARTITION" -t idle,alloc,mix,comp -o %N | sort -u) \
        <(scontrol show hostnames "$bad" | sort -u) | wc -l)
    if [[ $left -ge $SLURM_JOB_NUM_NODES ]]; then
        rim_scontrol update JobId="$RIM_JOB" ExcNodeList="$bad" && rim_say "kept off $bad from now on"
    else
        rim_say "$bad not excluded: only $left other nodes in $SLURM_JOB_PARTITION, $SLURM_JOB_NUM_NODES needed"
    fi
}

# Run rim_launch so that signals to the batch shell are seen while it waits.
rim_supervise() {
    local launch status=0 signalled=0
    # shellcheck disable=SC2317  # called by the trap
    stop() {
        rim_say "asked to stop ($1)"
        : >"$RIM_ATTEMPT/stop" || true
        # The step's tasks; SLURM itself signals them before a preemption, but not before the time limit.
        if [[ $1 == USR1 ]]; then kill -USR1 "$launch" 2>/dev/null || true; fi
        signalled=1
    }
    trap 'stop USR1' USR1
    trap 'stop TERM' TERM
    if [[ -n ${RIM_STOP_REQUESTED:-} ]]; then : >"$RIM_ATTEMPT/stop" || true; fi
    (rim_launch "$@") &
    launch=$!
    while :; do
        signalled=0
        wait "$launch" && status=0 || status=$?
        if [[ $signalled -eq 0 ]]; then break; fi
    done
    status=$(rim_status "$status")
    if [[ $status -eq 0 ]]; then rim_done || status=$?; fi
    rim_end "$status"
}

# The whole of a training job: arguments of `rim-dist train`.
rim_train() {
    trap 'RIM_STOP_REQUESTED=1' USR1 # the time limit may be near already: the ranks stop after their first step
    rim_site
    rim_environment
    rim_begin "$@" || rim_end $?
    rim_check_nodes || rim_end 75
    rim_supervise train "$@"
}
