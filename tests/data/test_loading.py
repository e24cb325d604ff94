"""NLVR2's files to batches, alone and in several processes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from configs.schema import Augment, NlvrConfig
from data.loading import BadPicture, Loader, build_loader, calibration_subset, load_image, read_json
from data.nlvr import NlvrCollate, NlvrDataset, build_datasets, find_image, read_statements, swap_sides
from data.text import enc_token_id, load_tokenizer
from transform.images import eval_transform, train_transform
from utils import Run, UserError

SIZE = 8
RED, BLUE = (250, 0, 0), (0, 0, 250)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Five pairs, each a red and a blue picture with two statements, in the layout train/0/x.png."""
    folder = tmp_path / "images" / "train" / "0"
    folder.mkdir(parents=True)
    entries = []
    for pair in range(5):
        for side, colour in enumerate((RED, BLUE)):
            Image.new("RGB", (SIZE, SIZE), colour).save(folder / f"{pair}-img{side}.png")
        for sentence, label in (("The left image is red.", "True"), (f"dog {pair}", "False")):
            images = [f"train/0/{pair}-img0.png", f"train/0/{pair}-img1.png"]
            entries.append({"sentence": sentence, "label": label, "images": images})
    for split in ("train", "dev", "test"):
        (tmp_path / f"nlvr_{split}.json").write_text(json.dumps(entries))
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the left right image is red dog".split()
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return tmp_path


def dataset_of(world: Path, **settings: Any) -> NlvrDataset:
    return NlvrDataset(read_statements(world / "nlvr_train.json"), world / "images", eval_transform(SIZE), **settings)


def loader_of(dataset: Dataset, workers: int = 0, run: Run | None = None, train: bool = True, **options) -> Loader:
    run = run or Run(torch.device("cpu"))
    return build_loader(dataset, 4, train=train, run=run, num_workers=workers, seed=1, collate=list, **options)


def is_red(picture: torch.Tensor) -> bool:
    return bool(picture[0].mean() > picture[2].mean())


class Numbers(Dataset):
    """Each item is its index and a random number."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, float(torch.rand(()))


class Broken(Numbers):
    def __getitem__(self, index: int) -> tuple[int, float]:
        raise UserError("x.png: no such picture")


class Holes(Numbers):
    """Every third item cannot be read."""

    def __getitem__(self, index: int) -> tuple[int, float]:
        if index % 3 == 0:
            raise BadPicture(f"{index}.png: broken")
        return super().__getitem__(index)


def epochs_of(loader: Loader, epochs: list[int]) -> list[list[tuple[int, float]]]:
    passes = []
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)
        passes.append([item for batch in loader for item in batch])
    return passes


def test_a_batch_has_the_documented_shapes(world: Path) -> None:
    tokenizer = load_tokenizer(world)
    dataset = dataset_of(world)
    batch = NlvrCollate(tokenizer)([dataset[0], dataset[3]])
    assert batch["images"].shape == (2, 2, 3, SIZE, SIZE)
    assert is_red(batch["images"][0, 0]) and not is_red(batch["images"][0, 1])
    enc = enc_token_id(tokenizer)
    assert batch["input_ids"].tolist() == [[enc, 5, 6, 8, 9, 10, 3], [enc, 11, 1, 3, 0, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [7, 4]
    assert batch["targets"].tolist() == [1, 0]
    assert batch["ids"] == ["nlvr_train-0", "nlvr_train-3"]


def test_a_text_longer_than_the_model_reads_is_cut(world: Path) -> None:
    batch = NlvrCollate(load_tokenizer(world), max_tokens=4)([dataset_of(world)[0]])
    assert batch["input_ids"].shape == (1, 4)


def test_training_exchanges_pictures_and_words_together(world: Path) -> None:
    dataset = dataset_of(world, swap=True)
    items = [dataset[0] for _ in range(40)]
    assert {is_red(item["left"]) for item in items} == {True, False}
    assert all(item["sentences"][0] == f"the {'left' if is_red(item['left']) else 'right'} image is red" for item in items)


def test_evaluation_never_exchanges(world: Path) -> None:
    assert all(is_red(dataset_of(world)[0]["left"]) for _ in range(20))


def test_places_within_a_picture_are_not_exchanged() -> None:
    assert swap_sides("the left image, a star left of a bright dot") == "the right image, a star left of a bright dot"
    assert swap_sides("the rightmost of them, on the left") == "the leftmost of them, on the right"


def test_statements_of_one_pair_share_its_pictures(world: Path) -> None:
    dataset = dataset_of(world, statements_per_pair=2)
    assert len(dataset) == 5
    batch = NlvrCollate(load_tokenizer(world))([dataset[0], dataset[1]])
    assert batch["images"].shape[0] == 2
    assert batch["ids"] == [f"nlvr_train-{i}" for i in range(4)]


def test_the_ablations_hide_pictures(world: Path) -> None:
    left = dataset_of(world, images="left")[0]
    assert torch.equal(left["left"], left["right"])
    blank = NlvrDataset(read_statements(world / "nlvr_train.json"), world, eval_transform(SIZE, blank=True))[0]
    assert not blank["left"].any() and not blank["right"].any()


@pytest.mark.parametrize("name", ["train/0/0-img0.png", "train/0-img0.png", "images/train/0-img0.png", "train/7/0-img0.png"])
def test_both_layouts_of_the_pictures_are_found(world: Path, name: str) -> None:
    flat = world / "flat"
    (flat / "train").mkdir(parents=True)
    Image.new("RGB", (SIZE, SIZE)).save(flat / "train/0-img0.png")
    for root in (world, world / "images", flat):
        assert find_image(root, name).name == "0-img0.png"


def test_a_picture_is_found_before_any_folder_is_listed(world: Path, monkeypatch) -> None:
    """NLVR2 has folders of a hundred thousand pictures."""
    flat = world / "flat" / "images" / "train"
    flat.mkdir(parents=True)
    Image.new("RGB", (SIZE, SIZE)).save(flat / "0-img0.png")
    monkeypatch.setattr(Path, "glob", lambda *_: pytest.fail("listed a folder"))
    assert find_image(world / "flat", "train/0/0-img0.png") == flat / "0-img0.png"


def test_missing_files_are_the_users_to_mend(world: Path) -> None:
    with pytest.raises(UserError, match="0-img0.png: no such picture; set the key 'image_root'"):
        NlvrDataset(read_statements(world / "nlvr_train.json"), world / "nowhere", eval_transform(SIZE))
    with pytest.raises(UserError, match="none.json: No such file"):
        read_statements(world / "none.json")
    (world / "images/train/0/4-img1.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="4-img1.png: not a readable picture"):
        dataset_of(world)[9]
    with pytest.raises(UserError, match="none.png: no such picture"):
        load_image(world / "none.png")


def test_a_cut_off_file_is_named_with_the_place(world: Path) -> None:
    path = world / "nlvr_train.json"
    path.write_text('[{"sentence": "a",\n "label": "Tr')
    with pytest.raises(UserError, match="nlvr_train.json: not valid JSON at line 2, column 11"):
        read_json(path)


def test_a_foreign_entry_is_named(world: Path) -> None:
    (world / "nlvr_train.json").write_text('[{"sentence": "a", "label": "maybe", "images": ["a", "b"]}]')
    with pytest.raises(UserError, match="entry 0 has the 'label' 'maybe'"):
        dataset_of(world)


def test_evaluation_counts_every_sample_once_on_any_number_of_processes() -> None:
    for processes in (1, 2, 3):
        runs = [Run(torch.device("cpu"), rank, processes) for rank in range(processes)]
        seen = [index for run in runs for batch in loader_of(Numbers(11), run=run, train=False) for index, _ in batch]
        assert sorted(seen) == list(range(11))


def test_training_gives_every_process_the_same_number_of_batches_and_shares_nothing() -> None:
    runs = [Run(torch.device("cpu"), rank, 2) for rank in range(2)]
    passes = [[batch for batch in loader_of(Numbers(19), run=run)] for run in runs]
    assert [len(batches) for batches in passes] == [2, 2] == [len(loader_of(Numbers(19), run=run)) for run in runs]
    seen = [index for batches in passes for batch in batches for index, _ in batch]
    assert len(set(seen)) == len(seen) == 16


def test_a_short_epoch_draws_its_samples_anew() -> None:
    loader = loader_of(Numbers(40), epoch_steps=3)
    short = epochs_of(loader, [0, 1])
    assert len(loader) == 3 and [len(items) for items in short] == [12, 12]
    assert [index for index, _ in short[0]] == [index for index, _ in epochs_of(loader_of(Numbers(40)), [0])[0]][:12]
    assert {index for index, _ in short[0]} != {index for index, _ in short[1]}


def test_samples_depend_on_seed_and_epoch_not_on_workers_or_resuming() -> None:
    alone = epochs_of(loader_of(Numbers(12)), [0, 1])
    assert epochs_of(loader_of(Numbers(12), workers=2), [0, 1]) == alone
    assert epochs_of(loader_of(Numbers(12)), [1]) == alone[1:]
    assert alone[0] != alone[1] and sorted(alone[0])[0][1] != sorted(alone[1])[0][1]


def test_loading_leaves_the_random_numbers_of_the_model_alone() -> None:
    before = torch.get_rng_state()
    epochs_of(loader_of(Numbers(12)), [0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_workers_error_reaches_the_user_in_one_line(workers: int) -> None:
    with pytest.raises(UserError, match=r"\Ax\.png: no such picture\Z"):
        list(loader_of(Broken(8), workers=workers))


def test_another_sample_takes_the_place_of_one_that_cannot_be_read_whatever_the_workers() -> None:
    alone, with_workers = (loader_of(Holes(12), workers, replace_bad=True) for workers in (0, 2))
    passes = epochs_of(alone, [0, 1])
    assert [len(items) for items in passes] == [12, 12] and all(index % 3 for items in passes for index, _ in items)
    assert epochs_of(with_workers, [0, 1]) == passes
    assert passes[0] != passes[1] and with_workers.replaced == alone.replaced
    untouched = [items for items, whole in zip(passes[0], epochs_of(loader_of(Numbers(12)), [0])[0], strict=True) if items == whole]
    assert len(untouched) == 8
    assert {f"{index}.png: broken" for index in (0, 3, 6, 9)} == set(alone.replaced)


def test_the_samples_that_were_replaced_are_those_of_the_last_pass() -> None:
    loader = loader_of(Holes(12), replace_bad=True)
    counts = [len(loader.replaced) for _ in epochs_of(loader, [0]) + epochs_of(loader, [0])]
    assert counts[0] == counts[1] >= 4


@pytest.mark.parametrize("workers", [0, 1])
def test_without_leave_to_replace_it_a_sample_that_cannot_be_read_stops_the_pass(workers: int) -> None:
    with pytest.raises(UserError, match="png: broken"):
        list(loader_of(Holes(12), workers, train=False))


class Unreadable(Numbers):
    def __getitem__(self, index: int) -> tuple[int, float]:
        raise BadPicture(f"{index}.png: broken")


def test_where_nothing_can_be_read_the_pass_stops() -> None:
    with pytest.raises(UserError, match="png: broken"):
        list(loader_of(Unreadable(8), replace_bad=True))


def test_only_pictures_are_replaced() -> None:
    with pytest.raises(UserError, match="no such picture"):
        list(loader_of(Broken(8), replace_bad=True))


def test_too_few_samples_for_a_batch_are_reported() -> None:
    with pytest.raises(UserError, match="lower 'batch_size_train'"):
        loader_of(Numbers(3))


def test_the_calibration_slice_is_spread_and_fixed() -> None:
    subset = calibration_subset(Numbers(1000), 10)
    assert [index // 100 for index in subset.indices] == list(range(10))
    assert subset.indices == calibration_subset(Numbers(1000), 10).indices
    assert calibration_subset(Numbers(3), 10).indices == [0, 1, 2]


def test_a_config_becomes_its_datasets(world: Path) -> None:
    config = NlvrConfig(image_root=world / "images", ann_root=world, image_size=16, calibration_size=4, statements_per_pair=2)
    datasets = build_datasets(config)
    assert {name: len(dataset) for name, dataset in datasets.items()} == {"train": 5, "calibration": 4, "val": 10, "test": 10}
    assert datasets["train"].swap and not datasets["calibration"].dataset.swap
    assert datasets["train"][0]["left"].shape == (3, 16, 16)


def test_a_sentence_that_names_a_side_is_not_mirrored(world: Path) -> None:
    folder = world / "images/train/0"
    for side in range(2):  # dark on the left half
        picture = Image.new("RGB", (SIZE, SIZE), (250, 250, 250))
        picture.paste((0, 0, 0), (0, 0, SIZE // 2, SIZE))
        picture.save(folder / f"0-img{side}.png")
    transform = train_transform(SIZE, Augment(crop_scale=(1, 1), flip=True, randaugment=False))
    dataset = NlvrDataset(read_statements(world / "nlvr_train.json"), world / "images", transform)
    halves = [[dataset[index]["left"][0, 0, 0] < 0 for _ in range(30)] for index in (0, 1)]
    assert all(halves[0]) and not all(halves[1])
