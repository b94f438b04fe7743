#!/usr/bin/env bash
# Train an aligned model from scratch on a CPU with shipped real data: a tokenizer and a small model, supervised fine-tuning,
# DPO at two betas on human comparisons, a reward model of the same comparisons and PPO with it, evaluation on fresh prompts, a
# table and a report.
# Usage: ./scripts/quickstart.sh [FOLDER]     (default runs/quickstart; FASTALIGN_SEED, default 0)
set -euo pipefail
folder=$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../runs/quickstart}")
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

seed=${FASTALIGN_SEED:-0}
samples=fastalign/samples/pros_cons
case "$folder" in "$PWD"/*) folder=${folder#"$PWD"/} ;; esac
if [ -e "$folder" ]; then
    echo "quickstart: $folder exists; remove it, or name another folder: ./scripts/quickstart.sh FOLDER" >&2
    exit 2
fi

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

begin=$SECONDS
run fastalign data check "$samples/pairs_train.jsonl"
run fastalign new-model --data.train "$samples/texts_train.jsonl.gz" --vocab-size 768 --hidden-size 128 --layers 4 --heads 4 \
    --max-positions 256 --out "$folder/base" --run.seed "$seed"
run fastalign sft --model.path "$folder/base" --data.train "$samples/texts_train.jsonl.gz" --data.eval "$samples/texts_eval.jsonl" \
    --data.max-length 128 --data.on-too-long skip --train.max-steps 1000 --train.eval-every 200 --train.batch-size 64 --optim.lr 3e-3 \
    --optim.schedule cosine --optim.warmup-steps 20 --run.dir "$folder/sft" --run.seed "$seed"
for beta in 0.1 0.5; do
    run fastalign dpo --model.path "$folder/sft/model" --data.train "$samples/pairs_train.jsonl" --data.eval "$samples/pairs_eval.jsonl" \
        --data.ties drop --loss.beta "$beta" --train.epochs 2 --train.eval-every 10 --train.batch-size 64 --optim.lr 5e-4 --optim.warmup-steps 5 \
        --reference.cache-dir "$folder/cache" --run.dir "$folder/dpo-beta-$beta" --run.seed "$seed"
done
run fastalign reward --model.path "$folder/sft/model" --data.train "$samples/pairs_train.jsonl" --data.eval "$samples/pairs_eval.jsonl" \
    --loss rao_kupper --loss.nu-lr 0.05 --train.epochs 2 --train.eval-every 20 --train.batch-size 64 --optim.lr 5e-4 --optim.warmup-steps 5 \
    --run.dir "$folder/reward" --run.seed "$seed"
run fastalign ppo --model.path "$folder/sft/model" --reward.sources "$folder/reward/model" --data.train "$samples/prompts_train.jsonl" \
    --kl.coefficient 0.2 --sampling.max-new-tokens 40 --train.max-steps 30 --train.batch-size 64 --optim.lr 3e-4 --value.lr 1e-3 \
    --run.dir "$folder/ppo" --run.seed "$seed"
for name in sft dpo-beta-0.1 dpo-beta-0.5 ppo; do
    run fastalign eval --model.path "$folder/$name/model" --reference.path "$folder/sft/model" \
        --data.prompts "$samples/prompts_eval.jsonl" --data.pairs "$samples/pairs_eval.jsonl" --reward "$samples/reward.json" \
        --sampling.max-new-tokens 40 --run.seed "$seed" --out "$folder/$name/eval/eval.json"
done
run fastalign report "$folder/sft" "$folder/dpo-beta-0.5" "$folder/dpo-beta-0.1" "$folder/ppo" "$folder/reward" --out "$folder/report.html"
echo "Finished in $((SECONDS - begin)) seconds. Next: ./scripts/human_loop.sh, where you say which of this model's answers are better."
