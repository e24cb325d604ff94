"""`variant: released` against the authors' Reduce_token and Query_model."""

import pytest
import torch

from madtp import released
from madtp.alignment import Alignment, aligned_features, token_attention
from madtp.importance import AttentionStatistics
from madtp.released import released_gather
from madtp.selection import best_tokens, keep_counts, merge_weights
from tests import golden

TERMS = ("cls", "self", "token")


@pytest.mark.parametrize("path", golden.cases("reduce_token_*"))
def test_reduce_token(path):
    info, t = golden.load(path)
    min_keep = info["config"].get("max_keep", int(path.stem.split("keep")[1]) if "keep" in path.stem else 0)
    products = t["token_attn"].transpose(1, 2)
    statistics = AttentionStatistics(t["cls_attn"], released.released_columns(t["self_attn"][:, :, 1:, 1:]))
    importance = released.released_importance(statistics, products, TERMS)
    x = torch.cat([torch.zeros_like(t["x"][:, :1]), t["x"]], dim=1)
    valid = torch.cat([torch.ones_like(t["mask"][:, :1]), t["mask"] == 0], dim=1).bool() if "mask" in t else None
    for temperature in info["config"]["temperatures"]:
        name = f"T{temperature}"
        theta = released.released_threshold(products, importance, float(temperature))
        counts = (importance > theta.unsqueeze(1)).sum(dim=1)
        golden.assert_close(importance, t[f"{name}.score"])
        golden.assert_close(theta.unsqueeze(1), t[f"{name}.threshold"])
        assert counts.tolist() == t[f"{name}.count"].tolist()
        keep = int(keep_counts(counts, torch.full_like(counts, importance.shape[1]), "max", min_keep)[0])
        assert (keep < importance.shape[1]) == bool(t[f"{name}.pruned"])
        if keep == importance.shape[1]:
            continue
        kept = best_tokens(importance, torch.full_like(counts, keep))
        for row, expected in zip(kept, t[f"{name}.kept"], strict=True):
            assert row.nonzero().squeeze(1).tolist() == sorted(expected[:keep].tolist())
        by_rank = merge_weights(importance, ~kept).gather(1, t[f"{name}.sorted"])[:, keep:]
        golden.assert_close(by_rank, t[f"{name}.merge_weight"].view_as(by_rank))
        out, out_valid = released_gather(x, valid, importance, kept, keep, mask_follows="med" in path.stem)
        golden.assert_close(out[:, 1:], t[f"{name}.order_cuda.out"])
        if valid is not None:
            assert torch.equal(out_valid[:, 1:], t[f"{name}.order_cuda.out_mask"] == 0)


@pytest.mark.parametrize("path", golden.cases("query_model"))
@pytest.mark.parametrize("mapped", [False, True], ids=["identity", "map"])
def test_query_model(path, mapped):
    _, t = golden.load(path)
    prefix = "map." if mapped else ""
    learnable = t[f"{prefix}space_dict"]
    alignment = Alignment(t["ft"].shape[-1], learnable.shape[1], "on" if mapped else "off")
    if mapped:
        alignment.projection.load_state_dict({"weight": t["w.q_map.0.weight"], "bias": t["w.q_map.0.bias"]})
    products, tokens = alignment(t["ft"], learnable)
    attention = token_attention(products, learnable.shape[1])
    golden.assert_close(products, t[f"{prefix}token_att"].transpose(1, 2))
    golden.assert_close(aligned_features(attention, tokens), t[f"{prefix}att_ft"])
    if not mapped:
        golden.assert_close(attention, t["att_weight"])
