"""AlexCapsNet: AlexNet's five convolutions, cut to digits, under capsules. 2,677,696 parameters.

    python alexcaps.py          prints the shape at each step and the parameter count

AlexNet is Krizhevsky, Sutskever, Hinton, NeurIPS 2012, here with the channels of its 2014 version
(arXiv:1404.5997), as torchvision has it. The capsule hybrid follows a student report, with three
departures, each marked below.
"""

import torch
from torch import Tensor, nn

from capsules import DigitCapsules, PrimaryCapsules, initialise_convolutions


class AlexCapsNet(nn.Module):
    """[B, 1, 28, 28] standardised digits -> digit capsule vectors [B, 10, 16]."""

    side, mean, std = 28, 0.1307, 0.3081  # what it wants of its input; MNIST's own mean and std

    def __init__(self, routing_iterations: int = 3):
        super().__init__()
        # Departure 1: the report keeps AlexNet's 11x11 stride-4 stem, made for 224x224 photographs.
        # It leaves 2x2 places after two layers, and three 3x3 convolutions then look at padding.
        # Pooling before ReLU: max(max(x, 0)) = max(0, max(x)), so it is the same network, but ReLU
        # has less than a quarter of the numbers to do.
        # fmt: off
        self.features = nn.Sequential(
            nn.Conv2d(1, 64, 5, padding=2),  #                            [B, 64, 28, 28]
            nn.MaxPool2d(3, stride=2), nn.ReLU(inplace=True),  #          [B, 64, 13, 13]
            nn.Conv2d(64, 192, 5, padding=2),  #                          [B, 192, 13, 13]
            nn.MaxPool2d(3, stride=2), nn.ReLU(inplace=True),  #          [B, 192, 6, 6]
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True),  #  [B, 384, 6, 6]
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True),  #  [B, 256, 6, 6]
            nn.Conv2d(256, 256, 3, padding=1),  #                         [B, 256, 6, 6]
            nn.MaxPool2d(3, stride=2), nn.ReLU(inplace=True),  #          [B, 256, 2, 2]
        )
        # fmt: on
        # Departure 2: primary capsules are squashed, as the paper's are; the report's are not.
        self.primary = PrimaryCapsules(256, types=32, dim=8, kernel_size=1)  # [B, 2*2*32 = 128, 8]
        self.digits = DigitCapsules(n=128, i=8, iterations=routing_iterations)  # [B, 10, 16]
        # Departure 3: the initialisation. With PyTorch's default the report's network got 33 % of
        # the digits right over its first epoch (its log). See initialise_convolutions and
        # DigitCapsules for the rule.
        initialise_convolutions(self)

    def forward(self, images: Tensor, return_couplings: bool = False):
        return self.digits(self.primary(self.features(images)), return_couplings)


if __name__ == "__main__":
    from capsules import capsule_lengths

    model, x = AlexCapsNet(), torch.randn(2, 1, AlexCapsNet.side, AlexCapsNet.side)
    for layer in (*model.features, model.primary, model.digits):
        x = layer(x)
        print(f"{type(layer).__name__:16s} {list(x.shape)}")
    print("lengths at the start", capsule_lengths(x).mean().item())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
