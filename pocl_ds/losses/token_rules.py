"""Temperature and weight of each token from what both models predict for it (docs/method.md,
eq. 29 to 31).

A token rule is one function below, from the signals of n tokens to two factors of each, and one
line in `config.registry.TOKEN_RULES` with its options and their defaults. The factors are constants
for the gradient. Each is a function of its token alone, so that a token's loss does not depend on
its chunk, micro-batch or rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from pocl_ds.config.consistency import token_rule_problem
from pocl_ds.config.registry import TOKEN_RULES as DEFAULTS
from pocl_ds.errors import NumericalError, RecipeError


class TokenSignals(Protocol):
    """What a rule may read of n tokens: each is [n], in the type of the loss's computation, without
    a gradient. p is the teacher's distribution and q the student's, at temperature 1.

    A signal may be computed when it is read; it is valid until the rule returns.
    """

    @property
    def teacher_entropy(self) -> Tensor:
        """Entropy of p, in nats."""
        ...

    @property
    def student_entropy(self) -> Tensor:
        """Entropy of q, in nats."""
        ...

    @property
    def hellinger(self) -> Tensor:
        """Hellinger distance of p and q, 0 to 1: the root of half the sum of
        (sqrt(p) - sqrt(q))^2.
        """
        ...

    @property
    def teacher_label_prob(self) -> Tensor:
        """Probability of the label under the teacher."""
        ...

    @property
    def student_label_prob(self) -> Tensor:
        """Probability of the label under the student."""
        ...

    @property
    def agreement(self) -> Tensor:
        """1 where both models have the same most probable id (the lowest of several), else 0."""
        ...

    @property
    def position(self) -> Tensor:
        """0 at the first loss token of the sample, 1 at its last, linear between; 0 if it has only
        one.
        """
        ...


@dataclass(frozen=True)
class TokenFactors:
    """What a rule gives n tokens, each [n] or None for 1.

    temperature: factor of the stage's temperature, greater than 0. weight: factor of the token's
    divergence, at least 0; the cross-entropy stays without it.
    """

    temperature: Tensor | None = None
    weight: Tensor | None = None


def adakd(
    signals: TokenSignals, *, strength: float, center: float, threshold: float
) -> TokenFactors:
    """Low temperatures for difficult tokens and high ones for easy tokens, and no divergence below
    a threshold (AdaKD, arXiv 2510.11615; docs/method.md, eq. 30).

    The difficulty is the Hellinger distance d. AdaKD divides it by the median of the batch and
    selects the most difficult share of the batch; here center and threshold are fixed in their
    place. strength: 0 leaves the temperature, below 0 reverses it. center: the d whose factor is 1.
    threshold: tokens with a smaller d have weight 0; 0 selects every token.
    """
    distance = signals.hellinger
    temperature = torch.exp(-strength * _relative(distance, center)) if strength else None
    weight = (distance >= threshold).to(distance.dtype) if threshold else None
    return TokenFactors(temperature, weight)


def entropy_weight(signals: TokenSignals, *, strength: float, center: float) -> TokenFactors:
    """Weights by the teacher's entropy, from exp(-strength) where it is certain to exp(strength)
    where it is not (docs/method.md, eq. 31).

    strength: below 0 gives certain tokens the larger weight. center: the entropy in nats whose
    weight is 1.
    """
    return TokenFactors(weight=torch.exp(strength * _relative(signals.teacher_entropy, center)))


def position_decay(signals: TokenSignals, *, end_weight: float) -> TokenFactors:
    """Weights that fall along the response, from 1 at its first token to end_weight at its last
    (docs/method.md, eq. 31).
    """
    return TokenFactors(weight=1 - (1 - end_weight) * signals.position)


TOKEN_RULES: dict[str, Callable[..., TokenFactors]] = {
    function.__name__: function for function in (adakd, entropy_weight, position_decay)
}
BUILT_IN = tuple(TOKEN_RULES)


def _relative(value: Tensor, center: float) -> Tensor:
    """tanh(log(value / center)), from -1 at 0 through 0 at the center towards 1."""
    square = value.square()
    return (square - center**2) / (square + center**2)


@dataclass(frozen=True)
class TokenRule:
    """A rule with its options. The factors of built-in rules are finite for every signal, so only
    those of other rules are checked.
    """

    name: str
    options: dict[str, Any]

    @classmethod
    def of(cls, name: str, options: dict[str, Any]) -> TokenRule:
        """The rule of this name: its default options, overridden by `options`.

        Raises RecipeError for an unknown name or option, or a value out of range.
        """
        if name not in DEFAULTS:
            raise RecipeError(
                f"there is no token rule {name!r}: choose one of {', '.join(DEFAULTS)}"
            )
        for option in options:
            if option not in DEFAULTS[name]:
                known = ", ".join(DEFAULTS[name]) or "no options"
                raise RecipeError(f"{name} has no option {option!r}: it has {known}")
        complete = {**DEFAULTS[name], **options}
        if problem := token_rule_problem(name, complete):
            raise RecipeError(problem)
        return cls(name, complete)

    @property
    def is_checked(self) -> bool:
        """Whether the values of the factors are checked."""
        return self.name not in BUILT_IN

    def __call__(self, signals: TokenSignals, labels: Tensor, dtype: torch.dtype) -> TokenFactors:
        """The factors of n tokens in `dtype`, without a gradient. labels: [n].

        Raises RecipeError if the rule returns anything but factors [n].
        """
        with torch.no_grad():
            factors = TOKEN_RULES[self.name](signals, **self.options)
        if not isinstance(factors, TokenFactors):
            raise RecipeError(
                f"the token rule {self.name} returned a {type(factors).__name__}: return "
                "TokenFactors"
            )
        values: dict[str, Tensor] = {}
        for field in fields(factors):
            value = getattr(factors, field.name)
            if value is None:
                continue
            if not isinstance(value, Tensor) or value.shape != labels.shape:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise RecipeError(
                    f"the token rule {self.name} returned a {field.name} of {shape} for "
                    f"{len(labels)} tokens: return one number for each"
                )
            values[field.name] = value.detach().to(labels.device, dtype)
        return TokenFactors(**values)

    def raise_invalid(self, invalid: Tensor) -> None:
        """Raise NumericalError if any token has an invalid factor; see `count_invalid`. Waits for
        the device.
        """
        temperatures, weights = (int(count) for count in invalid.tolist())
        if temperatures or weights:
            problem = (
                f"a temperature factor that is not positive and finite to {temperatures} tokens"
                if temperatures
                else f"a weight that is negative or not finite to {weights} tokens"
            )
            raise NumericalError(f"the token rule {self.name} gave {problem}: correct the plugin")


def count_invalid(factors: TokenFactors, like: Tensor) -> Tensor:
    """Numbers of tokens with an invalid temperature and with an invalid weight: [2], on the device
    and in the type of `like`.
    """
    counts = like.new_zeros(2)
    if factors.temperature is not None:
        valid = factors.temperature.isfinite() & (factors.temperature > 0)
        counts[0] = (~valid).sum()
    if factors.weight is not None:
        counts[1] = (~(factors.weight.isfinite() & (factors.weight >= 0))).sum()
    return counts
