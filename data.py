"""MNIST (or scikit-learn's digits) as batches on the training device, in reproducible epochs.

The images stay on the device as uint8 (MNIST: 47 MB). One grid_sample turns a whole batch
into network input. PIL, which works image by image, takes 11 times as long for inputs of
28x28, and 3 times as long for 78x78.

Everything random in an epoch depends on (seed, epoch) alone. So a resumed run needs no
saved random state, and one process with batches of 64 sees exactly the images that two
processes with batches of 32 see.
"""

import gzip
import hashlib
import os
import time
import urllib.request
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

VALIDATION_SIZE = {"mnist": 5000, "digits": 200}
# The validation images are the same for every --seed, so that runs with different seeds
# can be compared.
SPLIT_SEED = 20171026
# MNIST's files, unpacked, and their checksums. FashionMNIST's files have the same names and
# sizes: only their content differs.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
SILENCE_SECONDS = 15  # give up on a mirror that sends nothing for this long
DOWNLOAD_SECONDS = 300  # in total, for all files from all mirrors
MAX_FILE_BYTES = 10_000_000  # the largest file of MNIST has 9,912,422 (packed)


class UserError(Exception):
    """A mistake that the user can fix. One line: what is wrong, what to do. Exit code 2."""


# -- Finding the data --------------------------------------------------------------


def read_mnist(data_dir: str | Path, file_name: str) -> bytes | None:
    """The content of one MNIST file, unpacked. None if it is missing.

    UserError if it is not a file of MNIST. The file is read once: the bytes that are checked
    are the bytes that are returned.
    """
    path = Path(data_dir) / "MNIST" / "raw" / file_name
    if not path.exists():
        path = path.with_name(f"{file_name}.gz")
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except FileNotFoundError:
        return None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        content = b""  # half a file: its checksum is wrong as well
    if md5(content) != MNIST_MD5[file_name]:
        hint = "move it elsewhere, or give another --data-dir"
        raise UserError(f"{path} is not a file of MNIST (or it is damaged): {hint}")
    return content


def md5(content: bytes) -> str:
    """The checksum that identifies MNIST's files."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def download_mnist(data_dir: str | Path) -> None:
    """Download MNIST's four files into data_dir. UserError if that fails.

    Nothing is written until all four have arrived. Each file is written under a temporary
    name, and then renamed.
    """
    from torchvision.datasets import MNIST  # slow to import, and only needed here

    deadline = time.monotonic() + DOWNLOAD_SECONDS
    contents = {}
    for packed_name, checksum in MNIST.resources:  # "train-images-idx3-ubyte.gz", its MD5
        packed = download_from_mirrors(MNIST.mirrors, packed_name, checksum, deadline)
        contents[packed_name.removesuffix(".gz")] = gzip.decompress(packed)
    raw = Path(data_dir) / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        scratch = raw / f".{name}.{os.getpid()}.tmp"  # another process may download, too
        try:
            scratch.write_bytes(content)
            os.replace(scratch, raw / name)
        finally:
            scratch.unlink(missing_ok=True)  # if the disk is full, a part of it is there


def download_from_mirrors(mirrors: list[str], name: str, checksum: str, deadline: float) -> bytes:
    """The file from the first mirror that has it. UserError if none does."""
    reasons = []
    for mirror in mirrors:
        try:
            content = download(mirror + name, deadline)
        except Exception as error:  # noqa: BLE001 - whatever it was, the next mirror may work
            reasons.append(f"{mirror}: {error or type(error).__name__}")
            continue
        if md5(content) == checksum:
            return content
        reasons.append(f"{mirror}: it sent a wrong or incomplete file")
    raise UserError(f"the download failed ({'; '.join(reasons)})")


def download(url: str, deadline: float) -> bytes:
    """Download a URL. Raises an error if the server is silent, too slow, or sends too much.

    `deadline` is compared with time.monotonic().
    """
    content = bytearray()
    with urllib.request.urlopen(url, timeout=SILENCE_SECONDS) as response:
        while piece := response.read1(100_000):  # what has arrived, at most 100 kB
            content += piece
            if time.monotonic() > deadline:
                raise TimeoutError(f"not complete after {DOWNLOAD_SECONDS} s")
            if len(content) > MAX_FILE_BYTES:
                raise ValueError(f"more than {MAX_FILE_BYTES:,} bytes")
    return bytes(content)


def resolve_dataset(choice: str, data_dir: str | Path) -> tuple[str, str]:
    """What "auto", "mnist" or "digits" means here: (name, why MNIST is missing or "").

    "auto" falls back to the digits only if MNIST is not available. A wrong or damaged file
    is an error under "auto", too. "digits" never goes online.
    """
    if choice == "digits":
        return "digits", ""
    missing = [name for name in MNIST_MD5 if read_mnist(data_dir, name) is None]
    if not missing:
        return "mnist", ""
    try:
        download_mnist(data_dir)
    except (UserError, OSError) as error:
        names = ", ".join(f"MNIST/raw/{name}" for name in missing)
        reason = f"{data_dir} lacks {names}, and {error}"
        if choice == "auto":
            return "digits", reason
        hint = "put MNIST's files there, or use --dataset digits"
        raise UserError(f"{reason}; {hint}") from None
    return "mnist", ""


def load(dataset: str, data_dir: str | Path, part: str) -> tuple[Tensor, Tensor]:
    """Images uint8 [n, 28, 28] and labels int64 [n] of "train", "validation" or "test".

    Training never loads the test part.
    """
    is_test = part == "test"
    if dataset == "mnist":
        images, labels = load_mnist(data_dir, is_test)
    else:
        images, labels = load_digits(is_test)
    if is_test:
        return images, labels
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(labels), generator=generator)
    held_out = VALIDATION_SIZE[dataset]
    chosen = order[:held_out] if part == "validation" else order[held_out:]
    return images[chosen], labels[chosen]


def load_mnist(data_dir: str | Path, test: bool) -> tuple[Tensor, Tensor]:
    """MNIST's 60,000 training or 10,000 test digits. UserError if they are not there."""
    stem = "t10k" if test else "train"
    images = read_mnist(data_dir, f"{stem}-images-idx3-ubyte")
    labels = read_mnist(data_dir, f"{stem}-labels-idx1-ubyte")
    if images is None or labels is None:
        raise UserError(f"MNIST is not in {data_dir}: give its folder with --data-dir")
    # The IDX format: a header (16 bytes before images, 8 before labels), then one byte for
    # each pixel or label. bytearray, because a tensor's memory must be writable.
    pixels = torch.frombuffer(bytearray(images), dtype=torch.uint8)[16:]
    classes = torch.frombuffer(bytearray(labels), dtype=torch.uint8)[8:]
    return pixels.view(-1, 28, 28), classes.long()


def load_digits(test: bool) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits of 8x8 pixels in 0..16, enlarged to uint8 28x28.

    The test part is always the same 360 of them, with about equally many of each class.
    """
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    digits, classes = datasets.load_digits(return_X_y=True)
    train_digits, test_digits, train_classes, test_classes = train_test_split(
        digits, classes, test_size=360, stratify=classes, random_state=0
    )
    if test:
        digits, classes = test_digits, test_classes
    else:
        digits, classes = train_digits, train_classes
    images = torch.from_numpy(digits).view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(images, (28, 28), mode="bilinear", align_corners=False)
    return images.squeeze(1).round().to(torch.uint8), torch.from_numpy(classes).long()


# -- From images to network input --------------------------------------------------


def images_to_input(
    images: Tensor, model, degrees: Tensor | None = None, shifts: Tensor | None = None
) -> Tensor:
    """uint8 [B, 28, 28] -> what `model` wants: float32 [B, 1, side, side], standardised.

    shifts [B, 2] says how far each image moves to the right and down, in pixels of the
    28x28 image. Then degrees [B] says how far it turns, counter-clockwise as in torchvision.
    Shift, rotation and resize are ONE bilinear grid_sample. It comes before standardisation,
    so that corners which turn into the picture are black (0) rather than grey (the mean).
    TypeError if the images are not uint8: floats in 0..1 would be divided by 255 again.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images_to_input wants uint8 in 0..255, not {images.dtype}")
    x = images.unsqueeze(1).float() / 255  # [B, 28, 28] -> [B, 1, 28, 28] in 0..1
    moved = degrees is not None or shifts is not None
    if moved or model.side != x.shape[-1]:
        grid = sampling_grid(x, model.side, degrees, shifts)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (x - model.mean) / model.std


def sampling_grid(
    images: Tensor, side: int, degrees: Tensor | None, shifts: Tensor | None
) -> Tensor:
    """Where each pixel of the output comes from in images [B, 1, 28, 28].

    Returns [B, side, side, 2], which grid_sample looks up. Coordinates run from -1 to 1
    across the picture, so a pixel is 2 / 28 wide.
    """
    B = len(images)
    pixel = 2 / images.shape[-1]
    zero = torch.zeros(B, device=images.device)
    angle = zero if degrees is None else torch.deg2rad(degrees)
    right = zero if shifts is None else shifts[:, 0] * pixel
    down = zero if shifts is None else shifts[:, 1] * pixel
    cos = angle.cos()
    sin = angle.sin()
    # The picture is shifted, then turned. To find where the output's place (x, y) came from,
    # go backwards: undo the rotation, then the shift.
    #
    #   ( cos  -sin ) ( x )     ( right )
    #   ( sin   cos ) ( y )  -  ( down  )
    #
    # The y axis points down. So the right edge (1, 0) shows what was below it, at (cos, sin):
    # the content moved up, and the picture turned counter-clockwise.
    first_row = torch.stack([cos, -sin, -right], dim=1)  # [B, 3]
    second_row = torch.stack([sin, cos, -down], dim=1)
    matrix = torch.stack([first_row, second_row], dim=1)  # [B, 2, 3]
    # affine_grid applies the matrix to each place (x, y, 1) of the output.
    return F.affine_grid(matrix, [B, 1, side, side], align_corners=False)


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of an epoch's random numbers.

    No two runs with different --seed use the same one, if they have fewer than 1000 epochs.
    (PyTorch uses only 32 bits of it, so --seed ends at 4,000,000.)
    """
    return 1000 * seed + epoch


class DigitDataset(Dataset):
    """Labelled digits, which a DataLoader fetches in whole batches.

    With `rotate` (degrees) or `shift` (pixels) above 0, every image has one angle and one
    shift per epoch. They are drawn for ALL images from (seed, epoch) and looked up by the
    image's index, so an image looks the same whichever process computes it.
    """

    def __init__(self, images: Tensor, labels: Tensor, model, device, rotate=0.0, shift=0.0):
        self.images = images.to(device)  # uint8 [n, 28, 28]
        self.labels = labels.to(device)  # [n]
        self.model = model  # a network or its class: it says which input it wants
        self.rotate = rotate
        self.shift = shift
        self.degrees = None  # of each image in this epoch: [n]
        self.shifts = None  # [n, 2]

    def set_epoch(self, seed: int, epoch: int) -> None:
        """Draw this epoch's angles, uniform in ±rotate, and shifts, uniform in ±shift."""
        if self.rotate == 0 and self.shift == 0:
            return
        # The order of the images is drawn with the same seed, by another generator. That
        # does no harm: an image's angle says nothing about its place in the order.
        generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
        uniform = 2 * torch.rand(3, len(self.labels), generator=generator) - 1  # in -1..1
        device = self.labels.device
        self.degrees = (uniform[0] * self.rotate).to(device)
        self.shifts = (uniform[1:].T * self.shift).to(device)  # [2, n] -> [n, 2]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A DataLoader calls this once per batch, instead of __getitem__ once per image."""
        device = self.labels.device
        # Pinned memory is memory that a GPU reads by itself: the CPU need not wait.
        chosen = torch.tensor(indices, pin_memory=device.type == "cuda")
        chosen = chosen.to(device, non_blocking=True)
        images = self.images[chosen]
        labels = self.labels[chosen]
        if self.rotate == 0 and self.shift == 0:
            return images_to_input(images, self.model), labels
        if self.degrees is None:
            raise RuntimeError("call set_epoch before the first batch of each epoch")
        degrees = self.degrees[chosen]
        shifts = self.shifts[chosen]
        return images_to_input(images, self.model, degrees, shifts), labels


def as_batch(batch):
    """The collate_fn for a DigitDataset, whose batches are already whole."""
    return batch
