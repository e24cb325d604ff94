"""BLIP's text decoder for captioning and question answering: transformers' decoder with the mask that it drops, and its cost.

S texts, L text tokens, M tokens of the source that a text reads (an image or a question), C channels, T tokens of packed texts.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Linear, Module, Parameter
from transformers import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextSelfAttention

from madtp import flops
from madtp.attention.attend import Causal, attend
from madtp.packing import Packed, pack
from models.bert import NORM_EPS, BertSize

IGNORED = -100  # target of a token that is left out of the loss


class MaskedCrossAttention(BlipTextSelfAttention):
    """Cross-attention that honours the mask of its keys, which transformers' BLIP ignores.

    There may be several texts per source: neighbouring texts then share its keys and values, which are computed once.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs,
    ):
        # Versions of transformers pass the keys' mask as the queries'. All its rows are equal: one serves any number of queries.
        mask = attention_mask if encoder_attention_mask is None else encoder_attention_mask
        kwargs["encoder_attention_mask"] = None if mask is None else mask[:, :, :1]
        joined = hidden_states.reshape(len(encoder_hidden_states), -1, hidden_states.shape[-1])
        attended, attention = super().forward(joined, None, encoder_hidden_states, **kwargs)
        return attended.reshape(hidden_states.shape), attention


def text_decoder(
    size: BertSize, source_width: int, label_smoothing: float, start: int, end: int, padding: int
) -> BlipTextLMHeadModel:
    """Builds a decoder whose parameters have BLIP's names.

    Args:
        source_width: channels of the tokens that it reads.
        start, end, padding: ids of [DEC], [SEP] and [PAD].
    """
    config = BlipTextConfig(
        vocab_size=size.vocab_size, hidden_size=size.hidden_size, encoder_hidden_size=source_width,
        intermediate_size=size.intermediate_size, num_hidden_layers=size.num_hidden_layers,
        num_attention_heads=size.num_attention_heads, max_position_embeddings=size.max_position_embeddings,
        layer_norm_eps=NORM_EPS, hidden_dropout_prob=size.dropout, attention_probs_dropout_prob=size.dropout,
        initializer_range=0.02, bos_token_id=start, eos_token_id=end, sep_token_id=end, pad_token_id=padding,
        label_smoothing=label_smoothing, is_decoder=True, attn_implementation="eager",
        tie_word_embeddings=True,
    )  # fmt: skip
    decoder = BlipTextLMHeadModel(config)
    for index, layer in enumerate(decoder.bert.encoder.layer):
        layer.crossattention.self = MaskedCrossAttention(config, True, layer_idx=index)
    decoder.post_init()
    return decoder


def predicting(mask: Tensor, given: int = 1) -> Tensor:
    """Marks the tokens whose logits predict a next token, (S, L) bool; the first `given` tokens need not be predicted.

    mask: (S, L), the attention mask of the texts
    """
    says = F.pad(mask[:, 1:].bool(), (0, 1))
    says[:, : given - 1] = False
    return says


def decode_packed(
    decoder: BlipTextLMHeadModel, ids: Tensor, read: Tensor, source: Tensor, layout: Packed
) -> tuple[list[Tensor], Packed]:
    """Runs the decoder's layers on texts without padding; what they compute is the same.

    Args:
        ids, read: (S, L), and the tokens that are read, bool: the first ones of each text.
        source, layout: packed tokens (T', C) that the texts read. Neighbouring texts share a source, whose keys and values are
            computed once: as many texts each, or the `readers` of the layout.
    Returns:
        The tokens that enter each layer, and those that leave the last one, (T, C) each; their layout.
    """
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    chosen, texts = pack(torch.stack([ids, places], dim=-1), read)
    x = decoder.bert.embeddings(chosen[None, :, 0], chosen[None, :, 1])[0]
    states = [x]
    for layer in decoder.bert.encoder.layer:
        x = layer.attention.output(_attended(layer.attention.self, x, x, texts, texts, "class_first"), x)
        x = layer.crossattention.output(_attended(layer.crossattention.self, x, source, texts.joined(layout), layout), x)
        x = layer.output(layer.intermediate(x), x)
        states.append(x)
    return states, texts


def _attended(heads: Any, x: Tensor, source: Tensor, queries: Packed, keys: Packed, causal: Causal = None) -> Tensor:
    """Computes an attention of the decoder on packed tokens: x (T, C), source (T', C) -> (T, C)."""
    projected = heads.query(x), heads.key(source), heads.value(source)
    dropout = heads.dropout.p if heads.training else 0.0
    number = heads.num_attention_heads
    return attend(*projected, number, queries, keys, dropout, causal=causal, training=heads.training)[0]


def packed_next_tokens(
    decoder: BlipTextLMHeadModel, ids: Tensor, says: Tensor, states: Tensor, texts: Packed
) -> tuple[Tensor, Tensor]:
    """Computes the logits of those tokens alone that predict a next one, and their losses.

    Args:
        ids, says: (S, L), and what `predicting` marks.
        states, texts: (T, C) that left the last layer, and their layout.
    Returns:
        (P, words) logits, those of the first text first, and the losses of each text, (S,), summed over its tokens.
    """
    rows = texts.rows[says[:, : texts.longest]]
    logits = decoder.cls(states.index_select(0, rows))
    targets = ids.roll(-1, dims=1)[says]
    losses = F.cross_entropy(logits.float(), targets, label_smoothing=decoder.label_smoothing, reduction="none")
    owners = torch.arange(len(ids), device=ids.device).repeat_interleave(says.sum(dim=1), output_size=len(losses))
    return logits, losses.new_zeros(len(ids)).index_add(0, owners, losses)


def log_likelihoods(
    decoder: BlipTextLMHeadModel, ids: Tensor, lengths: Tensor, source: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores K texts about each of B sources in one pass.

    The texts of a source form one sequence: their common first token stands there once and is visible to all, every other token
    sees only the tokens before it in its own text, and last tokens, which predict nothing, are left out.

    Args:
        ids: (B, K, L), all with the same first token; entries behind a text's end are ignored.
        lengths: (B, K) tokens of a text, at least 2.
        source, valid: (B, M, C) and (B, M), False for padding.
    Returns:
        log p of each text, the sum over its tokens of log p(token); and, for label smoothing, the sum over its tokens of the mean
        of log p over all words. (B, K) float32 each.
    """
    places = torch.arange(ids.shape[2], device=ids.device).expand_as(ids)
    inner = ((places > 0) & (places < lengths.unsqueeze(2) - 1)).flatten(1)
    # Moves inner tokens to the front, in their order, and cuts to the largest number of them.
    chosen = inner.byte().sort(dim=1, descending=True, stable=True).indices[:, : int(inner.sum(dim=1).max())]
    text, place, used = chosen // ids.shape[2], chosen % ids.shape[2], inner.gather(1, chosen)
    owner, position = F.pad(text, (1, 0), value=-1), F.pad(place, (1, 0))
    same_text = (owner.unsqueeze(2) == owner.unsqueeze(1)) & (position.unsqueeze(2) >= position.unsqueeze(1))
    visible = same_text & F.pad(used, (1, 0), value=True).unsqueeze(1)
    visible[:, :, 0] = True
    embedded = decoder.bert.embeddings(torch.cat([ids[:, 0, :1], ids.flatten(1).gather(1, chosen)], dim=1), position)
    hidden = decoder.bert.encoder(
        embedded,
        attention_mask=_additive(visible.unsqueeze(1), embedded),
        encoder_hidden_states=source,
        encoder_attention_mask=_additive(valid[:, None, None], embedded),
        use_cache=False,
    ).last_hidden_state
    logarithms = decoder.cls(hidden).float().log_softmax(dim=-1)
    following = ids.roll(-1, dims=2).flatten(1).gather(1, chosen).unsqueeze(2)
    inside = logarithms[:, 1:].gather(2, following).squeeze(2) * used
    likelihoods = logarithms[:, 0].gather(1, ids[:, :, 1]).scatter_add(1, text, inside)
    means = logarithms.mean(dim=2)
    return likelihoods, means[:, :1].expand_as(likelihoods).scatter_add(1, text, means[:, 1:] * used)


def _additive(visible: Tensor, like: Tensor) -> Tensor:
    """Returns an additive mask: 0 where True, the lowest number where False."""
    return torch.zeros_like(visible, dtype=like.dtype).masked_fill_(~visible, torch.finfo(like.dtype).min)


def decoder_flops(decoder: BlipTextLMHeadModel, tokens: Tensor, source: Tensor) -> Tensor:
    """Counts the multiply-adds of a teacher-forced pass for texts of `tokens` (S,) that read `source` (S,) tokens, (S,)."""
    config = decoder.config
    width, depth = config.hidden_size, config.num_hidden_layers
    attention = flops.attention(tokens, tokens, width) + flops.attention(tokens, source, width)
    layers = depth * (attention + 3 * flops.layer_norm(tokens, width))
    layers = layers + flops.products(tokens, *_token_weights(decoder)) + key_flops(decoder.bert.encoder.layer, source)
    head = flops.linear(tokens, width, width + config.vocab_size) + flops.layer_norm(tokens, width)
    return layers + head + flops.layer_norm(tokens, width)


def key_flops(layers: Iterable[Module], source: Tensor) -> Tensor:
    """Counts the multiply-adds that map `source` (S,) tokens to the keys and values of all cross-attentions, (S,)."""
    reads = [layer.crossattention.self for layer in layers]
    return flops.products(source, *(linear.weight for heads in reads for linear in (heads.key, heads.value)))


def _token_weights(decoder: BlipTextLMHeadModel) -> list[Parameter]:
    """Returns the weights of all layers that every text token meets: all linear ones but the source's keys and values."""
    return [
        linear.weight
        for layer in decoder.bert.encoder.layer
        for name, linear in layer.named_modules()
        if isinstance(linear, Linear) and name not in ("crossattention.self.key", "crossattention.self.value")
    ]


def generation_flops(decoder: BlipTextLMHeadModel, prompt: int, lengths: Tensor, beams: int, source: Tensor) -> Tensor:
    """Counts the multiply-adds of beam search for texts of `lengths` (S,), whose first `prompt` tokens are given, (S,).

    Every beam maps the `source` (S,) tokens to keys and values once and caches them, as it does those of its own tokens.
    """
    config = decoder.config
    width, steps = config.hidden_size, (lengths - prompt).clamp(min=1)
    last = prompt + steps - 1  # tokens read when the last one is chosen
    keys_seen = prompt * prompt + (last * (last + 1) - prompt * (prompt + 1)) // 2
    layer = 3 * flops.layer_norm(last, width) + 2 * (keys_seen + last * source) * width
    linears = flops.products(last, *_token_weights(decoder)) + key_flops(decoder.bert.encoder.layer, source)
    head = flops.linear(steps, width, width + config.vocab_size) + flops.layer_norm(steps, width)
    return beams * (config.num_hidden_layers * layer + linears + head + flops.layer_norm(last, width))


def written_lengths(ids: Tensor, end: int) -> Tensor:
    """Counts the tokens of generated texts (S, L), from the first to their `end` token, without padding, (S,)."""
    is_end = (ids == end).long()
    return (is_end.cumsum(dim=1) - is_end == 0).sum(dim=1)
