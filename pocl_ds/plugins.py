"""What a module of yours registers, named in a recipe's `plugins`: one function and one decorator
for each method.

    from pocl_ds import plugins

    @plugins.divergence("mine", weight=0.5)         # loss.name=mine, loss.options.weight
    def mine(log_p, log_q, *, weight): ...          # [tokens, ids] both -> [tokens]

    @plugins.metric("length")                       # score.metrics=[length], and ranking.strategy=length: small is easy
    def length(responses, references, log_probs): ...   # one number a sample

    @plugins.strategy("alternate")                  # ranking.strategy=alternate
    def alternate(scored): ...                      # difficulty.rank.Scored -> indices, easiest first

    @plugins.policy("mixed", on_policy=True)        # policy.name=mixed, policy.options
    class Mixed: ...                                # see distill.policies.Policy

A module is imported wherever a recipe that names it is read, on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

from pocl_ds.config import registry
from pocl_ds.errors import RecipeError

Registered = TypeVar("Registered", bound=Callable[..., Any])


def divergence(name: str, **options: float | bool) -> Callable[[Registered], Registered]:
    """Register a divergence, from log-probabilities of teacher and student [tokens, ids] to
    [tokens]. options: their defaults.
    """
    from pocl_ds.losses.divergences import DIVERGENCES

    return _register(
        "divergence", name, DIVERGENCES, lambda: registry.LOSSES.__setitem__(name, options)
    )


def policy(name: str, *, on_policy: bool) -> Callable[[Registered], Registered]:
    """Register a policy: a class made from (PolicyConfig, write, seed). on_policy: whether it calls
    `write`.
    """
    from pocl_ds.rollouts.policies import POLICIES

    return _register(
        "policy", name, POLICIES, lambda: registry.POLICIES.__setitem__(name, on_policy)
    )


def strategy(name: str) -> Callable[[Registered], Registered]:
    """Register a ranking strategy: from `Scored` to indices, easiest first, a permutation."""
    from pocl_ds.difficulty.rank import STRATEGIES

    return _register(
        "ranking strategy",
        name,
        STRATEGIES,
        lambda: registry.STRATEGIES.append(name),
        registry.METRICS,
    )


def metric(name: str) -> Callable[[Registered], Registered]:
    """Register a metric of difficulty, which is a ranking strategy of the same name too: small is
    easy.
    """
    from pocl_ds.difficulty.score import METRICS

    return _register(
        "metric", name, METRICS, lambda: registry.METRICS.append(name), registry.STRATEGIES
    )


def _register(
    kind: str,
    name: str,
    registry: dict[str, Any],
    announce: Callable[[], None],
    beside: Collection[str] = (),
) -> Callable[[Registered], Registered]:
    """beside: names that a recipe writes into the same field."""

    def register(found: Registered) -> Registered:
        before = registry.get(name)
        if name in beside:
            raise RecipeError(
                f"plugins: ranking.strategy={name} has a meaning already: give your {kind} another "
                f"name"
            )
        if before is not None:
            if getattr(before, "__module__", None) != found.__module__:
                raise RecipeError(
                    f"plugins: there is a {kind} {name!r} already: give yours another name"
                )
            return found  # the same module, imported under a second name
        registry[name] = found
        announce()
        return found

    return register
