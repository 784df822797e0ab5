"""Train AlexCapsNet or ResCapsNet on one device, in float32 (on a GPU with TF32 products).

    python train_single.py --model alexcaps                  20 epochs of MNIST; offline: of digits
    python train_single.py --model rescaps --epochs 3        a shorter run
    python train_single.py --model alexcaps --dry-run        one batch through everything
    python train_single.py --resume --run-dir runs/alexcaps-single        go on after any stop

Writes config.json, metrics.csv, last.pt and best.pt to runs/<model>-single/, for evaluate.py. On 2
CPU cores AlexCapsNet takes two minutes an epoch: 98.9 % of the validation digits after the first,
99.5 % after ten.

Four parts: one epoch and validation (the lesson) · the run folder and its checkpoints (skip it at
first reading) · the command line and its checks · main. train_ddp.py adds devices and precision.
"""

import argparse
import atexit
import ctypes
import io
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm

from alexcaps import AlexCapsNet
from capsules import capsule_lengths, margin_loss
from data import DataError, DigitBatches, as_batch, epoch_seed, load, resolve_dataset
from rescaps import ResCapsNet

MODELS = {"alexcaps": AlexCapsNet, "rescaps": ResCapsNet}
LOOK_EVERY = 50  # steps between two looks at the loss; each look makes the CPU wait for the device
VALIDATION_BATCH = 500  # larger than in training: there are no gradients to keep in memory


class UsageError(Exception):
    """A mistake of the user's. The message is one line: what is wrong, what to do. Exit code 2."""


class RunFailed(Exception):
    """The run cannot go on (loss not finite, disk full). One line as well. Exit code 1."""

    everyone_knows = True  # in a distributed run: raised on all ranks, so that one may print it


# ------------------------------------------------------------------------------------------------
# 1. One epoch and validation. Start at train_one_epoch: Totals only counts.
# ------------------------------------------------------------------------------------------------


class Totals:
    """Sums of loss and hits over an epoch, left on the device and looked at every LOOK_EVERY steps.

    Calling loss.item() in every step would make the CPU wait for the device in every step.
    """

    def __init__(self, epoch: int, bar: tqdm):
        self.epoch, self.bar = epoch, bar
        self.pending: list[Tensor] = []  # one tensor [3] per step: loss * images, hits, images
        self.step, self.loss, self.hits, self.images = 0, 0.0, 0, 0
        self.peak_memory_mib: int | str = ""  # blank on a CPU

    def add(self, loss: Tensor, lengths: Tensor, labels: Tensor) -> None:
        """Note one step: its mean loss (a scalar), lengths [B, J] and labels [B]."""
        hits = (lengths.argmax(dim=1) == labels).sum()
        images = hits.new_full((), len(labels))  # made on the device: a copy to it would wait
        self.pending.append(torch.stack([loss.detach() * images, hits, images]))
        if len(self.pending) == LOOK_EVERY:
            self.look()

    def look(self) -> None:
        """Bring the pending steps to the CPU, stop if a loss is not finite, show the bar."""
        if self.pending:
            steps = self.collect()
            if steps.is_cuda:  # noted here, as the larger batches of validation will take more
                self.peak_memory_mib = round(torch.cuda.max_memory_allocated() / 2**20)
            steps = steps.tolist()  # CPU-GPU sync point
            self.pending.clear()
            for loss, hits, images in steps:
                self.step += 1
                if not math.isfinite(loss):
                    raise RunFailed(
                        f"the loss is {loss} in epoch {self.epoch}, step {self.step}: try a lower "
                        "--lr; the checkpoints of the epochs before are kept"
                    )
                self.loss, self.hits = self.loss + loss, self.hits + int(hits)
                self.images += int(images)
            self.bar.set_postfix_str(f"loss {self.mean_loss:.4f}, accuracy {self.accuracy:.2f} %")
            self.bar.update(self.images - self.bar.n)

    def collect(self) -> Tensor:
        """The pending steps as one tensor [steps, 3]."""
        return torch.stack(self.pending)

    @property
    def mean_loss(self) -> float:
        return self.loss / self.images

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * self.hits / self.images


def train_one_epoch(training: "Training", dataset: DigitBatches, config: dict) -> Totals:
    """One pass over the training images, in the order and at the angles of (seed, epoch).

    `training` holds the model, its optimizer and the epochs finished so far (part 2), `config` the
    flags (part 3).
    """
    model, optimizer, epoch = training.model, training.optimizer, training.epoch + 1
    dataset.set_epoch(config["seed"], epoch)
    generator = torch.Generator().manual_seed(epoch_seed(config["seed"], epoch))
    # Not shuffle=True: with a generator of its own the order follows from (seed, epoch) alone
    sampler = RandomSampler(dataset, generator=generator)
    loader = DataLoader(dataset, config["batch_size"], sampler=sampler, collate_fn=as_batch)
    model.train()
    with progress_bar(epoch, config["epochs"], len(dataset)) as bar:
        totals = Totals(epoch, bar)
        for images, labels in loader:  # [B, 1, side, side], [B]
            lengths = capsule_lengths(model(images))  # [B, J, D] -> [B, J]
            loss = margin_loss(lengths, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            totals.add(loss, lengths, labels)
            if config["dry_run"]:
                break
        totals.look()
    return totals


@torch.no_grad()
def validate(model: nn.Module, dataset: DigitBatches, indices=None, one_batch=False) -> Tensor:
    """Sums over images, float64 [3]: loss, hits, images. `indices` picks a share of the images.

    Sums instead of means, so that the shares of several processes can simply be added.
    """
    model.eval()  # BatchNorm: the running statistics, not the batch's
    loader = DataLoader(dataset, VALIDATION_BATCH, sampler=indices, collate_fn=as_batch)
    sums = torch.zeros(3, dtype=torch.float64, device=dataset.labels.device)
    for images, labels in loader:
        lengths = capsule_lengths(model(images))
        hits = (lengths.argmax(dim=1) == labels).sum()
        count = hits.new_full((), len(labels))
        sums += torch.stack([margin_loss(lengths, labels) * count, hits, count])
        if one_batch:
            break
    return sums


def progress_bar(epoch: int, epochs: int, images: int, hidden: bool = False) -> tqdm:
    """A bar that counts images; not drawn where stderr is no terminal: logs stay readable."""
    style = {"unit": " images", "leave": False, "disable": hidden or None}
    return tqdm(total=images, desc=f"epoch {epoch}/{epochs}", **style)


# ------------------------------------------------------------------------------------------------
# 2. The run folder and its checkpoints
# ------------------------------------------------------------------------------------------------

CHECKPOINT_FORMAT = "capsnet-checkpoint-1"
CHECKPOINT_KEYS = {
    *("model", "optimizer", "scheduler", "scaler", "epoch", "best", "history", "config"),
}
RUN_FILES = ("last.pt", "best.pt", "metrics.csv", "config.json")
COLUMNS = (
    *("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy"),  # accuracies in percent
    *("lr", "seconds", "images_per_second", "peak_memory_mib"),  # times: of the training part
)


@dataclass
class Training:
    """All that changes during a run, which is all that a checkpoint must hold."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler | None = None  # of mixed precision: train_ddp.py
    epoch: int = 0  # epochs finished
    best: dict | None = None  # epoch, val_accuracy and val_loss of best.pt
    history: list[dict] = field(default_factory=list)  # the rows of metrics.csv

    def state(self, config: dict) -> dict:
        """Tensors and plain Python types: torch.load(weights_only=True) refuses anything else."""
        return {
            "format": CHECKPOINT_FORMAT,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "epoch": self.epoch,
            "best": self.best,
            "history": self.history,
            "config": config,
        }

    def restore(self, checkpoint: dict, path: Path) -> None:
        """Go back to a checkpoint that load_checkpoint has read; UsageError if it does not fit."""
        try:
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.scheduler.load_state_dict(checkpoint["scheduler"])
            if self.scaler:
                self.scaler.load_state_dict(checkpoint["scaler"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(
                f"{path} does not fit this run's model and optimizer: start again with --overwrite"
            ) from None
        self.epoch, self.best = checkpoint["epoch"], checkpoint["best"]
        self.history = checkpoint["history"]


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write, flush, rename: at any moment `path` holds either its old or its new content, whole."""
    scratch = path.with_name(path.name + ".tmp")
    try:
        with open(scratch, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        with suppress(OSError):
            scratch.unlink()
        raise RunFailed(f"cannot write {path}: {error.strerror}; its old content is kept") from None


def save_checkpoint(path: Path, state: dict) -> None:
    """Save a checkpoint (Training.state) atomically; RunFailed where the disk refuses."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path, config: dict) -> dict:
    """The checkpoint at `path`; UsageError if it is missing, damaged or of another run."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself does not compare checksums
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        # weights_only: a pickle may run any code when it is loaded; this refuses all but tensors
        # and plain types.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"there is no checkpoint {path}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except Exception:  # noqa: BLE001 - a damaged file makes the reader fail in any way at all
        raise UsageError(f"{path} is damaged or is no checkpoint: restore a copy of it") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise UsageError(f"{path} is no checkpoint of this program")
    if not checkpoint.keys() >= CHECKPOINT_KEYS:
        raise UsageError(f"{path} is no whole checkpoint")
    for name in RECIPE:
        if checkpoint["config"].get(name) != config[name]:
            raise UsageError(f"{path} is of another run than config.json beside it: {name} differs")
    if checkpoint["epoch"] > config["epochs"]:
        raise UsageError(
            f"--epochs {config['epochs']} is less than the {checkpoint['epoch']} that {path} has"
        )
    return checkpoint


def load_config(run_dir: Path) -> dict:
    """config.json of a run folder; UsageError if there is none or it is damaged."""
    path = Path(run_dir) / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{run_dir} holds no run: there is no {path}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is damaged: it is no JSON") from None
    for name, kind in (RECIPE | FREE).items():
        if not isinstance(config, dict) or not isinstance(config.get(name, ...), kind):
            raise UsageError(f"{path} is no run's config: {name} is missing or of a wrong type")
    if config["model"] not in MODELS or config["dataset"] not in ("mnist", "digits"):
        raise UsageError(f"{path} names an unknown model or dataset")
    return config


def write_metrics(run_dir: Path, history: list[dict]) -> None:
    """metrics.csv, written whole each time: a run that was killed leaves no row twice."""
    lines = [COLUMNS, *([row[name] for name in COLUMNS] for row in history)]
    text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    write_atomically(run_dir / "metrics.csv", text)


def begin(run_dir: Path, training: Training, config: dict, resume: bool) -> None:
    """Make the run folder as it stands before epoch 1, or go on with it; say what is trained."""
    if resume:
        write_metrics(run_dir, training.history)  # a kill may have come after last.pt, before it
    else:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            for name in (*RUN_FILES, *(f"{name}.tmp" for name in RUN_FILES), "report.json"):
                (run_dir / name).unlink(missing_ok=True)  # --overwrite: no old one is read again
        except OSError as error:
            raise UsageError(f"cannot make the run folder {run_dir}: {error.strerror}") from None
        save_checkpoint(run_dir / "last.pt", training.state(config))  # so every stop is resumable
    if training.epoch < config["epochs"]:  # a finished run keeps the record of its machine
        write_atomically(run_dir / "config.json", json.dumps(config, indent=2) + "\n")
    say_fallback(config)
    resumed = f", resumed after epoch {training.epoch}" if training.epoch else ""
    print(f"{intro(config)}\nrun folder: {run_dir}{resumed}", flush=True)


def count_epoch(
    training: Training, config: dict, totals: Totals, validated: list[float], seconds: float
) -> None:
    """Add the finished epoch to the history and lower the learning rate."""
    loss, hits, images = validated
    if not math.isfinite(loss):
        raise RunFailed(f"the validation loss is {loss} in epoch {totals.epoch}: try a lower --lr")
    training.epoch += 1
    row = {
        "epoch": training.epoch,
        "train_loss": round(totals.mean_loss, 6),
        "train_accuracy": round(totals.accuracy, 3),
        "val_loss": round(loss / images, 6),
        "val_accuracy": round(100 * hits / images, 3),
        "lr": training.optimizer.param_groups[0]["lr"],
        "seconds": round(seconds, 2),
        "images_per_second": round(totals.images / seconds, 1),
        "peak_memory_mib": totals.peak_memory_mib,
    }
    if config["device"].startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    training.history.append(row)
    training.scheduler.step()
    if training.best is None or row["val_accuracy"] > training.best["val_accuracy"]:  # tie: earlier
        training.best = {name: row[name] for name in ("epoch", "val_accuracy", "val_loss")}


def save_epoch(run_dir: Path, training: Training, config: dict) -> None:
    """Save the epoch that count_epoch counted and print its line; best.pt comes before last.pt."""
    state, row = training.state(config), training.history[-1]
    if training.best["epoch"] == training.epoch:
        save_checkpoint(run_dir / "best.pt", state)
    save_checkpoint(run_dir / "last.pt", state)
    write_metrics(run_dir, training.history)
    print(epoch_line(row, config["epochs"]), flush=True)


def epoch_line(row: dict, epochs: int) -> str:
    """What is printed after each epoch, from its row of metrics.csv."""
    return (
        f"epoch {row['epoch']:2.0f}/{epochs}  training {row['train_loss']:.4f} "
        f"{row['train_accuracy']:6.2f} %  validation {row['val_loss']:.4f} "
        f"{row['val_accuracy']:6.2f} %  lr {row['lr']:.2g}  {row['seconds']:.0f} s  "
        f"{row['images_per_second']:,.0f} images/s"
    )


# ------------------------------------------------------------------------------------------------
# 3. The command line and its checks
# ------------------------------------------------------------------------------------------------

# What makes a run the run it is, with its type in config.json: --resume accepts no other value.
RECIPE = {
    "script": str,
    "model": str,
    "dataset": str,
    "batch_size": int,
    "lr": (int, float),
    "routing_iterations": int,
    "rotate": (int, float),
    "shift": (int, float),
    "train_size": (int, type(None)),
    "seed": int,
    "dry_run": bool,
    "world_size": int,
    "precision": str,
    "accumulation_steps": int,
    "sync_bn": bool,
}
FREE = {"epochs": int, "data_dir": str, "device": str, "compile": bool}  # may change on resume
FIXED = {  # what train_ddp.py varies, as it is for this script
    "script": "single",
    "world_size": 1,
    "precision": "fp32",
    "accumulation_steps": 1,
    "sync_bn": False,
}


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it is, and each flag with its default."""


class Parser(argparse.ArgumentParser):
    """An argparse parser that answers a mistake with one line instead of its usage text."""

    def error(self, message: str):
        raise UsageError(f"{message} (see --help)")


def number(kind: type, low: float, high: float):
    """A type for argparse: an int or float within low..high."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # which lies within nothing
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {low:g} to {high:,}")
        return value

    return parse


def build_parser(description: str) -> Parser:
    """The flags that both training scripts have."""
    parser = Parser(description=description, formatter_class=Help, allow_abbrev=False)
    flag, count = parser.add_argument, number(int, 1, 10**6)
    flag("--model", choices=MODELS, help="which network; needed to start a run")
    flag("--dataset", choices=("auto", "mnist", "digits"), default="auto",
         help="auto: MNIST, or scikit-learn's digits where MNIST cannot be had")
    flag("--data-dir", default="data", help="folder with MNIST/raw; downloaded if absent")
    flag("--epochs", type=count, default=20, help="passes over the training images")
    flag("--batch-size", type=count, default=32, help="images per step and process")
    flag("--lr", type=number(float, 1e-9, 100), default=1e-3,
         help="Adam's learning rate, times 0.7 every 2 epochs")
    flag("--routing-iterations", type=count, default=3, help="of dynamic routing")
    flag("--rotate", type=number(float, 0, 180), default=10.0,
         help="training images are turned by up to this many degrees, either way")
    flag("--shift", type=number(float, 0, 14), default=0.0,
         help="and moved by up to this many pixels, in each direction")
    flag("--train-size", type=count, help="train on the first N images; for a quick try")
    flag("--seed", type=number(int, 0, 10**9), default=0,
         help="of weights, order, angles and shifts")
    flag("--device", help="cpu, cuda, cuda:1 ...; if not given, the GPU where there is one")
    flag("--compile", action=argparse.BooleanOptionalAction, default=False,
         help="torch.compile: minutes at the start, faster steps after it")
    flag("--dry-run", action="store_true", help="one batch through everything; no run is kept")
    flag("--run-dir", type=Path, help="if not given, runs/<model>-<script>[-digits][-seedN]")
    flag("--resume", action="store_true", help="go on with the run in the run folder")
    flag("--overwrite", action="store_true", help="start anew where the folder holds a run")
    return parser


def find_device(name: str | None) -> torch.device:
    """The device of that name, or the best one there is; UsageError if it is missing."""
    found = torch.accelerator.current_accelerator(check_available=True)
    best = found if found and found.type == "cuda" else torch.device("cpu")
    try:
        device = torch.device(name or best)
    except RuntimeError:
        raise UsageError(f"{name!r} is no device: try --device {best}") from None
    count = torch.accelerator.device_count() if found and device.type == found.type else 0
    if device.type != "cpu" and (device.index or 0) >= count:
        raise UsageError(f"this machine has no device {name}: try --device {best}")
    if device.type not in ("cpu", "cuda"):
        print(f"note: this code is untested on {device.type}")
    return device


def plan_run(parser: Parser, fixed: dict, find_begun=None) -> tuple[dict, Path, bool]:
    """The command line as (config, run folder, whether to resume). Checks; writes no run.

    `fixed` is what no flag chooses: the script, the world size. MNIST may be downloaded here.
    find_begun(config, run_dir) may name a folder to resume though no --resume was given.
    """
    defaults = vars(parser.parse_args([]))
    unset = argparse.Namespace(**dict.fromkeys(defaults))  # so that flags not given stay None
    given = {k: v for k, v in vars(parser.parse_args(namespace=unset)).items() if v is not None}
    config = {**defaults, **given, **fixed}
    resume, overwrite, run_dir = (config.pop(k) for k in ("resume", "overwrite", "run_dir"))
    if find_begun and (begun := find_begun(config, run_dir)):
        resume, overwrite, run_dir = True, False, begun
    if resume:
        if overwrite or config["dry_run"]:
            raise UsageError("--resume goes neither with --overwrite nor with --dry-run")
        run_dir = run_dir or find_run(config)
        return recorded_config(run_dir, {**given, **fixed}), run_dir, True
    if config["model"] is None:
        raise UsageError(f"--model is missing: give one of {', '.join(MODELS)}")
    config["device"] = str(find_device(config["device"]))
    if config["dry_run"]:
        config["epochs"] = 1
        if run_dir is None:  # its files go when the process ends
            run_dir = Path(tempfile.mkdtemp(prefix="dry-run-"))
            atexit.register(shutil.rmtree, run_dir, ignore_errors=True)
    if run_dir or config["dataset"] != "auto":  # before a download, where it can be told
        check_folder(run_dir or default_folder(config, config["dataset"]), overwrite)
    name, reason = resolve_dataset(config["dataset"], config["data_dir"])
    config |= {"dataset": name, "fallback_reason": reason}
    run_dir = run_dir or default_folder(config, name)
    check_folder(run_dir, overwrite)
    return config, run_dir, False


def check_folder(run_dir: Path, overwrite: bool) -> None:
    """UsageError if the folder holds a run already."""
    if not overwrite and any((run_dir / name).exists() for name in RUN_FILES):
        raise UsageError(
            f"{run_dir} holds a run already: go on with --resume, choose another --run-dir, or "
            "replace it with --overwrite"
        )


def default_folder(config: dict, dataset: str) -> Path:
    """runs/<model>-<script>[-digits][-seedN]"""
    digits = "-digits" if dataset == "digits" else ""
    seed = f"-seed{config['seed']}" if config["seed"] else ""
    return Path("runs") / f"{config['model']}-{config['script']}{digits}{seed}"


def possible_folders(config: dict) -> list[Path]:
    """The default folders that a run of this config may have: `auto` may mean either dataset."""
    choice = config["dataset"]
    names = ("mnist", "digits") if choice == "auto" else (choice,)
    return [default_folder(config, name) for name in names]


def find_run(config: dict) -> Path:
    """The folder that --resume means without --run-dir: MNIST's or the digits'."""
    if config["model"] is None:
        raise UsageError("--resume needs --run-dir, or --model (and the run's --seed)")
    folders = possible_folders(config)
    found = [folder for folder in folders if (folder / "config.json").exists()]
    if not found:
        raise UsageError(f"nothing to resume: there is no run in {' or '.join(map(str, folders))}")
    if len(found) > 1:
        raise UsageError(f"both {found[0]} and {found[1]} hold a run: name one with --run-dir")
    return found[0]


def recorded_config(run_dir: Path, given: dict) -> dict:
    """The config of the run to resume, with those flags changed that may change."""
    config = load_config(run_dir)
    if given["script"] != config["script"]:
        raise UsageError(f"{run_dir} was made by train_{config['script']}.py: resume it with that")
    if config["dry_run"]:
        raise UsageError(f"{run_dir} is of a dry run: there is nothing to go on with")
    if given.get("dataset") == "auto":
        del given["dataset"]  # what auto meant then is recorded; it is not asked again
    for name in RECIPE:
        if given.get(name, config[name]) != config[name]:
            flag = f"--{name.replace('_', '-')}" if name != "world_size" else "a world size of"
            raise UsageError(
                f"{flag} {given[name]} is not what {run_dir} was begun with ({config[name]}), and "
                "a resumed run keeps that"
            )
    config |= {name: given[name] for name in (*FREE, "launch") if name in given}
    config["device"] = str(find_device(config["device"]))
    return config


# ------------------------------------------------------------------------------------------------
# 4. Main
# ------------------------------------------------------------------------------------------------


def make_datasets(config: dict, device: torch.device) -> tuple[DigitBatches, DigitBatches]:
    """Training and validation images on the device; UsageError if --train-size is too large."""
    model, name, data_dir = MODELS[config["model"]], config["dataset"], config["data_dir"]
    images, labels = load(name, data_dir, "train")
    size = config["train_size"] or len(labels)
    if size > len(labels):
        raise UsageError(f"--train-size {size} is more than the {len(labels):,} images of {name}")
    augmentation = config["rotate"], config["shift"]
    train_set = DigitBatches(images[:size], labels[:size], model, device, *augmentation)
    return train_set, DigitBatches(*load(name, data_dir, "validation"), model, device)


def build_model(config: dict) -> nn.Module:
    """The network that a config names, newly initialised."""
    return MODELS[config["model"]](config["routing_iterations"])


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of returning it to the kernel after every step.

    Feature maps of 25 MB would be handed back and faulted in again, page by page, in each step.
    ResCapsNet's step on 2 CPU cores takes 18 % less time with this. Elsewhere it has no effect.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
        libc.mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap too


def make_training(config: dict, device: torch.device) -> Training:
    """Model, optimizer and learning rate schedule of the report's recipe, before epoch 1."""
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # whose name and memory are recorded
        # TF32: products of numbers with 10 bits of mantissa instead of 23, but much faster
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(config["seed"])
    # Drawn on the CPU: the same start on every device. channels_last is [B, H, W, C] in memory, as
    # oneDNN and cuDNN like it best: a fifth less time per step on a CPU.
    model = build_model(config).to(device, memory_format=torch.channels_last)
    if config["compile"]:
        # Keeps the names of the state (no "_orig_mod."). dynamic=False: one program for each batch
        # size (32, the short last batch, validation) instead of a slower one for all sizes.
        name, usual = ("CXX", "g++") if device.type == "cpu" else ("CC", "gcc")  # C: for Triton
        compilers = [os.environ.get(name, usual), *(["clang"] if name == "CC" else [])]
        if not any(map(shutil.which, compilers)):
            raise UsageError(f"--compile needs a compiler: install {compilers[0]}, or omit it")
        model.compile(dynamic=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"], fused=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.7)
    return Training(model, optimizer, scheduler)


def describe(config: dict, training: Training, datasets: tuple, device_count: int = 1) -> dict:
    """The facts of a run that no flag says, for config.json."""
    gpu = torch.device(config["device"]).type == "cuda"
    batches = config["world_size"] * config["accumulation_steps"]  # that make one step
    return {
        "effective_batch": config["batch_size"] * batches,
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "train_images": len(datasets[0]),
        "validation_images": len(datasets[1]),
        "device_name": torch.cuda.get_device_name() if gpu else cpu_name(),
        "device_count": device_count,  # different devices: ranks that share one count once
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),  # of each process
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "git_commit": git_commit(),
    }


def usable_cores() -> int:
    """The cores that this process may run on: a batch system may allow fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of this code, marked "+" if it was changed since; None outside of git."""
    try:
        command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        here = Path(__file__).parent
        answer = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def intro(config: dict) -> str:
    """What is about to be trained, on what, and how."""
    tf32 = config["precision"] == "fp32" and config["device"].startswith("cuda")
    return (
        f"{MODELS[config['model']].__name__}: {config['parameters']:,} parameters, "
        f"{config['routing_iterations']} routing iterations\n"
        f"data: {config['dataset']}, {config['train_images']:,} training and "
        f"{config['validation_images']:,} validation images, rotated by up to "
        f"{config['rotate']:g} degrees, moved by up to {config['shift']:g} pixels\n"
        f"effective batch size {config['effective_batch']} = {config['batch_size']} images x "
        f"{config['world_size']} process(es) x {config['accumulation_steps']} accumulation "
        f"step(s), learning rate {config['lr']:g}, times 0.7 every 2 epochs\n"
        f"device: {config['device']} ({config['device_name']}), {config['threads']} thread(s), "
        f"{config['precision']}{' with TF32 products' if tf32 else ''}"
        f"{', compiled' if config['compile'] else ''}"
    )


def print_outro(config: dict, run_dir: Path, training: Training) -> None:
    """How the run ended and what to do next."""
    if config["dry_run"]:
        print("dry run: one batch went through training, validation and checkpoints")
    else:
        best = training.best
        print(
            f"best validation accuracy {best['val_accuracy']:.2f} % in epoch {best['epoch']}\n"
            f"test it: python evaluate.py {shlex.quote(str(run_dir))}"
        )
    say_fallback(config)


def say_fallback(config: dict) -> None:
    """Two lines, at the start and at the end, where the digits stand in for MNIST."""
    if config.get("fallback_reason"):
        print(f"NOTE: MNIST could not be had: {config['fallback_reason']}")
        print("NOTE: this run is on scikit-learn's 1,797 digits of 8x8 pixels, not on MNIST")


class Terminated(BaseException):
    """SIGTERM, as an exception: like KeyboardInterrupt, it unwinds what is under way."""


@contextmanager
def resumable(run_dir: Path, launcher: str | None):
    """On Ctrl-C or SIGTERM say how to go on; launcher: the command before its flags, or None."""
    try:
        yield
    except (KeyboardInterrupt, Terminated):
        if launcher:
            command = f"{launcher} --resume --run-dir {shlex.quote(str(run_dir))}"
            print(f"\nstopped; to go on: {command}", file=sys.stderr)
        raise


def run_main(main, quiet: bool = False) -> None:
    """Call main; whatever ends it becomes one line and an exit code.

    0 done, 1 the run failed, 2 wrong use, 130 Ctrl-C, 143 SIGTERM. A traceback means a bug. `quiet`
    processes leave it to rank 0 to print what all ranks know.
    """

    def no_more_signals():  # on the way out: torchrun sends one where another rank was quicker
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)

    def leave(code: int, message: str, everyone_knows: bool = True):
        no_more_signals()
        if not (quiet and everyone_knows):
            print(message, file=sys.stderr)
        sys.exit(code)

    def stop(number, _):
        no_more_signals()  # a second one must not break the clean way out
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)
    keep_freed_memory()
    try:
        main()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UsageError, DataError, OSError) as error:  # OSError: a path that cannot be looked at
        leave(2, f"error: {error}")
    except RunFailed as error:
        leave(1, f"failed: {error}", everyone_knows=error.everyone_knows)
    except torch.OutOfMemoryError:
        leave(1, "failed: the GPU's memory is full: try a smaller --batch-size", False)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # PyTorch's words for a full CPU memory
            raise
        leave(1, "failed: the memory is full: try a smaller --batch-size", False)
    except KeyboardInterrupt:
        sys.exit(130)
    except Terminated:
        sys.exit(143)


def main() -> None:
    config, run_dir, resume = plan_run(build_parser(__doc__), FIXED)
    device = torch.device(config["device"])
    datasets = train_set, validation_set = make_datasets(config, device)
    training = make_training(config, device)
    if resume:
        training.restore(load_checkpoint(run_dir / "last.pt", config), run_dir / "last.pt")
    config |= describe(config, training, datasets)
    with resumable(run_dir, None if config["dry_run"] else "python train_single.py"):
        begin(run_dir, training, config, resume)
        while training.epoch < config["epochs"]:
            start = time.perf_counter()
            totals = train_one_epoch(training, train_set, config)
            seconds = time.perf_counter() - start
            validated = validate(training.model, validation_set, one_batch=config["dry_run"])
            count_epoch(training, config, totals, validated.tolist(), seconds)
            save_epoch(run_dir, training, config)
        print_outro(config, run_dir, training)


if __name__ == "__main__":
    run_main(main)
