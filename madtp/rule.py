"""The rule by which tokens are pruned, and how hard: what a model is built with, and what a temperature search finds."""

from dataclasses import dataclass

METHODS = ("dtp", "stp", "tome", "random")
VARIANTS = ("paper", "released")
KEEP_RULES = ("max", "mean", "instance")
TERMS = ("cls", "self", "token")
GRADIENTS = ("none", "merge", "decision")
CAUSAL_SCORES = ("plain", "relative", "skip")


@dataclass(frozen=True)
class PruningRule:
    """The rule by which tokens are selected. docs/settings.md describes the effect of each choice.

    method: "dtp" (the paper) or a baseline. "stp" removes a fixed number of tokens in each block, those of the least importance;
        "tome" removes as many by merging similar ones (see merging.py); "random" keeps a fraction T / (1 + T), drawn at random.
        Of "stp" and "tome" see `static_removal`; `keep` has no effect on them.
    variant: "paper", or "released" for checkpoints of the authors' code
    keep: "max" and "mean" give every sample of a batch the same number of tokens, "instance" each sample its own
    terms: the scores that the importance averages, of "cls", "self" and "token"
    mag: guide by learnable tokens. Without, there is no S_token, and -TIS takes the place of A_token in the threshold (Eq. 9): it
        goes from the mean importance for T = 0 to the least one. The paper leaves this open.
    merge: replace the pruned tokens by one token, their mean weighted by importance
    share: keep this share of the tokens, the best ones, instead of those above the threshold; the threshold is computed all the
        same, so that methods can be compared at an imposed cost
    num_prefix_tokens: tokens in front that are never pruned, such as a class token and registers. The first is the class token.
        With 0 there is none, and S_cls is left out of the importance: the mean is over the other terms.
    gradient: the way on which a task's loss reaches the learnable tokens and the maps of the alignment: "none"; "merge", through
        the weights of the merged token, as in the authors' code; "decision", also through the decisions, by a straight-through
        estimate (see `decision_gate`). S_cls and S_self are constants in each, except for "merge" of variant "released", as in the
        authors' code.
    causal_scores: S_self in a causal attention, where the first token sees itself alone and so always has the largest attention.
        "plain" is Eq. 5 as written, "relative" weighs a query by the number of tokens that it sees, "skip" leaves out queries that
        see themselves alone
    every: one block in `every` prunes, and so removes more at once; in the others attention stays fused, because nothing needs its
        map. 1 is the paper's
    """

    method: str = "dtp"
    variant: str = "paper"
    keep: str = "max"
    terms: tuple[str, ...] = TERMS
    mag: bool = True
    merge: bool = True
    share: float | None = None
    num_prefix_tokens: int = 1
    gradient: str = "none"
    causal_scores: str = "plain"
    every: int = 1

    def __post_init__(self):
        known = {"method": METHODS, "variant": VARIANTS, "keep": KEEP_RULES, "gradient": GRADIENTS, "causal_scores": CAUSAL_SCORES}
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not self.terms or not set(self.terms) <= set(TERMS):
            raise ValueError(f"terms must name some of {', '.join(TERMS)}, got {self.terms!r}")
        if self.num_prefix_tokens < 0 or not self.scores:
            lacking = "a class token or learnable tokens" if not self.mag else "a class token"
            raise ValueError(
                f"terms {self.terms!r} need {lacking}, and num_prefix_tokens is {self.num_prefix_tokens}, mag {self.mag}"
            )
        if self.variant == "released" and (self.keep == "instance" or not self.merge or self.method != "dtp"):
            raise ValueError("variant 'released' knows method 'dtp' with merge and keep 'max' or 'mean' only")
        if self.variant == "released" and (not self.mag or self.every > 1):
            raise ValueError("variant 'released' prunes with learnable tokens and in every block")
        if self.variant == "released" and self.num_prefix_tokens != 1:
            raise ValueError("variant 'released' knows one prefix token only")
        if self.gradient == "decision" and (self.variant != "paper" or self.method != "dtp"):
            raise ValueError("gradient 'decision' is for method 'dtp' of variant 'paper'")
        if self.every < 1:
            raise ValueError(f"every is a whole number above 0, got {self.every}")
        if self.share is not None and (self.method != "dtp" or self.variant != "paper" or not 0 < self.share <= 1):
            raise ValueError("share is a number above 0 up to 1, for method 'dtp' of variant 'paper'")

    @property
    def scores(self) -> tuple[str, ...]:
        """The terms that the importance averages: without a class token there is no S_cls, without learnable tokens no S_token."""
        missing = {"cls"} if not self.num_prefix_tokens else set()
        missing |= set() if self.mag else {"token"}
        return tuple(term for term in self.terms if term not in missing)

    @property
    def traces_attention(self) -> bool:
        """Tells whether gradients also flow through S_cls and S_self, into the attention."""
        return self.variant == "released" and self.gradient == "merge"

    @property
    def needs_scores(self) -> bool:
        """Tells whether the tokens are chosen by their importance."""
        return self.method in ("dtp", "stp")

    @property
    def needs_keys(self) -> bool:
        """Tells whether the tokens are matched by their keys."""
        return self.method == "tome"

    @property
    def reads_learnable_tokens(self) -> bool:
        """Tells whether decisions depend on the learnable tokens: by the threshold or by S_token."""
        return self.needs_scores and self.mag and (self.method == "dtp" or "token" in self.scores)

    @property
    def is_static(self) -> bool:
        """Tells whether a block removes a fixed number of tokens."""
        return self.method in ("stp", "tome")


@dataclass(frozen=True)
class PruneSetting:
    """The strength of pruning. A `temperature` of None is off; `prune_from` is the first block that prunes."""

    temperature: float | None = None
    prune_from: int = 0

    def at(self, block: int, rule: PruningRule) -> float | None:
        """Returns the temperature of a block, None where it does not prune."""
        later = block - self.prune_from
        return self.temperature if later >= 0 and later % rule.every == 0 else None


OFF = PruneSetting()
