"""Routers of mixtures: which experts compute a token, and their shares.

A router makes of x [batch, length, d_model] the experts that each token is sent to [batch, length, experts_per_token] int32,
and their shares of the same shape. It rounds where the reference does: another rounding would route some tokens to other
experts.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from optima_tpu.models.layers import project


def same(values: Array) -> Array:
    """The values themselves."""
    return values


def softmax(values: Array) -> Array:
    """The softmax over the last axis, in float32."""
    return jax.nn.softmax(values.astype(jnp.float32), axis=-1)


def sigmoid(values: Array) -> Array:
    """The sigmoid of each, in float32."""
    return jax.nn.sigmoid(values.astype(jnp.float32))


def of_sum_one(values: Array) -> Array:
    """The values divided by their sum over the last axis."""
    return values / jnp.sum(values, axis=-1, keepdims=True)


class Router(nnx.Module):
    """The experts with the largest scores, which are made of their logits.

    Args:
      few: number of experts that a token is sent to.
      scores: makes scores of the logits.
      shares: makes the shares of the scores of these experts.
      bias: whether logits have biases.
    """

    def __init__(
        self,
        d_model: int,
        experts: int,
        few: int,
        *,
        scores: Callable[[Array], Array] = same,
        shares: Callable[[Array], Array] = same,
        bias: bool = False,
    ):
        self.weight = nnx.Param(jnp.zeros((experts, d_model)))
        if bias:
            self.bias = nnx.Param(jnp.zeros((experts,)))
        self.few, self.scores, self.shares = few, scores, shares

    def __call__(self, x: Array) -> tuple[Array, Array]:
        values, chosen = jax.lax.top_k(self.scores(self._logits(x)), self.few)
        return chosen, self.shares(values).astype(x.dtype)

    def _logits(self, x: Array) -> Array:
        if not hasattr(self, "bias"):
            return project(x, self.weight[...])
        # One rounding, of the sum. torch adds the bias before it rounds.
        return (project(x, self.weight[...], jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """The choice of DeepSeek and GLM: some groups, then experts in these.

    Attributes:
      total: number of equal groups.
      chosen: number of groups that the experts of a token come from.
      best: a group is rated by the sum of its ``best`` largest scores.
      sigmoid: whether scores are sigmoids, to which the choice, but not the share, adds a correction; otherwise a softmax.
      scale: factor of the shares.
    """

    total: int = 1
    chosen: int = 1
    best: int = 2
    sigmoid: bool = True
    scale: float = 1.0


class GroupRouter(nnx.Module):
    """The best experts within the best groups of experts, by their scores.

    Everything is computed in float32, with the shares, as in the reference. Source: arXiv:2405.04434 and arXiv:2412.19437.
    """

    def __init__(self, d_model: int, experts: int, few: int, normalise: bool, groups: Groups):
        self.weight = nnx.Param(jnp.zeros((experts, d_model)))
        if groups.sigmoid:
            self.e_score_correction_bias = nnx.Param(jnp.zeros((experts,)))
        self.few, self.normalise, self.groups = few, normalise, groups

    def __call__(self, x: Array) -> tuple[Array, Array]:
        logits, groups = project(x.astype(jnp.float32), self.weight[...]), self.groups
        scores = ratings = jax.nn.sigmoid(logits) if groups.sigmoid else jax.nn.softmax(logits, axis=-1)
        if groups.sigmoid:
            ratings = scores + self.e_score_correction_bias[...].astype(jnp.float32)
        if groups.chosen < groups.total:
            grouped = ratings.reshape(*ratings.shape[:-1], groups.total, -1)
            best = jnp.sum(jax.lax.top_k(grouped, groups.best)[0], axis=-1)
            _, kept = jax.lax.top_k(best, groups.chosen)
            open_groups = jnp.any(kept[..., None, :] == jnp.arange(groups.total)[:, None], axis=-1)
            ratings = jnp.where(open_groups[..., None], grouped, -jnp.inf).reshape(ratings.shape)
        _, chosen = jax.lax.top_k(ratings, self.few)
        shares = jnp.take_along_axis(scores, chosen, axis=-1)
        if self.normalise:
            shares = shares / (jnp.sum(shares, axis=-1, keepdims=True) + 1e-20)
        return chosen, groups.scale * shares
