#!/usr/bin/env bash
# People in the loop: samples of a fine-tuned model, comparisons by people, a reward model of them with ties and votes, PPO with it,
# a blind comparison of before and after by people, and a report.
# Usage: ./scripts/human_loop.sh [--simulate REWARD] [--model MODEL] [--prompts FILE] [--held-out FILE] [FOLDER]
#   --simulate REWARD  a reward (module:function, a model's folder or a .json file) compares in place of people
#   --model MODEL      where it starts (runs/quickstart/sft/model, of ./scripts/quickstart.sh)
#   --prompts FILE     prompts to train on, --held-out FILE those of the blind comparison (the shipped ones)
#   FOLDER             everything it writes (runs/human_loop); FASTALIGN_SEED: random seed (0)
# At a page, compare as many pairs as you like, then press Ctrl-C here: the loop goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
samples=fastalign/samples/pros_cons
model=runs/quickstart/sft/model prompts=$samples/prompts_train.jsonl held_out=$samples/prompts_eval.jsonl
folder=runs/human_loop simulate=""
while [ $# -gt 0 ]; do
    case "$1" in
        --simulate | --model | --prompts | --held-out)
            [ $# -gt 1 ] || { echo "human_loop: $1: expected a value, got none" >&2; exit 2; }
            name=${1#--}
            declare "${name//-/_}=$2"
            shift 2 ;;
        -*) echo "human_loop: unknown option $1" >&2; exit 2 ;;
        *) folder=$1; shift ;;
    esac
done
if [ -e "$folder" ]; then
    echo "human_loop: $folder exists; remove it, or name another folder" >&2
    exit 2
fi
if [ ! -d "$model" ]; then
    echo "human_loop: no model in $model; ./scripts/quickstart.sh makes one, or give --model" >&2
    exit 2
fi
export FASTALIGN_EXTRAS=${FASTALIGN_EXTRAS:-compare}
. scripts/environment.sh
seed=${FASTALIGN_SEED:-0}
most_votes=${FASTALIGN_VOTES:-600} # of a simulated annotator, at each page

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

# Serve a page until Ctrl-C; with --simulate, until the simulated annotator has done its part.
people_compare() {
    if [ -z "$simulate" ]; then
        trap : INT # of this script: Ctrl-C ends the page alone
        run fastalign compare "$@"
        trap - INT
        return
    fi
    printf '\n$ fastalign compare %s\n' "$*"
    local output line link="" page
    exec {output}< <(echo $BASHPID; exec fastalign compare "$@" --server.port 0 2>&1)
    read -r page <&"$output"
    while read -r line <&"$output"; do
        echo "$line"
        case "$line" in http://*) link=$line ;; Ctrl-C*) break ;; esac
    done
    [ -n "$link" ] || return 1
    run python scripts/simulated_annotators.py "$link" --reward "$simulate" --votes "$most_votes" --seed "$seed"
    kill -INT "$page"
    cat <&"$output"
    exec {output}<&-
}

mkdir -p "$folder"
run fastalign generate --model.path "$model" --data.prompts "$prompts" --sampling.num-samples 4 --sampling.max-new-tokens 40 \
    --run.seed "$seed" --out "$folder/samples.jsonl"
people_compare "$folder/samples.jsonl" --reward "$model" --out "$folder/comparisons.db" --run.seed "$seed"
run fastalign compare results "$folder/comparisons.db" --out "$folder/comparisons.json"
run fastalign compare export "$folder/comparisons.db" --out "$folder/pairs.jsonl"
run python scripts/split_pairs.py "$folder/pairs.jsonl" --train "$folder/train.jsonl" --held-out "$folder/held_out.jsonl"
run fastalign reward --model.path "$model" --data.train "$folder/train.jsonl" --data.eval "$folder/held_out.jsonl" --loss rao_kupper \
    --loss.votes --loss.nu-lr 0.05 --train.epochs 3 --train.eval-every 10 --train.batch-size 32 --optim.lr 5e-4 --optim.warmup-steps 5 \
    --run.dir "$folder/reward" --run.seed "$seed"
run fastalign ppo --model.path "$model" --reward.sources "$folder/reward/model" --data.train "$prompts" --kl.coefficient 0.2 \
    --sampling.max-new-tokens 40 --train.max-steps 30 --train.batch-size 64 --optim.lr 3e-4 --value.lr 1e-3 \
    --run.dir "$folder/ppo" --run.seed "$seed"
people_compare --a "$folder/ppo/model" --b "$model" --data.prompts "$held_out" --sampling.max-new-tokens 40 --out "$folder/blind.db" \
    --run.seed "$seed"
run fastalign compare results "$folder/blind.db" --out "$folder/win.json"
run fastalign report "$folder/reward" "$folder/ppo" "$folder/comparisons.db" "$folder/blind.db" --out "$folder/report.html"
