#!/usr/bin/env bash
# Check that two commits compute the same numbers: run both, then compare all metrics, evaluations, samples, tables and weights.
# Usage: ./scripts/compare_commits.sh OLD NEW                    run OLD and NEW in a temporary folder and compare them
#        ./scripts/compare_commits.sh run SOURCE FOLDER [NAME ...]   run SOURCE; results, logs and its checkout go into FOLDER
#        ./scripts/compare_commits.sh compare FOLDER FOLDER       compare the results of two such calls
# OLD, NEW and SOURCE are commits, or folders whose files (committed or not) are taken. NAMEs: quickstart, frontier, fsdp, vllm,
# resume, short (default: all, about half an hour on two cores); those after frontier start from FOLDER/quickstart/sft/model.
# Exit code: 0 identical, 1 something differs, 2 a run failed. Both commits run in one environment, nothing is installed:
# FASTALIGN_VENV (.venv) names it; vLLM's engine has to be there too (scripts/install_vllm_cpu.sh).
set -euo pipefail
export OMP_NUM_THREADS=1  # with more, sums are rounded by how the threads share them
here=$(realpath "$(dirname "${BASH_SOURCE[0]}")")
root=$(dirname "$here")
bin=$(realpath "${FASTALIGN_VENV:-$root/.venv}")/bin
all_names="quickstart frontier fsdp vllm resume short"
[ -x "$bin/python" ] || { echo "compare_commits: no $bin/python; set FASTALIGN_VENV" >&2; exit 2; }

# check_out SOURCE CHECKOUT: a clean copy of the source, with its native library for CPUs.
check_out() {
    mkdir -p "$2"
    if [ -d "$1" ]; then
        (cd "$1" && git ls-files -z --cached --others --exclude-standard | xargs -0 ls -d 2>/dev/null | tar -cf - -T -) | tar -xf - -C "$2"
    else
        git -C "$root" archive "$1" | tar -xf - -C "$2"
    fi
    (cd "$2" && NVCC=none "$bin/python" setup.py --quiet build_ext --inplace)
    # Its scripts source this file: they are to use the environment that is there, whatever is pinned.
    echo 'cd "$(dirname "${BASH_SOURCE[0]}")/.."' > "$2/scripts/environment.sh"
}

# The runs. Each is called in the checkout, with its folder; sft and samples are what all but the first two start from.
quickstart() { scripts/quickstart.sh "$1"; }
frontier() { scripts/frontier.sh --quick "$1"; }
common=(--train.batch-size 16 --train.tokens-per-batch 1024 --optim.lr 5e-4 --optim.warmup-steps 2)
fsdp() {
    ranks=(torchrun --standalone --nproc-per-node 2 -m fastalign)
    "${ranks[@]}" dpo "${pairs[@]}" --data.ties drop "${common[@]}" --parallel.strategy fsdp --train.max-steps 6 --run.dir "$1/dpo"
    "${ranks[@]}" ppo "${prompts[@]}" "${common[@]}" --parallel.strategy fsdp --train.max-steps 3 --run.dir "$1/ppo"
    "${ranks[@]}" reward "${pairs[@]}" --loss rao_kupper "${common[@]}" --parallel.strategy ddp --train.max-steps 4 --run.dir "$1/reward"
}
vllm() { fastalign ppo "${prompts[@]}" "${common[@]}" --sampler vllm --train.max-steps 4 --run.dir "$1"; }
resume() {
    for more in "--train.stop-at-step 4" --run.resume; do
        fastalign dpo "${pairs[@]}" --data.ties drop "${common[@]}" --train.max-steps 8 --run.dir "$1/dpo" $more
        fastalign ppo "${prompts[@]}" "${common[@]}" --train.max-steps 8 --run.dir "$1/ppo" $more
    done
}
short() {
    fastalign dpo "${pairs[@]}" --loss dpo_rao_kupper "${common[@]}" --model.lora.rank 4 --model.lora.targets all-linear lm_head \
        --train.max-steps 6 --run.dir "$1/lora"
    fastalign dpo "${pairs[@]}" --data.ties drop --loss simpo "${common[@]}" --train.packing padded --train.max-steps 4 --run.dir "$1/simpo"
    fastalign reward "${pairs[@]}" --loss bradley_terry "${common[@]}" --data.ties drop --train.max-steps 6 --run.dir "$1/reward"
    fastalign online-dpo "${prompts[@]}" "${common[@]}" --reference.refresh-every 2 --train.max-steps 4 --run.dir "$1/online"
    kl=--kl  # older commits: --kl.place
    ! grep -qs -- "--kl.place" tests/repo/command_line_options.txt || kl=--kl.place
    for choice in "rloo --kl.estimator full" "grpo $kl loss --kl.estimator k3"; do
        fastalign ppo "${prompts[@]}" "${common[@]}" --sampling.num-samples 4 --train.max-steps 3 --run.dir "$1/${choice%% *}" --ppo.advantage $choice
    done
}

# run_source SOURCE FOLDER [NAME ...]
run_source() {
    local source=$1 folder checkout name begin code
    folder=$(realpath -m "$2"); checkout=$folder/source
    shift 2
    if [ ! -d "$checkout" ]; then
        check_out "$source" "$checkout.part"
        mv "$checkout.part" "$checkout"
    fi
    for name in ${*:-$all_names}; do
        declare -F "$name" > /dev/null && [[ " $all_names " == *" $name "* ]] || { echo "compare_commits: no run named $name" >&2; exit 2; }
        [ ! -e "$folder/$name" ] || { echo "compare_commits: $folder/$name exists" >&2; exit 2; }
        begin=$SECONDS
        set +e  # a subshell before || would not stop at its first failure
        (
            set -e
            cd "$checkout"
            export PATH="$bin:$PATH" PYTHONPATH=$checkout PYTHONDONTWRITEBYTECODE=1 XDG_CACHE_HOME=$folder/cache
            export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
            python -c "import fastalign, sys; sys.exit(not fastalign.__file__.startswith('$checkout/'))"
            samples=fastalign/samples/pros_cons sft=$folder/quickstart/sft/model
            pairs=(--model.path "$sft" --data.train $samples/pairs_train.jsonl --data.eval $samples/pairs_eval.jsonl)
            prompts=(--model.path "$sft" --data.train $samples/prompts_train.jsonl --reward.sources $samples/reward.json --sampling.max-new-tokens 24)
            case "$name" in quickstart | frontier) ;; *) [ -d "$sft" ] || { echo "no $sft: run quickstart first"; exit 2; } ;; esac
            "$name" "$folder/$name"
        ) > "$folder/$name.log" 2>&1
        code=$?
        set -e
        if [ $code != 0 ]; then
            tail -n 5 "$folder/$name.log" >&2
            echo "compare_commits: $name of $source failed; see $folder/$name.log" >&2
            exit 2
        fi
        echo "$name: $((SECONDS - begin)) seconds"
    done
}

case "${1:-}" in
    run) [ $# -ge 3 ] || { sed -n 3,5p "$0" >&2; exit 2; }; shift; run_source "$@" ;;
    compare) exec "$bin/python" "$here/compare_runs.py" "${@:2}" ;;
    *)
        [ $# = 2 ] || { sed -n 3,5p "$0" >&2; exit 2; }
        folder=$(mktemp -d)
        run_source "$1" "$folder/old"
        run_source "$2" "$folder/new"
        exec "$bin/python" "$here/compare_runs.py" "$folder/old" "$folder/new"
        ;;
esac
