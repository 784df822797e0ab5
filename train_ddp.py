"""train_single.py on several processes, GPUs and machines, in mixed precision.

    torchrun --nproc_per_node=2 train_ddp.py --model rescaps   two processes
    python train_ddp.py --model alexcaps                       one process
    torchrun --nproc_per_node=2 train_ddp.py --resume RUN      continue after any stop
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv-backend=c10d --rdzv-id=JOB \\
        --rdzv-endpoint=HOST:29500 train_ddp.py --model alexcaps   on each of 2 machines

On 2 CPU cores with bfloat16, 20 epochs of AlexCapsNet take 70 s each. The test accuracy
is 99.6 %. Open train_single.py beside it: the loop is the same, and what does not change
is imported. What distribution or mixed precision adds is marked with one of two words:

    DDP:    the process group: how the ranks (processes 0, 1, ...) meet
            a device, and on the CPU threads, for each rank
            rank 0 decides, writes and prints; the other ranks are told
            each rank's part of the images, in training and in validation
            gradients averaged over ranks, once for each accumulation group
            losses and hits summed over ranks; rank 0's BatchNorm statistics
    AMP:    autocast around the network; in float16 also GradScaler around the step
"""

import json
import os
import secrets
import signal
import socket
import sys
import time
import warnings
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import train_single
from data import DigitBatches, UserError, as_batch, epoch_seed
from train_single import LOOK_EVERY, Run, progress, show, tally

# DDP: torchrun tells each process who it is. RANK alone, without the other variables, is
# left over from something else.
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHED = all(name in os.environ for name in LAUNCHER)
RANK = int(os.environ["RANK"]) if LAUNCHED else 0  # of all: 0 decides, writes, prints
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if LAUNCHED else 0  # on this machine
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
LOCAL_WORLD_SIZE = int(os.environ["LOCAL_WORLD_SIZE"]) if LAUNCHED else 1
# DDP: a rank leaves without Python's shutdown, during which a gloo thread that still frees
# a tensor would abort the process.
leave = os._exit if LAUNCHED else sys.exit

TIMEOUT = timedelta(minutes=10)  # DDP: a rank waits this long for another one

# AMP: the type in which convolutions and matrix products are computed. float16 has 5 bits of exponent: small
# gradients vanish unless the loss is scaled up. bfloat16 has 8 bits, as float32 has.
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# -- One epoch, and validation -----------------------------------------------------


def train_one_epoch(run: Run, ddp: DistributedDataParallel, dataset: DigitBatches) -> Tensor:
    """This rank's part of an epoch -> sums over all ranks.

    All ranks take the same optimizer steps, since they have the same gradients.
    """
    config = run.config
    epoch = len(run.history) + 1
    dataset.set_epoch(config["seed"], epoch)
    # DDP: the permutation of train_single.py; rank r takes its places r, r + WORLD_SIZE, ...
    # The sampler adds the epoch to the seed itself, as epoch_seed does. If the ranks do not
    # divide the number of images, it repeats the first few: all ranks take as many steps.
    sampler = DistributedSampler(dataset, WORLD_SIZE, RANK, seed=epoch_seed(config["seed"], 0))
    sampler.set_epoch(epoch)  # DDP: without this line every epoch has the same order
    loader = DataLoader(dataset, config["batch_size"], sampler=sampler, collate_fn=as_batch)
    accumulate = config["accumulation_steps"]  # batches in a group: one optimizer step
    group_images = accumulate * config["batch_size"]  # images in a group, on this rank
    device = dataset.labels.device
    dtype = PRECISIONS[config["precision"]]  # AMP:
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    bar = progress(loader, f"epoch {epoch}/{config['epochs']}", hidden=RANK > 0)  # DDP:
    ddp.train()
    for batch, (images, labels) in enumerate(bar, start=1):
        last_of_group = batch % accumulate == 0 or batch == len(loader)
        # DDP: backward averages gradients over ranks. Until the group's last batch that
        # would be wasted work.
        with nullcontext() if last_of_group else ddp.no_sync():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):  # AMP:
                capsules = ddp(images)  # in float32 again: see capsules.py
                loss = run.model.loss(capsules, images, labels)
            # A batch's loss is the mean over its images. Weighted with the batch's part of
            # the group's images, the losses add up to the mean over the group. Without the
            # weight, the gradient would be too large by the number of batches.
            images_before = (batch - 1) // accumulate * group_images
            images_in_group = min(group_images, len(sampler) - images_before)
            weight = len(labels) / images_in_group
            run.scaler.scale(loss * weight).backward()  # AMP: keeps small gradients above 0
        if last_of_group:
            run.scaler.step(run.optimizer)  # AMP: unscales; no step if a gradient overflowed
            run.scaler.update()  # AMP: then halves the scale; doubles it after 2000 good steps
            run.optimizer.zero_grad()
        sums += tally(loss, run.model.scores(capsules), labels)
        if batch % LOOK_EVERY == 0 or batch == len(loader):
            show(bar, summed(sums))  # DDP: all ranks look at the same steps, and stop together
    return summed(sums)  # DDP:


def validate(model: nn.Module, dataset: DigitBatches) -> Tensor:
    """train_single.validate, in float32, each image on exactly one rank -> sums over all."""
    # DDP: at the start of each optimizer step, DDP copies rank 0's BatchNorm statistics to
    # all ranks. After the last step they differ again. Rank 0's are the ones that are saved.
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
    # DDP: no DistributedSampler here: it repeats images, which would then count twice.
    mine = range(RANK, len(dataset), WORLD_SIZE)
    return summed(train_single.validate(model, dataset, mine, hidden=RANK > 0))


def summed(sums: Tensor) -> Tensor:
    """DDP: a copy of the sums, added up over all ranks. Every rank gets the same bits."""
    total = sums.clone()
    dist.all_reduce(total)  # waits for the slowest rank
    return total


# -- Processes that act as one -----------------------------------------------------


def join() -> dist.Store:
    """DDP: meet the other ranks -> a store that lives as long as torchrun does.

    A store is a dictionary that all ranks share. torchrun's store outlives a restart of the
    ranks, so it still holds the addresses of dead ranks. The process group gets a new
    store, which rank 0 serves.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # NCCL refuses two ranks on one GPU. Ranks that share a GPU communicate through gloo.
    backend = "cpu:gloo,cuda:nccl" if 0 < gpus and LOCAL_WORLD_SIZE <= gpus else "gloo"
    if LAUNCHED and "TORCHELASTIC_RUN_ID" not in os.environ:  # not started by torchrun
        print(f"rank {RANK} waits for the others at {os.environ['MASTER_ADDR']}", flush=True)
    try:
        if LAUNCHED:
            lasting, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
            store = store_of_rank_0(lasting, os.environ["MASTER_ADDR"])
        else:
            lasting = store = dist.HashStore()  # one process needs no more
        dist.init_process_group(
            backend, store=store, rank=RANK, world_size=WORLD_SIZE, timeout=TIMEOUT
        )
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"rank {RANK} does not reach the others: {reason}") from None
    return lasting


def store_of_rank_0(lasting: dist.Store, host: str) -> dist.Store:
    """DDP: rank 0 serves a new store and leaves its port in the lasting one.

    After a restart the others may find the port of a dead rank 0, where nobody answers.
    Then they ask again.
    """
    if RANK == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        lasting.set("port", str(store.port))
        return store
    give_up = time.monotonic() + TIMEOUT.total_seconds()
    while time.monotonic() < give_up:
        port = int(lasting.get("port"))  # waits until there is one
        with suppress(OSError, dist.DistError):
            socket.create_connection((host, port), timeout=1).close()
            return dist.TCPStore(host, port, timeout=TIMEOUT)
        time.sleep(0.1)
    raise UserError(f"rank {RANK} waits for rank 0, which does not answer")


def together(work):
    """DDP: work() on every rank -> its result. A mistake that one rank finds ends all."""
    result = None
    mistake = None
    try:
        result = work()
    except (UserError, OSError) as error:
        mistake = str(error)
    mistakes = [None] * WORLD_SIZE
    dist.all_gather_object(mistakes, mistake)  # waits for the slowest rank
    for text in mistakes:
        if text is not None:
            raise UserError(text)
    return result


def on_rank_0(work):
    """DDP: work() on rank 0 alone -> its result, on all ranks. A mistake ends all."""
    result = together(lambda: work() if RANK == 0 else None)
    told = [result]
    dist.broadcast_object_list(told)
    return told[0]


def plan(given: dict, lasting: dist.Store) -> tuple[dict, dict, Path]:
    """Rank 0 reads the command -> (flags, settings, run folder), for all ranks."""
    given = after_restart(given, lasting)
    script = {"script": "ddp", "world_size": WORLD_SIZE}
    config, folder = train_single.read_command(given, script)
    if config["device"] not in ("cpu", "cuda"):
        hint = "each rank takes its own; give cpu or cuda"
        raise UserError(f"--device {config['device']}: {hint}")
    on_cpu = config["device"] == "cpu"
    if "resume" not in given:
        config["precision"] = pick_precision(given.get("precision"), on_cpu)  # AMP:
        config["id"] = secrets.token_hex(8)
        # DDP: before the run is saved for the first time, so that no restart misses it
        lasting.set("run", json.dumps([config["id"], str(folder)]))
    if on_cpu and config["precision"] == "fp16":
        raise UserError("--precision fp16 needs a GPU; on the CPU take bf16 or fp32")
    if config["sync_bn"] and (on_cpu or config["compile"]):
        raise UserError("--sync-bn needs GPUs, and does not go with --compile")
    return given, config, folder


def after_restart(given: dict, lasting: dist.Store) -> dict:
    """DDP: the flags, or, if torchrun restarted us, those that resume the run begun before.

    The id identifies that run. If the ranks died before it was saved, the folder may still
    hold a stranger's run, which --overwrite was about to replace.
    """
    if "resume" in given or not lasting.check(["run"]):
        return given
    run_id, folder = json.loads(lasting.get("run"))
    with suppress(FileNotFoundError, UserError):  # nothing there, or a damaged stranger
        checkpoint = train_single.load_checkpoint(Path(folder) / "last.pt")
        if checkpoint["config"].get("id") == run_id:
            return {"resume": folder}
    return given


def pick_precision(wanted: str | None, on_cpu: bool) -> str:
    """AMP: by default float16 on GPUs, and on the CPU bfloat16 if it has instructions for
    it. A CPU that emulates them is slower than in float32, often ten times."""
    if not on_cpu:
        return wanted or "fp16"
    if cpu_has_bfloat16():
        if wanted is None:
            print("precision: bf16, since this CPU has instructions for it")
        return wanted or "bf16"
    if wanted is None:
        print("precision: fp32, since this CPU has no instructions for bf16")
    if wanted == "bf16":
        print("WARNING: this CPU emulates bf16, which may take ten times as long as fp32")
    return wanted or "fp32"


def cpu_has_bfloat16() -> bool:
    """AMP: whether the CPU itself computes products in bfloat16, by its flags."""
    if hasattr(torch.cpu, "get_capabilities"):
        flags = [name for name, there in torch.cpu.get_capabilities().items() if there]
    else:
        info = Path("/proc/cpuinfo")  # Linux alone has it
        flags = info.read_text().split() if info.exists() else []
    return not {"avx512_bf16", "amx_bf16", "bf16", "arm_bf16"}.isdisjoint(flags)


def pick_device(config: dict) -> torch.device:
    """DDP: this rank's device; on the CPU, this rank's part of the cores."""
    if config["device"] == "cuda":
        gpus = max(1, torch.cuda.device_count())  # with none, find_device says so
        return train_single.find_device(f"cuda:{LOCAL_RANK % gpus}")
    if LAUNCHED and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        # torchrun sets it to 1 if you did not set it, which leaves cores idle.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // LOCAL_WORLD_SIZE))
    return torch.device("cpu")


def prepare(given: dict, config: dict, folder: Path) -> tuple[Run, DigitBatches, DigitBatches]:
    """What train_single.main does before the first epoch."""
    device = pick_device(config)  # DDP:
    train_set, validation_set = train_single.make_datasets(config, device)
    run = Run(config, folder, device)
    if RANK == 0:  # DDP: one rank writes
        train_single.open_folder(run, given)
    elif "resume" in given:
        run.load()
    return run, train_set, validation_set


def wrap(run: Run) -> DistributedDataParallel:
    """DDP: the model, wrapped so that backward averages gradients over ranks."""
    if run.config["sync_bn"]:  # BatchNorm over the batches of all ranks
        run.model = nn.SyncBatchNorm.convert_sync_batchnorm(run.model)
    # A false alarm: cuDNN's gradient [64, 1, 5, 5] may have another stride where the size is 1.
    warnings.filterwarnings("ignore", "Grad strides do not match")
    # gradient_as_bucket_view: gradients stay in the buffers that are sent, one copy less
    return DistributedDataParallel(run.model, gradient_as_bucket_view=True)


# -- Main --------------------------------------------------------------------------


def main() -> None:
    parser = train_single.build_parser(__doc__)
    count = train_single.number_between(int, 1, 1_000_000)
    flag = parser.add_flag
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="without it, fp16 on GPUs; bf16 or fp32 on the CPU"
    )
    flag("--accumulation-steps", "batches per optimizer step", type=count, metavar="N")
    flag("--sync-bn", "BatchNorm over the batches of all ranks; GPUs only", action="store_true")
    given = vars(parser.parse_args())  # a mistake ends all ranks, before one waits for another
    refuse_half_a_launch()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a rank even if it waits in C++
    lasting = join()  # DDP:
    given, config, folder = on_rank_0(lambda: plan(given, lasting))  # DDP:
    run, train_set, validation_set = together(lambda: prepare(given, config, folder))  # DDP:
    if RANK == 0:  # DDP:
        signal.signal(signal.SIGINT, lambda *_: stop(run))
    on_rank_0(lambda: train_single.begin(run, train_set))  # DDP:
    ddp = wrap(run)  # DDP:
    while len(run.history) < run.config["epochs"]:
        start = time.perf_counter()
        trained = train_one_epoch(run, ddp, train_set)
        seconds = time.perf_counter() - start
        validated = validate(run.model, validation_set)
        run.finish_epoch(trained, validated, seconds)
        on_rank_0(run.save)  # DDP:
        on_rank_0(lambda: print(run.epoch_line(), flush=True))  # DDP:
    on_rank_0(lambda: train_single.print_outro(run))  # DDP:
    dist.destroy_process_group()  # not after a failure: NCCL would wait for the other ranks


def refuse_half_a_launch() -> None:
    """DDP: UserError if a launcher started several processes, but did not number them all.

    Each process would take itself for the only one, and train the same run.
    """
    several = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    if several and not LAUNCHED:
        missing = [name for name in LAUNCHER if name not in os.environ]
        raise UserError(f"RANK is set, but {', '.join(missing)} is not: start with torchrun")


def stop(run: Run) -> None:
    """Ctrl-C on rank 0: leave at once, because the other ranks have already stopped."""
    command = "python train_ddp.py"
    if LAUNCHED:  # on several machines, the other flags of torchrun are needed again
        ranks = f"--nproc_per_node={WORLD_SIZE}" if WORLD_SIZE == LOCAL_WORLD_SIZE else "..."
        command = f"torchrun {ranks} train_ddp.py"
    train_single.print_stopped(run, command)
    leave(130)


if __name__ == "__main__":
    train_single.run_main(main, quiet=LOCAL_RANK > 0, leave=leave)
