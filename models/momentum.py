"""What contrastive retrieval models share: encoders that follow slowly, queues of their features, losses, costs.

Momentum encoders and queues are MoCo's (He et al., 2020), soft targets and hard negatives ALBEF's (Li et al., 2021).
Shapes: B pairs of an image and a text, L text tokens, E width of the common space, Q places of a queue.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp.alignment import similarity_loss
from madtp.blocks import UNPRUNED, AlignedModel, Encoded, Guidance, dense_record
from madtp.flops import GIGA
from utils import gather_tensors

NO_IMAGE = -100  # the image id of a place of the queue that was never filled


@dataclass
class PairPasses:
    """What a training step computes of B pairs: both towers, and both momentum towers."""

    image: Encoded
    text: Encoded
    image_momentum: Encoded
    text_momentum: Encoded


class MomentumModel(AlignedModel):
    """A model of pairs whose named parts each have a copy, with `_m` behind the name, that follows them slowly.

    Subclasses give `encode_image`, `encode_text`, `contrastive_temperature`, `limit_contrastive_temperature`, `tower_flops`, and in `dense_passes` what a
    pair with a text of so many tokens would leave on record if nothing was pruned.
    """

    image_queue: Tensor  # (E, Q)
    text_queue: Tensor  # (E, Q)
    idx_queue: Tensor  # (1, Q)
    ptr_queue: Tensor  # (1,)

    def init_momentum(self, parts: tuple[str, ...], embed_dim: int, queue_size: int, momentum: float) -> None:
        """To be called when all `parts`, modules or parameters of this model, are there; fills the queues with noise."""
        self._parts, self.momentum = parts, momentum
        for name in parts:
            follower = copy.deepcopy(getattr(self, name)).requires_grad_(False)
            for module in follower.modules() if isinstance(follower, nn.Module) else ():
                module.__dict__.pop("forward", None)  # a checkpoint wrapper's: the copy of it still calls the original
            setattr(self, f"{name}_m", follower)
        self.register_buffer("image_queue", F.normalize(torch.randn(embed_dim, queue_size), dim=0))
        self.register_buffer("text_queue", F.normalize(torch.randn(embed_dim, queue_size), dim=0))
        self.register_buffer("idx_queue", torch.full((1, queue_size), NO_IMAGE))
        self.register_buffer("ptr_queue", torch.zeros(1, dtype=torch.long))

    def forget_momentum(self) -> None:
        """Give up what only training needs; encoders remain, for a model that does not learn."""
        for name in (*(f"{part}_m" for part in self._parts), *(name for name, _ in self.named_buffers(recurse=False))):
            delattr(self, name)

    def followers(self) -> Iterator[tuple[Tensor, Tensor]]:
        for name in self._parts:
            part, follower = getattr(self, name), getattr(self, f"{name}_m")
            if isinstance(part, nn.Parameter):
                yield part, follower
            else:
                yield from zip(part.parameters(), follower.parameters(), strict=True)

    @torch.no_grad()
    def follow(self) -> None:
        """One step of the momentum weights towards the online ones."""
        for part, follower in self.followers():
            follower.mul_(self.momentum).add_(part, alpha=1 - self.momentum)

    @torch.no_grad()
    def enqueue(self, passes: PairPasses, image_ids: Tensor) -> None:
        """The momentum features of all processes replace the oldest of the queues. image_ids (B,)."""
        batch = passes.image_momentum.feature, passes.text_momentum.feature, image_ids
        size = self.image_queue.shape[1]
        image, text, ids = (gather_tensors(part)[-size:] for part in batch)  # of more than fit, the last stay
        places = (self.ptr_queue + torch.arange(len(ids), device=ids.device)) % size
        self.image_queue[:, places] = image.t()
        self.text_queue[:, places] = text.t()
        self.idx_queue[0, places] = ids
        self.ptr_queue.copy_((self.ptr_queue + len(ids)) % size)

    def passes(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_ids: Tensor | None = None,
        guidance: Guidance = UNPRUNED,
    ) -> PairPasses:
        """Every pass of a training step; nothing of the model changes.

        The momentum encoders take no gradient, but the learnable tokens that meet their tokens do.

        Args:
            images (B, 3, H, W); input_ids, attention_mask (B, L): text i belongs to image i.
            image_ids: (B,) which of the pairs share an image; None where it does not matter.
        """
        both = [
            (self.encode_image(images, guidance, slow), self.encode_text(input_ids, attention_mask, guidance, slow))
            for slow in (False, True)
        ]
        return PairPasses(*both[0], *both[1])

    def encode_pairs(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, guidance: Guidance = UNPRUNED
    ) -> tuple[Encoded, Encoded]:
        """Encodes images and texts by the online encoders. Arguments as for `passes`."""
        return self.encode_image(images, guidance), self.encode_text(input_ids, attention_mask, guidance)

    def contrastive_loss(self, passes: PairPasses, image_ids: Tensor, alpha: float) -> Tensor:
        """Cross-entropy of each image against all texts of batch and queue, and the reverse, averaged.

        The targets are the pairs with the same image id, and to a share `alpha` what the momentum encoders find similar.
        """
        image_slow, text_slow = passes.image_momentum.feature, passes.text_momentum.feature
        images = torch.cat([image_slow.t(), self.image_queue.clone()], dim=1)  # the queue changes before the backward pass
        texts = torch.cat([text_slow.t(), self.text_queue.clone()], dim=1)
        same = image_ids.unsqueeze(1) == torch.cat([image_ids, self.idx_queue[0]])
        pairs = same.float() / same.sum(dim=1, keepdim=True)
        losses = []
        with torch.autocast(images.device.type, enabled=False):  # a low temperature makes much of little rounding
            for online, slow, others in ((passes.image.feature, image_slow, texts), (passes.text.feature, text_slow, images)):
                with torch.no_grad():
                    targets = alpha * F.softmax(slow @ others / self.contrastive_temperature, dim=1) + (1 - alpha) * pairs
                losses.append(-(F.log_softmax(online @ others / self.contrastive_temperature, dim=1) * targets).sum(dim=1).mean())
        return sum(losses) / 2

    def losses(self, passes: PairPasses, image_ids: Tensor, alpha: float) -> dict[str, Tensor]:
        """The losses of a step by name; with alignment features also L_sim of the online and of the momentum pair."""
        named = {"contrastive": self.contrastive_loss(passes, image_ids, alpha)}
        if passes.image.record.features is not None:
            slow = passes.image_momentum.record.features, passes.text_momentum.record.features
            named["similarity"] = similarity_loss(passes.image.record.features, passes.text.record.features)
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
        """A training step's losses by name. The momentum weights take a step, the queues take the batch in.

        Args:
            images (B, 3, H, W); input_ids, attention_mask (B, L); image_ids (B,): pairs of one image share an id.
            alpha: share of the targets that the momentum encoders give.
        """
        self.limit_contrastive_temperature()
        self.follow()
        passes = self.passes(images, input_ids, attention_mask, image_ids, guidance)
        losses = self.losses(passes, image_ids, alpha)
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
        products = torch.full_like(image, 4 * embed_dim * (1 + places))  # online and slow, either way; itself and the queue
        parts = {"image": image, "text": text, "image_momentum": image_slow, "text_momentum": text_slow, "contrastive": products}
        return {name: part.double() / GIGA for name, part in parts.items()}

    def deployment_gflops(self, passes: PairPasses) -> Tensor:
        """Returns the GFLOPs of a pair in use, without momentum encoders and training passes, (B,) float64."""
        return sum(self.tower_flops(passes.image, passes.text)).double() / GIGA


def dense_encoded(depth: int, tokens: int) -> Encoded:
    """Returns the record, without tokens, that one sample leaves when nothing is pruned."""
    return Encoded(torch.empty(0), None, torch.empty(0), dense_record(depth, tokens, samples=1))


@torch.no_grad()
def hard_negatives(queries: Tensor, others: Tensor, query_ids: Tensor, other_ids: Tensor, temperature: Tensor | float) -> Tensor:
    """For each query one of `others` of another image, the likelier the more similar. (B, E), (W, E), (B,), (W,) -> (B,) long.

    A query for which there is none gets -1.
    """
    allowed = query_ids.unsqueeze(1) != other_ids
    with torch.autocast(queries.device.type, enabled=False):
        weights = F.softmax(queries @ others.t() / temperature, dim=1)
    weights = weights.clamp(min=torch.finfo(weights.dtype).tiny) * allowed  # so that one is drawn even where all underflow
    alone = ~allowed.any(dim=1)
    chosen = torch.multinomial(torch.where(alone.unsqueeze(1), 1.0, weights), 1).squeeze(1)
    return torch.where(alone, -1, chosen)
