"""Image transforms for training and evaluation."""

import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from timm.data.auto_augment import RandAugment, rand_augment_ops
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, which BLIP uses as well
STD = (0.26862954, 0.26130258, 0.27577711)

# As published. At strength 5, Brightness and Sharpness have the factor 1, so they do not change the image.
OPERATIONS = ["AutoContrast", "Brightness", "Sharpness", "Equalize", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"]
LAYERS, STRENGTH = 2, 5

_SIDE = re.compile(r"\b(left|right)", re.IGNORECASE)  # also leftmost, right-hand


class ImageTransform(Protocol):
    """A transform from an RGB image to a float tensor (3, image_size, image_size). `may_flip=False` forbids mirroring."""

    image_size: int

    def __call__(self, image: Image.Image, may_flip: bool = True) -> torch.Tensor: ...


def keeps_truth(sentence: str) -> bool:
    """Tells whether mirroring the image keeps the sentence true: no word of it begins with left or right.

    In NLVR2 these words often name one of the two images, which mirroring does not change, but just as often a side within an
    image. The published code always mirrors. The small shears, shifts and rotations of RandAugment keep all sentences true.
    """
    return _SIDE.search(sentence) is None


class Preparation(NamedTuple):
    """How a picture becomes a tensor.

    mean, std: of the normalisation, by channel
    resample: interpolation where it is resized
    """

    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    resample: str = "bicubic"

    @classmethod
    def of(cls, pictures: Any) -> "Preparation":
        """pictures: configs.sizes.Pictures; None for CLIP's"""
        return cls() if pictures is None else cls(pictures.mean, pictures.std, pictures.resample)

    def crop(self, image_size: int, scale: tuple[float, float]) -> RandomResizedCrop:
        return RandomResizedCrop(image_size, scale=scale, interpolation=InterpolationMode(self.resample))

    def resize(self, image: Image.Image, size: int) -> Image.Image:
        return image if image.size == (size, size) else image.resize((size, size), Image.Resampling[self.resample.upper()])

    def to_tensor(self, image: Image.Image) -> torch.Tensor:
        return F.normalize(F.to_tensor(image), self.mean, self.std)


def train_transform(image_size: int, augment: Any, blank: bool = False, pictures: Any = None) -> ImageTransform:
    """Builds the training transform: random crop, flip and RandAugment.

    `augment` (configs.schema.Augment) switches each of them on or off. With `blank`, every image becomes zeros. `pictures`: see
    `Preparation.of`.
    """
    if blank:
        return _BlankTransform(image_size)
    preparation = Preparation.of(pictures)
    return _TrainTransform(image_size, preparation, tuple(augment.crop_scale), augment.flip, augment.randaugment)


def eval_transform(image_size: int, blank: bool = False, pictures: Any = None) -> ImageTransform:
    """Builds the evaluation transform, which resizes the whole image. With `blank`, every image becomes zeros.

    pictures: see `Preparation.of`
    """
    return _BlankTransform(image_size) if blank else _EvalTransform(image_size, Preparation.of(pictures))


class _BlankTransform:
    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    def __call__(self, image: Image.Image, may_flip: bool = True) -> torch.Tensor:
        return torch.zeros(3, self.image_size, self.image_size)


class _EvalTransform:
    def __init__(self, image_size: int, preparation: Preparation) -> None:
        self.image_size, self.preparation = image_size, preparation

    def __call__(self, image: Image.Image, may_flip: bool = True) -> torch.Tensor:
        return self.preparation.to_tensor(self.preparation.resize(image, self.image_size))


class _TrainTransform:
    def __init__(
        self, image_size: int, preparation: Preparation, crop_scale: tuple[float, float], flip: bool, randaugment: bool
    ) -> None:
        self.image_size, self.preparation = image_size, preparation
        # RandomResizedCrop changes the aspect ratio even at a scale of 1, so it is skipped there.
        self.crop = None
        if min(crop_scale) < 1:
            self.crop = preparation.crop(image_size, crop_scale)
        self.flip = flip
        self.augment = _rand_augment() if randaugment else None

    def __call__(self, image: Image.Image, may_flip: bool = True) -> torch.Tensor:
        image = self.crop(image) if self.crop else self.preparation.resize(image, self.image_size)
        if self.flip and random.random() < 0.5 and may_flip:
            image = F.hflip(image)
        return self.preparation.to_tensor(self.augment(image) if self.augment else image)


def _rand_augment() -> Callable[[Image.Image], Image.Image]:
    """Builds BLIP's RandAugment: two operations, each applied with probability 0.5. Shifts are at most 10 pixels."""
    settings = {"translate_const": 10, "img_mean": (128, 128, 128), "interpolation": Image.Resampling.BILINEAR}
    operations = rand_augment_ops(STRENGTH, prob=0.5, hparams=settings, transforms=OPERATIONS)
    return RandAugment([_identity, *operations], num_layers=LAYERS)


def _identity(image: Image.Image) -> Image.Image:
    return image
