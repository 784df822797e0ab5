#!/usr/bin/env bash
# The twelve runs behind the headline: both networks, trained by both scripts, with seeds 0, 1, 2.
#
#     bash results/train_all.sh [FLAGS]         FLAGS: for training, such as --data-dir FOLDER
#
# It takes thirteen hours on 2 CPU cores. It may be stopped and started again at any time: finished
# runs are skipped, unfinished runs are resumed. Then: python -m results.tables runs/*caps-*
set -euo pipefail
for run in rescaps-single alexcaps-single{,-seed1,-seed2} alexcaps-ddp{,-seed1,-seed2} \
    rescaps-ddp{,-seed1,-seed2} rescaps-single-seed1 rescaps-single-seed2; do
    [ -e "runs/$run/report.json" ] && continue # finished and evaluated
    train="python train_single.py"
    [[ $run = *-ddp* ]] && train="torchrun --nproc_per_node=2 train_ddp.py"
    if [ -e "runs/$run/last.pt" ]; then
        $train --resume "runs/$run"
    else
        seed=${run##*seed}
        [[ $run = *seed* ]] || seed=0
        $train --model "${run%%-*}" --dataset mnist --seed "$seed" "$@"
    fi
    python evaluate.py "runs/$run"
done
