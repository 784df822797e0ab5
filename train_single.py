"""Train AlexCapsNet or ResCapsNet on one device, in float32 (TF32 on a GPU).

    python train_single.py --model alexcaps               20 epochs of MNIST
    python train_single.py --model rescaps --epochs 3     a shorter run
    python train_single.py --model alexcaps --dry-run     one step of everything
    python train_single.py --resume runs/alexcaps-single  continue after any stop

The run's files go to runs/<model>-single: last.pt, from which the run is resumed, and
what evaluate.py reads. On 2 CPU cores an epoch of AlexCapsNet takes 1.5 to 6 minutes.
After nine epochs its validation accuracy is 99.6 %.

Read it downwards:

    1. one epoch, and validation: the lesson
    2. a run, and what is saved of it
    3. the command line
    4. main
    5. tools that the other scripts share: look them up when you meet them

Then open train_ddp.py beside it.
"""

import argparse
import csv
import ctypes
import io
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.distributed import is_torchelastic_launched
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm

from alexcaps import AlexCapsNet
from data import DigitDataset, UserError, as_batch, epoch_seed, load, resolve_dataset
from rescaps import ResCapsNet

MODELS = {"alexcaps": AlexCapsNet, "rescaps": ResCapsNet}
VALIDATION_BATCH = 500  # larger than in training: no activations are kept for backward
SHOW_EVERY = 20  # steps between two updates of the loss in the progress bar

# -- 1. One epoch, and validation --------------------------------------------------


def train_one_epoch(run: "Run", dataset: DigitDataset) -> Tensor:
    """Train for one epoch. Returns 3 sums: loss x count, hits, count (see tally).

    `run` (part 2) owns the model, its optimizer, the settings and the history, which
    has one row for each finished epoch.
    """
    model = run.model
    epoch = len(run.history) + 1
    seed = run.config["seed"]
    dataset.set_epoch(seed, epoch)  # draws this epoch's angles and shifts
    # The order of the images depends on (seed, epoch) alone. (Do not use shuffle=True:
    # the DataLoader would draw a number from the generator first, and the order would
    # differ from that of DistributedSampler in train_ddp.py.)
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    sampler = RandomSampler(dataset, generator=generator)
    batch_size = run.config["batch_size"]
    loader = DataLoader(dataset, batch_size, sampler=sampler, collate_fn=as_batch)
    # float64, because many numbers are added up
    sums = torch.zeros(3, dtype=torch.float64, device=dataset.labels.device)
    bar = progress(loader, f"epoch {epoch}/{run.config['epochs']}")
    model.train()  # BatchNorm: use the statistics of the batch
    for step, (images, labels) in enumerate(bar, start=1):
        capsules = model(images)  # [B, 1, side, side] -> [B, J, D]
        # The margin loss of the capsules' lengths; with --reconstruction, also the
        # decoder's loss. Both are in capsules.py.
        loss = model.loss(capsules, images, labels)
        run.optimizer.zero_grad()  # or backward would add to the previous step's gradients
        loss.backward()  # the gradient of the loss with respect to each weight
        run.optimizer.step()  # Adam changes the weights
        # The images are on the device already and the sums stay there, so the CPU can
        # prepare the next step while a GPU computes. Only check_and_show waits for the device.
        sums += tally(loss, model.scores(capsules), labels)
        if step % SHOW_EVERY == 0 or step == len(loader):
            check_and_show(bar, sums)
    return sums


@torch.no_grad()
def validate(model: nn.Module, dataset: DigitDataset, indices=None, hidden=False) -> Tensor:
    """Evaluate the model. Returns the 3 sums of tally over all validation images.

    It returns sums because sums of several processes can simply be added. train_ddp.py
    gives `indices` (evaluate only these images) and `hidden` (no progress bar).
    """
    # A sampler can be any sequence of indices. None means all images, in their order.
    loader = DataLoader(dataset, VALIDATION_BATCH, sampler=indices, collate_fn=as_batch)
    sums = torch.zeros(3, dtype=torch.float64, device=dataset.labels.device)
    model.eval()  # BatchNorm: use the running statistics
    for images, labels in progress(loader, "validation", hidden):
        capsules = model(images)
        loss = model.loss(capsules, images, labels)
        sums += tally(loss, model.scores(capsules), labels)
    return sums


def tally(loss: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """What a batch adds to the sums: [loss x count, hits, count], on the device.

    `loss` is the mean over the batch, and count the number of its images. A hit is an
    image whose highest score, in scores [B, J], is that of its label, in labels [B].
    Nothing here waits for the device; loss.item() would, in every step.
    """
    hits = (scores.argmax(dim=1) == labels).sum()
    count = torch.full_like(hits, len(labels))
    return torch.stack([loss.detach() * count, hits, count])


def progress(items: Iterable, title: str, hidden: bool = False) -> tqdm:
    """The items (batches of a loader, for example), with a progress bar unless `hidden`."""
    disable = True if hidden else None  # None: the bar appears only in a terminal
    return tqdm(items, title, leave=False, disable=disable)


def check_and_show(bar: tqdm, sums: Tensor) -> None:
    """Show the means so far. UserError if the loss is no longer a finite number.

    The means are over all images of the epoch so far, not over the last batch alone.
    """
    loss_sum, hits, count = read_sums(sums)
    bar.set_postfix_str(f"loss {loss_sum / count:.4f}, accuracy {hits / count:.2%}")


def read_sums(sums: Tensor) -> list[float]:
    """The sums as Python numbers. UserError if the loss is not finite."""
    loss_sum, hits, count = sums.tolist()  # CPU-GPU sync point
    if not math.isfinite(loss_sum):
        hint = "start again with a lower --lr (in fp16, try --precision bf16)"
        raise UserError(f"the loss is {loss_sum}: {hint}")
    return [loss_sum, hits, count]


# -- 2. A run, and what is saved of it ---------------------------------------------

# The attributes of Run that have a state_dict. Settings and history are saved, too.
SAVED = ("model", "optimizer", "scheduler", "scaler")
# last.pt is the run after its last epoch, and best.pt the run after its best epoch.
# metrics.csv and config.json are for people and for evaluate.py, which adds report.json.
RUN_FILES = ("last.pt", "best.pt", "metrics.csv", "config.json", "report.json")
COLUMNS = (  # of metrics.csv: see Run.finish_epoch
    "epoch",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "lr",
    "seconds",
)


class Run:
    """A training run: its settings, its folder, and everything that training changes.

    A resumed run should end bit-identical to one that was never stopped. So everything
    that changes is saved: weights and BatchNorm's running statistics, Adam's two moments
    of each weight and its step count, the schedule's epoch count, and the scale of mixed
    precision. Everything random depends on (seed, epoch), so no random state is saved.
    The epoch's number and the best epoch follow from the history.
    """

    def __init__(self, config: dict, folder: Path, device: torch.device):
        self.config = config
        self.folder = folder
        self.history = []  # a row for each finished epoch: see finish_epoch
        self.lock = None  # until open_folder (part 4) locks the folder
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)
            # TF32: a mantissa of 10 bits instead of 23, but much faster. In matrix
            # products it must be asked for; in convolutions it is PyTorch's default.
            torch.set_float32_matmul_precision("high")
        torch.manual_seed(config["seed"])
        # The weights are drawn on the CPU, so they start the same on every device.
        # channels_last is [B, H, W, C] in memory: oneDNN and cuDNN are faster with it.
        model = make_network(config)
        self.model = model.to(device, memory_format=torch.channels_last)
        if config["compile"]:
            check_compiler(device)
            # dynamic=False: compile separately for each batch size (32, the short last
            # batch, validation). One version for all sizes would be slower.
            self.model.compile(dynamic=False)
        # Adam divides each weight's step by the size of its recent gradients, so one
        # learning rate suits all layers. fused: one kernel updates all weights.
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config["lr"], fused=True)
        # Training starts with large steps and ends with small ones: the last of 20 epochs
        # has 0.7^9 = 4 % of the first learning rate.
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=2, gamma=0.7)
        # For train_ddp.py in float16. In other precisions it does nothing.
        float16 = config["precision"] == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=float16)

    @property
    def best(self) -> dict:
        """The row of the best epoch so far. If several are equal, it is the earliest."""
        return max(self.history, key=lambda row: row["val_accuracy"])

    def finish_epoch(self, trained: Tensor, validated: Tensor, seconds: float) -> None:
        """Add an epoch's row to the history, and advance the schedule.

        `trained` and `validated` are sums, see tally. Accuracies are in percent.
        """
        train_loss_sum, train_hits, train_count = read_sums(trained)
        val_loss_sum, val_hits, val_count = read_sums(validated)
        row = {
            "epoch": len(self.history) + 1,
            "train_loss": round(train_loss_sum / train_count, 6),
            "train_accuracy": round(100 * train_hits / train_count, 3),
            "val_loss": round(val_loss_sum / val_count, 6),
            "val_accuracy": round(100 * val_hits / val_count, 3),
            "lr": float(f"{self.scheduler.get_last_lr()[0]:.6g}"),  # 6 significant digits
            "seconds": round(seconds, 2),
        }
        self.history.append(row)
        self.scheduler.step()  # once per epoch, not per batch

    def epoch_line(self) -> str:
        """What is printed after each epoch; a star marks the best so far.

        Accuracies have four significant digits (:#.4g).
        """
        row = self.history[-1]
        star = " *" if self.best is row else ""
        return (
            f"epoch {row['epoch']:2}/{self.config['epochs']}"
            f" | train loss {row['train_loss']:.4f} acc {row['train_accuracy']:#.4g}"
            f" | val loss {row['val_loss']:.4f} acc {row['val_accuracy']:#.4g}"
            f" | {row['seconds']:.0f} s{star}"
        )

    def load(self) -> None:
        """Go back to the folder's last.pt. UserError if it belongs to another network."""
        file = self.folder / "last.pt"
        checkpoint = load_checkpoint(file)
        self.history = checkpoint["history"]
        if len(self.history) > self.config["epochs"]:
            done = len(self.history)
            raise UserError(f"--epochs is less than the {done} epochs that are done")
        try:
            for name in SAVED:
                getattr(self, name).load_state_dict(checkpoint[name])
        except (RuntimeError, ValueError):  # other names, or weights of other shapes
            raise UserError(f"{file} is not a checkpoint of this network") from None

    def save(self) -> None:
        """Write the run as it is after an epoch, before the first one, or when it is resumed.

        last.pt comes first, because everything else follows from it. After a stop between
        the files, best.pt lacks the best epoch and metrics.csv lacks a line: the resumed
        run writes both again before it goes on.
        """
        self.lock.check()  # or we would write into somebody else's run
        # Only tensors and plain Python types: load_checkpoint accepts nothing else.
        # The checkpoint is made in memory first, so both files get the same bytes.
        state = {name: getattr(self, name).state_dict() for name in SAVED}
        state["config"] = self.config
        state["history"] = self.history
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
        write_file(self.folder / "last.pt", content)
        if self.history and self.best is self.history[-1]:
            write_file(self.folder / "best.pt", content)
        if not self.history:
            # last.pt now belongs to a new run, which has no best epoch yet. Remove what is
            # left of the run that it replaces.
            for name in ("best.pt", "report.json"):
                (self.folder / name).unlink(missing_ok=True)
        self.save_for_people()

    def save_for_people(self) -> None:
        """Write metrics.csv and config.json. Training reads neither."""
        write_csv(self.folder / "metrics.csv", COLUMNS, self.history)
        settings = json.dumps(self.config, indent=2) + "\n"
        write_file(self.folder / "config.json", settings.encode())


# -- 3. The command line -----------------------------------------------------------

# Every setting that a flag or a script chooses, with its default. config.json holds them.
# fmt: off
DEFAULTS = {
    "model": None, "routing_iterations": 3, "reconstruction": 0.0,
    "dataset": "auto", "data_dir": "data", "train_size": None, "rotate": 10.0, "shift": 0.0,
    "epochs": 20, "batch_size": 32, "lr": 0.001, "seed": 0,
    "device": None, "compile": False, "dry_run": False,
    # what train_ddp.py varies
    "script": "single", "world_size": 1, "precision": "fp32",
    "accumulation_steps": 1, "sync_bn": False,
}
# fmt: on
DRY_RUN = Path("runs/dry-run")  # a dry run may replace the one before
MAY_CHANGE = ("resume", "epochs", "data_dir", "device", "compile")  # with --resume
# Printed at the start and at the end of a run, so that nobody mistakes a result on the
# small digits for one on MNIST
NOTE = {
    "mnist": "",
    "digits": "\nNOTE: this is scikit-learn's 1,797 small digits, not MNIST",
}


def build_parser(description: str) -> "Parser":
    """The flags that both training scripts have; see Parser in part 5."""
    parser = Parser(description)
    flag = parser.add_flag
    positive = number_between(int, 1, 1_000_000)
    real = partial(number_between, float)
    # fmt: off
    flag("--model", "which network; needed to start a run", choices=MODELS)
    flag("--routing-iterations", "iterations of routing", type=positive, metavar="N")
    flag("--reconstruction", "weight of the decoder's loss; 0: no decoder; 0.392: the paper's "
         "weight; with 20 the drawings resemble the digits after a few epochs",
         type=real(0, 100), metavar="W")
    flag("--dataset", "auto: MNIST, or scikit-learn's digits if MNIST is not available",
         choices=("auto", "mnist", "digits"))
    flag("--data-dir", "the folder that holds MNIST/raw", type=nonempty_path, metavar="DIR")
    flag("--train-size", "use only the first N training images", type=positive, metavar="N")
    flag("--rotate", "rotate training digits by up to R degrees", type=real(0, 180), metavar="R")
    flag("--shift", "shift training digits by up to S pixels", type=real(0, 28), metavar="S")
    flag("--epochs", "passes over the training images", type=positive, metavar="N")
    flag("--batch-size", "images per step and process", type=positive, metavar="N")
    flag("--lr", "initial learning rate of Adam, multiplied by 0.7 every 2 epochs",
         type=real(1e-9, 100))
    flag("--seed", "seed of weights, order and augmentation",
         type=number_between(int, 0, 4_000_000))
    flag("--device", "cpu, cuda, cuda:1 ...; without it, the GPU if there is one")
    flag("--compile", "use torch.compile: it takes a minute, then steps may be faster",
         action=argparse.BooleanOptionalAction)
    flag("--dry-run", "take one step of everything, in runs/dry-run", action="store_true")
    flag("--run-dir", "where the run goes; without it, runs/<model>-<script>[-digits][-seedN]",
         type=nonempty_path, metavar="DIR")
    flag("--resume", "continue the run in this folder; only --epochs, --data-dir, --device and "
         "--compile may be given with it", type=nonempty_path, metavar="RUN")
    flag("--overwrite", "replace the run in the run folder", action="store_true")
    # fmt: on
    return parser


def read_command(given: dict, script_settings: dict) -> tuple[dict, Path]:
    """The flags that were given -> the settings of the run, and its folder.

    `script_settings` are those that the script itself decides: its name and its number of
    processes.
    """
    if "resume" in given:
        return resumed_settings(given, script_settings), Path(given["resume"])
    config = new_settings(given, script_settings)
    return config, run_folder(given, config)


def new_settings(given: dict, script_settings: dict) -> dict:
    """The settings of a new run: the defaults, except for what was given.

    The dataset and the device that are really used are recorded, not "auto" or None, so
    that a resumed run uses the same ones. MNIST may be downloaded here.
    """
    config = DEFAULTS | only_settings(given) | script_settings
    if config["model"] is None:
        raise UserError(f"--model is missing: give one of {', '.join(MODELS)}")
    if config["dry_run"]:
        refuse_flags(given, ("epochs", "train_size"), "--dry-run", "a dry run takes one step")
    config["device"] = str(find_device(config["device"]))
    ranks = config["world_size"]
    config["effective_batch"] = config["batch_size"] * ranks * config["accumulation_steps"]
    config["dataset"], reason = resolve_dataset(config["dataset"], config["data_dir"])
    if reason:
        print(f"NOTE: MNIST is not available: {reason}")
    if config["dry_run"]:
        config["epochs"] = 1
        config["train_size"] = config["effective_batch"]
    return config


def resumed_settings(given: dict, script_settings: dict) -> dict:
    """The settings that a run began with, except for the few that may change.

    UserError if the run belongs to the other script or to another number of processes,
    because its steps would not be the same.
    """
    others = [name for name in given if name not in MAY_CHANGE]
    refuse_flags(given, others, "--resume", "a run keeps the settings that it began with")
    folder = Path(given["resume"])
    if not (folder / "last.pt").exists():
        raise UserError(f"there is no run in {folder} (no last.pt)")
    recorded = load_checkpoint(folder / "last.pt")["config"]
    if any(recorded.get(name) != value for name, value in script_settings.items()):
        ranks = recorded.get("world_size")
        processes = "1 process" if ranks == 1 else f"{ranks} processes"
        needed = f"train_{recorded.get('script')}.py with {processes}"
        raise UserError(f"{folder} must be resumed by {needed}")
    if recorded.get("model") not in MODELS:
        text = f"{folder} belongs to another network, {recorded.get('model')}"
        hint = "for a plain network, write -m results.plain before the script's name"
        raise UserError(f"{text}: {hint}")
    config = DEFAULTS | recorded | only_settings(given)
    config["device"] = str(find_device(config["device"]))
    return config


def refuse_flags(given: dict, names, other: str, reason: str) -> None:
    """UserError if one of these flags was given together with the other flag."""
    for name in names:
        if name in given:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} cannot be used with {other}: {reason}")


def only_settings(given: dict) -> dict:
    """The flags that are settings of a run: not --run-dir, --resume and --overwrite."""
    return {name: value for name, value in given.items() if name in DEFAULTS}


def run_folder(given: dict, config: dict) -> Path:
    """Where a new run goes: --run-dir, or a name made of model, script, data and seed."""
    if "run_dir" in given:
        return Path(given["run_dir"])
    if config["dry_run"]:
        return DRY_RUN
    name = f"{config['model']}-{config['script']}"
    if config["dataset"] == "digits":
        name += "-digits"
    if config["seed"] > 0:
        name += f"-seed{config['seed']}"
    return Path("runs") / name


# -- 4. Main -----------------------------------------------------------------------


def make_datasets(config: dict, device: torch.device) -> tuple[DigitDataset, DigitDataset]:
    """Training and validation images, on the device.

    Validation images are neither rotated nor shifted.
    """
    network = MODELS[config["model"]]
    images, labels = load(config["dataset"], config["data_dir"], "train")
    n = config["train_size"]  # None: all of them
    train_set = DigitDataset(
        images[:n], labels[:n], network, device, config["rotate"], config["shift"]
    )
    images, labels = load(config["dataset"], config["data_dir"], "validation")
    n = 200 if config["dry_run"] else None
    return train_set, DigitDataset(images[:n], labels[:n], network, device)


def open_folder(run: Run, given: dict) -> None:
    """Lock the run's folder. UserError if it holds a run that must not be replaced.

    Lock first, then look: if two runs start at the same moment, only one of them
    finds the folder empty.
    """
    run.lock = FolderLock(run.folder)
    usual_dry_run = run.config["dry_run"] and run.folder == DRY_RUN
    may_hold_a_run = "resume" in given or "overwrite" in given or usual_dry_run
    if not may_hold_a_run and any((run.folder / name).exists() for name in RUN_FILES):
        hint = "--resume continues it, --overwrite replaces it, or give another --run-dir"
        raise UserError(f"{run.folder} holds a run: {hint}")


def record_hardware(run: Run, train_set: DigitDataset) -> None:
    """Add to the settings what is only known now: the hardware and the number of images."""
    config = run.config
    threads = torch.get_num_threads()
    config["hardware"] = f"{threads} CPU thread{'s' if threads > 1 else ''}"
    if config["device"].startswith("cuda"):
        config["hardware"] = torch.cuda.get_device_name()
    config["train_images"] = len(train_set)


def print_intro(run: Run) -> None:
    """What is trained, on what, and where it goes."""
    config = run.config
    network = type(run.model).__name__
    note = NOTE[config["dataset"]]
    where = f" on {config['hardware']}"
    if config["world_size"] > 1:
        where = f", {config['world_size']} processes, each{where}"
    print(f"{network} in {config['precision']}{where}{note}")
    print(
        f"{config['train_images']:,} images of {config['dataset']}, "
        f"{config['effective_batch']} per step, learning rate {config['lr']:g}"
    )
    print(f"run folder: {run.folder}, epochs done: {len(run.history)}", flush=True)


def print_stopped(run: Run, program: str) -> None:
    """Ctrl-C: a run can be stopped at any moment; say how to continue."""
    command = f"{program} --resume {shell_path(run.folder)}"
    print(f"\nstopped; to continue: {command}", file=sys.stderr)


def print_outro(run: Run) -> None:
    """How the run ended, and what to do next."""
    best = run.best
    note = NOTE[run.config["dataset"]]
    print(f"best validation accuracy {best['val_accuracy']:.2f} % in epoch {best['epoch']}")
    print(f"test it: python evaluate.py {shell_path(run.folder)}{note}")


def main() -> None:
    if is_torchelastic_launched() and os.environ["WORLD_SIZE"] != "1":  # by torchrun
        hint = "under torchrun, start train_ddp.py"
        raise UserError(f"train_single.py runs as one process: {hint}")
    given = vars(build_parser(__doc__).parse_args())
    config, folder = read_command(given, {"script": "single", "world_size": 1})
    device = torch.device(config["device"])
    train_set, validation_set = make_datasets(config, device)
    run = Run(config, folder, device)
    open_folder(run, given)
    if "resume" in given:
        run.load()
    record_hardware(run, train_set)
    run.save()
    print_intro(run)
    try:
        while len(run.history) < config["epochs"]:
            start = time.perf_counter()
            trained = train_one_epoch(run, train_set)
            seconds = time.perf_counter() - start
            validated = validate(run.model, validation_set)
            run.finish_epoch(trained, validated, seconds)
            run.save()
            print(run.epoch_line(), flush=True)
    except KeyboardInterrupt:
        print_stopped(run, "python train_single.py")
        raise
    print_outro(run)


# -- 5. Tools that the other scripts share -----------------------------------------


def make_network(config: dict) -> nn.Module:
    """The network of a run's settings, with new weights."""
    network = MODELS[config["model"]]
    return network(config["routing_iterations"], config["reconstruction"])


class FolderLock:
    """A run folder belongs to one training run at a time, until its process ends.

    The kernel keeps the lock while the file .lock is open, so kill -9 releases it, too.
    (A file system without locks would need a marker file, which kill -9 leaves behind.)
    UserError if another training run has the lock, or if the folder cannot be locked.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.file = folder / ".lock"
        self.file_lock = FileLock(self.file, fallback_to_soft=False)
        try:
            self.file_lock.acquire(blocking=False)
        except Timeout:
            hint = "wait for it, or start another run in another --run-dir"
            raise UserError(f"another training run is writing to {folder}: {hint}") from None
        except (OSError, NotImplementedError) as error:
            hint = "choose a --run-dir on another disk"
            raise UserError(f"{folder} cannot be locked ({error}): {hint}") from None
        self.file_identity = self.file.stat()

    def check(self) -> None:
        """UserError if our folder was moved or removed.

        Another training run may have made a new folder of the same name, and we must not
        write into that. (While our .lock is open, no other file gets its inode number. So
        the same number means that it is still our file.)
        """
        found = self.file.stat() if self.file.exists() else None
        if found is None or not os.path.samestat(found, self.file_identity):
            text = f"{self.folder} was moved or removed during training"
            hint = "nothing more was written; resume the run where it is now"
            raise UserError(f"{text}: {hint}")


def write_file(path: Path, content: bytes) -> None:
    """Write, flush, rename: at any moment `path` has its old or its new content, whole.

    For the file system a rename is atomic. Writing into the file itself would destroy
    the old checkpoint before the new one is complete: a full disk or a power failure in
    between would cost the run. Only one process may write a path at a time. In training,
    FolderLock ensures that.
    """
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        with open(scratch, "wb") as file:
            file.write(content)
            file.flush()  # from Python to the kernel,
            os.fsync(file.fileno())  # and from there to the disk, before the rename
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def write_csv(path: Path, columns: Sequence[str], rows: list[dict]) -> None:
    """Write a line for each row. Keys of a row that are not columns are left out."""
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, table.getvalue().encode())


def load_checkpoint(file: Path) -> dict:
    """What Run.save wrote to a file. UserError if it is damaged or something else."""
    checkpoint = load_saved(file)
    if not {"config", "history", *SAVED} <= checkpoint.keys():
        raise UserError(f"{file} is not a checkpoint that this version can read")
    return checkpoint


def load_saved(file: Path) -> dict:
    """A dictionary that torch.save wrote to a file. UserError if it cannot be read."""
    content = io.BytesIO(file.read_bytes())
    saved = None
    with suppress(Exception):  # a damaged file can raise anything
        # torch.load ignores the checksums of the zip file.
        if zipfile.ZipFile(content).testzip() is None:
            content.seek(0)
            # Unpickling can run arbitrary code. weights_only accepts only tensors and
            # plain types.
            saved = torch.load(content, map_location="cpu", weights_only=True)
    if not isinstance(saved, dict):
        raise UserError(f"{file} is damaged, or this version cannot read it")
    return saved


def find_device(name: str | None) -> torch.device:
    """The device of that name, or the best available one. UserError if there is none."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):  # mps computes channels_last wrongly
            raise UserError(f"--device {name}: this code is written for cpu and cuda")
        torch.empty(0, device=device)  # PyTorch itself says what is wrong
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: {reason} (try --device cpu)") from None
    return device


def check_compiler(device: torch.device) -> None:
    """UserError if torch.compile cannot work because it finds no compiler.

    On the CPU it generates C++. On a GPU it generates Triton, which needs a C compiler.
    """
    if device.type == "cuda":  # as in triton.runtime.build
        language = "C"
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    else:  # as in torch._inductor.config
        language = "C++"
        names = [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
    if not any(shutil.which(name) for name in names):
        hint = "install one, or do not compile (--no-compile with --resume)"
        raise UserError(f"torch.compile needs a {language} compiler, {names[0]}: {hint}")


def number_between(kind: type, low: float, high: float):
    """A type for argparse: an int or a float from low to high.

    argparse passes the flag's text to the returned function.
    """

    def parse(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if low <= number <= high:  # False for nan
            return number
        name = "an integer" if kind is int else "a number"
        message = f"{text!r} is not {name} between {low:,} and {high:,}"
        raise argparse.ArgumentTypeError(message)

    return parse


def nonempty_path(text: str) -> str:
    """A type for argparse: a path. It expands ~: in --data-dir=~/x the shell does not."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return os.path.expanduser(text)


def shell_path(path: Path) -> str:
    """A path as one would type it: quoted, and never mistaken for a flag."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a UserError (one line), and a flag that is not given
    does not appear in the result."""

    def __init__(self, description: str):
        super().__init__(
            usage=argparse.SUPPRESS,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )

    def add_flag(self, name: str, help: str, **options) -> None:
        """Like add_argument, but it appends the default to the help text."""
        default = DEFAULTS.get(name[2:].replace("-", "_"))
        if default is not None and default is not False:
            help += f" (default: {default})"
        self.add_argument(name, help=help, **options)

    def error(self, message: str) -> None:
        raise UserError(message)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of returning it to the kernel in every step.

    Otherwise large tensors (feature maps and votes, about 25 MB each) would be returned
    and mapped again, page by page, in each step: a capsule layer would take almost twice
    as long (results/README.md, Speed). On other systems this has no effect.
    """
    with suppress(OSError, AttributeError):  # no glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
        libc.mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap too


def open_streams() -> None:
    """Make stdout and stderr safe to print to.

    A stream that was closed (>&-) is None in Python. A character that the terminal
    cannot show is printed as its code.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the end
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's streams do not have it
            stream.reconfigure(errors="backslashreplace")


def flush_streams() -> None:
    """Write what is still buffered: os._exit would not.

    If that fails, Python must not try again at exit. (It would print two more lines and
    change the exit code.)
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a full disk, or nobody reads the pipe any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run_main(main, last_to_speak: bool = False, leave=sys.exit) -> None:
    """Call main, then leave(code). A user's mistake prints one line and gives code 2.

    A traceback means a bug, or that another rank died. If several processes find the
    same mistake, only one should print it: those that are `last_to_speak` wait for 30 s.
    """
    open_streams()
    keep_freed_memory()
    on_interrupt = signal.getsignal(signal.SIGINT)
    code = 0
    mistake = None
    try:
        main()
        sys.stdout.flush()  # here, so that an error is reported like any other
    except (UserError, OSError) as error:  # OSError: a file cannot be read or written
        mistake = str(error)
    except RuntimeError as error:
        # A GPU's full memory has an exception class of its own, the CPU's does not.
        on_cpu = "can't allocate memory" in str(error)
        if not (on_cpu or isinstance(error, torch.OutOfMemoryError)):
            raise
        mistake = (
            f"{str(error).splitlines()[0]} (the memory is full: in training, lower --batch-size)"
        )
    except KeyboardInterrupt:
        code = 130
    if mistake is not None:
        code = 2
        if last_to_speak:
            # Usually torchrun kills this process meanwhile, because another one failed. If
            # it is still alive afterwards, no other process has found the mistake.
            time.sleep(30)
        with suppress(OSError):
            print(f"error: {mistake}", file=sys.stderr)
    signal.signal(signal.SIGINT, on_interrupt)  # a notebook needs its own handler again
    flush_streams()
    leave(code)


if __name__ == "__main__":
    run_main(main, last_to_speak=is_torchelastic_launched() and os.environ["LOCAL_RANK"] != "0")
