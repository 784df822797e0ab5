#!/usr/bin/env bash
# The twelve runs behind the headline: both networks, trained by both scripts, with seeds 0, 1, 2.
#
#     bash results/train_all.sh [FLAGS]         FLAGS: for training, such as --data-dir FOLDER
#
# It takes thirteen hours on 2 CPU cores. It may be stopped and started again at any time: finished
# runs are skipped, unfinished runs are resumed. Then:
# python -m results.tables runs/{alex,res}caps-{single,ddp}{,-seed1,-seed2}
set -euo pipefail
for run in {alex,res}caps-{single,ddp}{,-seed1,-seed2}; do
    [ -e "runs/$run/report.json" ] && continue # finished and evaluated
    train="python train_single.py"
    [[ $run = *-ddp* ]] && train="torchrun --nproc_per_node=2 train_ddp.py"
    if [ -e "runs/$run/last.pt" ]; then
        $train --resume "runs/$run"
    else
        seed=0
        [[ $run = *-seed* ]] && seed=${run##*-seed}
        $train --model "${run%%-*}" --dataset mnist --seed "$seed" "$@"
    fi
    python evaluate.py "runs/$run"
done
