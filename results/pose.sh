#!/usr/bin/env bash
# What does a network know of a digit's pose? Train three networks with seeds 0, 1, 2, on 20,000
# digits for 3 epochs. Then let results/pose.py probe them, and write its results to results/.
#
#     bash results/pose.sh [FLAGS]              FLAGS: for training, such as --data-dir FOLDER
#     python -m results.tables                  then: write the tables of both pages
#
# It takes about an hour on 2 CPU cores. It may be stopped and started again at any time: finished
# runs are skipped, unfinished runs are resumed.
set -euo pipefail
rows=("baseline" "decoder --reconstruction 20" "plain")
for seed in 0 1 2; do
    for row in "${rows[@]}"; do
        read -r name flags <<<"$row"
        run=runs/pose/$name-seed$seed
        python="python" model="alexcaps"
        [ "$name" = plain ] && python="python -m results.plain" model="plain-alexcaps"
        if [ -e "$run/last.pt" ]; then
            $python train_ddp.py --resume "$run" # ends at once if the run is finished
        else
            $python train_ddp.py --model $model --dataset mnist --train-size 20000 --epochs 3 \
                --seed $seed $flags --run-dir "$run" "$@"
        fi
    done
done
# Networks of 20 epochs are probed, too, if they are there. They were trained with
#     torchrun --nproc_per_node=2 train_ddp.py --model alexcaps --reconstruction 20 --seed 1 \
#         --run-dir runs/alexcaps-ddp-reconstruction-seed1
# then with seed 2, with --reconstruction 0.392 as ...-paper, and with --shift 2 as ...-shift.
# Seed 0 has its weights in results/. The last network draws knobs.png.
long=(results/alexcaps-ddp-reconstruction)
for name in seed1 seed2 paper shift; do
    run=runs/alexcaps-ddp-reconstruction-$name
    [ -e "$run/best.pt" ] && long+=("$run")
done
python -m results.pose runs/pose/* "${long[@]}" --out results
