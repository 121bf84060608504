"""Published selectors in float64 numpy, by loops from their formulas.

Of our code they use only the counts of a pattern and the levels of ADMM.
"""

import numpy as np

from optima_tpu.method.patterns import NM, Pattern
from optima_tpu.method.selectors import ADMM


def thanos(
    weight: np.ndarray, hessian: np.ndarray, pattern: Pattern, block: int, damping: float
) -> tuple[np.ndarray, np.ndarray]:
    """Prunes by Thanos: one inverse a block, one linear solve a row.

    Source: Ilin and Richtarik, arXiv 2504.05346, without outlier rows.

    Returns:
      (weights, keep), each [d_out, d_in].
    """
    weight, hessian = weight.astype(np.float64), hessian.astype(np.float64)
    rows, columns = weight.shape
    keep = np.ones(weight.shape, bool)
    norms = np.sqrt(np.diag(hessian))
    damped = hessian + damping * np.mean(np.diag(hessian)) * np.eye(columns)
    if isinstance(pattern, NM):
        block = -(-block // pattern.m) * pattern.m
    for first in range(0, columns, block):
        last = min(first + block, columns)
        scores = np.abs(weight[:, first:]) * norms[first:]
        lost = np.zeros(scores.shape, bool)
        if isinstance(pattern, NM):
            for row in range(rows):
                for group in range(0, last - first, pattern.m):
                    order = np.argsort(scores[row, group : group + pattern.m], kind="stable")
                    lost[row, group + order[: pattern.m - pattern.n]] = True
        elif pattern.group == "row":
            for row in range(rows):
                left = pattern.pruned_in(columns) - np.sum(~keep[row])
                lost[row, np.argsort(scores[row], kind="stable")[:left]] = True
        else:
            left = pattern.pruned_in(rows * columns) - np.sum(~keep)
            lost.flat[np.argsort(scores, axis=None, kind="stable")[:left]] = True
        inverse = np.linalg.inv(damped[first:, first:])
        for row in range(rows):
            gone = np.flatnonzero(lost[row, : last - first])
            pull = np.linalg.solve(inverse[np.ix_(gone, gone)], weight[row, first + gone])
            weight[row, first:] -= pull @ inverse[gone]
            weight[row, first + gone] = 0.0
            keep[row, first + gone] = False
    return weight, keep


def sparsegpt(
    weight: np.ndarray, hessian: np.ndarray, pattern: Pattern, block: int, damping: float
) -> tuple[np.ndarray, np.ndarray]:
    """Prunes by SparseGPT, input after input, with an explicit inverse.

    Source: Frantar and Alistarh, 2023, algorithm 1, without lazy updates. Counts are exact, where the published code prunes one
    more a block. Dead inputs are scored 0 but not set to zero.

    Returns:
      (weights, keep), each [d_out, d_in].
    """
    weight, hessian = weight.astype(np.float64), hessian.astype(np.float64)
    rows, columns = weight.shape
    keep = np.ones(weight.shape, bool)
    dead = np.diag(hessian) == 0
    inverse = np.linalg.inv(hessian + np.diag(np.where(dead, 1.0, damping * np.mean(np.diag(hessian)))))
    factor = np.linalg.cholesky(inverse).T

    def scores(first, last):
        return np.where(dead[first:last], 0.0, weight[:, first:last] ** 2 / np.diag(factor)[first:last] ** 2)

    def prune(part, lost, score):
        part.flat[np.argsort(score, axis=None, kind="stable")[:lost]] = False

    for j in range(columns):
        last = min(j + block, columns)
        if isinstance(pattern, NM):
            if j % pattern.m == 0:
                for row, score in enumerate(scores(j, j + pattern.m)):
                    prune(keep[row, j : j + pattern.m], pattern.m - pattern.n, score)
        elif j % block == 0 and pattern.group == "row":
            for row, score in enumerate(scores(j, last)):
                prune(keep[row, j:last], pattern.pruned_in(last) - pattern.pruned_in(j), score)
        elif j % block == 0:
            prune(keep[:, j:last], pattern.pruned_in(rows * last) - pattern.pruned_in(rows * j), scores(j, last))
        for row in range(rows):
            if not keep[row, j]:
                weight[row, j:] -= weight[row, j] / factor[j, j] * factor[j, j:]
                weight[row, j] = 0.0
    return weight, keep


def admm(
    weight: np.ndarray, hessian: np.ndarray, linear: np.ndarray, pattern: Pattern, selector: ADMM
) -> tuple[np.ndarray, np.ndarray]:
    """Finds mask and weights by ADMM; there are no dead inputs.

    Source: Meng et al., ALPS, 2024, equation 5.

    The first step is one of Richardson's with the inverse at ``sigma``, written as in a textbook: by the residual of the exact
    step.

    Returns:
      (weights, keep), each [d_out, d_in].
    """
    scale = np.sqrt(np.diag(hessian.astype(np.float64)))
    scaled, dense = hessian / scale / scale[:, None], weight * scale
    target, eye = linear / scale + selector.damping * dense, np.eye(len(scale))
    v, z, dual = dense, dense, np.zeros_like(dense)
    for rho, sigma in ((rho, stage.sigma) for stage in selector.stages() for rho in stage.penalties):
        exact, inverse = scaled + (selector.damping + rho) * eye, np.linalg.inv(scaled + sigma * eye)
        for _ in range(selector.iterations):
            v = v + (target - dual + rho * z - v @ exact) @ inverse
            z = v + dual / rho
            keep = np.zeros(z.shape, bool)
            groups = (
                keep.reshape(z.size // pattern.m, pattern.m)
                if isinstance(pattern, NM)
                else (keep if pattern.group == "row" else keep.reshape(1, -1))
            )
            lost = pattern.m - pattern.n if isinstance(pattern, NM) else pattern.pruned_in(groups.shape[1])
            order = np.argsort(np.abs(z).reshape(groups.shape), axis=1, kind="stable")
            np.put_along_axis(groups, order[:, lost:], True, axis=1)
            z = np.where(keep, z, 0.0)
            dual = dual + rho * (v - z)
    return z / scale, keep
