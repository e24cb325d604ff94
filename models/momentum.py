"""The part that contrastive retrieval models share: momentum encoders, queues of their features, losses, costs.

Momentum encoders and queues are MoCo's (He et al., 2020), soft targets and hard negatives ALBEF's (Li et al., 2021).
B pairs of an image and a text, L text tokens, E channels of the common space, Q entries of a queue.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp.alignment import alignment_loss, similarity_loss
from madtp.blocks import UNPRUNED, AlignedModel, Encoded, Guidance, dense_record
from madtp.flops import GIGA
from utils import gather_tensors

NO_IMAGE = -100  # image id of a queue entry that was never filled


@dataclass
class PairPasses:
    """The outputs of a training step on B pairs: both towers, and both momentum towers."""

    image: Encoded
    text: Encoded
    image_momentum: Encoded
    text_momentum: Encoded


class MomentumModel(AlignedModel):
    """A model of image-text pairs with a momentum copy of each named part; the copy's name ends in `_m`.

    Subclasses define `encode_image`, `encode_text`, `contrastive_temperature`, `limit_contrastive_temperature`, `tower_flops` and
    `dense_passes`, which returns the records of an unpruned pair with a given number of text tokens.
    """

    image_queue: Tensor  # (E, Q)
    text_queue: Tensor  # (E, Q)
    idx_queue: Tensor  # (1, Q)
    ptr_queue: Tensor  # (1,)

    def init_momentum(self, parts: tuple[str, ...], embed_dim: int, queue_size: int, momentum: float) -> None:
        """Copies the `parts`, modules or parameters of this model, once they all exist, and fills the queues with noise."""
        self._parts, self.momentum = parts, momentum
        for name in parts:
            follower = copy.deepcopy(getattr(self, name)).requires_grad_(False)
            for module in follower.modules() if isinstance(follower, nn.Module) else ():
                module.__dict__.pop("forward", None)  # of a checkpointed block: its copy would still run the original
            setattr(self, f"{name}_m", follower)
        self.register_buffer("image_queue", F.normalize(torch.randn(embed_dim, queue_size), dim=0))
        self.register_buffer("text_queue", F.normalize(torch.randn(embed_dim, queue_size), dim=0))
        self.register_buffer("idx_queue", torch.full((1, queue_size), NO_IMAGE))
        self.register_buffer("ptr_queue", torch.zeros(1, dtype=torch.long))

    def forget_momentum(self) -> None:
        """Deletes momentum encoders and queues, for a model that is not trained."""
        for name in (*(f"{part}_m" for part in self._parts), *(name for name, _ in self.named_buffers(recurse=False))):
            delattr(self, name)

    def forget_queue_ids(self) -> None:
        """Makes every queue entry one of an unknown image."""
        self.idx_queue.fill_(NO_IMAGE)

    def followers(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields each parameter with its momentum copy."""
        for name in self._parts:
            part, follower = getattr(self, name), getattr(self, f"{name}_m")
            if isinstance(part, nn.Parameter):
                yield part, follower
            else:
                yield from zip(part.parameters(), follower.parameters(), strict=True)

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the momentum weights one step towards the online weights."""
        parts, followers = zip(*self.followers(), strict=True)
        torch._foreach_lerp_(followers, parts, 1 - self.momentum)  # one kernel for many small tensors

    @torch.no_grad()
    def enqueue(self, passes: PairPasses, image_ids: Tensor) -> None:
        """Replaces the oldest queue entries by the momentum features of all processes. image_ids: (B,)

        A pair with features that are not finite leaves the entry as it was: its step is skipped, but the queue would keep them.
        """
        batch = passes.image_momentum.feature, passes.text_momentum.feature, image_ids
        size = self.image_queue.shape[1]
        image, text, ids = (gather_tensors(part)[-size:] for part in batch)  # of more than fit, keep the last
        places = (self.ptr_queue + torch.arange(len(ids), device=ids.device)) % size
        finite = image.isfinite().all(dim=1) & text.isfinite().all(dim=1)
        for queue, entries in ((self.image_queue, image.t()), (self.text_queue, text.t()), (self.idx_queue, ids)):
            queue[:, places] = torch.where(finite, entries, queue[:, places])
        self.ptr_queue.copy_((self.ptr_queue + len(ids)) % size)

    def passes(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_ids: Tensor | None = None,
        guidance: Guidance = UNPRUNED,
    ) -> PairPasses:
        """Runs every pass of a training step without changing the model.

        Neither the momentum encoders nor the learnable tokens that meet their tokens get a gradient, as in the authors' code.

        Args:
            images: (B, 3, H, W).
            input_ids, attention_mask: (B, L); text i belongs to image i.
            image_ids: (B,), equal for pairs that share an image; None where it does not matter.
        """
        online = self.encode_image(images, guidance), self.encode_text(input_ids, attention_mask, guidance)
        with torch.no_grad():
            image, text = self.encode_image(images, guidance, True), self.encode_text(input_ids, attention_mask, guidance, True)
        return PairPasses(*online, image, text)

    def encode_pairs(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, guidance: Guidance = UNPRUNED
    ) -> tuple[Encoded, Encoded]:
        """Encodes images and texts by the online encoders. Arguments as for `passes`."""
        return self.encode_image(images, guidance), self.encode_text(input_ids, attention_mask, guidance)

    def contrastive_loss(self, passes: PairPasses, image_ids: Tensor, alpha: float) -> Tensor:
        """Returns the cross-entropy of each image against all texts of batch and queue, averaged with the reverse.

        The targets are the pairs with the same image id, mixed with the similarities of the momentum encoders at weight `alpha`.
        """
        image_slow, text_slow = passes.image_momentum.feature, passes.text_momentum.feature
        images = torch.cat([image_slow.t(), self.image_queue.clone()], dim=1)  # the queue changes before the backward pass
        texts = torch.cat([text_slow.t(), self.text_queue.clone()], dim=1)
        same = image_ids.unsqueeze(1) == torch.cat([image_ids, self.idx_queue[0]])
        pairs = same.float() / same.sum(dim=1, keepdim=True)
        losses = []
        with torch.autocast(images.device.type, enabled=False):  # a low temperature amplifies rounding errors
            for online, slow, others in ((passes.image.feature, image_slow, texts), (passes.text.feature, text_slow, images)):
                with torch.no_grad():
                    targets = alpha * F.softmax(slow @ others / self.contrastive_temperature, dim=1) + (1 - alpha) * pairs
                losses.append(-(F.log_softmax(online @ others / self.contrastive_temperature, dim=1) * targets).sum(dim=1).mean())
        return sum(losses) / 2

    def losses(self, passes: PairPasses, image_ids: Tensor, alpha: float, negatives: bool = False) -> dict[str, Tensor]:
        """Returns the losses of a step by name; with alignment features also L_sim of the online and of the momentum pair."""
        named = {"contrastive": self.contrastive_loss(passes, image_ids, alpha)}
        if passes.image.record.features is not None:
            slow = passes.image_momentum.record.features, passes.text_momentum.record.features
            features = passes.image.record.features, passes.text.record.features
            named["similarity"] = alignment_loss(*features, image_ids, negatives)
            named["similarity_momentum"] = similarity_loss(*slow)
        return named

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_ids: Tensor,
        alpha: float,
        guidance: Guidance = UNPRUNED,
    ) -> dict[str, Tensor]:
        """Returns the losses of a training step by name, moves the momentum weights, and adds the batch to the queues.

        Args:
            images: (B, 3, H, W).
            input_ids, attention_mask: (B, L).
            image_ids: (B,); pairs of one image share an id.
            alpha: weight of the momentum encoders in the targets.
        """
        self.limit_contrastive_temperature()
        self.follow()
        passes = self.passes(images, input_ids, attention_mask, image_ids, guidance)
        losses = self.losses(passes, image_ids, alpha, guidance.negatives)
        self.enqueue(passes, image_ids)
        return losses

    def traced(self, *inputs: Tensor, guidance: Guidance = UNPRUNED) -> Tensor:
        """Returns the losses of a training step as one tensor that a tracer can follow, without side effects.

        inputs: as for `passes`
        """
        passes = self.passes(*inputs, guidance=guidance)
        return torch.stack(list(self.losses(passes, torch.arange(len(inputs[0]), device=inputs[0].device), 1.0).values()))

    def costs(self, *inputs: Tensor, guidance: Guidance = UNPRUNED) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the GFLOPs of each pair of a training step by module, and in deployment. inputs: as for `passes`."""
        passes = self.passes(*inputs, guidance=guidance)
        return self.gflops_by_module(passes), self.deployment_gflops(passes)

    def reference_gflops(self, text_tokens: int) -> float:
        """Returns the GFLOPs of an uncompressed pair in a training step, the paper's convention. Needs no data."""
        return float(sum(self.gflops_by_module(self.dense_passes(text_tokens)).values()))

    def gflops_by_module(self, passes: PairPasses) -> dict[str, Tensor]:
        """Returns the GFLOPs of each pair of a training step, (B,) float64, in closed form at true lengths, as if it were alone."""
        image, text = self.tower_flops(passes.image, passes.text)
        image_slow, text_slow = self.tower_flops(passes.image_momentum, passes.text_momentum)
        embed_dim, places = self.image_queue.shape
        # Online and momentum features, in both directions, with the pair itself and with the queue.
        products = torch.full_like(image, 4 * embed_dim * (1 + places))
        parts = {"image": image, "text": text, "image_momentum": image_slow, "text_momentum": text_slow, "contrastive": products}
        return {name: part.double() / GIGA for name, part in parts.items()}

    def deployment_gflops(self, passes: PairPasses) -> Tensor:
        """Returns the GFLOPs of a pair in use, without momentum encoders and training passes, (B,) float64."""
        return sum(self.tower_flops(passes.image, passes.text)).double() / GIGA


def can_number(ids: Tensor, images: int) -> bool:
    """Tells whether the image ids (1, Q) of a queue can be numbers, from 0, of so many training images.

    The largest of n ids drawn from them lies among the last 10 / n of the numbers but for a chance of exp(-10).
    """
    drawn = ids[ids != NO_IMAGE]
    if not len(drawn) or drawn.min() < 0:
        return False
    return images * (1 - 10 / len(drawn)) - 1 <= int(drawn.max()) < images


def dense_encoded(depth: int, tokens: int) -> Encoded:
    """Returns the record, without tokens, that one sample leaves when nothing is pruned."""
    return Encoded(torch.empty(0), None, torch.empty(0), dense_record(depth, tokens, samples=1))


@torch.no_grad()
def hard_negatives(queries: Tensor, others: Tensor, query_ids: Tensor, other_ids: Tensor, temperature: Tensor | float) -> Tensor:
    """Draws for each query one of `others` with another image id, more similar ones with higher probability.

    Args:
        queries, others: (B, E), (W, E) normalised features.
        query_ids, other_ids: (B,), (W,).
    Returns:
        (B,) indices; -1 for a query without candidates.
    """
    allowed = query_ids.unsqueeze(1) != other_ids
    with torch.autocast(queries.device.type, enabled=False):
        weights = F.softmax(queries @ others.t() / temperature, dim=1)
    weights = weights.clamp(min=torch.finfo(weights.dtype).tiny) * allowed  # one is drawn even where all underflow
    alone = ~allowed.any(dim=1)
    chosen = torch.multinomial(torch.where(alone.unsqueeze(1), 1.0, weights), 1).squeeze(1)
    return torch.where(alone, -1, chosen)
