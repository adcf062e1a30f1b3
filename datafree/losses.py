"""One function per equation. Logits are (N, classes), features (N, D); every loss is a scalar.

Inputs are in float32 at least, so that a loss never carries the rounding of the networks' arithmetic.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def at_least_float32(x: Tensor) -> Tensor:
    """x in at least float32: half-precision values are widened, float64 stays."""
    return x.float() if x.dtype in HALF else x


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of x (N, C, H, W), in at least float32, by BatchNorm's own pass over x.

    That reads bfloat16 as it is and channels_last in its order: 25 times as fast as `torch.var_mean` on a CPU.
    """
    dtype = torch.float32 if x.dtype in HALF else x.dtype
    unchanged = x.new_zeros(2, x.shape[1], dtype=dtype)  # running statistics; their type is the sums'
    return torch.batch_norm_update_stats(x, *unchanged, 0.0)


def one_hot_loss(t_logits: Tensor) -> Tensor:
    """L_oh (DAFL, Eq. 3): mean cross-entropy of the teacher with its own arg-max, small when it is confident."""
    t_logits = at_least_float32(t_logits)
    return F.cross_entropy(t_logits, t_logits.argmax(1))


def information_entropy_loss(t_logits: Tensor, base: float = 10) -> Tensor:
    """L_ie (DAFL, Eq. 5): sum_c p_c log p_c with p the batch mean of the teacher's softmax.

    Smallest, -log(classes), when the batch holds every class equally often. The paper writes the natural
    logarithm (`base=math.e`); its code takes base 10, which the published weights belong to.
    """
    p = at_least_float32(t_logits).softmax(1).mean(0)
    p = p.clamp_min(torch.finfo(p.dtype).tiny)  # a class that underflows to 0 has no logarithm
    return (p * p.log()).sum() / math.log(base)


def activation_loss(t_features: Tensor) -> Tensor:
    """L_a (DAFL, Eq. 4): minus the mean absolute teacher feature before the classifier."""
    return -at_least_float32(t_features).abs().mean()


def kd_loss(s_logits: Tensor, t_logits: Tensor, T: float = 1.0) -> Tensor:
    """L_KD (DAFL, Eq. 1; Hinton et al. 2015): T^2 KL(softmax(t / T) || softmax(s / T)).

    Summed over classes, mean over the batch. Detach the teacher's logits where only the student is to learn.
    """
    log_s = (at_least_float32(s_logits) / T).log_softmax(1)
    log_t = (at_least_float32(t_logits) / T).log_softmax(1)
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * T**2


def l1_loss(s_logits: Tensor, t_logits: Tensor) -> Tensor:
    """L_1 (DFAD): mean absolute difference of the logits; the student minimises, the generator maximises it."""
    return (at_least_float32(s_logits) - at_least_float32(t_logits)).abs().mean()


def decision_adversarial_loss(s_logits: Tensor, t_logits: Tensor) -> Tensor:
    """L_adv (CMI, Fast-Datafree): -mean_i [arg-maxes agree] KL(softmax t_i || softmax s_i).

    Small where the student is wrong about how sure the teacher is, not about the class. Only the mask is detached.
    """
    s_logits, t_logits = at_least_float32(s_logits), at_least_float32(t_logits)
    agree = (s_logits.argmax(1) == t_logits.argmax(1)).to(t_logits.dtype)
    log_s, log_t = s_logits.log_softmax(1), t_logits.log_softmax(1)
    kl = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1)
    return -(kl * agree).mean()


def js_loss(s_logits: Tensor, t_logits: Tensor, T: float = 3.0) -> Tensor:
    """Jensen-Shannon divergence of the softmaxes at temperature T (DeepInversion).

    As published, the probabilities and their mean are clamped to 0.01..0.99.
    """
    p, q = ((at_least_float32(x) / T).softmax(1) for x in (s_logits, t_logits))
    log_p, log_q = p.clamp(0.01, 0.99).log(), q.clamp(0.01, 0.99).log()
    m = ((p + q) / 2).clamp(0.01, 0.99)
    return sum(F.kl_div(x, m, reduction="batchmean") for x in (log_p, log_q)) / 2


def total_variation(x: Tensor) -> Tensor:
    """L_tv (DeepInversion, as Fast-Datafree computes it) of images x (N, C, H, W).

    The mean absolute difference of neighbours, summed over the four directions.
    """
    straight = (x[..., :-1], x[..., 1:]), (x[:, :, :-1], x[:, :, 1:])
    oblique = (x[:, :, 1:, :-1], x[:, :, :-1, 1:]), (x[:, :, :-1, :-1], x[:, :, 1:, 1:])
    return sum((a - b).abs().mean() for a, b in (*straight, *oblique))


def contrastive_loss(local: Tensor, others: Tensor, T: float, batch_size: int) -> Tensor:
    """L_cr (CMI) of unit vectors: view i of an image against the other view of each.

    Args:
        local, others: (N, D), rows of unit length: the batch, then rows of the memory bank; `others` is detached here.
        T: temperature. batch_size: rows of the batch; the means over these and over the bank's rows are added.
    """
    logits = local @ others.detach().t() / T
    loss = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device), reduction="none")
    batch, bank = loss.split([batch_size, len(loss) - batch_size])
    return batch.mean() + bank.mean() if len(bank) else batch.mean()


def attention_loss(s_map: Tensor, t_map: Tensor) -> Tensor:
    """L_AT (Zagoruyko and Komodakis 2017): mean squared difference of two attention maps.

    That of a feature map (N, C, H, W) is its square's mean over C, flattened and of unit length; C may differ.
    """
    s, t = (F.normalize(at_least_float32(x).square().mean(1).flatten(1)) for x in (s_map, t_map))
    return F.mse_loss(s, t)
