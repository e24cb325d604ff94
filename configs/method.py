"""The keys of the method, which all tasks share: pruned tokens, alignment, sparse weights and distillation."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from configs.sizes import Section, Text


class MethodKeys(Section):
    """The keys that choose the method and how hard it compresses."""

    # the method
    method: Literal["dtp", "stp", "tome", "random", "none"] = Field(
        "dtp",
        description="baselines: stp prunes a fixed number of tokens per block by importance, tome merges as many similar patches,"
        " random draws; none: prune no tokens, so p is 0 unless weights are sparse",
    )
    p: float = Field(0.5, ge=0, lt=1, description="share of the GFLOPs to remove; 0 trains or evaluates uncompressed")
    variant: Literal["paper", "released"] = Field("paper", description="released: the formulas of the authors' published code")
    keep: Literal["max", "mean", "instance", "fixed"] = Field(
        "max",
        description="tokens kept per sample: the largest or mean need in its batch, or its own (instance); fixed, for --evaluate:"
        " the same for all, from what the calibration subset keeps by itself, as an exported model does",
    )
    prune_from: int = Field(0, ge=0, description="index of the first block that prunes; higher keeps more tokens")
    prune_every: int = Field(
        1,
        ge=1,
        description="beyond the paper: one block in so many prunes, from prune_from on; the others keep fused attention, which is"
        " faster at equal GFLOPs where tokens are scored from the attention map",
    )
    tis: list[Literal["cls", "self", "token"]] = Field(
        ["cls", "self", "token"], min_length=1, description="terms of the token importance score"
    )
    mag: bool = Field(
        True, description="guide by learnable tokens; off: no S_token and no L_sim, and a threshold from the importance alone"
    )
    causal_scores: Literal["plain", "relative", "skip"] = Field(
        "plain",
        description="CLIP's causal text encoder, whose start token sees itself alone and therefore has the largest S_self: plain"
        " leaves it so, relative weighs a query by the number of tokens it sees, skip leaves such queries out",
    )
    merge: bool = Field(True, description="merge the pruned tokens into one, instead of dropping them")
    mag_projection: Literal["auto", "on", "off"] = Field(
        "auto", description="map tokens to sd_dim before alignment; auto: only if the widths differ"
    )
    sd_num: int = Field(100, ge=1, description="number of learnable tokens, shared by both modalities")
    sd_dim: int = Field(768, ge=1, description="channels of a learnable token")
    sd_init_std: float | None = Field(None, gt=0, description="initial std of the learnable tokens; none: 0.02 (released: 1)")
    sd_init: Literal["random", "kmeans", "principal"] = Field(
        "random",
        description="start of the learnable tokens: random, or the tokens of both modalities on the calibration subset: their"
        " cluster centres (kmeans), or principal directions with both signs (principal); sd_init_std scales all of them",
    )
    sd_redraw: bool = Field(
        False, description="ablation: make the learnable tokens anew by sd_init, even if the pretrained file holds some"
    )
    guide: Literal["shared", "text"] = Field(
        "shared",
        description="tokens that guide the pruning of an image: the learnable tokens, or beyond the paper the features that they"
        " collect from its text (text; NLVR2 and VQA, where each text then costs an encoding of its image)",
    )
    sim_weight: float = Field(0.1, ge=0, description="weight of the similarity loss; higher aligns the modalities more")
    sim_negatives: bool = Field(
        False, description="beyond the paper: the similarity loss also tells matching pairs from the other pairs of the batch"
    )
    token_gradient: Literal["none", "merge", "decision"] | None = Field(
        None,
        description="way of the task's loss to the learnable tokens: the weights of the merged token (merge), also the decisions,"
        " by a straight-through estimate (decision), or only L_sim trains them (none); none set: none (released: merge)",
    )
    relaxation: float = Field(
        1.0, gt=0, description="token_gradient: decision: width of a soft decision, in mean importances; lower is sharper"
    )
    relaxation_end: float | None = Field(None, gt=0, description="relaxation at the end of training; none: constant")
    align_lr_scale: float = Field(1.0, gt=0, description="factor on the learning rate of the learnable tokens and their maps")
    align_epochs: int = Field(0, ge=0, description="epochs that align the modalities before the first token is pruned")
    ramp_epochs: int | None = Field(None, ge=0, description="epochs until the target reaches p; none: a third of max_epoch")
    train_budget: tuple[float, float] | None = Field(
        None,
        description="train for every p of this range at once, such as [0.3, 0.8]: steps alternate between its ends and points"
        " between; --evaluate --p X then needs no training. p selects the checkpoint. none: for p alone",
    )
    calibration_size: int = Field(256, ge=1, description="training samples that p is measured on; higher is steadier but slower")

    # weights and distillation (MADTP++)
    sparsity_type: Text = Field(
        "", description="N:M weight sparsity: 2:4, 1:4, 4:8 (m4n2_1d, m4n2_1d_faster: 2:4); empty: dense weights"
    )
    sparse_layers: Literal["mlp", "attention", "all"] = Field("all", description="linear layers of the blocks that become sparse")
    mask_schedule: Literal["once", "refresh"] = Field("once", description="refresh: choose masks again in each epoch of the ramp")
    refit_weights: bool = Field(
        True, description="refit kept weights on the calibration subset (least squares) to make up for masked ones (variant: paper)"
    )
    order: Literal["weights_first", "tokens_first", "together", "adaptive"] = Field(
        "together", description="order of pruning weights and tokens; adaptive: in each step, first what costs the least accuracy"
    )
    sparse_unit: Literal["block", "tower"] = Field(
        "block", description="order: adaptive: mask the attention or the MLP of one block, or of one tower, at a time"
    )
    sparse_kernels: bool = Field(
        False, description="evaluation on a GPU: run 2:4 layers with sparse kernels if these are measured to be faster"
    )
    distill: bool = Field(False, description="also learn from the uncompressed model; better at high p, but slower")
    teacher: Text = Field("", description="path of the uncompressed model's weights; empty: those of 'pretrained'")
    distill_temperature: float = Field(2.0, gt=0, description="divides teacher and student logits; higher softens both")
    distill_vision: float = Field(1.0, ge=0, description="weight of the distillation loss on the images' class tokens")
    distill_language: float = Field(10.0, ge=0, description="weight of the distillation loss on the texts' class tokens")
    distill_logits: float = Field(1.0, ge=0, description="weight of the distillation loss on the logits; NLVR2 as published: 2")

    @field_validator("sparsity_type", mode="after")
    @classmethod
    def _as_n_of_m(cls, value: str) -> str:
        if re.fullmatch(r"m\d+n\d+_2d_\w+", value):
            raise ValueError(f"{value!r} is a pattern along both sides of a weight; use one along the input, such as m4n2_1d")
        named = re.fullmatch(r"m(\d+)n(\d+)_1d(_faster)?", value)  # _faster finds the same masks
        value = f"{named[2]}:{named[1]}" if named else value
        kept, group = map(int, value.split(":")) if re.fullmatch(r"\d+:\d+", value) else (not value, 2)
        if not 0 < kept < group:
            raise ValueError(f"{value!r} is no N:M pattern; write 2:4, 1:4 or 4:8, or nothing for dense weights")
        return value

    @model_validator(mode="before")
    @classmethod
    def _nothing_removes_nothing(cls, values: Any) -> Any:
        nothing = isinstance(values, dict) and values.get("method") == "none" and not values.get("sparsity_type")
        return {**values, "p": 0.0} if nothing else values

    @field_validator("mag_projection", mode="before")
    @classmethod
    def _yaml_switch(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @property
    def uncompressed(self) -> bool:
        """Tells whether no tokens are pruned: the model then has no pruners and no learnable tokens."""
        return self.p == 0 or self.method == "none"

    @property
    def keep_rule(self) -> str:
        """The keep rule by which the temperature is found: fixed numbers come from those that samples keep by themselves."""
        return "instance" if self.keep == "fixed" else self.keep

    @property
    def aligns(self) -> bool:
        """Tells whether the model has learnable tokens, which L_sim trains."""
        return self.mag and not self.uncompressed and self.method != "tome"

    @property
    def packed(self) -> bool:
        """Tells whether batches run without padding. The authors' code needs padding: its masks do not follow their tokens."""
        return self.variant == "paper" and self.keep != "fixed"

    @property
    def text_guides(self) -> bool:
        """Tells whether the words of a text guide the pruning of its image."""
        return self.guide == "text" and not self.uncompressed

    @property
    def pattern(self) -> tuple[int, int] | None:
        """N and M of the sparse weights; None if all weights stay dense."""
        if not self.sparsity_type or self.p == 0:
            return None
        kept, group = self.sparsity_type.split(":")
        return int(kept), int(group)

    @property
    def refits(self) -> bool:
        """Tells whether masking also refits the kept weights. The authors' variant only masks."""
        return self.refit_weights and self.variant == "paper"

    @property
    def distill_weights(self) -> dict[str, float]:
        """The weights of the distillation losses, by name."""
        return {key: getattr(self, key) for key in ("distill_vision", "distill_language", "distill_logits")}

    @property
    def gradient(self) -> str:
        """The `gradient` of the pruning rule."""
        return self.token_gradient or ("merge" if self.variant == "released" else "none")
