"""train_single.py on several processes, GPUs and machines, in mixed precision.

    torchrun --nproc_per_node=2 train_ddp.py --model rescaps   two processes
    python train_ddp.py --model alexcaps                       one process
    torchrun --nproc_per_node=2 train_ddp.py --resume RUN      continue after any stop
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv-backend=c10d --rdzv-id=JOB \\
        --rdzv-endpoint=HOST:29500 train_ddp.py --model alexcaps   on each of 2 machines

On 2 CPU cores with bfloat16, an epoch of AlexCapsNet takes 70 s. After 20 epochs its test
accuracy is 99.6 %. Open train_single.py beside it: the loop is the same, and what does not
change is imported. What distribution or mixed precision adds is marked with one of two words:

    DDP:  - The ranks (processes 0, 1, ...) join one process group: they can now exchange data.
          - Each rank gets a GPU (shared if there are too few), or its part of the CPU's threads.
          - Rank 0 decides, writes and prints. The other ranks receive its decisions.
          - Each rank trains on, and validates, its own part of the images.
          - Gradients are averaged over ranks, once per optimizer step.
          - Losses and hits are summed over ranks. BatchNorm's statistics are rank 0's.
    AMP:  - autocast surrounds the network and its loss.
          - In float16, GradScaler surrounds the optimizer's step.
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
from data import DigitDataset, UserError, as_batch, epoch_seed
from train_single import SHOW_EVERY, Run, check_and_show, progress, tally

# DDP: torchrun tells each process who it is. Without torchrun there is one process.
LAUNCHED = dist.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if LAUNCHED else 0  # of all ranks: 0 decides, writes, prints
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if LAUNCHED else 0  # on this machine
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
LOCAL_WORLD_SIZE = int(os.environ["LOCAL_WORLD_SIZE"]) if LAUNCHED else 1
# DDP: a rank exits with os._exit. During Python's normal shutdown a gloo thread may still be
# freeing a tensor, which would abort the process.
leave = os._exit if LAUNCHED else sys.exit

TIMEOUT = timedelta(minutes=10)  # DDP: a rank waits this long for another one

# AMP: the type in which convolutions and matrix products are computed. float16 has 5 bits of
# exponent: small gradients vanish unless the loss is scaled up. bfloat16 has 8 bits of
# exponent, like float32, but only 7 bits of mantissa.
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# -- One epoch, and validation -----------------------------------------------------


def train_one_epoch(run: Run, ddp: DistributedDataParallel, dataset: DigitDataset) -> Tensor:
    """Train for one epoch on this rank's part of the images. Returns the sums over all ranks.

    All ranks take the same optimizer steps, because they have the same gradients.
    """
    config = run.config
    epoch = len(run.history) + 1
    dataset.set_epoch(config["seed"], epoch)
    # DDP: the sampler shuffles with its seed + the epoch. Its seed is epoch_seed(seed, 0), so
    # the sum is epoch_seed(seed, epoch), and the order is that of train_single.py. Rank r takes
    # positions r, r + WORLD_SIZE, ... If the number of images is not divisible by WORLD_SIZE,
    # the sampler repeats the first few, so that every rank takes the same number of steps.
    sampler = DistributedSampler(dataset, WORLD_SIZE, RANK, seed=epoch_seed(config["seed"], 0))
    sampler.set_epoch(epoch)  # DDP: without this line every epoch has the same order
    loader = DataLoader(dataset, config["batch_size"], sampler=sampler, collate_fn=as_batch)
    # With --accumulation-steps k, the gradients of k batches (a group) are added up before an
    # optimizer step. Without BatchNorm, it is the step of a batch k times as large, but it
    # needs no more memory. The last group of an epoch may be smaller.
    batches_per_group = config["accumulation_steps"]
    images_per_group = batches_per_group * config["batch_size"]  # on this rank
    images_of_rank = len(sampler)  # in the epoch
    device = dataset.labels.device
    dtype = PRECISIONS[config["precision"]]  # AMP: the type of products
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    bar = progress(loader, f"epoch {epoch}/{config['epochs']}", hidden=RANK > 0)  # DDP: one bar
    ddp.train()
    for batch_number, (images, labels) in enumerate(bar, start=1):
        last_of_epoch = batch_number == len(loader)
        last_of_group = batch_number % batches_per_group == 0 or last_of_epoch
        # DDP: under no_sync, backward only adds to this rank's own gradients. The backward of
        # the group's last batch averages their sum over ranks: one exchange per group.
        sync_or_not = nullcontext() if last_of_group else ddp.no_sync()
        with sync_or_not:
            # AMP: inside, products are computed in dtype
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                capsules = ddp(images)  # DDP: through ddp, which prepares the averaging
                # DDP has given each parameter a function (a hook) that runs when backward
                # has computed its gradient. So the decoder's gradients are averaged, too,
                # although the loss calls it through run.model.
                loss = run.model.loss(capsules, images, labels)
            # The loss is the mean over one batch. We want the mean over the whole group, so
            # each batch counts in proportion to its images. Without the weight, the
            # gradient of a group of k batches would be k times too large.
            groups_before = (batch_number - 1) // batches_per_group
            images_left = images_of_rank - groups_before * images_per_group
            images_in_group = min(images_per_group, images_left)
            weight = len(labels) / images_in_group
            run.scaler.scale(loss * weight).backward()  # AMP: keeps small gradients above 0
        if last_of_group:
            run.scaler.step(run.optimizer)  # AMP: unscales; skips the step on inf or nan
            # AMP: halves the scale after a skipped step, doubles it after 2000 good ones
            run.scaler.update()
            run.optimizer.zero_grad()
        sums += tally(loss, run.model.scores(capsules), labels)
        if batch_number % SHOW_EVERY == 0 or last_of_epoch:
            # DDP: all ranks read the same sums, so all stop if the loss is not finite.
            check_and_show(bar, summed(sums))
    return summed(sums)  # DDP: over all ranks


def validate(model: nn.Module, dataset: DigitDataset) -> Tensor:
    """Call train_single.validate in float32, with each image on exactly one rank.

    Returns the sums over all ranks.
    """
    # DDP: at the start of each optimizer step, DDP copies rank 0's BatchNorm statistics to
    # all ranks. After the last step they differ again. Rank 0's are the ones that are saved.
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
    # DDP: plain indices, because DistributedSampler would count repeated images twice.
    mine = range(RANK, len(dataset), WORLD_SIZE)
    return summed(train_single.validate(model, dataset, mine, hidden=RANK > 0))


def summed(sums: Tensor) -> Tensor:
    """DDP: a copy of the sums, added up over all ranks. Every rank gets the same bits."""
    total = sums.clone()
    dist.all_reduce(total)  # waits for the slowest rank
    return total


# -- Processes that act as one -----------------------------------------------------


def join() -> dist.Store:
    """DDP: join the process group of all ranks. Returns launch_store.

    If a rank dies, torchrun --max-restarts starts all ranks again. To find each other they
    need a store: a dictionary that all ranks share. launch_store lives in torchrun, so it
    outlives the ranks; after_restart reads there which run to resume. group_store is new at
    every start, because the old one holds addresses of dead ranks.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # The library that carries data between ranks: NCCL between GPUs, otherwise gloo. Ranks
    # that share a GPU need gloo, too, because NCCL refuses them.
    gpu_each = LOCAL_WORLD_SIZE <= gpus
    backend = "cpu:gloo,cuda:nccl" if gpu_each else "gloo"
    try:
        if LAUNCHED:
            launch_store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
            group_store = store_of_rank_0(launch_store, os.environ["MASTER_ADDR"])
        else:
            launch_store = dist.HashStore()  # one process: a dictionary of its own will do
            group_store = dist.HashStore()
        dist.init_process_group(
            backend, store=group_store, rank=RANK, world_size=WORLD_SIZE, timeout=TIMEOUT
        )
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"rank {RANK} cannot reach the other ranks: {reason}") from None
    return launch_store


def store_of_rank_0(launch_store: dist.Store, host: str) -> dist.Store:
    """DDP: rank 0 serves a new store and leaves its port in launch_store.

    After a restart the other ranks may find the port of a dead rank 0, where nobody answers.
    Then they ask again.
    """
    if RANK == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        launch_store.set("port", str(store.port))
        return store
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        port = int(launch_store.get("port"))  # waits until rank 0 has set it
        with suppress(OSError, dist.DistError):
            # A dead rank's port refuses this at once; TCPStore would try until TIMEOUT.
            socket.create_connection((host, port), timeout=1).close()
            return dist.TCPStore(host, port, timeout=TIMEOUT)
        time.sleep(0.1)
    raise UserError(f"rank {RANK} cannot reach rank 0, which does not answer")


def together(work):
    """DDP: call work() on every rank. Returns its result.

    If one rank finds a mistake, all ranks raise it.
    """
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
    """DDP: call work() on rank 0 only. Returns its result, on all ranks.

    If rank 0 finds a mistake, all ranks raise it.
    """

    def my_part():
        return work() if RANK == 0 else None

    results = [together(my_part)]  # [None] on the other ranks
    dist.broadcast_object_list(results)  # replaces [None] with rank 0's result
    return results[0]


def plan(given: dict, launch_store: dist.Store) -> tuple[dict, dict, Path]:
    """What rank 0 decides for all ranks: the flags, the settings and the run's folder."""
    given = after_restart(given, launch_store)
    script_settings = {"script": "ddp", "world_size": WORLD_SIZE}
    config, folder = train_single.read_command(given, script_settings)
    if config["device"] not in ("cpu", "cuda"):
        hint = "each rank takes its own; give cpu or cuda"
        raise UserError(f"--device {config['device']}: {hint}")
    on_cpu = config["device"] == "cpu"
    if "resume" not in given:
        config["precision"] = given.get("precision") or usual_precision(on_cpu)  # AMP: for all
        config["id"] = secrets.token_hex(8)
        # DDP: before the run is saved for the first time, so that no restart misses it
        launch_store.set("run", json.dumps([config["id"], str(folder)]))
    check_precision(config["precision"], on_cpu)  # AMP: can the device do it?
    if config["sync_bn"] and (on_cpu or config["compile"]):
        raise UserError("--sync-bn needs GPUs, and cannot be used with --compile")
    return given, config, folder


def after_restart(given: dict, launch_store: dist.Store) -> dict:
    """DDP: if torchrun restarted us and our run was saved, resume it: {"resume": folder}.

    Otherwise the flags stay as given. If a rank died before our first save, last.pt may be
    that of an older run, which --overwrite was meant to replace. So we compare ids.
    """
    if "resume" in given or not launch_store.check(["run"]):
        return given
    run_id, folder = json.loads(launch_store.get("run"))
    with suppress(FileNotFoundError, UserError):  # no checkpoint, or a damaged older one
        checkpoint = train_single.load_checkpoint(Path(folder) / "last.pt")
        if checkpoint["config"].get("id") == run_id:
            return {"resume": folder}
    return given


def usual_precision(on_cpu: bool) -> str:
    """AMP: float16 on GPUs, bfloat16 on CPUs that have instructions for it.

    Other CPUs compute in float32: they emulate bfloat16, which takes about ten times as
    long. On a CPU, the reason is printed.
    """
    if not on_cpu:
        return "fp16"
    if cpu_has_bfloat16():
        print("precision: bf16, because this CPU has instructions for it")
        return "bf16"
    print("precision: fp32, because this CPU has no instructions for bf16")
    return "fp32"


def check_precision(precision: str, on_cpu: bool) -> None:
    """AMP: UserError if the device cannot compute in this precision. A warning if it is slow."""
    if precision == "fp16" and on_cpu:
        hint = "on the CPU use bf16 or fp32 (a run that began in fp16 goes on only on a GPU)"
        raise UserError(f"--precision fp16 needs a GPU: {hint}")
    if precision == "bf16":
        if on_cpu:
            is_fast = cpu_has_bfloat16()
        else:
            is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
        if not is_fast:
            name = "CPU" if on_cpu else "GPU"
            print(f"WARNING: this {name} emulates bf16, which may take far longer than fp32")


def cpu_has_bfloat16() -> bool:
    """AMP: whether the CPU has instructions for bfloat16. Its flags say so."""
    if hasattr(torch.cpu, "get_capabilities"):
        flags = [name for name, there in torch.cpu.get_capabilities().items() if there]
    else:
        info = Path("/proc/cpuinfo")  # only on Linux
        flags = info.read_text().split() if info.exists() else []
    return any(name in flags for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))


def prepare_device(config: dict) -> torch.device:
    """DDP: this rank's GPU; or the CPU, after this rank has taken its part of the cores."""
    if config["device"] == "cuda":
        gpus = max(1, torch.cuda.device_count())  # without a GPU, find_device complains
        return train_single.find_device(f"cuda:{LOCAL_RANK % gpus}")
    if LAUNCHED and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        # torchrun sets OMP_NUM_THREADS to 1 if you did not set it, which leaves cores idle.
        # (We cannot tell if you set it to 1 yourself.)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // LOCAL_WORLD_SIZE))
    return torch.device("cpu")


def prepare(config: dict, folder: Path) -> tuple[Run, DigitDataset, DigitDataset]:
    """Make the run and the datasets, as train_single.main does."""
    device = prepare_device(config)  # DDP: this rank's
    train_set, validation_set = train_single.make_datasets(config, device)
    return Run(config, folder, device), train_set, validation_set


def load_everywhere(run: Run) -> None:
    """DDP: go back to last.pt on all ranks.

    UserError if they do not find the same number of epochs. On several machines, a copy of
    the folder may be old, because only rank 0 writes.
    """
    together(run.load)
    epochs = [None] * WORLD_SIZE
    dist.all_gather_object(epochs, len(run.history))
    if len(set(epochs)) > 1:  # all ranks see the same list, so all raise the same error
        text = f"{run.folder} has {epochs} epochs on ranks 0, 1, ..."
        raise UserError(f"{text}: copy it from rank 0's machine")


def begin(run: Run, train_set: DigitDataset) -> None:
    """DDP: rank 0's part before training starts or goes on, as in train_single.main."""
    train_single.record_hardware(run, train_set)
    run.save()
    train_single.print_intro(run)


def save_and_print(run: Run) -> None:
    """DDP: rank 0's part after each epoch, as in train_single.main."""
    run.save()
    print(run.epoch_line(), flush=True)


def wrap(run: Run) -> DistributedDataParallel:
    """DDP: the model, wrapped so that backward averages gradients over ranks."""
    if run.config["sync_bn"]:  # BatchNorm over the batches of all ranks
        run.model = nn.SyncBatchNorm.convert_sync_batchnorm(run.model)
    # Ignore a harmless warning: in a dimension of size 1, the stride of cuDNN's gradient may
    # differ from the stride of the weight.
    warnings.filterwarnings("ignore", "Grad strides do not match")
    # Gradients are sent in a few large buffers, the buckets. gradient_as_bucket_view: they
    # stay there, which saves a copy.
    return DistributedDataParallel(run.model, gradient_as_bucket_view=True)


# -- Main --------------------------------------------------------------------------


def main() -> None:
    parser = train_single.build_parser(__doc__)
    positive = train_single.number_between(int, 1, 1_000_000)
    flag = parser.add_flag
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="without it, fp16 on GPUs; bf16 or fp32 on the CPU"
    )
    flag("--accumulation-steps", "batches per optimizer step", type=positive, metavar="N")
    flag("--sync-bn", "BatchNorm over the batches of all ranks; GPUs only", action="store_true")
    typed = vars(parser.parse_args())  # a mistake ends all ranks, before one waits for another
    # DDP: these variables come from another launcher than torchrun. Each process would believe
    # that it is alone, and all would train the same run.
    if not LAUNCHED and "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("RANK and WORLD_SIZE are set, but not by torchrun: start with torchrun")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a rank even if it waits in C++
    # DDP: meet, decide, prepare
    launch_store = join()
    given, config, folder = on_rank_0(lambda: plan(typed, launch_store))
    run, train_set, validation_set = together(lambda: prepare(config, folder))
    # DDP: rank 0 locks the folder. Then no other run writes last.pt while all ranks read it.
    on_rank_0(lambda: train_single.open_folder(run, given))
    if "resume" in given:
        load_everywhere(run)
    on_rank_0(lambda: begin(run, train_set))
    # DDP: rank 0 also says how to continue. Python calls stop only when rank 0 is not inside
    # C++. If rank 0 is waiting there for the other ranks, they end on the same Ctrl-C. Their
    # end ends the wait, and then Python calls stop.
    if RANK == 0:
        signal.signal(signal.SIGINT, lambda *_: stop(run))
    ddp = wrap(run)
    while len(run.history) < run.config["epochs"]:
        start = time.perf_counter()
        trained = train_one_epoch(run, ddp, train_set)
        seconds = time.perf_counter() - start
        validated = validate(run.model, validation_set)
        run.finish_epoch(trained, validated, seconds)
        on_rank_0(lambda: save_and_print(run))  # DDP: one rank writes and prints
    on_rank_0(lambda: train_single.print_outro(run))
    dist.destroy_process_group()  # not after a failure: NCCL would wait for the other ranks


def stop(run: Run) -> None:
    """Ctrl-C on rank 0: leave at once. The other ranks stop on the same signal, so rank 0
    must not wait for them."""
    command = "python train_ddp.py"
    if LAUNCHED:
        # On several machines we do not know all flags of torchrun. "..." stands for them.
        ranks = f"--nproc_per_node={WORLD_SIZE}" if WORLD_SIZE == LOCAL_WORLD_SIZE else "..."
        command = f"torchrun {ranks} train_ddp.py"
    train_single.print_stopped(run, command)
    leave(130)


if __name__ == "__main__":
    train_single.run_main(main, last_to_speak=LOCAL_RANK > 0, leave=leave)
