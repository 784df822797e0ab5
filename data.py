"""MNIST (or scikit-learn's digits) as batches on the training device, in reproducible epochs.

Images stay on the device as uint8 (MNIST: 47 MB). A whole batch is turned into network input by one
grid_sample: that costs a twentieth (28x28) to a fifth (78x78) of doing it image by image with PIL.
Everything random in epoch e is a function of (seed, e) alone: a resumed run needs no saved random
state, and one process at batch 64 sees exactly the images that two processes at batch 32 see.
"""

import contextlib
import io
import os
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.utils.data import Dataset

VALIDATION_SIZE = {"mnist": 5000, "digits": 200}
SPLIT_SEED = 20171026  # of the validation part, for every --seed: or runs could not be compared
STALL_SECONDS = 15  # a download that brings no byte for this long is given up
MNIST_FILES = {  # name: (size in bytes, magic number, items), from the IDX format's description
    "train-images-idx3-ubyte": (47_040_016, 2051, 60_000),
    "train-labels-idx1-ubyte": (60_008, 2049, 60_000),
    "t10k-images-idx3-ubyte": (7_840_016, 2051, 10_000),
    "t10k-labels-idx1-ubyte": (10_008, 2049, 10_000),
}


class DataError(Exception):
    """The data cannot be had or is damaged; the message is one line for the user."""


# ------------------------------------------------------------------------------------------------
# Finding the data
# ------------------------------------------------------------------------------------------------


def mnist_is_there(data_dir: str | Path) -> bool:
    """True if all four MNIST files lie in data_dir, whole; DataError if one of them is damaged.

    torchvision only looks whether the files exist, and would go on with half a file.
    """
    raw = Path(data_dir) / "MNIST" / "raw"
    found = [raw / name for name in MNIST_FILES if (raw / name).exists()]
    for path in found:
        size, magic, items = MNIST_FILES[path.name]
        with open(path, "rb") as file:
            head = file.read(8)  # big-endian: magic number, number of items
        actual = path.stat().st_size
        expected = magic.to_bytes(4, "big") + items.to_bytes(4, "big")
        if actual != size or head != expected:
            what = f"{actual:,} bytes instead of {size:,}" if actual != size else "a wrong header"
            raise DataError(f"{path} is damaged ({what}): delete it and start again")
    return len(found) == len(MNIST_FILES)


def download_mnist(data_dir: str | Path) -> None:
    """Download MNIST into data_dir by torchvision; DataError if that fails or stalls.

    The files arrive in a temporary folder and are moved when they are whole, so that a stop in the
    middle leaves nothing half-written. A network that swallows packets would block for minutes: the
    download runs in a thread, and is left behind when no byte has come for STALL_SECONDS.
    """
    outcome: list[str] = []

    def work(folder: str) -> None:
        try:
            torchvision.datasets.MNIST(folder, download=True)
            outcome.append("")
        except Exception as error:  # noqa: BLE001 - whatever it was, it is told to the user
            lines = [line for line in str(error).splitlines() if line.strip()]
            outcome.append(lines[-1] if lines else type(error).__name__)

    try:
        os.makedirs(data_dir, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(
            prefix=".download-", dir=data_dir, ignore_cleanup_errors=True
        )
    except OSError as error:
        raise DataError(f"cannot write to {data_dir}: {error.strerror}") from None
    with scratch as folder, contextlib.redirect_stdout(io.StringIO()):
        thread = threading.Thread(target=work, args=(folder,), daemon=True)
        thread.start()
        arrived, last_news = 0, time.monotonic()
        while thread.is_alive() and time.monotonic() - last_news < STALL_SECONDS:
            thread.join(0.2)
            size = 0
            for path in Path(folder).rglob("*"):
                with contextlib.suppress(OSError):  # may just have been renamed
                    size += path.stat().st_size
            if size != arrived:
                arrived, last_news = size, time.monotonic()
        if thread.is_alive():
            raise DataError(f"download failed: no answer for {STALL_SECONDS} s")
        if outcome != [""]:
            raise DataError(f"download failed: {outcome[0]}")
        raw = Path(data_dir) / "MNIST" / "raw"
        try:
            raw.mkdir(parents=True, exist_ok=True)
            for name in MNIST_FILES:
                os.replace(Path(folder) / "MNIST" / "raw" / name, raw / name)
        except OSError as error:
            raise DataError(f"cannot write to {raw}: {error.strerror}") from None


def resolve_dataset(choice: str, data_dir: str | Path) -> tuple[str, str]:
    """What "auto", "mnist" or "digits" means here: (name, why MNIST could not be had or "").

    "auto" falls back to the digits only where MNIST cannot be had. A damaged file is an error under
    "auto" too: silently training on something else would be worse. "digits" never asks the network.
    """
    if choice == "digits" or mnist_is_there(data_dir):
        return ("digits" if choice == "digits" else "mnist"), ""
    try:
        download_mnist(data_dir)
        return "mnist", ""
    except DataError as error:
        if choice == "auto":
            return "digits", str(error)
        raise DataError(
            f"MNIST is not in {data_dir} and the {error}; put its four files in "
            f"{Path(data_dir) / 'MNIST' / 'raw'}, or use --dataset digits"
        ) from None


def load(name: str, data_dir: str | Path, part: str) -> tuple[Tensor, Tensor]:
    """Images uint8 [n, 28, 28] and labels int64 [n] of part "train", "validation" or "test".

    The test part is evaluate.py's alone; training never loads it.
    """
    if name == "mnist":
        if not mnist_is_there(data_dir):
            raise DataError(f"MNIST is no longer in {data_dir}: give its folder with --data-dir")
        mnist = torchvision.datasets.MNIST(str(data_dir), train=part != "test")
        images, labels = mnist.data, mnist.targets
        if labels.max() > 9:
            raise DataError(f"the labels in {data_dir} are damaged: delete MNIST/raw there")
    else:
        images, labels = _digits(test=part == "test")
    if part == "test":
        return images, labels
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out = VALIDATION_SIZE[name]
    chosen = order[:held_out] if part == "validation" else order[held_out:]
    return images[chosen], labels[chosen]


def _digits(test: bool) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits of 8x8 in 0..16 as uint8 28x28; a fixed stratified test part."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)
    images, labels = (parts[1], parts[3]) if test else (parts[0], parts[2])
    images = torch.from_numpy(images).view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(images, (28, 28), mode="bilinear", align_corners=False)
    return images.squeeze(1).round().to(torch.uint8), torch.from_numpy(labels).long()


# ------------------------------------------------------------------------------------------------
# From images to network input
# ------------------------------------------------------------------------------------------------


def prepare(
    images: Tensor, model, degrees: Tensor | None = None, shifts: Tensor | None = None
) -> Tensor:
    """uint8 [B, 28, 28] -> what `model` wants: float32 [B, 1, side, side], rotated, standardised.

    shifts [B, 2] moves each image by its own pixels, of 28, to the right and down; then degrees [B]
    turns it by its own angle, counter-clockwise as torchvision's rotate does. Shift, rotation and
    resize are ONE bilinear grid_sample; standardisation comes after it, so that the corners which
    turn into the picture are black (0) and not grey (mean).
    """
    x = images.unsqueeze(1).float() / 255  # [B, 28, 28] -> [B, 1, 28, 28] in 0..1
    if degrees is not None or shifts is not None or model.side != x.shape[-1]:
        zero = torch.zeros(len(x), device=x.device)
        angle = zero if degrees is None else torch.deg2rad(degrees)
        cos, sin = angle.cos(), angle.sin()
        # grid_sample's coordinates run from -1 to 1, so a pixel is 2 / 28 wide
        right, down = (zero, zero) if shifts is None else (shifts * (2 / x.shape[-1])).unbind(1)
        # Each OUTPUT place (x, y) asks where it comes from: (x cos - y sin, x sin + y cos), and
        # before the shift, `right` further left. The y axis points down, hence this matrix turns
        # the picture counter-clockwise.
        theta = torch.stack([cos, -sin, -right, sin, cos, -down], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(theta, [len(x), 1, model.side, model.side], align_corners=False)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (x - model.mean) / model.std


def epoch_seed(seed: int, epoch: int) -> int:
    """The sampler's seed in an epoch: runs of different --seed share none below 1000 epochs."""
    return 1000 * seed + epoch


class DigitBatches(Dataset):
    """Labelled digits that a DataLoader asks for by whole batches.

    With `rotate` or `shift` > 0 every image has one angle and one shift per epoch, drawn together
    for ALL images from (seed, epoch) and indexed by image: who computes an image does not change
    what it looks like.
    """

    def __init__(self, images: Tensor, labels: Tensor, model, device, rotate=0.0, shift=0.0):
        self.images, self.labels, self.model = images.to(device), labels.to(device), model
        self.rotate, self.shift = rotate, shift  # at most: degrees, pixels
        self.degrees, self.shifts = None, None  # of each image in this epoch: [n], [n, 2]

    def set_epoch(self, seed: int, epoch: int) -> None:
        """Draw this epoch's angles, uniform in ±rotate degrees, and shifts, in ±shift pixels."""
        if self.rotate > 0 or self.shift > 0:
            # Another stream than the permutation's, which is seeded with epoch_seed itself.
            generator = torch.Generator().manual_seed(epoch_seed(seed, epoch) + (1 << 40))
            uniform = 2 * torch.rand(3, len(self.labels), generator=generator) - 1
            self.degrees = (uniform[0] * self.rotate).to(self.labels.device)
            self.shifts = (uniform[1:].T * self.shift).to(self.labels.device)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A DataLoader calls this once per batch instead of __getitem__ once per image."""
        device = self.labels.device  # from pinned memory the copy to a GPU keeps no one waiting
        chosen = torch.tensor(indices, pin_memory=device.type == "cuda")
        chosen = chosen.to(device, non_blocking=True)
        images, labels = self.images[chosen], self.labels[chosen]
        if self.degrees is None:
            return prepare(images, self.model), labels
        return prepare(images, self.model, self.degrees[chosen], self.shifts[chosen]), labels


def as_batch(batch):
    """collate_fn for DigitBatches, whose batches are already whole."""
    return batch
