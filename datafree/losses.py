"""One function per equation. Logits are (N, classes), features (N, D); every loss is a scalar.

Half-precision inputs are widened to float32 first, so that a loss never carries the rounding of
the networks' arithmetic; float64 inputs stay float64.
"""

import math

import torch
import torch.nn.functional as F


def _wide(x):
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def one_hot_loss(t_logits):
    """L_oh (DAFL, Eq. 3): mean cross-entropy of the teacher with its own arg-max.

    Small when the teacher is confident about the images.
    """
    t_logits = _wide(t_logits)
    return F.cross_entropy(t_logits, t_logits.argmax(1))


def information_entropy_loss(t_logits, base=10):
    """L_ie (DAFL, Eq. 5): sum_c p_c log p_c with p the batch mean of the teacher's softmax.

    Smallest, -log(classes), when the batch holds every class equally often. The paper writes the
    natural logarithm, its code takes base 10 and the published weights belong to that: base 10
    is the default, `base=math.e` the paper's formula.
    """
    p = _wide(t_logits).softmax(1).mean(0)
    p = p.clamp_min(torch.finfo(p.dtype).tiny)  # a class that underflows to 0 has no logarithm
    return (p * p.log()).sum() / math.log(base)


def activation_loss(t_features):
    """L_a (DAFL, Eq. 4): minus the mean absolute teacher feature before the classifier."""
    return -_wide(t_features).abs().mean()


def kd_loss(s_logits, t_logits, T=1.0):
    """L_KD (DAFL, Eq. 1; Hinton et al. 2015): T^2 KL(softmax(t / T) || softmax(s / T)).

    Summed over classes, mean over the batch. Detach the teacher's logits where only the student
    is to learn.
    """
    log_s = (_wide(s_logits) / T).log_softmax(1)
    log_t = (_wide(t_logits) / T).log_softmax(1)
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * T**2
