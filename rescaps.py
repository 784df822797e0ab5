"""ResCapsNet: three residual blocks at full resolution under capsules. 2,022,240 parameters.

    python rescaps.py           prints the shape at each step and the parameter count

Residual blocks are He, Zhang, Ren, Sun, CVPR 2016; the capsule hybrid follows a student report,
with four departures, each marked below.
"""

import torch
from torch import Tensor, nn

from capsules import DigitCapsules, PrimaryCapsules, initialise_convolutions


class ResidualBlock(nn.Module):
    """y = ReLU(x + F(x)), [B, C, H, W] -> the same shape. The sum lets gradients flow around F."""

    def __init__(self, channels: int):
        super().__init__()
        # No bias before a BatchNorm, which subtracts the mean, and the bias with it.
        self.residual = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        # In place, as nobody needs the values in between: 50 MB less per block at B = 32.
        return self.residual(x).add_(x).relu_()


class ResCapsNet(nn.Module):
    """[B, 1, 78, 78] standardised digits -> digit capsule vectors [B, 10, 16]."""

    # The report's 78: its convolution 9x9 with stride 8 has (78 - 9) // 8 + 1 = 9 places a side.
    # Departure 1: standardised digits; the report's lie in 0..1.
    side, mean, std = 78, 0.1307, 0.3081

    def __init__(self, routing_iterations: int = 3):
        super().__init__()
        # Departure 2: the report's stem has a bias before its BatchNorm (2,022,272 parameters).
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False),  # [B, 32, 78, 78]
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            ResidualBlock(32),  # each [B, 32, 78, 78], full resolution: the costly part
            ResidualBlock(32),
            ResidualBlock(32),
        )
        # Departure 3: primary capsules are squashed, as the paper's are; the report's are not.
        self.primary = PrimaryCapsules(32, types=16, dim=8, kernel_size=9, stride=8)  # [B, 1296, 8]
        self.digits = DigitCapsules(n=9 * 9 * 16, i=8, iterations=routing_iterations)  # [B, 10, 16]
        # Departure 4: the initialisation, as in AlexCapsNet.
        initialise_convolutions(self)

    def forward(self, images: Tensor, return_couplings: bool = False):
        return self.digits(self.primary(self.features(images)), return_couplings)


if __name__ == "__main__":
    from capsules import capsule_lengths

    model, x = ResCapsNet(), torch.randn(2, 1, ResCapsNet.side, ResCapsNet.side)
    for layer in (*model.features, model.primary, model.digits):
        x = layer(x)
        print(f"{type(layer).__name__:16s} {list(x.shape)}")
    print("lengths at the start", capsule_lengths(x).mean().item())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
