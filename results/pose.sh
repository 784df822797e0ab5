#!/usr/bin/env bash
# Three networks with seeds 0, 1, 2, on 20,000 digits for 3 epochs; then results/pose.py probes
# what each of them knows of a digit's pose.
#
#     bash results/pose.sh [FLAGS]              FLAGS: for training, such as --data-dir FOLDER
#
# It takes about an hour on 2 CPU cores. It may be stopped and started again at any time: finished
# runs are kept, unfinished runs are resumed.
set -euo pipefail
rows=("baseline" "decoder --reconstruction 20" "plain")
for seed in 0 1 2; do
    for row in "${rows[@]}"; do
        read -r name flags <<<"$row"
        run=runs/pose/$name-seed$seed
        python="python" model="alexcaps"
        [ "$name" = plain ] && python="python -m results.plain" model="plain-alexcaps"
        if [ -e "$run/last.pt" ]; then
            $python train_ddp.py --resume "$run"
        else
            $python train_ddp.py --model $model --dataset mnist --train-size 20000 --epochs 3 \
                --seed $seed $flags --run-dir "$run" "$@"
        fi
    done
done
# The last one was trained for 20 epochs: it draws knobs.png.
python -m results.pose runs/pose/* results/alexcaps-ddp-reconstruction
