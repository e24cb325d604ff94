"""Recall of image-text retrieval, in percent, from rankings."""

import torch
from torch import Tensor

CUTS = (1, 5, 10)


def recalls(texts: Tensor, images: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """Computes the percentage of queries with a correct target among the first 1, 5 and 10, and the means.

    Args:
        texts: (I, k) indices of the best texts for each image, best first.
        images: (T, k) indices of the best images for each text, best first.
        image_of_text: (T,) index of the image of each text.

    Returns:
        recalls under BLIP's names: txt_r1, txt_r5, txt_r10 and txt_r_mean from `texts`, the same with img_ from `images`, and
        r_mean.
    """
    right = {"txt": image_of_text[texts] == torch.arange(len(texts)).unsqueeze(1), "img": images == image_of_text.unsqueeze(1)}
    found = {}
    for name, hits in right.items():
        shares = [100 * hits[:, :cut].any(dim=1).double().mean().item() for cut in CUTS]
        found.update({f"{name}_r{cut}": share for cut, share in zip(CUTS, shares, strict=True)})
        found[f"{name}_r_mean"] = sum(shares) / len(shares)
    return {**found, "r_mean": (found["txt_r_mean"] + found["img_r_mean"]) / 2}
