"""Pictures to tensors."""

import numpy as np
import pytest
import torch
from PIL import Image

from configs.schema import Augment
from configs.sizes import Pictures
from transform.images import MEAN, STD, eval_transform, keeps_truth, train_transform

OFF = Augment(crop_scale=(1, 1), flip=False, randaugment=False)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def plain(picture: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def test_a_picture_of_the_right_size_is_only_normalised(picture: Image.Image) -> None:
    for transform in (eval_transform(32), train_transform(32, OFF)):
        torch.testing.assert_close(transform(picture), plain(picture))


def test_other_sizes_are_resized_bicubically(picture: Image.Image) -> None:
    resized = picture.resize((48, 48), Image.Resampling.BICUBIC)
    torch.testing.assert_close(eval_transform(48)(picture), plain(resized))


def test_the_keys_of_pictures_normalise_and_resize(picture: Image.Image) -> None:
    keys = Pictures(mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2), resample="bilinear")
    resized = picture.resize((48, 48), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
    expected = (pixels - torch.tensor(keys.mean)[:, None, None]) / torch.tensor(keys.std)[:, None, None]
    for transform in (eval_transform(48, pictures=keys), train_transform(48, OFF, pictures=keys)):
        torch.testing.assert_close(transform(picture), expected)
    crops = Augment(crop_scale=(0.2, 0.3), flip=False, randaugment=False)
    found = train_transform(48, crops, pictures=keys)(picture) * torch.tensor(keys.std)[:, None, None]
    found += torch.tensor(keys.mean)[:, None, None]
    assert found.min() > -1e-5 and found.max() < 1 + 1e-5


def test_half_of_the_pictures_are_mirrored_and_none_that_may_not(picture: Image.Image) -> None:
    transform = train_transform(32, Augment(crop_scale=(1, 1), flip=True, randaugment=False))
    mirrored = plain(picture).flip(-1)
    count = sum(torch.equal(transform(picture), transform(picture, may_flip=False).flip(-1)) for _ in range(100))
    assert 25 < count < 75
    assert all(not torch.allclose(transform(picture, may_flip=False), mirrored) for _ in range(20))


def test_the_published_augmentation_gives_pictures_of_the_asked_size(picture: Image.Image) -> None:
    transform = train_transform(24, Augment())
    outputs = [transform(picture) for _ in range(50)]  # enough to meet every operation
    assert all(output.shape == (3, 24, 24) and output.isfinite().all() for output in outputs)
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize(
    ("sentence", "kept"),
    [("two dogs sit", True), ("the left image", False), ("the Rightmost dog", False), ("an upright dog", True)],
)
def test_a_sentence_that_names_a_side_forbids_mirroring(sentence: str, kept: bool) -> None:
    assert keeps_truth(sentence) is kept
