"""The published step, written out with PyWavelets in float64 numpy: what every implementation is held against."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pywt


@dataclass
class Oracle:
    """Adam in wavelet space on one matrix, coefficient by coefficient, as the published method describes it.

    `weight` is ``[R, C]``. The transform is PyWavelets' own, on rows padded with zeros to a multiple of ``2**level``.
    """

    weight: np.ndarray
    level: int
    wavelet: str = "haar"
    lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0
    scale: float = 0.25
    energy: bool = False
    detail_gain: float | str = 1.0  # or "coherence"
    limiter: float = 1.01
    residual: bool = False  # FOAM: u = (mean of n + r) / (sqrt(v + r**2) + eps), r = x - mean of the unit
    nesterov: bool = False
    correct_bias: bool = True
    cautious: bool = False  # weights decay only where they lose what has their sign
    step_count: int = 0
    exp_avg: np.ndarray | float = 0.0
    exp_avg_sq: np.ndarray | float = 0.0
    limited_norm: float = 0.0
    rhos: list[float] = field(default_factory=list)

    def step(self, gradient: np.ndarray) -> None:
        """One update from `gradient` ``[R, C]``."""
        self.step_count += 1
        (beta1, beta2), unit = self.betas, 2**self.level
        columns = gradient.shape[1]
        padded = np.pad(gradient, ((0, 0), (0, -columns % unit)))
        approximation, *details = pywt.wavedec(padded, self.wavelet, mode="periodization", level=self.level, axis=-1)
        before, t = self.exp_avg, self.step_count
        self.exp_avg = beta1 * self.exp_avg + (1 - beta1) * approximation
        second = approximation**2
        if self.energy:
            for j, detail in enumerate(details):
                second = second + (detail**2).reshape(*approximation.shape, 2**j).sum(-1)
            real = np.minimum(unit, columns - unit * np.arange(approximation.shape[1]))
            second = second / real
        self.exp_avg_sq = beta2 * self.exp_avg_sq + (1 - beta2) * second
        d = np.sqrt(self.exp_avg_sq) + self.eps
        nesterov = self.nesterov and self.level > 0
        read = beta1 * self.exp_avg + (1 - beta1) * approximation if nesterov else self.exp_avg
        normed = read / d
        # How much of all gradients the two moments hold, by which they are corrected.
        first = 1 - beta1 ** (t + 1 if nesterov else t) if self.correct_bias else 1.0
        second_weight = 1 - beta2**t if self.correct_bias else 1.0
        norm, rho = float(np.sqrt((normed**2).sum())), 1.0
        if self.level > 0 and self.limiter > 0:
            if self.limited_norm > 0:
                rho = max(norm / (self.limited_norm + 1e-8), self.limiter) / self.limiter
            self.limited_norm = norm / rho
        self.rhos.append(rho)
        gain = self.detail_gain
        if gain == "coherence":
            steady = (before / (1 - beta1 ** (t - 1)) / d) ** 2 * (1 - beta2**t) if t > 1 else 0.0 * d
            gain = np.maximum(1 - beta1, np.minimum(1.0, steady) * first)
        gain = np.broadcast_to(gain, d.shape)
        update = pywt.waverec(
            [normed]
            + [
                np.repeat(gain, 2**j, axis=-1) * detail / np.repeat(d, 2**j, axis=-1)
                for j, detail in enumerate(details)
            ],
            self.wavelet,
            mode="periodization",
            axis=-1,
        )[:, :columns]
        update = update * np.sqrt(second_weight) / first
        if self.residual and self.level > 0:
            nothing = [np.zeros_like(detail) for detail in details]
            means, n, v = (
                pywt.waverec([a, *nothing], self.wavelet, mode="periodization", axis=-1)[:, :columns]
                for a in (approximation, read / first, self.exp_avg_sq / second_weight * unit**0.5)
            )
            r = gradient - means
            update = (n + r) / (np.sqrt(v + r**2) + self.eps)
        scale = self.scale if self.level > 0 else 1.0
        change = self.lr * scale / rho * update
        decays = self.weight * change >= 0 if self.cautious else 1.0
        self.weight = self.weight - change
        self.weight = self.weight - self.lr * self.weight_decay * self.weight * decays
