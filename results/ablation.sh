#!/usr/bin/env bash
# One change at a time: AlexCapsNet on 20,000 digits for 3 epochs, nine rows with seeds 0, 1, 2.
#
#     bash results/ablation.sh [FLAGS]          FLAGS: for training, such as --data-dir FOLDER
#
# It takes an hour and a half on 2 CPU cores. It may be stopped and started again at any time:
# finished runs are skipped, unfinished runs are resumed.
# Then: python -m results.tables runs/ablation/*
set -euo pipefail
rows=("baseline" "plain" "rotate-0 --rotate 0" "shift-2 --shift 2"
    "routing-1 --routing-iterations 1" "routing-2 --routing-iterations 2"
    "routing-5 --routing-iterations 5" "batch-64 --accumulation-steps 2"
    "batch-256 --accumulation-steps 8")
for seed in 0 1 2; do
    for row in "${rows[@]}"; do
        read -r name flags <<<"$row"
        run=runs/ablation/$name-seed$seed
        python="python" model="alexcaps"
        [ "$name" = plain ] && python="python -m results.plain" model="plain-alexcaps"
        [ -e "$run/report.json" ] && continue # finished and evaluated
        if [ -e "$run/last.pt" ]; then
            $python train_ddp.py --resume "$run"
        else
            $python train_ddp.py --model $model --dataset mnist --train-size 20000 --epochs 3 \
                --seed $seed $flags --run-dir "$run" "$@"
        fi
        $python evaluate.py "$run"
    done
done
