"""Routers of mixtures of experts: which experts compute a token, and the share of each in the output.

A router makes of x [batch, length, d_model] the experts that each token is sent to [batch, length, experts_per_token] int32, and
their shares of the same shape. It rounds where the reference does: another rounding would route some tokens to other experts.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from optima_tpu.models.layers import project


class Router(nnx.Module):
    """The experts with the largest softmax of their logits.

    Args:
      few: number of experts that a token is sent to.
      normalise: whether the shares of these experts are scaled to sum to one.
    """

    def __init__(self, d_model: int, experts: int, few: int, normalise: bool):
        self.weight = nnx.Param(jnp.zeros((experts, d_model)))
        self.few, self.normalise = few, normalise

    def __call__(self, x: Array) -> tuple[Array, Array]:
        shares = jax.nn.softmax(project(x, self.weight[...]).astype(jnp.float32), axis=-1)
        values, chosen = jax.lax.top_k(shares, self.few)
        if self.normalise:
            values = values / jnp.sum(values, axis=-1, keepdims=True)
        return chosen, values.astype(x.dtype)


class BiasedRouter(nnx.Module):
    """The experts with the largest logits, which have biases; their shares are the softmax over these experts: gpt-oss."""

    def __init__(self, d_model: int, experts: int, few: int):
        self.weight, self.bias = nnx.Param(jnp.zeros((experts, d_model))), nnx.Param(jnp.zeros((experts,)))
        self.few = few

    def __call__(self, x: Array) -> tuple[Array, Array]:
        # One rounding, of the sum. torch adds the bias before it rounds.
        logits = (project(x, self.weight[...], jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)
        values, chosen = jax.lax.top_k(logits, self.few)
        return chosen, jax.nn.softmax(values.astype(jnp.float32), axis=-1).astype(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """The choice of DeepSeek and GLM: first some groups of experts, then the experts within these.

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
    """The experts with the largest scores within the groups with the largest scores.

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
