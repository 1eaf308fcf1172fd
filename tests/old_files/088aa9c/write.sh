#!/usr/bin/env bash
# Wrote data/, runs/, exports/ and recorded.json beside it; README.md says when and how.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
revision=$(python -c "from hourglass_dist.history import revision; print(revision())")
[[ $revision == "$(basename "$PWD")" ]] || { echo "this is the code of $revision" >&2; exit 2; }

rm -rf data runs exports recorded.json
mkdir data
cut=(--held-out hash:0.1 --separator '\n\n' --block-tokens 2048 --shard-blocks 2)
head -c 8000 < <(gzip -dc ../../../data_tools/corpora/tinyshakespeare.txt.gz) >text.txt
hourglass data tokenizer text.txt --out tokenizer --kind bpe --vocab-size 400 --separator '\n\n'
hourglass data shard text.txt --out data/bytes "${cut[@]}"
hourglass data shard text.txt --out data/bpe --tokenizer tokenizer "${cut[@]}"
rm -r tokenizer text.txt

for name in adamw muon; do # as they are when they are killed after step 6, before it is saved
  hourglass launch torchrun "settings/$name.yaml" --cluster settings/two_ranks.yaml
  rm -r "runs/$name/checkpoints/step_00000006"
  echo step_00000003 >"runs/$name/checkpoints/latest"
  rm "runs/$name/lock" "runs/$name"/events.*
done
for name in seed paper modern vanilla; do
  hourglass train "settings/$name.yaml"
  hourglass export "runs/$name" "exports/$name"
  rm -r "runs/$name"
done
python record.py
