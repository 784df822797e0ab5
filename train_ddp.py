"""train_single.py on many processes, GPUs and machines, in mixed precision.

    torchrun --nproc_per_node=2 train_ddp.py --model rescaps   two processes
    python train_ddp.py --model alexcaps                       one of them
    torchrun --nproc_per_node=2 train_ddp.py --resume RUN      after any stop
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv-backend=c10d --rdzv-id=JOB \\
        --rdzv-endpoint=HOST:29500 train_ddp.py --model alexcaps   on each of 2

On 2 CPU cores 20 epochs of AlexCapsNet take 70 s each: 99.6 % in the test.
Open train_single.py beside it: the loop is the same, and what does not change
is imported. What distribution (DDP:) or mixed precision (AMP:) adds is marked:

    DDP:    the process group; a device, and on the CPU threads, for each rank
            rank 0 decides, writes and prints; the others are told
            each rank's share of the images, in training and in validation
            gradients averaged over ranks, once for an accumulation group
            losses and hits summed over ranks; rank 0's BatchNorm buffers
    AMP:    autocast around the network; in float16 GradScaler around the step
"""

import os
import sys

if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":
    print("loading PyTorch ...", flush=True)  # two seconds and more, without another word

import json
import secrets
import signal
import time
import warnings
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import train_single
from capsules import capsule_lengths, margin_loss
from data import DigitBatches, UserError, as_batch, epoch_seed
from train_single import Run, finite, tally, watch

# DDP: torchrun tells each process who it is. A lonely RANK is left over from something else.
LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
LAUNCHED = LAUNCHER <= {*os.environ}
RANK = int(os.environ["RANK"]) if LAUNCHED else 0  # among all: 0 decides, writes and prints
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if LAUNCHED else 0  # on this machine: which GPU
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
LOCAL_WORLD_SIZE = int(os.environ["LOCAL_WORLD_SIZE"]) if LAUNCHED else 1
# DDP: without a shutdown of Python, during which a thread of gloo that frees a tensor would abort
leave = os._exit if LAUNCHED else sys.exit

# DDP: how long one rank may wait for another: while rank 0 may be downloading, and afterwards
PATIENCE, TIMEOUT = timedelta(minutes=10), timedelta(minutes=2)

# AMP: what the network's products are computed in. float16 has 5 bits of exponent: small gradients
# vanish unless the loss is scaled up. bfloat16 has the 8 bits of float32.
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# -- One epoch and validation ----------------------------------------------------------------------


def train_one_epoch(run: Run, ddp: DistributedDataParallel, dataset: DigitBatches) -> Tensor:
    """This rank's share of one epoch -> sums over all ranks; all take the same optimizer steps."""
    optimizer, scaler, config, epoch = run.optimizer, run.scaler, run.config, len(run.history) + 1
    dataset.set_epoch(config["seed"], epoch)
    # DDP: the permutation of train_single.py; rank r takes its places r, r + WORLD_SIZE, ... The
    # sampler adds the epoch to the seed itself, as epoch_seed does. Where the ranks do not divide
    # the number of images, it repeats the first few, so that all ranks take equally many steps.
    sampler = DistributedSampler(dataset, WORLD_SIZE, RANK, seed=epoch_seed(config["seed"], 0))
    sampler.set_epoch(epoch)  # DDP: without this line every epoch has the same order
    loader = DataLoader(dataset, config["batch_size"], sampler=sampler, collate_fn=as_batch)
    device, dtype = dataset.labels.device, PRECISIONS[config["precision"]]
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    steps = config["accumulation_steps"]
    group_size = config["batch_size"] * steps  # images of one optimizer step, on this rank
    ddp.train()
    batches = watch(loader, sums, f"epoch {epoch}/{config['epochs']}", finite_sum, RANK > 0)  # DDP:
    for step, (images, labels) in enumerate(batches):
        group = min(group_size, len(sampler) - step // steps * group_size)  # the last: short
        last_of_group = (step + 1) % steps == 0 or step + 1 == len(loader)
        # DDP: backward averages gradients over ranks; before a group's end that is for nothing
        with nullcontext() if last_of_group else ddp.no_sync():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):  # AMP:
                lengths = capsule_lengths(ddp(images))  # float32 again: see capsules.py
            loss = margin_loss(lengths, labels)
            # A micro-batch counts by its share of the group's images. Leaving the division out
            # would multiply the gradient by the number of micro-batches.
            share = len(labels) / group
            scaler.scale(loss * share).backward()  # AMP: small float16 gradients stay above 0
        if last_of_group:
            scaler.step(optimizer)  # AMP: unscales; skips the step if a gradient overflowed
            scaler.update()  # AMP: halves the scale then, doubles it after 2000 good steps
            optimizer.zero_grad()
        sums += tally(loss, lengths, labels)
    return summed(sums)  # DDP:


def validate(model: nn.Module, dataset: DigitBatches) -> Tensor:
    """As train_single.validate, in float32, each image on exactly one rank; sums over all ranks."""
    # DDP: a step's first forward pass begins with rank 0's BatchNorm buffers; after the last one
    # each rank has running means of its own. Rank 0's are saved.
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
    # DDP: no DistributedSampler here. It pads the shares, and some images would count twice.
    share = range(RANK, len(dataset), WORLD_SIZE)
    return summed(train_single.validate(model, dataset, share, hidden=RANK > 0))  # DDP:


def summed(sums: Tensor) -> Tensor:
    """DDP: a copy, added up over all ranks; every rank gets the same bits."""
    total = sums.clone()
    dist.all_reduce(total)  # waits for the slowest rank
    return total


def finite_sum(sums: Tensor) -> list[float]:
    """DDP: what all ranks look at, so that all stop together."""
    return finite(summed(sums))


# -- Processes that act as one ---------------------------------------------------------------------


def join() -> tuple[dist.Store, dist.Store]:
    """DDP: meet the other ranks -> two stores, dictionaries that all ranks share.

    The first lives as long as torchrun does; the second is of this start of the workers alone.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # NCCL refuses two ranks on one GPU; then they talk through gloo, by way of the CPU.
    backend = "cpu:gloo,cuda:nccl" if 0 < gpus and LOCAL_WORLD_SIZE <= gpus else "gloo"
    if LAUNCHED and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun starts all at once
        print(f"rank {RANK} waits for the others at {os.environ['MASTER_ADDR']}", flush=True)
    meeting = dist.rendezvous("env://", timeout=PATIENCE)  # which begins with next
    try:
        lasting = next(meeting)[0] if LAUNCHED else dist.HashStore()
        store = dist.PrefixStore(name_of_this_start(lasting), lasting)
        dist.init_process_group(backend, None, TIMEOUT, WORLD_SIZE, RANK, store)
    except dist.DistError as error:
        raise UserError(f"rank {RANK} meets no others: {str(error).splitlines()[0]}") from None
    return lasting, store


def name_of_this_start(store: dist.Store) -> str:
    """DDP: a name that the ranks started together have in common.

    They leave their addresses in the store under it: torchrun keeps the store when it restarts
    workers, and a new rank must not wait for a dead one. Rank 0 answers hellos until all heard.
    """
    mine = secrets.token_hex(8)
    if RANK > 0:
        store.set(f"hello of {RANK}", mine)
        name = store.get(f"answer to {mine}").decode()
        store.set(f"{name} heard by {mine}", "")
        return name
    for rank in range(1, WORLD_SIZE):
        other = ""
        while not store.check([f"{mine} heard by {other}"]):
            other = store.get(f"hello of {rank}").decode()  # may still be that of a dead one
            store.set(f"answer to {other}", mine)
            time.sleep(0.02)
    return mine


def agree(store: dist.Store, name: str, work, alone: bool = False):
    """DDP: work() on every rank, or by rank 0 alone, for all -> its result.

    Where it fails on one, it fails on all. They wait for PATIENCE: one may be downloading.
    """
    result, error = None, None
    if RANK == 0 or not alone:
        try:
            result = work()
        except (UserError, OSError) as failure:
            error = str(failure)
        store.set(f"{name} {RANK}", json.dumps((error, result if alone else None)))
    for rank in [0] if alone else range(WORLD_SIZE):
        error, told = json.loads(store.get(f"{name} {rank}"))
        if error:
            raise UserError(error)
    return told if alone else result


def plan(parser, lasting: dist.Store) -> tuple:
    """Rank 0 reads the command -> (settings, run folder, resume?, may the folder hold a run)."""
    if lasting.check(["run folder"]):  # DDP: torchrun has restarted us, and the run was begun
        sys.argv[1:] = ["--resume", lasting.get("run folder").decode()]
    fixed = {"script": "ddp", "world_size": WORLD_SIZE}
    config, folder, resume, may_hold_run = train_single.read_command(parser, fixed)
    if config["device"] not in ("cpu", "cuda"):
        raise UserError(f"--device {config['device']}: each rank takes its own; give cpu or cuda")
    on_cpu = config["device"] == "cpu"
    config["precision"] = config["precision"] or ("bf16" if on_cpu else "fp16")  # AMP:
    if on_cpu and config["precision"] == "fp16":
        raise UserError("--precision fp16 needs a GPU: a run on the CPU begins with bf16 or fp32")
    if config["sync_bn"] and (on_cpu or config["compile"]):
        raise UserError("--sync-bn needs GPUs, and does not go with --compile")
    return config, str(folder), resume, may_hold_run


def pick_device(config: dict) -> torch.device:
    """DDP: this rank's device; on the CPU, this rank's share of the cores."""
    if config["device"] != "cpu":
        return train_single.find_device(f"cuda:{LOCAL_RANK % max(1, torch.cuda.device_count())}")
    if LAUNCHED and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        # torchrun sets it to 1 where it is unset, which leaves cores idle. Another value is yours.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // LOCAL_WORLD_SIZE))
    return torch.device("cpu")


def prepare(config: dict, folder: Path, resume: bool, may_hold_run: bool) -> tuple:
    """What main of train_single.py does before the first epoch -> (run, training, validation)."""
    device = pick_device(config)
    train_set, validation_set = train_single.make_datasets(config, device)
    run = Run(config, device)
    if RANK == 0:  # DDP: one writer
        run.claim(folder, may_hold_run)
    if resume:
        run.load(train_single.load_checkpoint(folder / "last.pt"), folder / "last.pt")
    return run, train_set, validation_set


def wrap(run: Run) -> DistributedDataParallel:
    """DDP: the model that averages gradients over ranks, while backward still computes others."""
    if run.config["sync_bn"]:  # one BatchNorm over the batches of all ranks; the same parameters
        run.model = nn.SyncBatchNorm.convert_sync_batchnorm(run.model)
    # cuDNN's gradient [64, 1, 5, 5] may have another stride where the size is 1: a false alarm here
    warnings.filterwarnings("ignore", "Grad strides do not match")
    # gradient_as_bucket_view: gradients stay in the buffers that were sent, a copy less
    return DistributedDataParallel(run.model, gradient_as_bucket_view=True)


# -- Main ------------------------------------------------------------------------------------------


def main() -> None:
    parser = train_single.build_parser(__doc__)
    flag, count = parser.add_argument, partial(train_single.number, int, 1, 10**6)
    flag("--precision", choices=PRECISIONS, help="else fp16 on GPUs and bf16 on the CPU")
    flag("--accumulation-steps", type=count, metavar="N", default=1, help="batches a step (1)")
    flag("--sync-bn", action="store_true", help="one BatchNorm over all ranks; GPUs only")
    parser.parse_args()  # a mistake ends here, on all ranks, before one waits for another
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a rank also while it waits in C++
    lasting, store = join()  # DDP:
    config, folder, *rest = agree(store, "plan", lambda: plan(parser, lasting), alone=True)
    ready = agree(store, "ready", lambda: prepare(config, Path(folder), *rest))  # DDP:
    run, train_set, validation_set = ready
    if RANK == 0:  # DDP: as all ranks are ready
        flags = f"--nproc_per_node={WORLD_SIZE}" if WORLD_SIZE == LOCAL_WORLD_SIZE else "..."
        train_single.begin(run, Path(folder), train_set, f"torchrun {flags} train_ddp.py")
        lasting.set("run folder", folder)  # DDP: from now on a restart resumes this run
    ddp = wrap(run)  # DDP:
    while len(run.history) < config["epochs"]:
        start = time.perf_counter()
        trained = train_one_epoch(run, ddp, train_set)
        seconds = time.perf_counter() - start
        run.finish_epoch(trained, validate(run.model, validation_set), seconds)
        if RANK == 0:  # DDP:
            run.save(Path(folder))
            print(run.epoch_line(), flush=True)
    if RANK == 0:  # DDP:
        train_single.print_outro(run, Path(folder))
    dist.destroy_process_group()  # not after a failure: NCCL would wait for the other ranks


if __name__ == "__main__":
    train_single.run_main(main, quiet=LOCAL_RANK > 0, leave=leave)
