#!/usr/bin/env bash
# `make demo`: corpus, training with two expert-parallel processes, samples before and after. DEMO_STEPS shortens it.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
here=.demo/$(date +%Y%m%d-%H%M%S)
recipe=(+experiment=tiny_cpu data.path=.demo/stdlib)
if [[ -n ${DEMO_STEPS:-} ]]; then recipe+=("train.steps=$DEMO_STEPS"); fi
prompt=${DEMO_PROMPT:-class }

title() { printf '\n\033[1m%s\033[0m\n' "$*"; }
sample() { "$bin/python" -m dstrain generate run.dir="$1" prompt="$prompt" max_tokens=300 temperature=0.5; echo; }

mkdir -p "$here"
if [[ ! -s .demo/stdlib.idx ]]; then
    title "Text: the sources of Python's standard library, as bytes"
    "$bin/dstrain" tokenize data.path=python-stdlib out=.demo/stdlib
fi

title "Before training, the model goes on from \"$prompt\" like this"
"$bin/python" -m dstrain train "${recipe[@]}" train.steps=0 run.dir="$here/untrained" >"$here/untrained.log"
# Random bytes include those that a terminal obeys.
sample "$here/untrained" | tr -d '\000-\010\013-\037'

title "Training: 2 processes, each with half of the experts"
"$bin/torchrun" --standalone --nproc-per-node 2 -m dstrain train "${recipe[@]}" mesh.ep=2 run.dir="$here/run"

title "After training"
sample "$here/run"

title "Where everything is"
cat <<END
  $here/run
    metrics.jsonl          the figures of every step
    config.yaml            the resolved config; environment.json has versions and commit
    checkpoints/           what \`dstrain generate\` and \`train.resume=auto\` read
  .demo/stdlib.bin, .idx   the text as tokens

What to try next
  source .venv/bin/activate
  dstrain generate run.dir=$here/run prompt="'class '" temperature=0.5
  dstrain verify +experiment=tiny_cpu mesh.ep=2        # the same gradients as one process?
  dstrain train +experiment=tiny_cpu data.path=YOUR.txt run.dir=runs/mine
  dstrain train +experiment=deepseek_v3 --cfg job      # the recipe of the 671B model
END
