"""ResCapsNet: three residual blocks at full resolution, with capsules on top.

    python rescaps.py           prints the shape after each step and the parameter count

It has 2,022,240 parameters. Residual blocks are from He, Zhang, Ren, Sun, CVPR 2016. The
capsule hybrid follows a student report, with four departures, each marked below.
"""

from torch import Tensor, nn

from capsules import CapsuleNetwork, DigitCapsules, PrimaryCapsules, print_shapes


class ResidualBlock(nn.Module):
    """y = ReLU(x + F(x)), [B, C, H, W] -> the same shape.

    The sum lets gradients flow around F.
    """

    def __init__(self, channels: int):
        super().__init__()
        # No bias before a BatchNorm: it subtracts the mean, and the bias with it.
        self.residual = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        # In place, because nothing else needs the intermediate values. At B = 32 this
        # avoids two temporary tensors of 25 MB.
        return self.residual(x).add_(x).relu_()


class ResCapsNet(CapsuleNetwork):
    """[B, 1, 78, 78] standardised digits -> digit capsule vectors [B, 10, 16]."""

    # 78 is the report's input size. The last convolution, 9x9 with stride 8, then has
    # (78 - 9) // 8 + 1 = 9 places along each side.
    side = 78
    # Departure 1: the input is standardised. The report's input lies in 0..1.
    mean = 0.1307
    std = 0.3081
    # The primary capsules sit at 9x9 places, 8 pixels apart. Each sees 17x17 pixels.
    map_side = 9
    place_stride = 8

    def __init__(self, routing_iterations: int = 3, reconstruction: float = 0.0):
        # Departure 2: no bias in the first convolution, because BatchNorm follows. The
        # report has one (2,022,272 parameters).
        features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False),  # [B, 32, 78, 78]
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            # Each block keeps [B, 32, 78, 78]: full resolution is what takes the time.
            ResidualBlock(32),
            ResidualBlock(32),
            ResidualBlock(32),
        )
        # Departure 3: the primary capsules are squashed, as in [S17]. The report does
        # not squash them. There are 16 at each of 9x9 places: [B, 1296, 8].
        primary = PrimaryCapsules(32, types=16, I=8, kernel_size=9, stride=8)
        digits = DigitCapsules(N=1296, I=8, iterations=routing_iterations)  # [B, 10, 16]
        # Departure 4: the initialisation, as in AlexCapsNet.
        super().__init__(features, primary, digits, reconstruction)


if __name__ == "__main__":
    print_shapes(ResCapsNet())
