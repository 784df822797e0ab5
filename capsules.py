"""Capsules: squash, dynamic routing, primary and digit capsules, lengths and margin loss.

Read this file first. A capsule is a small vector: its LENGTH says how sure the network is that
something is present, its DIRECTION says in which pose. Two papers are used throughout:

    [S17] Sabour, Frosst, Hinton: Dynamic Routing Between Capsules, NeurIPS 2017
    [H15] He, Zhang, Ren, Sun: Delving Deep into Rectifiers, ICCV 2015

Dimensions, named once for all files:

    B  images in the batch
    N  primary capsules, i = 1..N        I  numbers in a primary capsule (8)
    J  digit capsules,   j = 1..J (10)   D  numbers in a digit capsule (16)
"""

import math

import torch
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision goes up to float32; float32 and float64 stay as they are.

    Mixed precision may compute the votes in 16 bits. What follows may not: float16 overflows when
    it squares 256, and bfloat16 keeps 8 significant bits, too few for nearly equal lengths.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def squash(s: Tensor) -> Tensor:
    """Shrink vectors to length below 1, keep their direction. [..., D] -> [..., D]; [S17] eq. 1."""
    s = at_least_float32(s)
    #          |s|^2       s              |s|
    #   v =  --------- * -----  =  s * ---------                             [S17] eq. 1
    #        1 + |s|^2    |s|          1 + |s|^2
    # The right side, where one |s| is cancelled, is no 0/0 at the zero vector, and vector_norm has
    # the gradient 0 there, where that of sqrt(sum(s * s)) is nan.
    norm = torch.linalg.vector_norm(s, dim=-1, keepdim=True)  # [..., 1]
    return s * (norm / (1 + norm * norm))


def capsule_lengths(v: Tensor) -> Tensor:
    """Length of each capsule, its class score in 0..1. [..., D] -> [...]."""
    return torch.linalg.vector_norm(at_least_float32(v), dim=-1)


def dynamic_routing(
    votes: Tensor, iterations: int = 3, return_couplings: bool = False
) -> Tensor | tuple[Tensor, list[Tensor]]:
    """Routing by agreement, [S17] procedure 1: votes [B, J, N, D] -> digit capsules [B, J, D].

    votes[:, j, i] is u^_j|i: what primary capsule i says that digit capsule j should be (they are
    made in DigitCapsules). A vote that agrees with the present v_j counts more in the next
    iteration. With return_couplings, also the coupling coefficients c of every iteration, each
    [B, J, N]. Gradients flow through all iterations, and each image is routed alone: no sum below
    runs over B.

    The layout [B, J, N, D] is what makes this fast: both sums of the procedure go through memory in
    order, and the one over i is a batched matrix product, which stores no [B, J, N, D] product.
    """
    votes = at_least_float32(votes)
    B, J, N = votes.shape[:3]
    # Iteration 1. The logits b_ij start at 0, so softmax gives each of the J digits 1/J, and s_j is
    # a plain sum: neither softmax nor matrix product is needed.
    #   c_ij = 1 / J        s_j = sum_i c_ij u^_j|i        v_j = squash(s_j)   [S17] procedure 1
    v = squash(votes.sum(dim=2) / J)  # [B, J, D]
    couplings = [votes.new_full((B, J, N), 1 / J)]
    b = votes.new_zeros(B, J, N)
    for _ in range(iterations - 1):
        #   b_ij = b_ij + u^_j|i . v_j                                         [S17] procedure 1
        # A scalar product over only D = 16 numbers: multiply and sum beats a matrix product here,
        # above all going backward.
        b = b + (votes * v.unsqueeze(2)).sum(dim=3)  # [B, J, N, D] * [B, J, 1, D] -> [B, J, N]
        #   c_ij = exp(b_ij) / sum_k exp(b_ik)                                 [S17] eq. 3
        c = b.softmax(dim=1)  # over the digits j: primary capsule i divides ITSELF among them
        #   s_j = sum_i c_ij u^_j|i                                            [S17] eq. 2
        s = (c.unsqueeze(2) @ votes).squeeze(2)  # [B, J, 1, N] @ [B, J, N, D] -> [B, J, D]
        v = squash(s)
        couplings.append(c)
    return (v, couplings) if return_couplings else v


class PrimaryCapsules(nn.Module):
    """A convolution whose channels are read as capsules: [B, C, H, W] -> [B, N, I].

    `types` capsules of `dim` numbers sit at each place of the output map: N = H' * W' * types,
    ordered by place first, then type.
    """

    def __init__(self, channels: int, types: int, dim: int, kernel_size: int, stride: int = 1):
        super().__init__()
        self.dim = dim
        self.conv = nn.Conv2d(channels, types * dim, kernel_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)  # [B, types*I, H', W']
        # A capsule's I numbers must come from ONE place of the map, so channels go last before the
        # reshape. (Flattening straight away would cut capsules out of I neighbouring pixels.)
        x = x.permute(0, 2, 3, 1)  # [B, types*I, H', W'] -> [B, H', W', types*I]
        return squash(x.reshape(x.shape[0], -1, self.dim))  # -> [B, H'*W'*types, I]


class DigitCapsules(nn.Module):
    """Votes of all primary capsules for all digits, then routing: [B, N, I] -> [B, J, D]."""

    def __init__(self, n: int, i: int, j: int = 10, d: int = 16, iterations: int = 3):
        super().__init__()
        self.j, self.d, self.iterations = j, d, iterations
        # n, i, j, d are the sizes N, I, J, D. Each primary capsule has its J matrices side by side,
        # each transposed, [I, D]: one product makes all its J votes.
        self.weight = nn.Parameter(torch.empty(n, i, j * d))
        # START ALIVE. Each number of a vote has variance std^2 |u|^2; in iteration 1, s_j is a sum
        # of N independent votes over J, and has D numbers:
        #   E|s_j|^2 = D * N * std^2 * |u|^2 / J^2        with |u| near 1 (PrimaryCapsules squashes)
        # We want |s_j| = 1/5: then |v_j| = (1/25) / (1 + 1/25), about 0.04, below m- = 0.1, the
        # margin of an absent digit: nine digits start at no loss, for every image, and the true
        # one's, (0.9 - 0.04)^2, is near its steepest. Much smaller, and the gradient, which shrinks
        # with |s_j|, leaves training on a plateau at 10 %; larger, and nine wrong capsules must
        # first be pushed down.
        nn.init.normal_(self.weight, std=j / (5 * math.sqrt(d * n)))

    def forward(self, u: Tensor, return_couplings: bool = False):
        #   u^_j|i = W_ij u_i                                                  [S17] eq. 2
        # as a batch of N products, [B, I] @ [I, J*D]. W is used where it lies: tiling it once per
        # image, as many implementations do, copies B times its 0.7 to 6.6 MB. (squash gives float32
        # even where the weights are of 16 bits, hence .to.)
        votes = torch.bmm(u.transpose(0, 1).to(self.weight.dtype), self.weight)  # [N, B, J*D]
        votes = votes.unflatten(2, (self.j, self.d))  # [N, B, J*D] -> [N, B, J, D]
        votes = votes.permute(1, 2, 0, 3).contiguous()  # [N, B, J, D] -> [B, J, N, D]
        # Autocast would send the matrix products of routing back to 16 bits: off for this part.
        with torch.autocast(votes.device.type, enabled=False):
            return dynamic_routing(votes, self.iterations, return_couplings)


def initialise_convolutions(model: nn.Module) -> None:
    """Kaiming-normal weights and zero biases for every convolution, [H15] eq. 10.

    ReLU halves the second moment of its input; a variance of 2 / fan_in gives it back, layer after
    layer. PyTorch's default has a sixth of that variance: AlexCapsNet would start with capsules of
    almost no length, where squash is flat.

    The convolution of the primary capsules gets twice that standard deviation: then even the
    weakest capsule has |u| near 1, as DigitCapsules assumes, and a step of Adam, which does not
    grow with the weights, turns a capsule half as far.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    with torch.no_grad():
        model.primary.conv.weight *= 2


def margin_loss(
    lengths: Tensor, labels: Tensor, m_plus: float = 0.9, m_minus: float = 0.1, lam: float = 0.5
) -> Tensor:
    """Margin loss of lengths [B, J] and labels [B], a scalar: mean over images; [S17] eq. 4."""
    lengths = at_least_float32(lengths)
    T = nn.functional.one_hot(labels, lengths.shape[1]).to(lengths.dtype)  # 1 for the true digit
    #   L_k = T_k max(0, m+ - |v_k|)^2 + lambda (1 - T_k) max(0, |v_k| - m-)^2    [S17] eq. 4
    present = T * (m_plus - lengths).clamp(min=0) ** 2
    absent = lam * (1 - T) * (lengths - m_minus).clamp(min=0) ** 2
    return (present + absent).sum(dim=1).mean()  # sum over digits, mean over images
