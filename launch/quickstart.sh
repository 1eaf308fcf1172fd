#!/usr/bin/env bash
# From a fresh clone to a trained, exported, talking hourglass language model, in one command.
# Run it again at any time: training continues where it stopped, and nothing is done twice.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
config=configs/quickstart.yaml data=data/tinyshakespeare run=runs/quickstart export=exports/quickstart

say() { printf '\n== %s\n' "$*"; }

say "1/6 environment"
bash launch/setup.sh
source "${VIRTUAL_ENV:-.venv}/bin/activate"

say "2/6 data: Tiny Shakespeare, byte by byte, the last tenth held out"
hourglass data shard tinyshakespeare --held-out last:0.1 --block-tokens 16384 --shard-blocks 2 --out "$data"

say "3/6 training"
gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true)
settings=()
if ((gpus > 0)); then # as many GPUs as the batch can be divided among
  batch=$(hourglass config "$config" | awk '$1 == "batch_size:" {print $2; exit}')
  while ((batch % gpus)); do gpus=$((gpus - 1)); done
  export NPROC_PER_NODE=$gpus
  settings=(train.micro_batch_size=$((batch / gpus)))
fi
bash launch/torchrun.sh "$config" "${settings[@]}"

say "4/6 export"
if [[ $export/config.json -nt $run/checkpoints/latest ]]; then
  echo "$export is up to date"
else
  rm -rf "$export"
  hourglass export "$run" "$export"
fi

say "5/6 score on the held-out text"
hourglass evaluate "$export" --data "$data"

say "6/6 a sample"
printf 'ROMEO:'
hourglass generate "$export" --prompt "ROMEO:" --max-new-tokens 400

say "done"
cat <<EOF
run           $run (settings, checkpoints, metrics.jsonl)
TensorBoard   $run (its events)
export        $export (model.safetensors, config.json, tokenizer)

Try next, after: source ${VIRTUAL_ENV:-.venv}/bin/activate
  hourglass generate $export --prompt "JULIET:" --temperature 0.5 --seed 7
  tensorboard --logdir $run
  hourglass plan configs/large_zero3.yaml --world-size 64
EOF
