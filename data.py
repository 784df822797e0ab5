"""MNIST (or scikit-learn's digits) as batches on the training device, in reproducible epochs.

Images stay on the device as uint8 (MNIST: 47 MB). A whole batch is turned into network input by one
grid_sample: that costs an eleventh (28x28) to a third (78x78) of doing it one by one with PIL.
Everything random in epoch e is a function of (seed, e) alone: a resumed run needs no saved random
state, and one process at batch 64 sees exactly the images that two processes at batch 32 see.
"""

import contextlib
import gzip
import hashlib
import io
import os
import socket
import tempfile
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

VALIDATION_SIZE = {"mnist": 5000, "digits": 200}
SPLIT_SEED = 20171026  # of the validation part, whatever --seed: else runs could not be compared
SILENCE_SECONDS = 15  # a download that brings no byte for this long is given up
# MNIST's files, unpacked, and their checksums. FashionMNIST has the same names and sizes: only the
# content tells them apart.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


class UserError(Exception):
    """Something that the user can mend. One line: what is wrong, what to do. Exit code 2."""


# ------------------------------------------------------------------------------------------------
# Finding the data
# ------------------------------------------------------------------------------------------------


def read_mnist(data_dir: str | Path, name: str) -> bytes | None:
    """The content of one MNIST file, unpacked; None if missing, UserError if it is not MNIST's.

    What is checked is what is returned, so nothing else in the folder can be read by mistake.
    """
    path = Path(data_dir) / "MNIST" / "raw" / name
    if not path.exists():
        path = path.with_name(f"{name}.gz")
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except FileNotFoundError:
        return None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        content = b""  # half a file: its checksum is wrong as well
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != MNIST_MD5[name]:
        raise UserError(
            f"{path} is not MNIST's: it is damaged, or of another dataset; move it elsewhere, or "
            "give another --data-dir"
        )
    return content


def download_mnist(data_dir: str | Path) -> None:
    """Download MNIST into data_dir by torchvision; UserError if that fails.

    The files arrive in a scratch folder and are moved when they are whole, so that a stop in the
    middle leaves nothing half-written in their place.
    """
    import torchvision  # here, as its import takes long and only a download needs it

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_SECONDS)  # else a network that swallows packets blocks us
    try:
        os.makedirs(data_dir, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as scratch,
            contextlib.redirect_stdout(io.StringIO()),
        ):
            torchvision.datasets.MNIST(scratch, download=True)
            raw = Path(data_dir) / "MNIST" / "raw"
            raw.mkdir(parents=True, exist_ok=True)
            for name in MNIST_MD5:
                os.replace(Path(scratch) / "MNIST" / "raw" / name, raw / name)
    except Exception as error:  # noqa: BLE001 - whatever it was, the user is told
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"its download failed: {lines[-1]}") from None
    finally:
        socket.setdefaulttimeout(before)


def resolve_dataset(choice: str, data_dir: str | Path) -> tuple[str, str]:
    """What "auto", "mnist" or "digits" means here: (name, why MNIST could not be had or "").

    "auto" falls back to the digits only where MNIST cannot be had. A file that is not MNIST's is an
    error under "auto" too. "digits" never asks the network.
    """
    if choice == "digits":
        return "digits", ""
    missing = [name for name in MNIST_MD5 if read_mnist(data_dir, name) is None]
    if not missing:
        return "mnist", ""
    try:
        download_mnist(data_dir)
        return "mnist", ""
    except UserError as error:
        reason = f"{data_dir} has no {', no '.join(f'MNIST/raw/{name}' for name in missing)}"
        if choice == "auto":
            return "digits", f"{reason}, and {error}"
        raise UserError(
            f"{reason}, and {error}; put MNIST's files there, or use --dataset digits"
        ) from None


def load(name: str, data_dir: str | Path, part: str) -> tuple[Tensor, Tensor]:
    """Images uint8 [n, 28, 28] and labels int64 [n] of part "train", "validation" or "test".

    The test part is evaluate.py's alone; training never loads it.
    """
    if name == "mnist":
        stem = "t10k" if part == "test" else "train"
        kinds = (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte")
        contents = [read_mnist(data_dir, kind) for kind in kinds]
        if None in contents:
            raise UserError(f"MNIST is not in {data_dir}: give its folder with --data-dir")
        # IDX format: 16 bytes of header before the images, 8 before the labels, then one byte each
        images, labels = (torch.frombuffer(bytearray(c), dtype=torch.uint8) for c in contents)
        images, labels = images[16:].view(-1, 28, 28), labels[8:].long()
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


def images_to_input(
    images: Tensor, model, degrees: Tensor | None = None, shifts: Tensor | None = None
) -> Tensor:
    """uint8 [B, 28, 28] -> what `model` wants: float32 [B, 1, side, side], rotated, standardised.

    shifts [B, 2] moves each image by its own pixels, of 28, to the right and down; then degrees [B]
    turns it by its own angle, counter-clockwise as torchvision's rotate does. Shift, rotation and
    resize are ONE bilinear grid_sample; standardisation comes after it, so that the corners which
    turn into the picture are black (0) and not grey (mean). TypeError if images are not uint8.
    """
    if images.dtype != torch.uint8:  # floats in 0..1 would be divided by 255 again
        raise TypeError(f"images_to_input wants uint8 images in 0..255, not {images.dtype}")
    x = images.unsqueeze(1).float() / 255  # [B, 28, 28] -> [B, 1, 28, 28] in 0..1
    if degrees is not None or shifts is not None or model.side != x.shape[-1]:
        zero = torch.zeros(len(x), device=x.device)
        angle = zero if degrees is None else torch.deg2rad(degrees)
        cos, sin = angle.cos(), angle.sin()
        # grid_sample's coordinates run from -1 to 1, so a pixel is 2 / 28 wide
        right, down = (zero, zero) if shifts is None else (shifts * (2 / x.shape[-1])).unbind(1)
        # Each OUTPUT place (x, y) asks where it comes from: (x cos - y sin, x sin + y cos), and, as
        # the shift came first, from `right` further left. The y axis points down, hence this matrix
        # turns the picture counter-clockwise.
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
    for ALL images from (seed, epoch) and indexed by image: which process computes an image does not
    change what it looks like.
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
        device = self.labels.device
        # From pinned memory the copy to a GPU keeps no one waiting
        chosen = torch.tensor(indices, pin_memory=device.type == "cuda")
        chosen = chosen.to(device, non_blocking=True)
        images, labels = self.images[chosen], self.labels[chosen]
        if self.degrees is None:
            return images_to_input(images, self.model), labels
        return images_to_input(images, self.model, self.degrees[chosen], self.shifts[chosen]), labels


def as_batch(batch):
    """collate_fn for DigitBatches, whose batches are already whole."""
    return batch
