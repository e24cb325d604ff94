"""MAG, Eq. 1-3 and 12, against loops and closed forms."""

import math

import pytest
import torch
from torch import nn

from madtp.alignment import Alignment, aligned_features, contrastive_similarity_loss, similarity_loss, token_attention

B, N, C, K, D = 2, 5, 4, 3, 6
LENGTHS = [5, 3]


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("width", "projection"), [(C, "auto"), (D, "on"), (D, "auto"), (D, "off")])
def test_alignment_by_loops(width, projection):
    tokens, learnable = seeded(B, N, width), seeded(K, D, seed=1)
    valid = torch.arange(N) < torch.tensor(LENGTHS)[:, None]
    tokens[~valid] = 1e6
    alignment = Alignment(width, D, projection)
    with torch.no_grad():
        products, mapped = alignment(tokens, learnable)
        attention = token_attention(products, D, valid)
        features = aligned_features(attention, mapped)
    weight, bias = torch.eye(D), torch.zeros(D)
    if isinstance(alignment.projection, nn.Linear):
        weight, bias = alignment.projection.weight.detach(), alignment.projection.bias.detach()
    for b, length in enumerate(LENGTHS):
        for k in range(K):
            vectors = [
                [sum(float(weight[d, c] * tokens[b, n, c]) for c in range(width)) + float(bias[d]) for d in range(D)]
                for n in range(length)
            ]
            raw = [sum(float(learnable[k, d]) * vector[d] for d in range(D)) for vector in vectors]
            powers = [math.exp(product / math.sqrt(D)) for product in raw]
            shares = [power / sum(powers) for power in powers]
            mean = [sum(share * vector[d] for share, vector in zip(shares, vectors, strict=True)) for d in range(D)]
            assert products[b, k, :length].tolist() == pytest.approx(raw, abs=1e-4)
            assert attention[b, k].tolist() == pytest.approx(shares + [0] * (N - length), abs=1e-5)
            assert features[b, k].tolist() == pytest.approx(mean, abs=1e-4)


def test_tokens_are_mapped_where_the_widths_differ_or_it_is_asked_for():
    mapped = {
        (width, choice): isinstance(Alignment(width, D, choice).projection, nn.Linear)
        for width, choice in [(C, "auto"), (D, "auto"), (D, "on"), (D, "off")]
    }
    assert mapped == {(C, "auto"): True, (D, "auto"): False, (D, "on"): True, (D, "off"): False}
    with pytest.raises(ValueError, match=f"width {C} cannot meet learnable tokens of width {D}"):
        Alignment(C, D, "off")


def test_a_sample_without_tokens_has_no_attention():
    attention = token_attention(seeded(2, K, N), D, torch.tensor([[False] * N, [True] * N]))
    assert not attention[0].any() and attention[1].sum(dim=-1).tolist() == pytest.approx([1] * K)


def test_the_similarity_loss_is_one_minus_the_cosine():
    a = seeded(B, K, D)
    assert float(similarity_loss(a, 3 * a)) == pytest.approx(0, abs=1e-6)
    assert float(similarity_loss(a, -a)) == pytest.approx(2, abs=1e-6)
    flat = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    upright = torch.tensor([[[0.0, 2.0], [0.0, 5.0]]])
    assert float(similarity_loss(flat, upright)) == pytest.approx((1 + 1 - math.sqrt(0.5)) / 2)


def test_the_similarity_loss_averages_over_tokens_and_samples():
    a, b = seeded(B, K, D), seeded(B, K, D, seed=1)
    cosines = [
        sum(float(x * y) for x, y in zip(u, v, strict=True)) / float(u.norm() * v.norm())
        for u, v in zip(a.view(-1, D), b.view(-1, D), strict=True)
    ]
    assert float(similarity_loss(a, b)) == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-6)


def test_the_contrastive_similarity_loss_is_the_cross_entropy_among_other_images():
    torch.manual_seed(0)
    vision, language, groups = torch.randn(4, 3, 5), torch.randn(4, 3, 5), torch.tensor([0, 0, 1, 2])
    near = torch.tensor([[float(torch.cosine_similarity(v, text, dim=-1).mean()) / 0.1 for text in language] for v in vision])
    total = 0.0
    for i in range(4):
        others = [j for j in range(4) if j == i or groups[j] != groups[i]]
        total += 2 * near[i, i] - near[i, others].logsumexp(0) - near[others, i].logsumexp(0)
    assert float(contrastive_similarity_loss(vision, language, groups)) == pytest.approx(-float(total) / 8, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert float(contrastive_similarity_loss(vision, language, groups)) == pytest.approx(-float(total) / 8, rel=1e-5)
