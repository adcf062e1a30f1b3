"""Image generators of the methods.

- `GeneratorA`, `GeneratorB`: Data-Free Adversarial Distillation (Fang et al. 2019); A for the MNIST and CIFAR rows, B
  for Caltech101, CamVid and NYUv2. `GeneratorA(bn_eps=0.8)` is that of DAFL (Chen et al. 2019).
- `FastGenerator`, `DeepGenerator`: Up to 100x Faster Data-Free Knowledge Distillation (Fang et al. 2022), for its
  32-pixel and its ImageNet rows. `FastGenerator(widen=2)` is the larger one of Contrastive Model Inversion (Fang et al.
  2021).
- `NoisyLayers` makes the latents of a generator from embeddings of labels: NAYER (Tran et al. 2024).
- `ZSKTGenerator`: zero-shot knowledge transfer (Micaelli and Storkey 2019) as MMRazor sets it.

Every generator has `nz`, `img_size`, `channels`, `latent_shape` and `latents(n)`; calling it on latents (N, nz) or
(N, nz, 1, 1) gives images (N, channels, img_size, img_size) in channels_last memory.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import init_weights
from .registry import GENERATORS, register


class UpsampleConv2d(nn.Conv2d):
    """Nearest x2 upsampling and a 3x3 convolution (padding 1), (N, C, H, W) -> (N, K, 2H, 2W).

    Each output pixel sees only 2x2 different input pixels, so both steps together equal one transposed convolution,
    kernel 4, stride 2, padding 1, whose kernel sums the 3x3 one over 2x2 shifts: 4 instead of 9 multiply-adds per
    output, and no enlarged input to store. It differs by rounding alone. `folded = False` computes the two steps.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)
        self.folded = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.folded:
            return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))
        if self.bias is None:
            return self.convolve(x)
        return _BiasGradient.apply(self.convolve(x, self.bias.detach()), self.bias)

    def convolve(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The folded computation with another bias than the module's, or none."""
        # Sums over 2x2 windows; folded before autocast rounds, hence in the weight's own type. They are an average
        # pooling, whose gradient on a GPU was wrong for long (pytorch #188344: channels_last with padding).
        padded = F.pad(self.weight, (1, 1, 1, 1))
        rows = padded[:, :, 1:] + padded[:, :, :-1]
        kernel = rows[..., 1:] + rows[..., :-1]
        return F.conv_transpose2d(x, kernel.flip(2, 3).transpose(0, 1), bias, 2, 1)


class _BiasGradient(torch.autograd.Function):
    """Maps y (N, C, H, W), to which a bias (C,) was added, to itself; gives the bias its gradient.

    The CPU library's own takes as long as the gradients of input and weight together, a matrix product next to nothing.
    """

    @staticmethod
    def forward(ctx, y: Tensor, bias: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        flat = gradient.permute(0, 2, 3, 1).reshape(-1, gradient.shape[1])
        return gradient, (flat.new_ones(1, len(flat)) @ flat).view(-1)


class ToImage(nn.Conv2d):
    """The last 3x3 convolution (padding 1), (N, C, H, W) -> (N, K, H, W).

    To a single channel the CPU library is slow: there, if `folded`, a matrix product computes the 9 products per pixel,
    (N H W, C) x (C, 9), and a convolution with zeros and ones sums them.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.folded = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.folded or self.out_channels > 1 or x.device.type != "cpu":
            return super().forward(x)
        products = x.permute(0, 2, 3, 1) @ self.weight.permute(1, 2, 3, 0).flatten(1)
        shifts = torch.eye(9, dtype=x.dtype, device=x.device).view(1, 9, 3, 3)
        return F.conv2d(products.permute(0, 3, 1, 2), shifts, self.bias, padding=1)


def set_folded(module: nn.Module, folded: bool) -> nn.Module:
    """Switch all of `module` to the fast computation of the same thing, or to the plain one."""
    for m in module.modules():
        if isinstance(getattr(m, "folded", None), bool):
            m.folded = folded
    return module


class Generator(nn.Module):
    """What all share. Raises ValueError when `img_size` is not a multiple of `stride`, the whole upsampling factor."""

    stride = 4

    def __init__(self, nz: int, img_size: int, channels: int):
        super().__init__()
        if img_size < self.stride or img_size % self.stride:
            raise ValueError(f"{type(self).__name__} needs img_size to be a multiple of {self.stride}, got {img_size}")
        self.nz, self.img_size, self.channels = nz, img_size, channels
        self.init_size, self.latent_shape = img_size // self.stride, (nz,)

    def latents(self, n: int, device: torch.device | None = None, generator: torch.Generator | None = None) -> Tensor:
        """n standard normal latents, shape (n, *latent_shape)."""
        return torch.randn(n, *self.latent_shape, device=device, generator=generator)

    def to_map(self, x: Tensor) -> Tensor:
        """Features (N, C * init_size**2) as a map (N, C, init_size, init_size), channels_last."""
        x = x.view(len(x), -1, self.init_size, self.init_size)
        return x.contiguous(memory_format=torch.channels_last)


leaky = partial(nn.LeakyReLU, 0.2, inplace=True)


def _doubled(c_in: int, c_out: int, bias: bool = True, eps: float = 1e-5) -> tuple[nn.Module, ...]:
    """The layers that double the map's side."""
    return UpsampleConv2d(c_in, c_out, bias), nn.BatchNorm2d(c_out, eps=eps), leaky()


class GeneratorA(Generator):
    """DFAD's GeneratorA, and with bn_eps 0.8, as published (an argument in the momentum's place), DAFL's.

    Ends in tanh and a batch norm without scale and shift: images have mean 0 and variance 1 per channel.
    """

    def __init__(self, nz: int, img_size: int = 32, channels: int = 3, ngf: int = 64, bn_eps: float = 1e-5):
        super().__init__(nz, img_size, channels)
        self.folded = True
        self.whole: Callable[[Tensor], Tensor] = lambda z: z  # of several processes' shares of latents: all
        self.l1 = nn.Sequential(nn.Linear(nz, 2 * ngf * self.init_size**2))
        self.conv_blocks0 = nn.Sequential(nn.BatchNorm2d(2 * ngf))
        self.conv_blocks1 = nn.Sequential(*_doubled(2 * ngf, 2 * ngf, eps=bn_eps))
        up = _doubled(2 * ngf, ngf, eps=bn_eps)
        last = ToImage(ngf, channels), nn.Tanh(), nn.BatchNorm2d(channels, affine=False)
        self.conv_blocks2 = nn.Sequential(*up, *last)

    def forward(self, z: Tensor) -> Tensor:
        z = z.flatten(1)
        convolution = self.conv_blocks1[0]
        # Multiply-adds of a place in the map: 4 pixels of the convolution each time, or of nz + 1 times and the sums.
        taps = 4 * convolution.in_channels
        if self.folded and self.training and 1.25 * ((self.nz + 1) * taps + len(z) * self.nz) < len(z) * taps:
            x = self._convolve_basis(z, convolution)
        else:
            x = convolution(self.conv_blocks0(self.to_map(self.l1(z))))
        return self.conv_blocks2(self.conv_blocks1[1:](x))

    def _convolve_basis(self, z: Tensor, convolution: UpsampleConv2d) -> Tensor:
        """The first convolution's output, computed for nz + 1 images instead of the batch.

        Until there all is linear in z but for the statistics of the first batch norm, and these follow from the mean
        and the covariance of z. So the convolution of the linear layer's columns and offset, combined by z, gives the
        same up to rounding: a batch of 512 latents of length 100 needs 101 convolutions. It is done where these
        and the sums are fewer multiply-adds by a fifth, from 168 latents of that length on: a pass forth and back took
        4 % less time at 192, 10 % at 256 and 17 % at 512.
        """
        linear, norm = self.l1[0], self.conv_blocks0[0]
        weight = linear.weight.view(norm.num_features, -1, self.nz)
        bias = linear.bias.view(norm.num_features, -1)
        with torch.autocast(z.device.type, enabled=False):
            latents = self.whole(z)
            centre = latents.mean(0)
            covariance = (latents - centre).t() @ (latents - centre) / len(latents)
            means = weight @ centre + bias
            mean = means.mean(1)
            var = ((weight @ covariance) * weight).sum(2).mean(1) + means.var(1, correction=0)
        with torch.no_grad():
            n = len(latents) * means.shape[1]
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(var * (n / (n - 1)), norm.momentum)
            norm.num_batches_tracked += 1
        scale = norm.weight * (var + norm.eps).rsqrt()
        columns = (weight * scale[:, None, None]).permute(2, 0, 1)
        offset = (bias - mean[:, None]) * scale[:, None] + norm.bias[:, None]
        basis = self.to_map(torch.cat([columns, offset[None]]).flatten(1))
        basis = convolution.convolve(basis).permute(0, 2, 3, 1)
        *shape, channels = basis.shape[1:]
        offset = basis[-1] + convolution.bias
        x = torch.addmm(offset.flatten(), z, basis[:-1].flatten(1))
        return x.view(-1, *shape, channels).permute(0, 3, 1, 2)


class FastGenerator(Generator):
    """Fast-Datafree's Generator, images in [0, 1]. `widen` multiplies the channels of the first map, for CMI by 2."""

    def __init__(
        self, nz: int, img_size: int = 32, channels: int = 3, ngf: int = 64, widen: int = 1, bias: bool = False
    ):
        super().__init__(nz, img_size, channels)
        width = 2 * ngf * widen
        self.l1 = nn.Sequential(nn.Linear(nz, width * self.init_size**2))
        # Identity holds the place of the published upsampling, so that parameter names agree.
        layers = [nn.BatchNorm2d(width), nn.Identity(), *_doubled(width, 2 * ngf, bias)]
        layers += [nn.Identity(), *_doubled(2 * ngf, ngf, bias)]
        self.conv_blocks = nn.Sequential(*layers, ToImage(ngf, channels), nn.Sigmoid())

    def forward(self, z: Tensor) -> Tensor:
        return self.conv_blocks(self.to_map(self.l1(z.flatten(1))))


class NoisyLayers(nn.Module):
    """NAYER's: embeddings of labels (N, E) become latents (N, nz), each `classes` rows by a linear layer of their own.

    Before them a batch norm. They are redrawn, not learnt from batch to batch; equal rows of one layer stay equal.

    Args:
        n: linear layers; fewer rows leave the last ones unused.
    """

    def __init__(self, size: int, nz: int, classes: int, n: int):
        super().__init__()
        self.n1, self.classes = nn.BatchNorm1d(size), classes
        self.weight, self.bias = nn.Parameter(torch.empty(n, nz, size)), nn.Parameter(torch.empty(n, nz))
        self.redraw()

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Weights N(0, 1), biases 0."""
        device = generator.device if generator else self.weight.device
        self.weight.copy_(torch.randn(self.weight.shape, device=device, generator=generator))
        self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        n, blocks = len(x), -(-len(x) // self.classes)
        x = F.pad(self.n1(x), (0, 0, 0, blocks * self.classes - n)).view(blocks, self.classes, -1)
        z = torch.baddbmm(self.bias[:blocks, None], x, self.weight[:blocks].transpose(1, 2))
        return z.flatten(0, 1)[:n]


class ZSKTGenerator(FastGenerator):
    """MMRazor's ZSKT generator, images of no fixed range: with biases; ends in a batch norm with scale and shift."""

    def __init__(self, nz: int, img_size: int = 32, channels: int = 3, ngf: int = 64):
        super().__init__(nz, img_size, channels, ngf, bias=True)
        self.conv_blocks[-1] = nn.BatchNorm2d(channels)


class GeneratorB(Generator):
    """DFAD's GeneratorB, a DCGAN (Radford et al. 2016, weights N(0, 0.02^2)): images in [-1, 1], or as `last` ends."""

    stride = 16

    def __init__(self, nz: int, img_size: int = 64, channels: int = 3, ngf: int = 64, last: type[nn.Module] = nn.Tanh):
        super().__init__(nz, img_size, channels)
        widths = [8 * ngf, 4 * ngf, 2 * ngf, ngf, ngf]
        self.project = nn.Sequential(nn.Flatten(), nn.Linear(nz, widths[0] * self.init_size**2))
        layers = [nn.BatchNorm2d(widths[0])]
        for before, after in pairwise(widths):
            up = nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=False)
            layers += [up, nn.BatchNorm2d(after), leaky()]
        self.main = nn.Sequential(*layers, ToImage(ngf, channels), last())
        init_weights(self, partial(nn.init.normal_, std=0.02), (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))

    def forward(self, z: Tensor) -> Tensor:
        return self.main(self.to_map(self.project(z)))


class DeepGenerator(Generator):
    """Fast-Datafree's DeepGenerator (ImageNet): latent maps (N, nz, img_size / 16, img_size / 16) -> images in [0, 1].

    As published, it carries a linear layer `l1` that it never uses; it is kept, frozen, so that checkpoints load.
    """

    stride = 16

    def __init__(self, nz: int, img_size: int = 224, channels: int = 3, ngf: int = 64):
        super().__init__(nz, img_size, channels)
        self.latent_shape = (nz, self.init_size, self.init_size)
        self.l1 = nn.Sequential(nn.Linear(nz, ngf * img_size**2 // 32**2)).requires_grad_(False)
        layers = [nn.Conv2d(nz, 2 * ngf, 3, padding=1, bias=False), nn.BatchNorm2d(2 * ngf), leaky()]
        widths = [2 * ngf, 2 * ngf, ngf, ngf, ngf]
        for before, after in pairwise(widths):
            layers += [nn.Identity(), *_doubled(before, after, bias=False)]
        self.conv_blocks = nn.Sequential(*layers, ToImage(ngf, channels), nn.Sigmoid())

    def forward(self, z: Tensor) -> Tensor:
        return self.conv_blocks(z.contiguous(memory_format=torch.channels_last))


register("generator_a", GeneratorA, GENERATORS)
register("generator_b", GeneratorB, GENERATORS)
register("dafl", GeneratorA, GENERATORS, bn_eps=0.8)
register("fast", FastGenerator, GENERATORS)
register("dcgan", GeneratorB, GENERATORS, last=nn.Sigmoid)
register("deep", DeepGenerator, GENERATORS)
register("cmi_large", FastGenerator, GENERATORS, widen=2)
register("zskt", ZSKTGenerator, GENERATORS)
