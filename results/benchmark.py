"""Measure how fast this machine trains both networks.

    python -m results.benchmark                  all parts: ten minutes or more
    python -m results.benchmark --only scaling   one part; the file keeps its other parts
    python -m results.benchmark --quick          a one-minute trial with tiny sizes;
                                                 nothing is written without --out

There are four parts:

    capsules   the digit capsules alone, compared with the two formulations most often
               seen in public code
    steps      a training step of both networks: float32, half precision, compiled
    data       a batch from data.py, compared with one made image by image by PIL
    scaling    DDP on two CPU cores, each used as a device, compared with one process on
               one core

It writes runs/speed/speed-cpu.json or speed-cuda.json. With `--out results` it replaces the
kept figures, which results.tables shows. The machine must have nothing else to do.
Contestants take turns, round after round, so a machine that slows down slows all of them
alike. Figures are medians over the rounds; scaling keeps every round. The images are
noise, because no speed here depends on what they show.
"""

import argparse
import itertools
import json
import os
import platform
import re
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import transforms

import train_single
from capsules import DigitCapsules, squash
from data import DigitDataset, UserError
from train_ddp import PRECISIONS
from train_single import MODELS, Run

# The capsule layer of the dynamic routing paper
N = 1152  # primary capsules
I = 8  # numbers in each
J = 10  # digit capsules
D = 16  # numbers in each


def race(contestants: dict, rounds: int, device: torch.device) -> dict:
    """Median milliseconds of each contestant, which is a function without arguments.

    They take turns. A turn is three runs, of which the first is not counted: it finds
    the other contestants' data in the cache.
    """
    taken = {name: [] for name in contestants}
    for number in range(-1, rounds):  # round -1 warms up: compilation, first allocations
        for name, work in contestants.items():
            for attempt in range(3):
                ms = milliseconds(work, device)
                if number >= 0 and attempt > 0:
                    taken[name].append(ms)
    return {name: median(times) for name, times in taken.items()}


def milliseconds(work, device: torch.device) -> float:
    """How long work() takes."""
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    return 1e3 * (time.perf_counter() - start)


def wait_for(device: torch.device) -> None:
    """A GPU works asynchronously: let it finish before we look at the clock."""
    if device.type == "cuda":
        torch.cuda.synchronize()


# -- Capsules: the layer alone, forward and backward ---------------------------------


def route(votes: Tensor, iterations: int = 3) -> Tensor:
    """Routing as in most public code: each sum is an einsum.

    Votes [B, N, J, D] -> digit capsules [B, J, D].
    """
    b = votes.new_zeros(votes.shape[:3])
    for _ in range(iterations - 1):
        v = squash(torch.einsum("bnj,bnjd->bjd", b.softmax(dim=2), votes))
        b = b + torch.einsum("bnjd,bjd->bnj", votes, v)
    return squash(torch.einsum("bnj,bnjd->bjd", b.softmax(dim=2), votes))


def tiled(u: Tensor, weight: Tensor) -> Tensor:
    """The most common formulation: W [N, J, D, I] is copied once for each image."""
    tiles = weight.unsqueeze(0).repeat(len(u), 1, 1, 1, 1)  # [B, N, J, D, I]
    votes = torch.matmul(tiles, u[:, :, None, :, None])  # [B, N, J, D, 1]
    return route(votes.squeeze(4))


def einsum(u: Tensor, weight: Tensor) -> Tensor:
    """The shortest formulation: W [N, J, I, D] is not copied."""
    return route(torch.einsum("bni,njid->bnjd", u, weight))


def formulations(batch_size: int, device, compiled: bool, n: int = N) -> dict:
    """{name: a function -> digit capsules, gradient of u, gradient of W}.

    All of them start from the same u and W. The gradient of W is returned in the layout
    of our layer, [N, I, J*D].
    """
    layer = DigitCapsules(n, I, J, D).to(device)
    u = 0.2 * torch.randn(batch_size, n, I, device=device)  # |u| is about 0.6
    u.requires_grad_()
    dv = torch.randn(batch_size, J, D, device=device)  # a gradient for the capsules v
    w = layer.weight.detach().view(n, I, J, D)
    tiled_w = w.permute(0, 2, 3, 1).contiguous().requires_grad_()  # [N, J, D, I]
    einsum_w = w.permute(0, 2, 1, 3).contiguous().requires_grad_()  # [N, J, I, D]

    def run_tiled():
        v = tiled(u, tiled_w)
        du, dw = torch.autograd.grad(v, (u, tiled_w), dv)
        return v, du, dw.permute(0, 3, 1, 2).flatten(2)  # [N, J, D, I] -> [N, I, J*D]

    def run_einsum():
        v = einsum(u, einsum_w)
        du, dw = torch.autograd.grad(v, (u, einsum_w), dv)
        return v, du, dw.permute(0, 2, 1, 3).flatten(2)  # [N, J, I, D] -> [N, I, J*D]

    def run_layer(forward):
        v = forward(u)
        du, dw = torch.autograd.grad(v, (u, layer.weight), dv)
        return v, du, dw

    contestants = {
        "tiled weights": run_tiled,
        "einsum": run_einsum,
        "ours": partial(run_layer, layer),
    }
    if compiled:
        fast = torch.compile(layer, dynamic=False)
        contestants["ours, compiled"] = partial(run_layer, fast)
    return contestants


def check_same(contestants: dict) -> None:
    """Raise an error unless all formulations give the same capsules and gradients.

    They run in full float32: with TF32's 10 bits of mantissa they would differ by more
    than is allowed here.
    """
    torch.set_float32_matmul_precision("highest")
    expected = contestants["ours"]()
    for work in contestants.values():
        for ours, theirs in zip(expected, work(), strict=True):
            scale = ours.abs().max().item()
            torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4 * scale)


def capsule_rows(device: torch.device, quick: bool) -> list[dict]:
    """A row for each formulation. On the CPU each is measured twice.

    First freed memory is given back to the operating system, as in any new process. Then
    it is kept, as in training (train_single.keep_freed_memory). That cannot be undone, so
    this part of the benchmark comes first.
    """
    batch_size = 2 if quick else 32
    rounds = 1 if quick else 12
    # PyTorch never gives a GPU's memory back during training.
    ways = ("given back", "kept") if device.type == "cpu" else ("kept",)
    rows = []
    for freed in ways:
        if freed == "kept":
            train_single.keep_freed_memory()
        contestants = formulations(batch_size, device, compiled=not quick)
        check_same(contestants)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, as in training
        for name, ms in race(contestants, rounds, device).items():
            rows.append({"capsule layer": name, "freed memory": freed, "ms": ms})
    return rows


# -- Steps: training both networks ---------------------------------------------------


def new_run(network: str, precision: str, compiled: bool, device: torch.device) -> Run:
    """A run at its start, as the training scripts make it. Nothing is written."""
    settings = {"model": network, "precision": precision, "compile": compiled}
    return Run(train_single.DEFAULTS | settings, Path("unused"), device)


def step_of(run: Run, forward: nn.Module, batch_size: int):
    """Returns step(), a training step of train_ddp.py on a batch of noise.

    `forward` is run.model, or its DistributedDataParallel.
    """
    side = run.model.side
    device = next(run.model.parameters()).device
    dtype = PRECISIONS[run.config["precision"]]
    images = torch.randn(batch_size, 1, side, side, device=device)
    labels = torch.randint(0, J, (batch_size,), device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = run.model.loss(forward(images), images, labels)
        run.scaler.scale(loss).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()

    return step


def step_rows(device: torch.device, quick: bool) -> list[dict]:
    """A row for each network, batch size and precision, eager and compiled."""
    half = "fp16" if device.type == "cuda" else "bf16"
    sizes = (2,) if quick else (32, 128)
    compilations = (False,) if quick else (False, True)
    rounds = 1 if quick else 9
    kinds = list(itertools.product(("fp32", half), compilations))
    rows = []
    for network, size in itertools.product(MODELS, sizes):
        steps = {}
        for precision, compiled in kinds:
            run = new_run(network, precision, compiled, device)
            steps[precision, compiled] = step_of(run, run.model, size)
        times = race(steps, rounds, device)
        for (precision, compiled), ms in times.items():
            row = {
                "network": network,
                "batch": size,
                "precision": precision,
                "compiled": compiled,
                "ms": ms,
                "images/s": 1e3 * size / ms,
            }
            rows.append(row)
    return rows


# -- Data: from stored digits to network input ---------------------------------------


def with_pil(images: Tensor, model, device: torch.device) -> Tensor:
    """The usual way: each image is rotated, resized and standardised on its own."""
    pipeline = transforms.Compose(
        [
            transforms.ToPILImage(),
            transforms.RandomRotation(10, transforms.InterpolationMode.BILINEAR),
            transforms.Resize(model.side),
            transforms.ToTensor(),
            transforms.Normalize(model.mean, model.std),
        ]
    )
    return torch.stack([pipeline(image) for image in images]).to(device)


def data_rows(device: torch.device, quick: bool) -> list[dict]:
    """A row for each network: a batch of 32, rotated as in training, made both ways."""
    images = torch.randint(0, 256, (32, 28, 28), dtype=torch.uint8)
    labels = torch.zeros(32, dtype=torch.long)
    rounds = 1 if quick else 15
    rows = []
    for network, model in MODELS.items():
        dataset = DigitDataset(images, labels, model, device, rotate=10)
        dataset.set_epoch(seed=0, epoch=1)
        contestants = {
            "PIL, ms": partial(with_pil, images, model, device),
            "ours, ms": partial(dataset.__getitems__, list(range(32))),
        }
        rows.append({"network": network} | race(contestants, rounds, device))
    return rows


# -- Scaling: two CPU cores as two devices -------------------------------------------


def contestants_of_scaling(network: str, precision: str, batch_size: int) -> dict:
    """{name: (step, number of processes)}.

    one     one process trains, while the other one sleeps
    apart   two processes train a network each. They share nothing but the machine's
            memory, so any loss of speed is due to the machine.
    ddp     two processes train one network. Any further loss is the cost of
            communication.
    """
    cpu = torch.device("cpu")
    run = new_run(network, precision, False, cpu)
    shared_run = new_run(network, precision, False, cpu)
    ddp = DistributedDataParallel(shared_run.model, gradient_as_bucket_view=True)
    alone = step_of(run, run.model, batch_size)
    shared = step_of(shared_run, ddp, batch_size)
    return {"one": (alone, 1), "apart": (alone, 2), "ddp": (shared, 2)}


def seconds_of(step, steps: int) -> float:
    """How long the slower of two processes takes for its steps."""
    dist.barrier()  # both start together
    start = time.perf_counter()
    for _ in range(steps):
        step()
    dist.barrier()
    return time.perf_counter() - start


def measure_scaling(rank: int, cores: list[int], quick: bool, scratch: str) -> None:
    """One of two processes, each with one thread on its own core.

    The contestants take turns; each step has 32 images per process. Rank 0 writes the
    rows, which list images/s, round by round. (If the first two logical cores are two
    threads of one core, "apart" is slow: its processes compete for that core.)
    """
    os.sched_setaffinity(0, {cores[rank]})
    torch.set_num_threads(1)
    train_single.keep_freed_memory()
    store = dist.FileStore(f"{scratch}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    steps = 1 if quick else 10  # in a turn
    rounds = 2 if quick else 9
    batch_size = 2 if quick else 32
    races = []  # (row, its contestants)
    for network, precision in itertools.product(MODELS, ("fp32", "bf16")):
        contestants = contestants_of_scaling(network, precision, batch_size)
        row = {"network": network, "precision": precision}
        for name in contestants:
            row[name] = []
        races.append((row, contestants))
    for number in range(-1, rounds):  # round -1 warms up
        for row, contestants in races:
            for name, (step, processes) in contestants.items():
                takes_part = rank < processes
                seconds = seconds_of(step, steps if takes_part else 0)
                if number >= 0:
                    images = processes * steps * batch_size
                    row[name].append(images / seconds)
    if rank == 0:
        rows = [row for row, _ in races]
        Path(scratch, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def scaling_rows(device: torch.device, quick: bool) -> list[dict]:
    """A row for each network and precision; [] if this machine cannot measure it."""
    on_linux = hasattr(os, "sched_getaffinity")
    cores = sorted(os.sched_getaffinity(0)) if on_linux else []
    if device.type != "cpu" or len(cores) < 2:
        print("scaling needs --device cpu, Linux and two cores: not measured")
        return []
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(measure_scaling, (cores, quick, scratch), nprocs=2)
        return json.loads(Path(scratch, "rows.json").read_text())


# -- Main ----------------------------------------------------------------------------

PARTS = {
    "capsules": capsule_rows,
    "steps": step_rows,
    "data": data_rows,
    "scaling": scaling_rows,
}


def hardware(device: torch.device) -> str:
    """The hardware that is measured: the processor's name and its cores, or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")  # only Linux has it
    text = info.read_text() if info.exists() else ""
    names = re.findall(r"model name\s*: (.+)", text)
    name = names[0] if names else platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # so that a mistake is one line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flag = parser.add_argument
    flag("--only", choices=PARTS, help="measure one part")
    flag("--device", help="cpu or cuda (default: the GPU if there is one)")
    flag("--quick", action="store_true", help="tiny sizes, uncompiled, to try it out")
    flag("--out", type=Path, help="where to write (default: runs/speed)")
    flags = parser.parse_args()
    try:
        device = train_single.find_device(flags.device)
        if not flags.quick and flags.only not in ("data", "scaling"):
            train_single.check_compiler(device)
    except UserError as error:
        parser.error(str(error))
    folder = flags.out or Path("runs/speed")
    file = folder / f"speed-{device.type}.json"
    is_written = flags.out or not flags.quick  # toy figures must not replace measured ones
    result = json.loads(file.read_text()) if is_written and file.exists() else {}
    parts = [flags.only] if flags.only else PARTS
    torch.manual_seed(0)
    for part in parts:
        print(f"measuring: {part} ...", flush=True)
        if part != "capsules":
            train_single.keep_freed_memory()  # as in training
        rows = PARTS[part](device, flags.quick)
        if not rows:
            continue  # this machine cannot measure it
        result[part] = {
            "hardware": hardware(device),
            "torch": torch.__version__,
            "rows": rows,
        }
        if is_written:
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(result, indent=1) + "\n"
            train_single.write_file(file, text.encode())
    # Not at the top: it imports matplotlib, and scaling's processes import this file, too.
    from results.tables import speed_text

    print(speed_text(result))


if __name__ == "__main__":
    main()  # not run_main: it would keep freed memory from the start
