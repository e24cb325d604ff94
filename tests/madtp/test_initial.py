"""Learnable tokens from data: known clusters and directions are found, and all are scaled alike."""

import pytest
import torch

from madtp.initial import METHODS, cluster_centres, principal_directions, tokens_from_data


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_centres_of_distant_clusters_are_found():
    centres = 10 * torch.eye(4)
    tokens = centres.repeat_interleave(50, dim=0) + 0.1 * seeded(200, 4)
    found = cluster_centres(tokens[torch.randperm(200)], 4, torch.Generator().manual_seed(1))
    order = found.argmax(dim=1).argsort()
    torch.testing.assert_close(found[order], tokens.unflatten(0, (4, 50)).mean(dim=1), atol=1e-4, rtol=0)


def test_each_centre_is_the_mean_of_the_tokens_nearest_to_it():
    tokens = seeded(300, 3)
    found = cluster_centres(tokens, 7, torch.Generator().manual_seed(1))
    nearest = torch.stack([(tokens - centre).square().sum(dim=1) for centre in found]).argmin(dim=0)
    for index, centre in enumerate(found):
        torch.testing.assert_close(centre, tokens[nearest == index].mean(dim=0), atol=1e-5, rtol=0)


def test_equal_tokens_have_equal_centres():
    assert torch.equal(cluster_centres(torch.ones(5, 2), 3), torch.ones(3, 2))


def test_principal_directions_are_those_of_the_singular_vectors_with_both_signs():
    tokens = seeded(100, 5) * torch.tensor([3.0, 1.0, 7.0, 0.5, 2.0]) + 4
    vectors = torch.linalg.svd(tokens - tokens.mean(dim=0))[2]
    found = principal_directions(tokens, 5)
    for index in range(5):
        assert abs(float(found[index] @ vectors[index // 2])) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(found[0::2][:2], -found[1::2])


@pytest.mark.parametrize("method", METHODS)
def test_tokens_from_data_do_not_depend_on_the_mean_of_the_tokens_and_have_the_wanted_size(method):
    tokens = seeded(60, 6)
    found, moved = (
        tokens_from_data(method, tokens + offset, 4, 5.0, torch.Generator().manual_seed(0)) for offset in (0.0, 9.0)
    )
    torch.testing.assert_close(found, moved, atol=1e-3, rtol=0)
    assert found.square().mean(dim=1).sqrt().tolist() == pytest.approx([5.0] * 4, abs=1e-4)


@pytest.mark.parametrize(("method", "number", "words"), [("kmeans", 9, "8 tokens"), ("principal", 7, "6 signed directions")])
def test_too_few_tokens_or_channels_are_named(method, number, words):
    with pytest.raises(ValueError, match=words):
        tokens_from_data(method, seeded(8, 3), number, 1.0)
