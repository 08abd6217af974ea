"""Fit the value codebook w*(a + b*w^2 + c*w^16) to N(0, 1) and compare it with Lloyd-Max.

Prints the coefficients of vllm_metal_tq/codebook.py and their mean square error in percent above
the optimum's. Needs scipy (pip install scipy).

    python benchmarks/fit_codebook.py
"""

import numpy as np
from scipy.optimize import minimize
from scipy.stats import norm

CUBIC_UP_TO = 4  # bits


def distortion(levels):
    """Mean square error of the quantiser with these levels and midpoint boundaries."""
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    low, high = edges[:-1], edges[1:]
    mass = norm.cdf(high) - norm.cdf(low)
    first = norm.pdf(low) - norm.pdf(high)
    edge = [np.where(np.isfinite(e), e, 0) * norm.pdf(e) for e in (low, high)]
    second = mass + edge[0] - edge[1]
    return float((second - 2 * levels * first + levels**2 * mass).sum())


def lloyd_max(bits):
    n = 2**bits
    levels = np.sqrt(3) * norm.ppf((np.arange(n) + 0.5) / n)
    for _ in range(60000):
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        centroids = -np.diff(norm.pdf(edges)) / np.diff(norm.cdf(edges))
        if np.abs(centroids - levels).max() < 1e-12:
            break
        levels = centroids
    return levels


def main():
    for bits in (2, 3, 4, 5, 6, 8):
        n, optimum = 2**bits, lloyd_max(bits)
        w = (2 * np.arange(n) + 1 - n) / n
        powers = (1, 3) if bits <= CUBIC_UP_TO else (1, 3, 17)
        basis = np.stack([w**p for p in powers], axis=1)
        weight = norm.pdf(optimum) ** 0.66
        start = np.linalg.lstsq(basis * weight[:, None], optimum * weight, rcond=None)[0]
        fit = minimize(
            lambda c, basis=basis: distortion(np.sort(basis @ c)),
            start,
            method="Nelder-Mead",
            options={"maxiter": 9000, "maxfev": 20000, "xatol": 1e-8, "fatol": 1e-14},
        )
        best = distortion(optimum)
        print(f"{bits} bits: {np.round(fit.x, 5)}, optimum {best:.7f}, {fit.fun / best - 1:+.2%}")


if __name__ == "__main__":
    main()
