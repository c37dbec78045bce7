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
        normed = self.exp_avg / d
        norm, rho = float(np.sqrt((normed**2).sum())), 1.0
        if self.level > 0 and self.limiter > 0:
            if self.limited_norm > 0:
                rho = max(norm / (self.limited_norm + 1e-8), self.limiter) / self.limiter
            self.limited_norm = norm / rho
        self.rhos.append(rho)
        gain = self.detail_gain
        if gain == "coherence":
            steady = (before / (1 - beta1 ** (t - 1)) / d) ** 2 * (1 - beta2**t) if t > 1 else 0.0 * d
            gain = np.maximum(1 - beta1, np.minimum(1.0, steady) * (1 - beta1**t))
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
        size = self.lr * np.sqrt(1 - beta2**self.step_count) / (1 - beta1**self.step_count)
        scale = self.scale if self.level > 0 else 1.0
        self.weight = self.weight - size * scale / rho * update
        self.weight = self.weight - self.lr * self.weight_decay * self.weight
