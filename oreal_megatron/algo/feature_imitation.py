"""Imitation of a teacher's features: Pearson correlation (PKD, arXiv 2207.02039), or mean squared error.

For channel c of student features x and teacher features y [N, C], over the N response tokens of a step,

    pearson:  L = 1 - mean_c r_c         r_c = mean_t(x~ y~),  x~ = (x - mean x) / std x,  y~ likewise
    mse:      L = mean_c mean_t (x - y)^2

so that scale and shift of a teacher's channel do not matter to the first, which equals mean (x~ - y~)^2 / 2. Both are
functions of sums over tokens, the moments, which add over micro-batches and ranks; with the moments of the step, every
token's gradient is known in closed form:

    dL/dx_t = - (y~_t - r x~_t) / (N C std x)      and      2 (x_t - y_t) / (N C)

A channel that is constant on one side has no correlation: r is 0, and so is its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_SPREAD = 1e-12  # a channel is constant if its variance is below so many times its mean square


class Statistics(NamedTuple):
    """Statistics of channels over the tokens of a step, float64 [C]."""

    mean: Tensor  # of the student
    teacher_mean: Tensor
    std: Tensor  # of the student; 1 for a constant channel, as below
    teacher_std: Tensor
    correlation: Tensor  # 0 for a constant channel
    varies: Tensor  # bool: on both sides
    squared_gap: Tensor  # mean of (x - y)^2


def moments(
    student: Tensor,  # [n, C]
    teacher: Tensor,  # [n, C]
) -> Tensor:
    """Return the sums over tokens of x, y, x^2, y^2 and x y, float64 [5, C]."""
    x, y = student.double(), teacher.double()
    return torch.stack([x.sum(0), y.sum(0), (x * x).sum(0), (y * y).sum(0), (x * y).sum(0)])


def statistics(sums: Tensor, tokens: int) -> Statistics:
    """Return the statistics of moments [5, C] that are summed over all tokens of the step."""
    mean, teacher_mean, square, teacher_square, product = sums / max(tokens, 1)
    variance, teacher_variance = square - mean**2, teacher_square - teacher_mean**2
    varies = (variance > SMALLEST_SPREAD * square) & (teacher_variance > SMALLEST_SPREAD * teacher_square)
    std = torch.where(varies, variance, 1.0).sqrt()
    teacher_std = torch.where(varies, teacher_variance, 1.0).sqrt()
    correlation = torch.where(varies, (product - mean * teacher_mean) / (std * teacher_std), 0.0)
    gap = (square - 2 * product + teacher_square).clamp(min=0)
    return Statistics(mean, teacher_mean, std, teacher_std, correlation, varies, gap)


def pearson_loss(channels: Statistics) -> Tensor:
    """Return the sum over channels of 1 - r."""
    return (1 - channels.correlation).sum()


def pearson_gradient(
    student: Tensor,  # [n, C]
    teacher: Tensor,  # [n, C]
    channels: Statistics,
    tokens: int,
) -> Tensor:
    """Return the gradient [n, C], in float32 or wider, of `pearson_loss` at some of the step's tokens."""
    x = (student.double() - channels.mean) / channels.std
    y = (teacher.double() - channels.teacher_mean) / channels.teacher_std
    gradient = (channels.correlation * x - y) / (max(tokens, 1) * channels.std)
    return torch.where(channels.varies, gradient, 0.0).to(torch.promote_types(student.dtype, torch.float32))


def mse_loss(channels: Statistics) -> Tensor:
    """Return the sum over channels of the mean squared difference."""
    return channels.squared_gap.sum()


def mse_gradient(student: Tensor, teacher: Tensor, channels: Statistics, tokens: int) -> Tensor:
    """Return the gradient [n, C] of `mse_loss`; arguments as of `pearson_gradient`."""
    wide = torch.promote_types(student.dtype, torch.float32)
    return 2 * (student.to(wide) - teacher.to(wide)) / max(tokens, 1)


class Distance(NamedTuple):
    """A loss of features with its gradient."""

    loss: Callable[[Statistics], Tensor]
    gradient: Callable[[Tensor, Tensor, Statistics, int], Tensor]


DISTANCES = {"pearson": Distance(pearson_loss, pearson_gradient), "mse": Distance(mse_loss, mse_gradient)}


def match_layers(student: int, teacher: int, number: int) -> list[tuple[int, int]]:
    """Return pairs (student layer, teacher layer), from 0, at `number` equal fractions of the depth; the last included.

    `student` and `teacher` are their numbers of layers, at least `number` each.
    """
    fractions = [(index + 1) / number for index in range(number)]
    return [(round(student * part) - 1, round(teacher * part) - 1) for part in fractions]
