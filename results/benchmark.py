"""How fast this machine trains both networks, in four parts:

    python -m results.benchmark                  all that this machine can do, ten minutes and more
    python -m results.benchmark --only scaling   one part; the file's other parts stay
    python -m results.benchmark --quick          tiny, in a minute: shows that it works, and writes
                                                 nothing unless --out says where

    capsules   the digit capsules alone, beside the two formulations most often seen in public code
    steps      a training step of both networks: float32, half precision, compiled
    data       a batch from data.py, beside one made image by image with PIL
    scaling    DDP on two CPU cores, each of them a device of its own, beside one process on one

Writes results/speed-cpu.json or speed-cuda.json; results.tables shows them. The machine must have
nothing else to do. Contestants take turns, round after round, so that a machine which slows down
slows all of them alike; figures are medians over the rounds. The pictures are noise: nothing here
is faster or slower for a digit.
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
from data import DigitBatches, UserError
from train_ddp import PRECISIONS
from train_single import MODELS, Run

N, I, J, D = 1152, 8, 10, 16  # the capsule layer of the dynamic routing paper


def race(contestants: dict, rounds: int, device: torch.device) -> dict:
    """Median milliseconds of each contestant, a function without arguments; they take turns.

    A turn is three runs, of which the first is not counted: it finds the others' data in the cache.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    taken = {name: [] for name in contestants}
    for turn in range(-1, rounds):  # the first turn warms up: compilation, first allocations
        for name, run in contestants.items():
            for attempt in range(3):
                wait()  # a GPU works behind the CPU's back: let it finish, then look at the clock
                start = time.perf_counter()
                run()
                wait()
                if turn >= 0 and attempt > 0:
                    taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(times) for name, times in taken.items()}


# -- Capsules: the layer alone, forward and backward -----------------------------------------------


def route(votes: Tensor, iterations: int = 3) -> Tensor:
    """Routing as most public code has it: votes [B, N, J, D], each sum an einsum -> [B, J, D]."""
    b = votes.new_zeros(votes.shape[:3])
    for _ in range(iterations - 1):
        v = squash(torch.einsum("bnj,bnjd->bjd", b.softmax(dim=2), votes))
        b = b + torch.einsum("bnjd,bjd->bnj", votes, v)
    return squash(torch.einsum("bnj,bnjd->bjd", b.softmax(dim=2), votes))


def tiled(u: Tensor, weight: Tensor) -> Tensor:
    """The most frequent way: W [N, J, D, I] is copied once for each image."""
    tiles = weight.unsqueeze(0).repeat(len(u), 1, 1, 1, 1)  # [B, N, J, D, I]
    return route(torch.matmul(tiles, u[:, :, None, :, None]).squeeze(4))


def einsum(u: Tensor, weight: Tensor) -> Tensor:
    """The shortest way: W [N, J, I, D] is used where it lies."""
    return route(torch.einsum("bni,njid->bnjd", u, weight))


def formulations(batch_size: int, device, compiled: bool, n: int = N) -> dict:
    """{name: function that returns the capsules and the gradients of u and W}, all from equal u, W.

    The gradient of W is returned as our layer keeps it, [N, I, J*D].
    """
    layer = DigitCapsules(n, I, J, D).to(device)
    u = (0.2 * torch.randn(batch_size, n, I, device=device)).requires_grad_()  # |u| about 0.6
    slope = torch.randn(batch_size, J, D, device=device)
    w = layer.weight.detach().view(n, I, J, D)
    tiled_w = w.permute(0, 2, 3, 1).contiguous().requires_grad_()  # [N, J, D, I]
    einsum_w = w.permute(0, 2, 1, 3).contiguous().requires_grad_()  # [N, J, I, D]

    def both_ways(forward, weight, back=None):
        v = forward()
        du, dw = torch.autograd.grad(v, (u, weight), slope)
        return v, du, dw.permute(back).flatten(2) if back else dw

    found = {
        "tiled weights": partial(both_ways, lambda: tiled(u, tiled_w), tiled_w, (0, 3, 1, 2)),
        "einsum": partial(both_ways, lambda: einsum(u, einsum_w), einsum_w, (0, 2, 1, 3)),
        "ours": partial(both_ways, lambda: layer(u), layer.weight),
    }
    if compiled:
        fast = torch.compile(layer, dynamic=False)
        found["ours, compiled"] = partial(both_ways, lambda: fast(u), layer.weight)
    return found


def check_same(found: dict) -> None:
    """All formulations give the same capsules and the same gradients, or this raises.

    In full float32: TF32's 10 bits of mantissa would let them differ by more than is allowed here.
    """
    torch.set_float32_matmul_precision("highest")
    for run in found.values():
        for ours, theirs in zip(found["ours"](), run(), strict=True):
            scale = ours.abs().max().item()
            torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4 * scale)


def capsule_rows(device: torch.device, quick: bool) -> list[dict]:
    """A row for each formulation, with freed memory as a process starts and as training keeps it.

    Keeping it (train_single.keep_freed_memory) cannot be taken back, so this part comes first.
    """
    rows = []
    for freed in ("given back", "kept") if device.type == "cpu" else ("kept",):
        if freed == "kept":
            train_single.keep_freed_memory()
        found = formulations(2 if quick else 32, device, compiled=not quick)
        check_same(found)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, as in training
        times = race(found, 1 if quick else 12, device)
        rows += [{"capsule layer": k, "freed memory": freed, "ms": v} for k, v in times.items()]
    return rows


# -- Steps: training both networks -----------------------------------------------------------------


def new_run(model: str, precision: str, compiled: bool, device: torch.device) -> Run:
    """A run at its start, as the training scripts make it."""
    settings = {"model": model, "precision": precision, "compile": compiled}
    return Run(train_single.DEFAULTS | settings, Path("unused"), device)


def step_of(run: Run, forward: nn.Module, batch_size: int):
    """-> step(), which does what a step of train_ddp.py does; forward is run.model, or its DDP."""
    device = next(run.model.parameters()).device
    dtype = PRECISIONS[run.config["precision"]]
    images = torch.randn(batch_size, 1, run.model.side, run.model.side, device=device)
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
    half, rows = "fp16" if device.type == "cuda" else "bf16", []
    kinds = list(itertools.product(("fp32", half), (False,) if quick else (False, True)))
    for model, size in itertools.product(MODELS, (2,) if quick else (32, 128)):
        runs = {kind: new_run(model, *kind, device) for kind in kinds}
        steps = {kind: step_of(run, run.model, size) for kind, run in runs.items()}
        for (precision, compiled), ms in race(steps, 1 if quick else 9, device).items():
            row = {"network": model, "batch": size, "precision": precision, "compiled": compiled}
            rows.append(row | {"ms": ms, "images/s": 1e3 * size / ms})
    return rows


# -- Data: from stored digits to network input -----------------------------------------------------


def with_pil(images: Tensor, model) -> Tensor:
    """The usual way: each image is rotated, resized and standardised by itself, with PIL."""
    turn = transforms.RandomRotation(10, transforms.InterpolationMode.BILINEAR)
    steps = transforms.ToPILImage(), turn, transforms.Resize(model.side), transforms.ToTensor()
    steps = transforms.Compose([*steps, transforms.Normalize(model.mean, model.std)])
    return torch.stack([steps(image) for image in images])


def data_rows(device: torch.device, quick: bool) -> list[dict]:
    """A row for each network: a batch of 32, rotated as in training, by PIL and by data.py."""
    images, rows = torch.randint(0, 256, (32, 28, 28), dtype=torch.uint8), []
    for name, model in MODELS.items():
        ours = DigitBatches(images, torch.zeros(32).long(), model, device, rotate=10)
        ours.set_epoch(seed=0, epoch=1)
        pil, ours = partial(with_pil, images, model), partial(ours.__getitems__, list(range(32)))
        times = race({"PIL, ms": pil, "ours, ms": ours}, 1 if quick else 15, device)
        rows.append({"network": name} | times)
    return rows


# -- Scaling: two CPU cores as two devices ---------------------------------------------------------


def measure_scaling(rank: int, cores: list[int], quick: bool, scratch: str) -> None:
    """One of two processes, each with one thread on a core of its own; rank 0 writes the rows.

    Three contestants take turns, with 32 images in each step and process: "one" process, while the
    other sleeps; two "apart", each of which trains a network of its own, so that they share nothing
    but the machine's memory; and two that train one network by "ddp". What apart loses is the
    machine's doing, what ddp loses beyond that is the price of communication.
    """
    os.sched_setaffinity(0, {cores[rank]})
    torch.set_num_threads(1)
    train_single.keep_freed_memory()
    store = dist.FileStore(f"{scratch}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    steps, rounds, size = (1, 2, 2) if quick else (10, 9, 32)
    racers, rates = {}, {}
    for kind in itertools.product(MODELS, ("fp32", "bf16")):
        alone, shared = (new_run(*kind, False, torch.device("cpu")) for _ in range(2))
        ddp = DistributedDataParallel(shared.model, gradient_as_bucket_view=True)
        alone, shared = step_of(alone, alone.model, size), step_of(shared, ddp, size)
        racers[kind] = {"one": (alone, 1), "apart": (alone, 2), "ddp": (shared, 2)}
        rates[kind] = {name: [] for name in racers[kind]}
    for turn in range(-1, rounds):  # the first warms up
        for kind, contestants in racers.items():
            for name, (step, processes) in contestants.items():
                dist.barrier()
                start = time.perf_counter()
                for _ in range(steps if rank < processes else 0):
                    step()
                dist.barrier()  # the slower of two counts
                if turn >= 0:
                    images = processes * steps * size
                    rates[kind][name].append(images / (time.perf_counter() - start))
    if rank == 0:
        rows = [{"network": m, "precision": p, **found} for (m, p), found in rates.items()]
        Path(scratch, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def scaling_rows(device: torch.device, quick: bool) -> list[dict]:
    """A row for each network and precision: each contestant's images/s, round by round."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if device.type != "cpu" or len(cores) < 2:
        print("scaling needs --device cpu, Linux and two cores: not measured")
        return []
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(measure_scaling, (cores, quick, scratch), nprocs=2)
        return json.loads(Path(scratch, "rows.json").read_text())


# -- Main ------------------------------------------------------------------------------------------

PARTS = {"capsules": capsule_rows, "steps": step_rows, "data": data_rows, "scaling": scaling_rows}


def hardware(device: torch.device) -> str:
    """What the figures hold for: the processor's name and its cores, or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")  # Linux alone has it
    names = re.findall(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    return f"{[*names, platform.machine()][0]}, {os.cpu_count()} cores"


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=style
    )
    parser.add_argument("--only", choices=PARTS, help="measure one part")
    parser.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--quick", action="store_true", help="tiny and uncompiled, to try it out")
    parser.add_argument("--out", type=Path, help="where to write (default: results/)")
    flags = parser.parse_args()
    try:
        device = train_single.find_device(flags.device)
    except UserError as error:
        parser.error(str(error))
    path = (flags.out or Path(__file__).parent) / f"speed-{device.type}.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    torch.manual_seed(0)
    for part in [flags.only] if flags.only else PARTS:
        print(f"measuring: {part} ...", flush=True)
        rows = PARTS[part](device, flags.quick)
        result[part] = {"hardware": hardware(device), "torch": torch.__version__, "rows": rows}
        if flags.out or not flags.quick:  # toy figures must not replace measured ones
            path.parent.mkdir(parents=True, exist_ok=True)
            train_single.write_file(path, (json.dumps(result, indent=1) + "\n").encode())
    from results.tables import speed_text  # here: scaling's two processes need no plots

    print(speed_text(result))


if __name__ == "__main__":
    main()
