"""Train AlexCapsNet or ResCapsNet on one device, in float32 (TF32 on a GPU).

    python train_single.py --model alexcaps              20 epochs of MNIST
    python train_single.py --model rescaps --epochs 3    a shorter run
    python train_single.py --model alexcaps --dry-run    one step of everything
    python train_single.py --resume runs/alexcaps-single  go on after any stop

Writes last.pt, best.pt, metrics.csv and config.json to runs/<model>-single, for
evaluate.py. On 2 CPU cores AlexCapsNet takes 1.5 to 3.5 minutes an epoch: of
the validation digits 98.5 % are right after the first, 99.6 % after nine.

Read it downwards: 1. one epoch and validation, the lesson; 2. a run, and what
is saved of it; 3. the command line; 4. main. Then open train_ddp.py beside it.
"""

if __name__ == "__main__":
    print("loading PyTorch ...", flush=True)  # two seconds and more, without another word

import argparse
import ctypes
import fcntl
import io
import json
import math
import os
import shlex
import signal
import sys
import time
import zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm

from alexcaps import AlexCapsNet
from capsules import capsule_lengths, margin_loss
from data import DigitBatches, UserError, as_batch, epoch_seed, load, resolve_dataset
from rescaps import ResCapsNet

MODELS = {"alexcaps": AlexCapsNet, "rescaps": ResCapsNet}
VALIDATION_BATCH = 500  # larger than in training: there are no gradients to keep in memory
LOOK_SECONDS = 0.5  # between two looks at the sums: see watch

# -- 1. One epoch and validation -------------------------------------------------------------------


def train_one_epoch(run: "Run", dataset: DigitBatches) -> Tensor:
    """One pass over the training images -> sums over them, [3]: loss, hits, images (see tally).

    `run` (part 2) owns the model, its optimizer, the settings and the epochs finished so far.
    """
    model, optimizer, config, epoch = run.model, run.optimizer, run.config, len(run.history) + 1
    dataset.set_epoch(config["seed"], epoch)  # draws this epoch's angles
    # The order follows from (seed, epoch) alone. (shuffle=True would draw another number first, and
    # so give another order than DistributedSampler in train_ddp.py.)
    generator = torch.Generator().manual_seed(epoch_seed(config["seed"], epoch))
    sampler = RandomSampler(dataset, generator=generator)
    loader = DataLoader(dataset, config["batch_size"], sampler=sampler, collate_fn=as_batch)
    # float64, as many numbers are added up
    sums = torch.zeros(3, dtype=torch.float64, device=dataset.labels.device)
    model.train()  # BatchNorm: the statistics of the batch
    # The batches come ready from the device and the sums stay there: no step waits for the device.
    for images, labels in watch(loader, sums, f"epoch {epoch}/{config['epochs']}", finite):
        lengths = capsule_lengths(model(images))  # [B, 1, side, side] -> [B, J, D] -> [B, J]
        loss = margin_loss(lengths, labels)
        optimizer.zero_grad()  # or backward would add to the last step's gradients
        loss.backward()
        optimizer.step()
        sums += tally(loss, lengths, labels)
    return sums


@torch.no_grad()
def validate(model: nn.Module, dataset: DigitBatches, share=None, hidden: bool = False) -> Tensor:
    """The same sums over the validation images, or over the share of them with these indices.

    Sums and not means, so that the shares of several processes can simply be added.
    """
    loader = DataLoader(dataset, VALIDATION_BATCH, sampler=share, collate_fn=as_batch)
    sums = torch.zeros(3, dtype=torch.float64, device=dataset.labels.device)
    model.eval()  # BatchNorm: the running statistics
    for images, labels in watch(loader, sums, "validation", Tensor.tolist, hidden):
        lengths = capsule_lengths(model(images))
        sums += tally(margin_loss(lengths, labels), lengths, labels)
    return sums


def tally(loss: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
    """What a batch adds to the sums: [loss x images, hits, images], on the device.

    loss is the batch's mean, lengths [B, J], labels [B]. Nothing here waits for the device, as
    loss.item() would in every step.
    """
    hits = (lengths.argmax(dim=1) == labels).sum()
    images = torch.ones_like(hits) * len(labels)
    return torch.stack([loss.detach() * images, hits, images])


def watch(loader: DataLoader, sums: Tensor, title: str, look, hidden: bool = False):
    """Hand out the loader's batches, and look at the sums about every half second.

    On a first reading take watch(loader, ...) for loader. look(numbers) brings the sums to the CPU,
    which has to wait there until the device has done all steps so far: too dear for every step, but
    a progress bar needs it, and a run whose loss has become nan should stop.
    """
    last, last_time = 0, time.perf_counter()  # step and time of the last look
    due = 1  # step of the next one
    pace = [1, 1.0]  # steps and seconds between the last two looks, the wait included
    with tqdm(total=len(loader), desc=title, leave=False, disable=hidden or None) as bar:
        for number, batch in enumerate(loader, start=1):
            yield batch  # the caller's loop body runs here, and adds the batch to `sums`
            if number in (due, len(loader)):
                loss, hits, images, steps, seconds = look(torch.cat([sums, sums.new_tensor(pace)]))
                # Where look adds up over ranks, all see the same numbers, hence the same next step.
                due = number + max(1, int(LOOK_SECONDS * steps / seconds))
                bar.set_postfix_str(f"loss {loss / images:.4f}, accuracy {hits / images:.2%}")
                bar.update(number - last)
                now = time.perf_counter()
                pace = [number - last, now - last_time]
                last, last_time = number, now


def finite(sums: Tensor) -> list[float]:
    """The sums on the CPU; UserError if the loss among them is not a finite number."""
    numbers = sums.tolist()  # CPU-GPU sync point
    if not math.isfinite(numbers[0]):
        cure = "begin again with a lower --lr (for fp16: --precision bf16)"
        raise UserError(f"the loss is {numbers[0]}: {cure}")
    return numbers


# -- 2. A run, and what is saved of it -------------------------------------------------------------

SAVED = ("model", "optimizer", "scheduler", "scaler")
RUN_FILES = ("last.pt", "best.pt", "metrics.csv", "config.json", "report.json")
# Of the history; accuracies are in percent
COLUMNS = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "seconds")


class Run:
    """A training run: its settings, all that changes in it, and the epochs that are finished.

    For a resumed run to end with the same bits, all that changes must be saved: weights and running
    statistics of BatchNorm, Adam's two moments of each weight and its step count, the schedule's
    epoch count, the scale of mixed precision. No random state is: what is random in epoch e is a
    function of (seed, e). The epoch's number and the best epoch follow from the history.
    """

    def __init__(self, config: dict, device: torch.device):
        self.config, self.history = config, []  # a row for each finished epoch
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)
            # TF32: products of numbers with 10 bits of mantissa instead of 23, but much faster
            torch.set_float32_matmul_precision("high")
        torch.manual_seed(config["seed"])
        network = MODELS[config["model"]](config["routing_iterations"])
        # Drawn on the CPU: the same start on every device. channels_last is [B, H, W, C] in memory,
        # as oneDNN and cuDNN like it best.
        self.model = network.to(device, memory_format=torch.channels_last)
        if config["compile"]:
            # dynamic=False: one program for each batch size (32, the short last batch, validation)
            # instead of a slower one for all sizes.
            self.model.compile(dynamic=False)
        # fused: one kernel updates all weights
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config["lr"], fused=True)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=2, gamma=0.7)
        # Of mixed precision, for train_ddp.py. Outside of float16 it does nothing.
        self.scaler = torch.amp.GradScaler(device.type, enabled=config["precision"] == "fp16")

    @property
    def best(self) -> dict:
        """The row of the best epoch so far; of equals, the earliest."""
        return max(self.history, key=lambda row: row["val_accuracy"])

    def load(self, checkpoint: dict, path: Path) -> None:
        """Go back to a checkpoint; UserError if it is of another network."""
        self.history = checkpoint["history"]
        if len(self.history) > self.config["epochs"]:
            raise UserError(f"--epochs is less than the {len(self.history)} that are done")
        try:
            for name in SAVED:
                getattr(self, name).load_state_dict(checkpoint[name])
        except (RuntimeError, ValueError):  # other names, or weights of other shapes
            raise UserError(f"{path} is no checkpoint of this network") from None

    def finish_epoch(self, trained: Tensor, validated: Tensor, seconds: float) -> None:
        """Add an epoch, given its sums, to the history, and go on in the schedule."""
        row = {"epoch": len(self.history) + 1}
        for part, sums in (("train", trained), ("val", validated)):
            loss, hits, images = finite(sums)
            row[f"{part}_loss"] = round(loss / images, 6)
            row[f"{part}_accuracy"] = round(100 * hits / images, 3)
        row["lr"] = float(f"{self.scheduler.get_last_lr()[0]:.6g}")
        row["seconds"] = round(seconds, 2)
        self.history.append(row)
        self.scheduler.step()  # of epochs, not of batches

    def claim(self, folder: Path, may_hold_run: bool) -> None:
        """Make the run folder and lock it until this process ends, however it ends.

        UserError where another training has the lock, or where there is a run that must stay.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # The kernel holds the lock as long as the file is open, also for a process that is killed.
        self.lock = open(folder / ".lock", "a")  # noqa: SIM115 - not closed here
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            cure = "wait for it, or begin another run in another --run-dir"
            raise UserError(f"another training is writing to {folder}: {cure}") from None
        except OSError as error:  # some network disks have no locks
            cure = "it must be on another disk"
            raise UserError(f"{folder} cannot be locked, {error.strerror}: {cure}") from None
        # Asked under the lock: two that start at once cannot both find the folder empty.
        if not may_hold_run and any((folder / name).exists() for name in RUN_FILES):
            raise UserError(f"{folder} holds a run: --resume goes on, --overwrite replaces it")

    def save(self, folder: Path) -> None:
        """Write the run as it stands after an epoch, or before the first, so any stop can resume.

        best.pt comes before last.pt: a stop between them repeats the epoch, and ends the same.
        """
        # Tensors and plain Python types: torch.load(weights_only=True) takes nothing else
        state = {name: getattr(self, name).state_dict() for name in SAVED}
        state |= {"config": self.config, "history": self.history}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        if self.history and self.best is self.history[-1]:
            write_file(folder / "best.pt", buffer.getvalue())
        write_file(folder / "last.pt", buffer.getvalue())
        if not self.history:  # --overwrite: only now, as the new run is there, the old one goes
            for name in ("best.pt", "report.json"):
                (folder / name).unlink(missing_ok=True)
        # For people and for archived results; training never reads these two.
        rows = [COLUMNS, *(row.values() for row in self.history)]
        lines = [",".join(map(str, row)) for row in rows]
        write_file(folder / "metrics.csv", ("\n".join(lines) + "\n").encode())
        write_file(folder / "config.json", (json.dumps(self.config, indent=2) + "\n").encode())

    def epoch_line(self) -> str:
        """What is printed after each epoch; * marks the best so far."""
        row, mark = self.history[-1], " *" if self.best is self.history[-1] else ""
        text = (
            "epoch {epoch:2}/{} | train loss {train_loss:.4f} acc {train_accuracy:#.4g}"
            " | val loss {val_loss:.4f} acc {val_accuracy:#.4g} | {seconds:.0f} s"
        )
        return text.format(self.config["epochs"], **row) + mark


def write_file(path: Path, content: bytes) -> None:
    """Write, flush, rename: at any moment `path` holds its old or its new content, whole.

    One writer at a time: of training, Run.claim sees to that.
    """
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        with open(scratch, "wb") as file:
            file.write(content)
            file.flush()  # from Python to the kernel,
            os.fsync(file.fileno())  # and from there to the disk, before the name points to it
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def load_checkpoint(path: Path) -> dict:
    """What Run.save wrote to `path`; UserError if it is damaged or something else."""
    content = io.BytesIO(path.read_bytes())
    with suppress(Exception):  # a damaged file makes the reader fail in any way at all
        damaged = zipfile.ZipFile(content).testzip()  # torch.load does not compare checksums
        content.seek(0)
        # weights_only: a pickle may run any code when it is loaded; this refuses all but tensors
        # and plain types.
        checkpoint = torch.load(content, map_location="cpu", weights_only=True)
        if damaged is None and {"config", "history", *SAVED} <= checkpoint.keys():
            return checkpoint
    raise UserError(f"{path} is damaged, or no checkpoint of this program")


# -- 3. The command line ---------------------------------------------------------------------------

# What train_ddp.py varies, as it is for this script
FIXED = {"script": "single", "world_size": 1, "precision": "fp32", "accumulation_steps": 1}
# Said at the start and at the end: nobody shall take the one for the other
NOTE = {"mnist": "", "digits": "\nNOTE: this is scikit-learn's 1,797 small digits, not MNIST"}
FREE = ("--resume", "--epochs", "--data-dir", "--device", "--compile")  # may change


def number(kind: type, low: float, high: float, text: str) -> float:
    """A type for argparse, by partial: an int or float within low..high."""
    with suppress(ValueError):
        if low <= kind(text) <= high:  # nan is not
            return kind(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} from {low:g} to {high:g}")


def refuse(text: str) -> None:
    """Raise it as a UserError."""
    raise UserError(text)


def path(text: str) -> str:
    """A type for argparse: a path, with ~ expanded; the shell leaves it in --data-dir=~/mnist."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return os.path.expanduser(text)


def build_parser(description: str) -> argparse.ArgumentParser:
    """The flags that both training scripts have."""
    # fmt: off
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse  # a wrong flag is a mistake like any other
    flag, count = parser.add_argument, partial(number, int, 1, 10**6)
    rate, span = partial(number, float, 1e-9, 100), partial(number, float, 0, 180)
    flag("--model", choices=MODELS, help="which network; needed to start a run")
    flag("--dataset", choices=("auto", "mnist", "digits"), default="auto",
         help="auto: MNIST, or scikit-learn's digits where MNIST cannot be had")
    flag("--data-dir", type=path, metavar="DIR", default="data", help="holds MNIST/raw (data)")
    flag("--epochs", type=count, metavar="N", default=20, help="passes over the images (20)")
    flag("--batch-size", type=count, metavar="N", default=32, help="per step and process (32)")
    flag("--lr", type=rate, default=1e-3, help="of Adam, times 0.7 every 2 epochs (0.001)")
    flag("--routing-iterations", type=count, metavar="N", default=3, help="of capsules (3)")
    flag("--rotate", type=span, metavar="R", default=10.0, help="digits by up to R degrees (10)")
    flag("--shift", type=span, metavar="S", default=0.0, help="and move them by up to S pixels (0)")
    flag("--train-size", type=count, metavar="N", help="at most the first N training images")
    flag("--seed", type=partial(number, int, 0, 10**9), default=0, help="of all randomness (0)")
    flag("--device", help="cpu, cuda, cuda:1 ...; else the GPU where there is one")
    flag("--compile", action="store_true", help="torch.compile: a minute first, then maybe faster")
    flag("--dry-run", action="store_true", help="one step of everything, into runs/dry-run")
    flag("--run-dir", type=path, metavar="DIR", help="else runs/<model>-<script>[-digits][-seedN]")
    flag("--resume", type=path, metavar="RUN",
         help="go on with the run in this folder; may change epochs, data-dir, device, compile")
    flag("--overwrite", action="store_true", help="replace the run in the run folder")
    # fmt: on
    return parser


def find_device(name: str | None) -> torch.device:
    """The device of that name, or the best one there is; UserError if there is none of it."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):  # mps computes channels_last wrongly, without a word
            raise UserError(f"--device {name}: this code is written for cpu and cuda")
        torch.empty(0, device=device)  # PyTorch itself says what is wrong with it
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def read_command(parser: argparse.ArgumentParser, fixed: dict) -> tuple:
    """The command line -> (settings, run folder, resume?, may the folder hold a run).

    `fixed` are settings that no flag chooses. MNIST may be downloaded here.
    """
    args = parser.parse_args()
    if args.resume:
        recorded = load_checkpoint(Path(args.resume) / "last.pt")["config"]
        script, processes = recorded.get("script"), recorded.get("world_size")
        if (script, processes) != (fixed["script"], fixed["world_size"]):
            raise UserError(f"{args.resume} needs train_{script}.py, {processes} process(es)")
        if recorded.get("model") not in MODELS:
            raise UserError(f"{args.resume} is of another network, {recorded.get('model')}")
        for flag in (word.split("=")[0] for word in sys.argv[1:]):
            if flag.startswith("--") and flag not in FREE:
                raise UserError(f"{flag} does not go with --resume: a run keeps what it began with")
        # A resumed run is the command that began it, and what is added now
        parser.set_defaults(**{k: recorded[k] for k in vars(args) if k in recorded})
        args = parser.parse_args()
    config = vars(args) | fixed
    folder, resume, overwrite = (config.pop(name) for name in ("run_dir", "resume", "overwrite"))
    if config["model"] is None:
        raise UserError(f"--model is missing: give one of {', '.join(MODELS)}")
    config["device"] = str(find_device(config["device"]))
    processes, batches = config["world_size"], config["accumulation_steps"]
    config["effective_batch"] = config["batch_size"] * processes * batches
    if resume:
        return config, Path(resume), True, True
    config["dataset"], reason = resolve_dataset(config["dataset"], config["data_dir"])
    if reason:
        print(f"NOTE: MNIST could not be had: {reason}")
    name = f"{config['model']}-{config['script']}"
    name += "-digits" if config["dataset"] == "digits" else ""
    name += f"-seed{config['seed']}" if config["seed"] else ""
    if config["dry_run"]:
        config |= {"epochs": 1, "train_size": config["effective_batch"]}
        name, overwrite = "dry-run", overwrite or not folder
    return config, Path(folder or f"runs/{name}"), False, overwrite


# -- 4. Main ---------------------------------------------------------------------------------------


def make_datasets(config: dict, device: torch.device) -> tuple[DigitBatches, DigitBatches]:
    """Training and validation images on the device. A dry run validates on 200 of them only."""
    name, data_dir, network = config["dataset"], config["data_dir"], MODELS[config["model"]]
    images, labels = (part[: config["train_size"]] for part in load(name, data_dir, "train"))
    train_set = DigitBatches(images, labels, network, device, config["rotate"], config["shift"])
    count = 200 if config["dry_run"] else None
    images, labels = (part[:count] for part in load(name, data_dir, "validation"))
    return train_set, DigitBatches(images, labels, network, device)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of returning it to the kernel after every step.

    Feature maps of 25 MB would be handed back and faulted in again, page by page, in each step.
    Elsewhere it has no effect.
    """
    with suppress(OSError, AttributeError):  # no glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
        libc.mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap too


def begin(run: Run, folder: Path, train_set: DigitBatches, script: str) -> None:
    """Save the run as it stands, and say what is trained and, on Ctrl-C, how to go on."""
    config = run.config
    gpu = torch.cuda.get_device_name() if config["device"].startswith("cuda") else ""
    config["hardware"] = gpu or f"{torch.get_num_threads()} CPU threads"
    config["train_images"] = len(train_set)
    run.save(folder)
    size, lr, note = config["effective_batch"], config["lr"], NOTE[config["dataset"]]
    print(f"{type(run.model).__name__} in {config['precision']} on {config['hardware']}{note}")
    print(f"{len(train_set):,} images of {config['dataset']}, {size} a step, learning rate {lr:g}")
    print(f"run folder: {folder}, epochs done: {len(run.history)}", flush=True)

    def stop(*_) -> None:
        print(f"\nstopped; to go on: {script} --resume {shlex.quote(str(folder))}", file=sys.stderr)
        os._exit(130)  # at once, as kill -9 would: every moment is a good one to stop

    signal.signal(signal.SIGINT, stop)


def print_outro(run: Run, folder: Path) -> None:
    """How the run ended and what to do next."""
    best, digits = run.best, NOTE[run.config["dataset"]]
    print(f"best validation accuracy {best['val_accuracy']:.2f} % in epoch {best['epoch']}")
    print(f"test it: python evaluate.py {shlex.quote(str(folder))}{digits}")


def run_main(main, quiet: bool = False, leave=sys.exit) -> None:
    """Call main, then leave(code); a mistake is one line and code 2. A traceback means a bug.

    Of several processes that all found it, one prints it, and the others are quiet.
    """
    keep_freed_memory()
    code = 0
    try:
        main()
    except (UserError, OSError) as error:  # OSError: a file that cannot be read or written
        code = 2
        if quiet:  # torchrun ends all as soon as one fails: let that be the one that prints
            time.sleep(30)  # still alive after that, this process alone knows what is wrong
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:  # before there is anything to go on with
        code = 130
    sys.stdout.flush()  # not every way to leave does
    leave(code)


def main() -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ["WORLD_SIZE"] != "1":
        raise UserError("train_single.py is one process: under torchrun, start train_ddp.py")
    config, folder, resume, may_hold_run = read_command(build_parser(__doc__), FIXED)
    device = torch.device(config["device"])
    train_set, validation_set = make_datasets(config, device)
    run = Run(config, device)
    run.claim(folder, may_hold_run)
    if resume:  # read under the lock, so that nobody else can write it any more
        run.load(load_checkpoint(folder / "last.pt"), folder / "last.pt")
    begin(run, folder, train_set, "python train_single.py")
    while len(run.history) < config["epochs"]:
        start = time.perf_counter()
        trained = train_one_epoch(run, train_set)
        seconds = time.perf_counter() - start
        run.finish_epoch(trained, validate(run.model, validation_set), seconds)
        run.save(folder)
        print(run.epoch_line(), flush=True)
    print_outro(run, folder)


if __name__ == "__main__":
    run_main(main, quiet="TORCHELASTIC_RUN_ID" in os.environ and os.environ["LOCAL_RANK"] != "0")
