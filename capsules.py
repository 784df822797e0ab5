"""Capsules: squash, routing, margin loss, decoder, and the network that combines them.

Read this file first. A capsule is a small vector. Its LENGTH says how sure the network
is that something is present. Its DIRECTION should say in which pose it is.

Two papers are used throughout:

    [S17] Sabour, Frosst, Hinton: Dynamic Routing Between Capsules, NeurIPS 2017
    [H15] He, Zhang, Ren, Sun: Delving Deep into Rectifiers, ICCV 2015

All files use these dimensions. In the equations, i counts primary capsules and j counts
digit capsules.

    B  images in the batch
    N  primary capsules        I  numbers in a primary capsule (8)
    J  digit capsules (10)     D  numbers in a digit capsule (16)

The file goes from the formulas to the network:

    squash, capsule_lengths          a capsule and its length
    dynamic_routing                  from votes to digit capsules
    PrimaryCapsules, DigitCapsules   the two capsule layers
    margin_loss, Decoder             what the network is trained for
    CapsuleNetwork                   what AlexCapsNet and ResCapsNet have in common
"""

import math

import torch
from torch import Tensor, nn

# -- A capsule and its length ---------------------------------------------------------


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; leave float32 and float64 as they are.

    It matters only in mixed precision (lesson 3), which may compute the votes in 16 bits.
    What follows needs more: float16 overflows when it squares 256, and bfloat16 keeps 8
    significant bits, too few to tell nearly equal lengths apart.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def squash(s: Tensor) -> Tensor:
    """Shrink vectors to a length below 1 and keep their direction. [..., D] -> [..., D].

    [S17] eq. 1.
    """
    s = at_least_float32(s)
    #          |s|^2       s              |s|
    #   v =  --------- * -----  =  s * ---------                        [S17] eq. 1
    #        1 + |s|^2    |s|          1 + |s|^2
    #
    # We compute the second form, in which one |s| cancels out: at the zero vector it is
    # 0, while the first form is 0/0. The gradient of vector_norm is also 0 there, while
    # that of sqrt(sum(s * s)) is nan.
    norm = torch.linalg.vector_norm(s, dim=-1, keepdim=True)  # [..., D] -> [..., 1]
    return s * (norm / (1 + norm * norm))


def capsule_lengths(v: Tensor) -> Tensor:
    """The length of each capsule: its class score in 0..1. [..., D] -> [...]."""
    return torch.linalg.vector_norm(at_least_float32(v), dim=-1)


# -- From votes to digit capsules -----------------------------------------------------


def dynamic_routing(votes: Tensor, iterations: int = 3) -> tuple[Tensor, list[Tensor]]:
    """Routing by agreement: votes [B, J, N, D] -> digit capsules v [B, J, D].

    [S17] procedure 1. votes[:, j, i] is u^_j|i: what primary capsule i says that digit
    capsule j should be (DigitCapsules makes the votes). A vote that agrees with the
    current v_j counts more in the next iteration.

    The function also returns the coupling coefficients c of every iteration, each
    [B, J, N]. Gradients flow through all iterations. Each image is routed on its own: no
    sum below runs over B.

    The layout [B, J, N, D] makes this fast: the sum over i (for s_j) and the sum over D
    (for the agreement) both read memory in order. The sum over i is a batched matrix
    product, so the products of c and the votes are never stored.
    """
    votes = at_least_float32(votes)
    B, J, N = votes.shape[:3]
    # Iteration 1. The logits b_ij start at 0, so softmax gives each of the J digits an
    # equal share, 1/J. So s_j is a plain sum, without softmax or matrix product.
    #
    #   c_ij = 1 / J       s_j = sum_i c_ij u^_j|i      v_j = squash(s_j)
    #                                                               [S17] procedure 1
    v = squash(votes.sum(dim=2) / J)  # [B, J, N, D] -> [B, J, D]
    couplings = [votes.new_full((B, J, N), 1 / J)]
    b = votes.new_zeros(B, J, N)
    for _ in range(iterations - 1):  # iterations 2, 3, ...
        #   b_ij = b_ij + u^_j|i . v_j                              [S17] procedure 1
        # The dot product has only D = 16 terms: multiplying and summing is faster here
        # than a matrix product, especially in the backward pass.
        # [B, J, N, D] * [B, J, 1, D] -> [B, J, N]
        b = b + (votes * v.unsqueeze(2)).sum(dim=3)
        #   c_ij = exp(b_ij) / sum_k exp(b_ik)                            [S17] eq. 3
        # The softmax runs over the digits j: each primary capsule divides its output
        # among the digits.
        c = b.softmax(dim=1)
        #   s_j = sum_i c_ij u^_j|i                                       [S17] eq. 2
        # [B, J, 1, N] @ [B, J, N, D] -> [B, J, D]
        s = (c.unsqueeze(2) @ votes).squeeze(2)
        v = squash(s)
        couplings.append(c)
    return v, couplings


# -- The two capsule layers -----------------------------------------------------------


class PrimaryCapsules(nn.Module):
    """A convolution whose channels are read as capsules: [B, C, H, W] -> [B, N, I].

    `types` capsules of I numbers sit at each place of the output map [H', W'], so
    N = H' * W' * types. They are ordered by place first, then by type.
    """

    def __init__(self, channels: int, types: int, I: int, kernel_size: int, stride=1):
        super().__init__()
        self.I = I
        self.conv = nn.Conv2d(channels, types * I, kernel_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)  # [B, C, H, W] -> [B, types*I, H', W']
        # The I numbers of a capsule must come from ONE place of the map, so the
        # channels go last before the reshape. (Without this, a capsule would be made of
        # numbers of one channel at several places.)
        x = x.permute(0, 2, 3, 1)  # [B, types*I, H', W'] -> [B, H', W', types*I]
        u = x.reshape(x.shape[0], -1, self.I)  # -> [B, H'*W'*types, I]
        return squash(u)


class DigitCapsules(nn.Module):
    """Primary capsules vote for digits, then votes are routed: [B, N, I] -> [B, J, D]."""

    def __init__(self, N: int, I: int, J: int = 10, D: int = 16, iterations: int = 3):
        super().__init__()
        self.J = J
        self.D = D
        self.iterations = iterations
        # weight[i] holds the matrices W_i1 to W_iJ side by side, so that one product
        # gives all J votes of capsule i. They are transposed, [I, D] instead of [D, I],
        # because u_i stands on their left.
        self.weight = nn.Parameter(torch.empty(N, I, J * D))
        # How large should the first weights be? Each number of a vote has variance
        # std^2 |u|^2. In iteration 1, s_j is the sum of N independent votes, divided by
        # J, and it has D numbers:
        #
        #   E|s_j|^2 = D * N * std^2 * |u|^2 / J^2
        #
        # where |u| is near 1 (PrimaryCapsules squashes). We want |s_j| = 1/5. Then
        # |v_j| = (1/25) / (1 + 1/25), about 0.04. That is below the margin m- = 0.1, so
        # the nine absent digits start without loss. With a much smaller |s_j|, training
        # stays at 10 % accuracy for a while, because the gradient shrinks with |s_j|.
        # With a much larger |s_j|, the nine absent digits start above the margin and
        # must first be pushed down.
        nn.init.normal_(self.weight, std=J / (5 * math.sqrt(D * N)))

    def forward(self, u: Tensor) -> Tensor:
        v, _ = self.route(u)
        return v

    def route(self, u: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Digit capsules [B, J, D], and the couplings of each iteration of routing."""
        votes = self.make_votes(u)
        # In mixed precision (lesson 3), autocast would compute the matrix products of
        # routing in 16 bits. Here it is switched off.
        with torch.autocast(votes.device.type, enabled=False):
            return dynamic_routing(votes, self.iterations)

    def make_votes(self, u: Tensor) -> Tensor:
        """Primary capsules [B, N, I] -> votes [B, J, N, D]."""
        #   u^_j|i = W_ij u_i                                             [S17] eq. 2
        # as a batch of N matrix products, [B, I] @ [I, J*D]. W is not copied. Many
        # implementations copy it once per image: 0.7 MB in AlexCapsNet, 6.6 MB in
        # ResCapsNet.
        u = u.transpose(0, 1)  # [B, N, I] -> [N, B, I]
        votes = torch.bmm(u, self.weight)  # [N, B, J*D]
        votes = votes.unflatten(2, (self.J, self.D))  # [N, B, J*D] -> [N, B, J, D]
        return votes.permute(1, 2, 0, 3).contiguous()  # -> [B, J, N, D]


# -- What the network is trained for --------------------------------------------------


def margin_loss(lengths: Tensor, labels: Tensor, m_plus=0.9, m_minus=0.1, lam=0.5) -> Tensor:
    """The margin loss of lengths [B, J] and labels [B]: a scalar, the mean over images.

    [S17] eq. 4. The true digit's capsule should be longer than m_plus, the others
    shorter than m_minus.
    """
    lengths = at_least_float32(lengths)
    T = nn.functional.one_hot(labels, lengths.shape[1])  # [B] -> [B, J]: 1 if true
    T = T.to(lengths.dtype)
    #   L_k = T_k max(0, m+ - |v_k|)^2 + lambda (1 - T_k) max(0, |v_k| - m-)^2
    #                                                                     [S17] eq. 4
    present = T * (m_plus - lengths).clamp(min=0) ** 2
    absent = lam * (1 - T) * (lengths - m_minus).clamp(min=0) ** 2
    return (present + absent).sum(dim=1).mean()  # sum over digits, mean over images


class Decoder(nn.Module):
    """Redraw a digit from one capsule: [B, J, D] -> [B, 1, 28, 28] in 0..1.

    [S17] section 4.1 and figure 2. The decoder gets one capsule of each image. The
    capsule's place in the masked vector tells it which digit that is. If the drawing has
    to resemble the input, the capsule's D numbers must say how the digit is written.

        capsules        mask         one vector      three linear layers
        [B, J, D]  ->  keep one  ->  [B, J*D]   ->  512 -> 1024 -> 784 = 28 * 28 pixels

    1,411,344 parameters for J = 10 and D = 16.
    """

    def __init__(self, J: int = 10, D: int = 16):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(J * D, 512),  # [B, 160] -> [B, 512]
            nn.ReLU(inplace=True),
            nn.Linear(512, 1024),  # [B, 512] -> [B, 1024]
            nn.ReLU(inplace=True),
            nn.Linear(1024, 28 * 28),  # [B, 1024] -> [B, 784]
        )

    def forward(self, capsules: Tensor, classes: Tensor) -> Tensor:
        """Draw from the capsules of these classes [B]; all others are masked to zero."""
        mask = nn.functional.one_hot(classes, capsules.shape[1])  # [B] -> [B, J]
        kept = capsules * mask.unsqueeze(2)  # [B, J, D] * [B, J, 1]
        x = self.layers(kept.flatten(1))  # [B, J, D] -> [B, J*D] -> [B, 784]
        # In bfloat16 the sigmoid of 6.5 would be exactly 1, with gradient 0.
        pixels = at_least_float32(x).sigmoid()  # 0 is black, 1 is white
        return pixels.view(-1, 1, 28, 28)


# -- What AlexCapsNet and ResCapsNet have in common -----------------------------------


def initialise_convolutions(model: nn.Module) -> None:
    """Kaiming-normal weights and zero biases for every convolution, [H15] eq. 10.

    ReLU halves the mean square of what it gets, if that is symmetric around 0. Weights
    of variance 2 / fan_in restore it, layer after layer. PyTorch's default has a sixth
    of that variance: AlexCapsNet would start with capsules of almost no length, where
    squash is flat.

    The convolution of the primary capsules gets twice that standard deviation. Then
    even the weakest capsule has |u| near 1, as DigitCapsules assumes.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    with torch.no_grad():
        model.primary.conv.weight *= 2


class CapsuleNetwork(nn.Module):
    """Images [B, 1, side, side], standardised -> digit capsules [B, J, D].

    A subclass builds three parts: `features`, the convolutions; `primary`, a
    PrimaryCapsules; and `digits`, a DigitCapsules. It also says which input it wants
    (side, mean, std) and, for evaluate.py's pictures of routing, where its primary
    capsules sit (map_side, place_stride). `reconstruction` is the weight of the decoder's
    loss; at 0 there is no decoder.
    """

    side: int  # pixels
    mean: float  # of the pixels in 0..1
    std: float
    map_side: int  # primary capsules sit at map_side x map_side places
    # Input pixels between neighbouring places; None if each place sees the whole image
    place_stride: int | None

    def __init__(self, features, primary, digits, reconstruction: float = 0.0):
        super().__init__()
        self.features = features
        self.primary = primary
        self.digits = digits
        initialise_convolutions(self)
        self.reconstruction = reconstruction
        self.decoder = None
        if reconstruction > 0:
            # It comes last, so that all other weights start with the same random values
            # with and without a decoder.
            self.decoder = Decoder(digits.J, digits.D)

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(images)  # [B, 1, side, side] -> [B, C, H, W]
        u = self.primary(x)  # -> [B, N, I]
        return self.digits(u)  # -> [B, J, D]

    def scores(self, capsules: Tensor) -> Tensor:
        """Class scores [B, J]: the lengths of the capsules. The longest is the answer.

        (In a network without capsules, results/plain.py, they are the logits.)
        """
        return capsule_lengths(capsules)

    def loss(self, capsules: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """The training loss of capsules = self(images), a scalar.

        It is the margin loss plus, with a decoder, `reconstruction` times the mean
        squared error of the pixels. [S17] section 4.1 multiplies the sum over 784
        pixels by 0.0005, which equals the mean times 0.392.
        """
        loss = margin_loss(self.scores(capsules), labels)
        if self.decoder is not None:
            # In training the TRUE digit's capsule is redrawn, even if another is longer.
            drawn = self.decoder(capsules, labels)  # [B, 1, 28, 28]
            error = nn.functional.mse_loss(drawn, self.target(images))
            loss = loss + self.reconstruction * error
        return loss

    def target(self, images: Tensor) -> Tensor:
        """What the decoder should draw: the network's own input, [B, 1, 28, 28] in 0..1.

        An input of 28x28 stays as it is. One of 78x78 is averaged over windows of 3 or 4
        pixels along each side.
        """
        pictures = nn.functional.adaptive_avg_pool2d(images, 28)
        return pictures * self.std + self.mean


def print_shapes(model: CapsuleNetwork) -> None:
    """Print each layer's output shape, the initial capsule length, and the parameters."""
    x = torch.randn(2, 1, model.side, model.side)
    for layer in (*model.features, model.primary, model.digits):
        x = layer(x)
        print(f"{type(layer).__name__:16s} {list(x.shape)}")
    print("mean capsule length at the start:", model.scores(x).mean().item())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
