"""Recall of image-text retrieval: rankings in, percent out."""

import torch
from torch import Tensor

CUTS = (1, 5, 10)


def recalls(texts: Tensor, images: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """Percent of the queries with a correct target among the first 1, 5 and 10, and the means, under BLIP's names.

    Args:
        texts: (I, k) the best texts of each image, as numbers, best first (txt_*).
        images: (T, k) the best images of each text (img_*).
        image_of_text: (T,) the number of each text's image.
    """
    right = {"txt": image_of_text[texts] == torch.arange(len(texts)).unsqueeze(1), "img": images == image_of_text.unsqueeze(1)}
    found = {}
    for name, hits in right.items():
        shares = [100 * hits[:, :cut].any(dim=1).double().mean().item() for cut in CUTS]
        found.update({f"{name}_r{cut}": share for cut, share in zip(CUTS, shares, strict=True)})
        found[f"{name}_r_mean"] = sum(shares) / len(shares)
    return {**found, "r_mean": (found["txt_r_mean"] + found["img_r_mean"]) / 2}
