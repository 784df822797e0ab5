"""How fast this machine trains both models, and how far that is from what it could do.

    python -m results.benchmark              on the GPU if there is one, else the CPU; ~8 minutes
    python -m results.benchmark --quick      one round of tiny batches: shows that it works, and
                                             writes nothing unless --out says where

Prints three tables and writes results/speed-cpu.json or results/speed-cuda.json:

    1. the capsule layer alone, beside the two formulations most often seen in public code
    2. a training step of both models: float32, mixed precision, compiled, both
    3. the data path, beside one image at a time with PIL

Contestants take turns, round after round, so that a machine which slows down or has other work
slows all of them alike; figures are medians over the rounds. The pictures are noise: nothing here
is faster or slower for a digit.
"""

import argparse
import json
import os
import platform
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torchvision
from torch import Tensor
from torch.nn.functional import conv2d
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import InterpolationMode, v2

import train_single
from capsules import DigitCapsules, capsule_lengths, margin_loss, squash
from data import DigitBatches, as_batch
from train_single import MODELS

N, I, J, D = 1152, 8, 10, 16  # the capsule layer of the dynamic routing paper


def race(contestants: dict, rounds: int, device: torch.device) -> dict:
    """Median seconds of each contestant, a function without arguments; they take turns.

    A turn is three runs, of which the first is not counted: it finds the others' data in the cache.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    seconds = {name: [] for name in contestants}
    for turn in range(-1, rounds):  # the first turn warms up: compilation, first allocations
        for name, run in contestants.items():
            for attempt in range(3):
                wait()  # a GPU works behind the CPU's back: let it finish, then look at the clock
                start = time.perf_counter()
                run()
                wait()
                if turn >= 0 and attempt > 0:
                    seconds[name].append(time.perf_counter() - start)
    return {name: median(taken) for name, taken in seconds.items()}


# ------------------------------------------------------------------------------------------------
# 1. The capsule layer alone, forward and backward
# ------------------------------------------------------------------------------------------------


def tiled(u: Tensor, weight: Tensor, iterations: int = 3) -> Tensor:
    """The most frequent way: W [N, J, D, I] is copied once for each image; products, then sums."""
    tiles = weight.unsqueeze(0).repeat(len(u), 1, 1, 1, 1)  # [B, N, J, D, I]
    votes = torch.matmul(tiles, u[:, :, None, :, None]).squeeze(4)  # [B, N, J, D]
    b = votes.new_zeros(votes.shape[:3])
    for iteration in range(iterations):
        c = b.softmax(dim=2).unsqueeze(3)  # [B, N, J, 1]
        v = squash((c * votes).sum(dim=1))  # [B, J, D]
        if iteration < iterations - 1:
            b = b + (votes * v.unsqueeze(1)).sum(dim=3)
    return v


def einsum(u: Tensor, weight: Tensor, iterations: int = 3) -> Tensor:
    """W [N, J, I, D]; each sum an einsum over [B, N, J, D], called [b, i, o, h] elsewhere."""
    votes = torch.einsum("bni,njid->bnjd", u, weight)
    b = votes.new_zeros(votes.shape[:3])
    for iteration in range(iterations):
        v = squash(torch.einsum("bnj,bnjd->bjd", b.softmax(dim=2), votes))
        if iteration < iterations - 1:
            b = b + torch.einsum("bnjd,bjd->bnj", votes, v)
    return v


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
    """All formulations give the same capsules and the same gradients, or this raises."""
    for run in found.values():
        for ours, theirs in zip(found["ours"](), run(), strict=True):
            scale = ours.abs().max().item()
            torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4 * scale)


def capsule_rows(device: torch.device, freed_memory: str, quick: bool) -> list[dict]:
    """One row per batch size and formulation; see train_single.keep_freed_memory."""
    rows = []
    for batch_size in (2,) if quick else (32, 128):
        found = formulations(batch_size, device, compiled=not quick)
        check_same(found)
        seconds = race(found, 1 if quick else 12, device)
        rows += [{
            "batch_size": batch_size, "formulation": name, "freed_memory": freed_memory,
            "milliseconds": 1e3 * taken,
            "times_faster_than_tiled": seconds["tiled weights"] / taken,
            "times_faster_than_einsum": seconds["einsum"] / taken,
        } for name, taken in seconds.items()]
    return rows


# ------------------------------------------------------------------------------------------------
# 2. A training step of both models
# ------------------------------------------------------------------------------------------------


def rulers(device: torch.device, dtypes: dict, quick: bool) -> dict:
    """What the machine can do: {name: (function, its operations or bytes)}.

    A large matrix product is the usual ruler. On some CPUs the library behind it (MKL) is slower
    than the one behind convolutions (oneDNN), so a large 1x1 convolution is timed as well.
    """
    side, images = (256, 1) if quick else (8192, 512) if device.type == "cuda" else (2048, 64)
    found = {}
    for precision, dtype in dtypes.items():
        a = torch.randn(side, side, device=device, dtype=dtype)
        x = torch.randn(images, 512, 32, 32, device=device, dtype=dtype)
        w = torch.randn(512, 512, 1, 1, device=device, dtype=dtype)
        x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
        found["matmul", precision] = partial(torch.mm, a, a), 2 * side**3
        found["convolution", precision] = partial(conv2d, x, w), 2 * images * 32**2 * 512**2
    source = torch.randn(1 << (20 if quick else 26), device=device)  # 256 MiB: no cache holds it
    target = torch.empty_like(source)
    found["copy", ""] = partial(target.copy_, source), 2 * source.nbytes  # read and written
    return found


def training_step(model_name: str, batch_size: int, precision: str, compiled: bool, device):
    """(step, model): step() does what one step of train_single.py or train_ddp.py does."""
    config = {"model": model_name, "routing_iterations": 3, "seed": 0, "lr": 1e-3}
    training = train_single.make_training(config | {"compile": compiled}, device)
    model, optimizer = training.model, training.optimizer
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    images = torch.randn(batch_size, 1, model.side, model.side, device=device)
    labels = torch.randint(0, J, (batch_size,), device=device)

    def step():
        with torch.autocast(device.type, dtype, enabled=precision != "fp32"):
            lengths = capsule_lengths(model(images))
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(margin_loss(lengths, labels)).backward()
        scaler.step(optimizer)
        scaler.update()

    return step, model


def count_bytes(step, model) -> int:
    """The bytes a step must move at least, an estimate from below.

    What autograd saves for the way back is written once and read once. A parameter is read going
    forward and going back, its gradient written and read, and Adam reads and writes it and its two
    moments: ten times its size. What is not saved is taken to stay in the cache.
    """
    parameters = {p.untyped_storage().data_ptr(): p.nbytes for p in model.parameters()}
    saved = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    activations = sum(size for place, size in saved.items() if place not in parameters)
    return 2 * activations + 10 * sum(parameters.values())


def peak_memory_mib(step) -> float:
    """Most memory in use on the GPU during a step, the weights and Adam's moments included."""
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**20


def busy_share(step, seconds: float) -> float:
    """The share of a step, `seconds` long, in which the GPU computes or copies."""
    kinds = (torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(10):
            step()
        torch.cuda.synchronize()
    microseconds = sum(
        event.self_device_time_total for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    )
    return microseconds / 1e6 / 10 / seconds


def step_rows(model_name: str, batch_size: int, device: torch.device, quick: bool) -> list[dict]:
    """One row for each precision, eager and compiled. The rulers race along with the steps."""
    gpu = device.type == "cuda"
    half, dtype = ("fp16", torch.float16) if gpu else ("bf16", torch.bfloat16)
    dtypes = {"fp32": torch.float32, half: dtype}
    steps, peaks = {}, {}
    for kind in [(p, c) for c in ((False,) if quick else (False, True)) for p in dtypes]:
        before = torch.cuda.memory_allocated() / 2**20 if gpu else 0
        steps[kind] = training_step(model_name, batch_size, *kind, device)
        peaks[kind] = peak_memory_mib(steps[kind][0]) - before if gpu else None
    ruler = rulers(device, dtypes, quick)
    runs = {kind: step for kind, (step, _) in steps.items()}
    runs |= {name: run for name, (run, _) in ruler.items()}
    seconds = race(runs, 1 if quick else 9, device)
    rate = {name: amount / seconds[name] for name, (_, amount) in ruler.items()}
    rows = []
    for (precision, compiled), (step, _) in steps.items():
        eager, taken = steps[precision, False], seconds[precision, compiled]
        with FlopCounterMode(display=False) as counter:  # matrix products and convolutions
            eager[0]()
        operations, moved = counter.get_total_flops(), count_bytes(*eager)
        matmul, convolution = rate["matmul", precision], rate["convolution", precision]
        floor = max(operations / max(matmul, convolution), moved / rate["copy", ""])
        rows.append({
            "model": model_name, "batch_size": batch_size,
            "precision": precision, "compile": compiled,
            "kind": precision + (", compiled" if compiled else ""),
            "milliseconds": 1e3 * taken, "images_per_second": batch_size / taken,
            "operations": operations, "gflops_per_second": operations / taken / 1e9,
            "matmul_rate": matmul, "convolution_rate": convolution,
            "share_of_matmul_rate": operations / taken / matmul,
            "share_of_machine_rate": operations / taken / max(matmul, convolution),
            "bytes": moved, "copy_rate": rate["copy", ""],
            "floor_milliseconds": 1e3 * floor, "times_floor": taken / floor,
            "peak_memory_mib": peaks[precision, compiled],
            "gpu_busy": busy_share(step, taken) if gpu else None,
        })
    return rows


# ------------------------------------------------------------------------------------------------
# 3. The data path
# ------------------------------------------------------------------------------------------------


class OneByOne(Dataset):
    """The usual way: each image is rotated, resized and standardised by itself, with PIL."""

    def __init__(self, images: Tensor, model):
        self.images, self.transform = images, v2.Compose([
            v2.ToPILImage(),
            v2.RandomRotation(10, InterpolationMode.BILINEAR),
            v2.Resize(model.side, InterpolationMode.BILINEAR),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([model.mean], [model.std]),
        ])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), 0


def data_rows(steps: list[dict], device: torch.device, quick: bool) -> list[dict]:
    """A batch of ours and one made image by image, beside the steps that were measured."""
    images = torch.randint(0, 256, (10_000, 28, 28), dtype=torch.uint8)
    rows = []
    for name, size in dict.fromkeys((row["model"], row["batch_size"]) for row in steps):
        ours = DigitBatches(images, torch.zeros(len(images)).long(), MODELS[name], device, 10)
        ours.set_epoch(0, 1)
        ours = iter(DataLoader(ours, size, shuffle=True, collate_fn=as_batch))
        others = iter(DataLoader(OneByOne(images, MODELS[name]), size, shuffle=True))
        turns = {"ours": partial(next, ours), "others": partial(next, others)}
        seconds = race(turns, 1 if quick else 15, device)
        times = {
            (row["precision"], row["compile"]): row["milliseconds"] / 1e3
            for row in steps if (row["model"], row["batch_size"]) == (name, size)
        }
        rows.append({
            "model": name, "batch_size": size,
            "milliseconds": 1e3 * seconds["ours"],
            "one_by_one_milliseconds": 1e3 * seconds["others"],
            "times_faster": seconds["others"] / seconds["ours"],
            "share_of_float32_step": seconds["ours"] / times["fp32", False],
            "share_of_fastest_step": seconds["ours"] / min(times.values()),
            "one_by_one_share_of_fastest_step": seconds["others"] / min(times.values()),
        })
    return rows


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------

COLUMNS = {  # table: {title: the row's text}
    "capsule_layer": {
        "batch": "{batch_size}", "capsule layer": "{formulation}", "freed memory": "{freed_memory}",
        "ms": "{milliseconds:.1f}", "speed, tiled = 1": "{times_faster_than_tiled:.1f}",
        "speed, einsum = 1": "{times_faster_than_einsum:.1f}",
    },
    "steps": {
        "model": "{model}", "batch": "{batch_size}", "precision": "{kind}",
        "step, ms": "{milliseconds:.1f}", "images/s": "{images_per_second:,.0f}",
        "GFLOP/s": "{gflops_per_second:,.0f}", "of matmul rate": "{share_of_matmul_rate:.0%}",
        "of machine rate": "{share_of_machine_rate:.0%}", "step / floor": "{times_floor:.1f}",
    },
    "data_path": {
        "model": "{model}", "batch": "{batch_size}", "PIL, ms": "{one_by_one_milliseconds:.1f}",
        "ours, ms": "{milliseconds:.2f}", "faster": "{times_faster:.0f}x",
        "of a float32 step": "{share_of_float32_step:.1%}",
        "of the fastest step": "{share_of_fastest_step:.1%}",
    },
}
GPU_COLUMNS = {"peak memory, MiB": "{peak_memory_mib:,.0f}", "GPU busy": "{gpu_busy:.0%}"}


def markdown(columns: dict, rows: list[dict]) -> str:
    """A Markdown table; columns: {title: how a row's text is made}."""
    lines = [columns, ["---"] * len(columns)]
    lines += [[cell.format(**row) for cell in columns.values()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def speed_table(result: dict) -> str:
    """A result as Markdown: the machine in a sentence, then the three tables."""
    machine = f"{result['device_name']}, {result['threads']} threads, PyTorch {result['torch']}; "
    for precision, rate in result["machine"].items():
        if precision != "copy_rate":
            machine += f"{precision}: matrix product {rate['matmul_rate'] / 1e9:,.0f} GFLOP/s, "
            machine += f"1x1 convolution {rate['convolution_rate'] / 1e9:,.0f} GFLOP/s; "
    text = machine + f"memory copy {result['machine']['copy_rate'] / 1e9:,.0f} GB/s.\n"
    for table, columns in COLUMNS.items():
        if table == "steps" and result["device"] == "cuda":
            columns = columns | GPU_COLUMNS
        text += "\n" + markdown(columns, result[table])
    return text


def report_table(result: dict) -> str:
    """results/report-code-cpu.json, the report's own code beside ours, as two Markdown tables."""
    parts = {
        "rescaps_layer": "ResCapsNet's capsule layer", "rescaps_step": "ResCapsNet, training step",
        "rescaps_loop": "ResCapsNet, step with its data", "alexcaps_step": "AlexCapsNet, step",
        "alexcaps_loop": "AlexCapsNet, step with its data",
    }
    rows = [row | {"part": title} for key, title in parts.items() for row in result[key]]
    sooner = markdown({
        "accuracy reached": "{accuracy:.1f} %",
        "the report's code": "{report_seconds:,.0f} s, {report}",
        "ours": "{ours_seconds:,.0f} s", "sooner": "{times_sooner:g}x",
    }, result["time_to_accuracy"]["rows"])
    return sooner + "\n" + markdown({
        "what": "{part}", "code": "{code}", "setting": "{setting}", "batch": "{batch_size}",
        "ms": "{milliseconds:.1f}", "speed per image, report = 1": "{times_faster_than_report:.1f}",
    }, rows)


def machine_rates(steps: list[dict]) -> dict:
    """The rulers' medians over all races, in operations and, for a copy, in bytes per second."""
    rates = {"copy_rate": median(row["copy_rate"] for row in steps)}
    for precision in dict.fromkeys(row["precision"] for row in steps):
        rows = [row for row in steps if row["precision"] == precision]
        rates[precision] = {
            key: median(row[key] for row in rows) for key in ("matmul_rate", "convolution_rate")
        }
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help="cpu or cuda (default: the best there is)")
    parser.add_argument("--quick", action="store_true", help="tiny and uncompiled, to try it out")
    parser.add_argument("--out", type=Path, help="where to write (default: results/)")
    flags = parser.parse_args()
    try:
        device = train_single.find_device(flags.device)
        if flags.out:
            flags.out.mkdir(parents=True, exist_ok=True)
    except (train_single.UsageError, OSError) as error:
        parser.error(str(error))
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as in training: TF32 on a GPU
    # First as a process starts, then with freed memory kept: that cannot be taken back.
    layers = capsule_rows(device, "given back", flags.quick)
    if device.type == "cpu":
        train_single.keep_freed_memory()
        layers += capsule_rows(device, "kept", flags.quick)
    steps = []
    for name in MODELS:
        for batch_size in (2,) if flags.quick else (32, 128):
            steps += step_rows(name, batch_size, device, flags.quick)
    gpu = device.type == "cuda"
    result = {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if gpu else train_single.cpu_name(),
        "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__), "git_commit": train_single.git_commit(),
        "quick": flags.quick, "machine": machine_rates(steps), "capsule_layer": layers,
        "steps": steps, "data_path": data_rows(steps, device, flags.quick),
    }
    print(speed_table(result))
    if flags.out or not flags.quick:  # toy figures must not replace measured ones
        path = (flags.out or Path(__file__).parent) / f"speed-{device.type}.json"
        train_single.write_atomically(path, json.dumps(result, indent=1) + "\n")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
