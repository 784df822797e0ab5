"""AlexCapsNet: AlexNet's five convolutions, adapted to digits, with capsules on top.

    python alexcaps.py          prints the shape after each step and the parameter count

It has 2,677,696 parameters. AlexNet is from Krizhevsky, Sutskever, Hinton, NeurIPS 2012,
here with the channel counts of the 2014 version (arXiv:1404.5997), as in torchvision. The
capsule hybrid follows a student report, with three departures, each marked below.
"""

from torch import nn

from capsules import CapsuleNetwork, DigitCapsules, PrimaryCapsules, print_shapes


class AlexCapsNet(CapsuleNetwork):
    """[B, 1, 28, 28] standardised digits -> digit capsule vectors [B, 10, 16]."""

    # The input: its size, and the mean and standard deviation of MNIST's pixels
    side = 28
    mean = 0.1307
    std = 0.3081
    # The primary capsules sit at 2x2 places, and each place sees the whole image.
    map_side = 2
    place_stride = None

    def __init__(self, routing_iterations: int = 3, reconstruction: float = 0.0):
        # Departure 1: the first convolution is 5x5 with stride 1. The report keeps
        # AlexNet's 11x11 with stride 4, made for photographs of 224x224. On digits that
        # leaves 2x2 places after the first pooling, and the convolutions that follow see
        # mostly padding.
        #
        # Pooling comes before ReLU. The result is the same in either order, but in this
        # one ReLU has less than a quarter of the numbers to compute.
        features = nn.Sequential(
            nn.Conv2d(1, 64, 5, padding=2),  # [B, 64, 28, 28]
            nn.MaxPool2d(3, stride=2),  # [B, 64, 13, 13]
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 192, 5, padding=2),  # [B, 192, 13, 13]
            nn.MaxPool2d(3, stride=2),  # [B, 192, 6, 6]
            nn.ReLU(inplace=True),
            nn.Conv2d(192, 384, 3, padding=1),  # [B, 384, 6, 6]
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1),  # [B, 256, 6, 6]
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1),  # [B, 256, 6, 6]
            nn.MaxPool2d(3, stride=2),  # [B, 256, 2, 2]
            nn.ReLU(inplace=True),
        )
        # Departure 2: the primary capsules are squashed, as in [S17]. The report does
        # not squash them. There are 32 at each of 2x2 places: [B, 128, 8].
        primary = PrimaryCapsules(256, types=32, I=8, kernel_size=1)
        digits = DigitCapsules(N=128, I=8, iterations=routing_iterations)  # [B, 10, 16]
        # Departure 3: the initialisation (initialise_convolutions and DigitCapsules
        # have the rules). With PyTorch's default, the report's network classified 33 %
        # of the digits correctly in its first epoch, according to its log.
        super().__init__(features, primary, digits, reconstruction)


if __name__ == "__main__":
    print_shapes(AlexCapsNet())
