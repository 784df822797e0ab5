"""train_single.py on any number of processes, GPUs and machines, in mixed precision.

    torchrun --nproc_per_node=2 train_ddp.py --model rescaps      two processes on this machine
    python train_ddp.py --model alexcaps                          one process, no torchrun needed
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        --rdzv-id=JOB train_ddp.py --model alexcaps               this line on each of two machines

On 2 CPU cores two processes train AlexCapsNet for 20 epochs in 26 minutes: 99.6 % of the test
digits.

Read train_single.py first; what does not change is imported from it. What distribution (DDP:) or
mixed precision (AMP:) adds is marked, in a comment or where a docstring begins, for grep to find:

    DDP:    the process group and its end on every way out
            which device and how many threads a rank takes
            rank 0 decides, writes and prints; the others are told
            each rank's share of the images, in training and in validation
            gradients averaged over ranks; none sent within an accumulation group
            losses and hits summed over ranks; rank 0's BatchNorm buffers for all
    AMP:    autocast around the network
            GradScaler around the step (float16 alone needs it)
"""

import argparse
import os
import socket
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from capsules import capsule_lengths, margin_loss
from data import DataError, DigitBatches, as_batch, epoch_seed, resolve_dataset
from train_single import (
    RunFailed,
    Totals,
    Training,
    UsageError,
    begin,
    build_parser,
    count_epoch,
    describe,
    find_device,
    load_checkpoint,
    load_config,
    make_datasets,
    make_training,
    number,
    plan_run,
    possible_folders,
    print_outro,
    progress_bar,
    resumable,
    run_main,
    save_epoch,
    usable_cores,
    validate,
)

# DDP: torchrun tells each process who it is by these variables; without it, there is one process.
RANKS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
TORCHRUN = RANKS | {"MASTER_ADDR", "MASTER_PORT"} <= {*os.environ}
RANK = int(os.environ["RANK"]) if TORCHRUN else 0  # among all: decides who writes and prints
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if TORCHRUN else 0  # on this machine: which GPU
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if TORCHRUN else 1
LOCAL_WORLD_SIZE = int(os.environ["LOCAL_WORLD_SIZE"]) if TORCHRUN else 1

TIMEOUT = timedelta(minutes=10)  # DDP: of any wait for another rank; rank 0 may be downloading

# AMP: what the network's matrix products and convolutions are computed in. float16 has 5 bits of
# exponent: small gradients vanish unless the loss is scaled up. bfloat16 has the 8 bits of float32.
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# ------------------------------------------------------------------------------------------------
# One epoch and validation
# ------------------------------------------------------------------------------------------------


class GlobalTotals(Totals):
    """Totals over all ranks."""

    def collect(self) -> Tensor:
        steps = super().collect()
        dist.all_reduce(steps)  # DDP: every rank sees every loss, so that all stop together
        return steps


def train_one_epoch(
    training: Training, model: DistributedDataParallel, dataset: DigitBatches, config: dict
) -> Totals:
    """This rank's share of one epoch; optimizer steps are the same on all ranks."""
    optimizer, scaler, epoch = training.optimizer, training.scaler, training.epoch + 1
    dataset.set_epoch(config["seed"], epoch)
    # DDP: the permutation of train_single.py; rank r takes its places r, r + WORLD_SIZE, ... The
    # sampler adds the epoch to the seed itself, as epoch_seed does.
    sampler = DistributedSampler(dataset, seed=epoch_seed(config["seed"], 0))
    sampler.set_epoch(epoch)  # DDP: without this line every epoch has the same order
    loader = DataLoader(dataset, config["batch_size"], sampler=sampler, collate_fn=as_batch)
    device, dtype = dataset.labels.device.type, PRECISIONS[config["precision"]]
    steps = config["accumulation_steps"]
    group_size = config["batch_size"] * steps  # images of one optimizer step, on this rank
    model.train()
    optimizer.zero_grad(set_to_none=True)
    with progress_bar(epoch, config["epochs"], sampler.total_size, hidden=RANK > 0) as bar:
        totals = GlobalTotals(epoch, bar)
        for step, (images, labels) in enumerate(loader):
            group = min(group_size, len(sampler) - step // steps * group_size)  # the last: short
            last_of_group = (step + 1) % steps == 0 or step + 1 == len(loader) or config["dry_run"]
            # DDP: backward averages gradients over ranks; before a group's end that is for nothing
            with nullcontext() if last_of_group else model.no_sync():
                with torch.autocast(device, dtype, enabled=config["precision"] != "fp32"):  # AMP:
                    lengths = capsule_lengths(model(images))  # float32 again: see capsules.py
                loss = margin_loss(lengths, labels)
                # A micro-batch counts by its share of the group's images. Leaving the division out
                # would multiply the gradient by the number of micro-batches.
                share = len(labels) / group
                scaler.scale(loss * share).backward()  # AMP: small float16 gradients stay above 0
            if last_of_group:
                scaler.step(optimizer)  # AMP: unscales; skips the step if a gradient overflowed
                scaler.update()  # AMP: halves the scale then, doubles it after 2000 good steps
                optimizer.zero_grad(set_to_none=True)
            totals.add(loss, lengths, labels)
            if config["dry_run"]:
                break
        totals.look()
    return totals


def validate_together(model: nn.Module, dataset: DigitBatches, one_batch: bool) -> Tensor:
    """As train_single.validate, each image on exactly one rank, in float32, sums over all ranks."""
    # DDP: a step's first forward pass begins with rank 0's BatchNorm buffers; after the last one
    # each rank has running means of its own. Rank 0's are saved.
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
    # DDP: no DistributedSampler here. It pads the shares to equal length, and some images would
    # count twice. `model` is not wrapped: nothing has to be synchronised in its forward pass.
    share = range(RANK, len(dataset), WORLD_SIZE)
    sums = validate(model, dataset, share, one_batch)
    dist.all_reduce(sums)  # DDP: loss, hits and images of all shares
    return sums


# ------------------------------------------------------------------------------------------------
# Processes that act as one
# ------------------------------------------------------------------------------------------------


class LostRank(RunFailed):
    """Another process has died, or the network to it has."""

    everyone_knows = False  # rank 0 may be the one that died


@contextmanager
def process_group():
    """DDP: join the other processes; leave them on every way out. Yields: restarted by torchrun?"""
    gpus = torch.cuda.device_count()
    backend = "cpu:gloo,cuda:nccl" if 0 < gpus and LOCAL_WORLD_SIZE <= gpus else "gloo"
    if 0 < gpus < LOCAL_WORLD_SIZE and LOCAL_RANK == 0:  # NCCL refuses two ranks on one GPU
        print(f"note: {LOCAL_WORLD_SIZE} ranks share {gpus} GPU(s) and talk through gloo")
    try:
        if TORCHRUN:
            store = next(dist.rendezvous("env://", timeout=TIMEOUT))[0]
        else:
            print("note: one process; for more: torchrun --nproc_per_node=2 train_ddp.py ...")
            store = dist.HashStore()
        # In this store the ranks find each other's addresses. torchrun keeps it when it restarts
        # dead workers: without a prefix the new ones would wait for the old ones' addresses.
        starts = store.add(f"starts of rank {RANK}", 1)
        store = dist.PrefixStore(f"start {starts}", store)
        dist.init_process_group(
            backend, store=store, rank=RANK, world_size=WORLD_SIZE, timeout=TIMEOUT
        )
        yield starts > 1 or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        dist.destroy_process_group()
    except (UsageError, DataError, RunFailed, OSError):  # agreed on: all ranks come this way
        dist.destroy_process_group()
        raise
    except BaseException as error:
        met = dist.is_initialized()
        if met and "nccl" in backend:  # the others may be in mid-step, and destroying would wait
            dist.group.WORLD.abort()  # for GPU kernels that wait for this rank
        elif met:
            dist.destroy_process_group()
        text = str(error).strip() or type(error).__name__
        if isinstance(error, dist.DistError) or (
            type(error) is RuntimeError and "gloo" in text.lower()
        ):
            what = "has lost another rank" if met else "cannot reach the other ranks"
            raise LostRank(f"rank {RANK} {what} ({text.splitlines()[0]})") from None
        raise


def agree(work, rank0_only: bool = False):
    """DDP: do work() on every rank, or on rank 0 for all; if it fails anywhere, all ranks fail.

    So no rank waits for one that has given up, and rank 0 can print what was wrong anywhere.
    """
    result, error = None, None
    if RANK == 0 or not rank0_only:
        try:
            result = work()
        except (UsageError, DataError, RunFailed, OSError) as failure:
            error = failure
    outcomes = [None] * WORLD_SIZE
    dist.all_gather_object(outcomes, (error, result if rank0_only else None))
    for error, _ in outcomes:
        if error is not None:
            raise error
    return outcomes[0][1] if rank0_only else result


def pick_device(config: dict) -> torch.device:
    """DDP: this rank's device; on the CPU, this rank's share of the cores."""
    if config["device"] == "cpu":
        # torchrun sets OMP_NUM_THREADS=1 unless it is set, which leaves cores idle
        torch.set_num_threads(max(1, usable_cores() // LOCAL_WORLD_SIZE))
        return torch.device("cpu")
    find_device("cuda")  # rank 0 has one; this rank's machine might not
    return torch.device("cuda", LOCAL_RANK % torch.cuda.device_count())


def plan_together(parser: argparse.ArgumentParser, restarted: bool) -> tuple[dict, Path, bool]:
    """DDP: rank 0 reads the command, decides what `auto` means and finds the data, for all."""
    fixed = {"script": "ddp", "world_size": WORLD_SIZE, "launch": launch_id()}

    def work():
        find = run_begun_by_this_launch if restarted else None
        config, run_dir, resume = plan_run(parser, fixed, find)
        kind = torch.device(config["device"])
        if kind.type not in ("cpu", "cuda") or kind.index:
            raise UsageError(f"--device {kind}: each rank takes its own; give cpu or cuda")
        config["device"] = kind.type
        if config["precision"] is None:  # AMP: each device's own half precision
            config["precision"] = "fp16" if kind.type == "cuda" else "bf16"
        if kind.type == "cpu" and config["precision"] == "fp16":
            raise UsageError("--precision fp16 needs a GPU: on the CPU use bf16 or fp32")
        if kind.type == "cpu" and config["sync_bn"]:
            raise UsageError("--sync-bn needs GPUs: PyTorch has no such BatchNorm for the CPU")
        return config, run_dir, resume

    return agree(work, rank0_only=True)


def launch_id() -> str:
    """Names this call of torchrun, also after its restarts: a restart resumes only its own run.

    The agent's process belongs to it, as a --rdzv-id may be used again.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"{run_id} {socket.gethostname()} {os.getppid()}"


def run_begun_by_this_launch(config: dict, run_dir: Path | None) -> Path | None:
    """DDP: the folder of the run that this torchrun began before it restarted its workers."""
    for folder in (run_dir,) if run_dir else possible_folders(config):
        whole = (folder / "last.pt").exists() and (folder / "config.json").exists()
        if whole and load_config(folder).get("launch") == config["launch"]:
            return folder
    return None


def find_data_here(config: dict) -> None:
    """DDP: on each further machine one rank finds or downloads the data that rank 0 decided on."""
    if RANK > 0 and LOCAL_RANK == 0:
        resolve_dataset(config["dataset"], config["data_dir"])


def check_shared(run_dir: Path) -> None:
    """DDP: UsageError if this rank does not see what rank 0 wrote."""
    if not (run_dir / "last.pt").exists():
        raise UsageError(
            f"rank {RANK} on {socket.gethostname()} cannot see {run_dir}: choose a --run-dir on a "
            "disk that all machines share"
        )


def count_devices(device: torch.device) -> int:
    """DDP: different devices in use; ranks that share a GPU, or a machine's CPU, count once."""
    names = [None] * WORLD_SIZE
    dist.all_gather_object(names, f"{socket.gethostname()} {device}")
    return len(set(names))


def wrap(training: Training, config: dict, device: torch.device) -> DistributedDataParallel:
    """DDP: the model that averages gradients over ranks, while backward still computes others."""
    if config["sync_bn"]:  # one BatchNorm over the batches of all ranks; parameters stay the same
        training.model = nn.SyncBatchNorm.convert_sync_batchnorm(training.model)
    return DistributedDataParallel(
        training.model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # gradients stay in the buffers that were sent: a copy less
    )


# ------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------


def main() -> None:
    parser = build_parser(__doc__)
    flag = parser.add_argument
    flag("--precision", choices=PRECISIONS, help="if not given, fp16 on GPUs and bf16 on the CPU")
    flag("--accumulation-steps", type=number(int, 1, 10**6), default=1,
         help="batches whose gradients are added up for one optimizer step")
    flag("--sync-bn", action="store_true", help="one BatchNorm over all ranks; GPUs only")
    parser.parse_args()  # a mistake in the command ends here, before processes wait for each other
    with process_group() as restarted:  # DDP:
        run(parser, restarted)


def run(parser: argparse.ArgumentParser, restarted: bool) -> None:
    """The main of train_single.py, by all ranks together."""
    config, run_dir, resume = plan_together(parser, restarted)  # DDP:
    device = agree(lambda: pick_device(config))  # DDP:
    agree(lambda: find_data_here(config))  # DDP:
    datasets = train_set, validation_set = agree(lambda: make_datasets(config, device))  # DDP:
    training = agree(lambda: make_training(config, device))  # DDP:
    half = config["precision"] == "fp16"
    training.scaler = torch.amp.GradScaler(device.type, enabled=half)  # AMP: float16 alone needs it
    last = run_dir / "last.pt"
    if resume:
        agree(lambda: training.restore(load_checkpoint(last, config), last))  # DDP:
    model = wrap(training, config, device)  # DDP:
    config |= describe(config, training, datasets, count_devices(device))
    launcher = f"torchrun --nproc_per_node={LOCAL_WORLD_SIZE} train_ddp.py"
    if WORLD_SIZE > LOCAL_WORLD_SIZE:
        launcher = "on each machine, the torchrun line of before with train_ddp.py"
    with resumable(run_dir, None if RANK > 0 or config["dry_run"] else launcher):
        agree(lambda: begin(run_dir, training, config, resume), rank0_only=True)  # DDP:
        if not config["dry_run"]:
            agree(lambda: check_shared(run_dir))  # DDP:
        while training.epoch < config["epochs"]:
            start = time.perf_counter()
            totals = train_one_epoch(training, model, train_set, config)
            seconds = time.perf_counter() - start
            validated = validate_together(training.model, validation_set, config["dry_run"])
            count_epoch(training, config, totals, validated.tolist(), seconds)
            agree(lambda: save_epoch(run_dir, training, config), rank0_only=True)  # DDP:
        if RANK == 0:
            print_outro(config, run_dir, training)


if __name__ == "__main__":
    run_main(main, quiet=RANK > 0)
