"""The keys of the YAML files: type, default, constraints and meaning of each.

The keys form one flat namespace, with the published names. `Config` holds the keys that all tasks share, those of the method in
configs/method.py; each task has a subclass. An empty value (`key:`) means none, and is an error where a value is required;
`pretrained:` may be empty.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from configs.method import MethodKeys
from configs.sizes import BERT_SIZES, VIT_SIZES, Bert, BertSizes, ClipSizes, Pictures, Section, Text, Vit, VitSizes, require
from configs.table import SPLITS, TableKeys, TablePart
from utils import home_expanded

PATHS = ("pretrained", "teacher", "resume", "tokenizer")  # paths that are texts, since they may be empty or a name
TASK = "the task of this file; needed by tools that accept the config of any task"


class CommandLine(NamedTuple):
    """The keys that the command line sets, and lines for the log about its flags."""

    keys: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


class Augment(Section):
    """The augmentation of training images."""

    crop_scale: tuple[float, float] = Field((0.5, 1.0), description="share of the area that a random crop keeps; [1, 1] is off")
    flip: bool = Field(True, description="mirror half of the images, unless a sentence names left or right")
    randaugment: bool = Field(True, description="apply RandAugment: two random operations of strength 5")
    swap: bool = Field(True, description="NLVR2: exchange the two images half the time, with left and right in the sentence")

    @model_validator(mode="after")
    def _ordered(self) -> "Augment":
        low, high = self.crop_scale
        return require(self, 0 < low <= high <= 1, "crop_scale must be two numbers with 0 < first <= second <= 1")


class Config(MethodKeys, TableKeys):
    """The keys that all tasks share."""

    script: ClassVar[str] = ""
    image_keys: ClassVar[tuple[str, ...]] = ("image_root",)  # keys of the image folders
    text_with_image: ClassVar[bool] = False  # every text is asked of one image

    _command_line: CommandLine = PrivateAttr(CommandLine())  # set by configs.load; no key of the file

    task: str = Field("", description=TASK)

    # data
    image_root: Path = Field(Path("datasets/images"), description="folder that image paths in the annotations are relative to")
    ann_root: Path = Field(Path("datasets/annotations"), description="folder of the annotation files")
    train_files: list[str] = Field([], description="names of the annotation files to train on, without .json")
    val_file: str = Field("", description="name of the annotation file that selects the checkpoint")
    test_file: str = Field("", description="name of the annotation file that is evaluated once, at the end")
    tokenizer: Path = Field(Path("pretrained/bert-base-uncased"), description="BERT's vocab.txt, or its folder")
    image_size: int = Field(384, ge=1, description="pixels along one side; higher shows more detail, GFLOPs grow with its square")
    augment: Augment = Field(Augment(), description="augmentation of training images")
    pictures: Pictures = Field(Pictures(), description="resizing and normalisation of images; a SigLIP's folder brings its own")
    text_only: bool = Field(False, description="ablation: blank all images")
    on_bad_sample: Literal["stop", "skip"] = Field(
        "stop",
        description="a training picture that cannot be read: stop the run, or skip it, with another sample in its place and a note"
        " in log.txt and result.json; evaluation always stops",
    )
    num_workers: int = Field(4, ge=0, description="processes that load data; does not change results")

    # model
    pretrained: Text = Field(
        "", description="weights to start from: a file, or a folder of transformers, which sets the sizes; empty: random weights"
    )
    vit: Vit = Field("base", description="base, large, or a mapping of sizes")
    vit_norm_eps: float = Field(
        1e-6, gt=0, description="epsilon of the image encoder's LayerNorm: BLIP's; a folder of transformers brings its own"
    )
    bert: Bert = Field("base", description="base, or a mapping of sizes")
    vit_grad_ckpt: bool = Field(False, description="recompute activations in the backward pass: less memory, slower")
    vit_ckpt_layer: int = Field(0, ge=0, description="vit_grad_ckpt: number of last blocks that recompute; higher saves memory")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth, rising from 0 to this; higher regularises more")

    # optimisation
    batch_size_train: int = Field(16, ge=1, description="samples per process and batch")
    accumulate: int = Field(
        1,
        ge=1,
        description="batches per step, whose gradients are averaged: fewer GPUs take the step of more",
    )
    batch_size_test: int = Field(32, ge=1, description="samples per process and step in evaluation")
    init_lr: float = Field(1e-5, gt=0, description="learning rate of the first epoch; higher learns faster, but may diverge")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the cosine schedule")
    weight_decay: float = Field(0.05, ge=0, description="weight decay of AdamW; higher keeps weights smaller")
    max_epoch: int = Field(5, ge=1, description="number of epochs")
    epoch_steps: int | None = Field(
        None, ge=1, description="steps per epoch; lower calibrates, validates and saves more often; none: all samples"
    )
    lr_schedule: Literal["epoch", "step"] = Field("epoch", description="update the learning rate once per epoch or at every step")
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises to init_lr")
    clip_grad: float = Field(0.0, ge=0, description="largest gradient norm; lower steadies training from scratch; 0: no limit")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target on wrong answers; higher regularises more")
    amp: bool = Field(False, description="mixed precision: faster on a GPU, less exact")
    max_bad_steps: int = Field(
        10, ge=1, description="steps in a row whose loss or gradient may be infinite or NaN before the run stops; they are skipped"
    )

    # the run
    seed: int = Field(42, ge=0, description="random seed of initial weights, data order and augmentation")
    device: str | None = Field(None, pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N; none: cuda if available")
    output_dir: Path = Field(Path("output"), description="folder that the run writes to")
    evaluate: bool = Field(False, description="evaluate the pretrained weights, do not train")
    resume: Text = Field(
        "", description="checkpoint of the run to continue; 'last': output_dir/checkpoint_last.pth; 'auto': that, if it is there"
    )
    overwrite: bool = Field(False, description="replace the results of another run in output_dir")
    save_minutes: float = Field(
        15.0, ge=0, description="minutes after which checkpoint_last.pth is saved within an epoch; 0: only after its last step"
    )
    save_steps: int | None = Field(None, ge=1, description="save checkpoint_last.pth also at each multiple of so many steps")

    @field_validator("train_files", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("*", mode="before")
    @classmethod
    def _home_folder(cls, value: Any, info: ValidationInfo) -> Any:
        """Expands `~`, which no shell expands in a YAML file or in --set."""
        is_path = "Path" in str(cls.model_fields[str(info.field_name)].annotation) or info.field_name in PATHS
        return home_expanded(str(value)) if is_path and isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _keys_fit_one_another(self) -> "Config":
        patch, both = self.patch_size, self.order == "adaptive" and self.mask_schedule == "refresh"
        require(self, self.patches_fit, f"image_size must be a multiple of the patch size, {patch}")
        require(self, not both, "order: adaptive chooses its masks once; mask_schedule must be once")
        if self.train_budget is not None:
            low, high = self.train_budget
            require(self, 0 < low < high < 1, "train_budget must be two numbers with 0 < first < second < 1")
            inside = self.evaluate or low <= self.p <= high
            require(self, inside, f"p = {self.p:g} must lie in the range of train_budget, {low:g} to {high:g}")
            require(self, self.pattern is None, "train_budget is for pruned tokens alone; leave sparsity_type empty")
        if self.keep == "fixed":
            require(self, self.evaluate, "keep: fixed is for --evaluate; train with instance")
            require(self, self.method == "dtp" and self.variant == "paper", "keep: fixed is for method: dtp, variant: paper")
        shared = self.guide == "shared"
        require(self, shared or self.text_with_image, "guide: text is for NLVR2 and VQA, where each text belongs to its image")
        require(
            self, shared or self.variant == "paper", "guide: text is beyond the paper and the authors' code; use variant: paper"
        )
        aligned = shared or self.uncompressed or self.aligns
        require(self, aligned, "guide: text needs the learnable tokens that collect it; use mag: true and another method than tome")
        return require(self, self.prune_from < self.depth, f"prune_from must be below the number of blocks, {self.depth}")

    @property
    def command_line(self) -> CommandLine:
        return self._command_line

    @property
    def patch_size(self) -> int:
        return self.vit_sizes.patch_size

    @property
    def patches_fit(self) -> bool:
        return self.image_size % self.patch_size == 0

    @property
    def depth(self) -> int:
        """The number of blocks of the deeper tower."""
        return max(self.vit_sizes.depth, self.bert_sizes.num_hidden_layers)

    @property
    def vit_sizes(self) -> VitSizes:
        return VIT_SIZES[self.vit] if isinstance(self.vit, str) else self.vit

    @property
    def bert_sizes(self) -> BertSizes:
        return BERT_SIZES[self.bert] if isinstance(self.bert, str) else self.bert

    @property
    def epoch_batches(self) -> int | None:
        """The largest number of batches per epoch and process; None for all."""
        return self.epoch_steps and self.epoch_steps * self.accumulate

    @property
    def resume_path(self) -> Path | None:
        """The checkpoint to resume from; None for a new run."""
        if self.resume == "last":
            return self.output_dir / "checkpoint_last.pth"
        return Path(self.resume) if self.resume else None

    def skips_bad(self, split: str) -> bool:
        """Tells whether samples of a split are skipped if they cannot be read; metrics are always those of a whole split."""
        return self.on_bad_sample == "skip" and split in ("train", "calibration")

    def annotation_file(self, name: str) -> Path | TablePart:
        """Returns the path of the annotation file `name`, given with or without .json; with a table, its split of this name."""
        if self.table is not None and name in SPLITS:
            return TablePart(self.table, name, self.task, self.split_shares, self.split_seed)
        return self.ann_root / home_expanded(f"{name.removesuffix('.json')}.json")


class NlvrConfig(Config):
    """Keys of NLVR2: tell whether a sentence is true of two images."""

    script: ClassVar[str] = "compress_nlvr_dtp.py"
    text_with_image: ClassVar[bool] = True

    task: Literal["nlvr"] = Field("nlvr", description=TASK)
    train_files: list[str] = Field(["nlvr_train"], min_length=1, description="annotation files to train on, without .json")
    val_file: str = Field("nlvr_dev", description="annotation file that selects the checkpoint")
    test_file: str = Field("nlvr_test", description="annotation file that is evaluated once, at the end")
    drop_path: float = Field(0.1, ge=0, lt=1, description="stochastic depth, rising from 0 to this; higher regularises more")
    output_dir: Path = Field(Path("output/nlvr"), description="folder that the run writes to")
    statements_per_pair: int = Field(
        1, ge=1, description="training statements that share one encoding of their images; higher is faster, but batches vary less"
    )
    images: Literal["both", "left"] = Field("both", description="left: ablation that shows the left image twice")


RETRIEVAL_FILES = {"coco": "coco_karpathy", "flickr": "flickr30k"}


class RetrievalConfig(Config):
    """Keys of image-text retrieval: find the caption of an image, and the image of a caption."""

    script: ClassVar[str] = "compress_retrieval_dtp.py"

    task: Literal["retrieval"] = Field("retrieval", description=TASK)
    dataset: Literal["coco", "flickr"] = Field("coco", description="data set of the default annotation files; flickr is Flickr30k")
    train_files: list[str] = Field([], description="annotation files to train on, without .json; none: those of `dataset`")
    val_file: str = Field("", description="annotation file that selects the checkpoint; none: that of `dataset`")
    test_file: str = Field("", description="annotation file that is evaluated once, at the end; none: that of `dataset`")
    output_dir: Path = Field(Path("output/retrieval"), description="folder that the run writes to")
    max_text_tokens: int = Field(35, ge=3, description="largest length of a caption in tokens; longer captions are cut")
    embed_dim: int = Field(256, ge=1, description="channels of the space in which images and captions are compared")
    queue_size: int = Field(57600, ge=1, description="features of earlier batches to contrast with; higher is harder, takes memory")
    queue_ids: Literal["auto", "keep", "drop"] = Field(
        "auto",
        description="image ids in the queue of `pretrained`: keep makes entries of the same image no negatives; auto: keep those of"
        " published weights if they can number the training images",
    )
    momentum: float = Field(0.995, ge=0, lt=1, description="momentum of the momentum encoders; higher changes them more slowly")
    alpha: float = Field(0.4, ge=0, le=1, description="share of soft targets by the momentum encoders; higher trusts labels less")
    negative_all_rank: bool = Field(True, description="draw hard negatives from the batches of all processes")
    k_test: int = Field(256, ge=1, description="candidates that the matching head ranks again; higher is better but slower")

    @model_validator(mode="before")
    @classmethod
    def _files_of_the_data_set(cls, values: Any) -> Any:
        stem = RETRIEVAL_FILES.get(str(values.get("dataset", "coco"))) if isinstance(values, dict) else None
        if stem is None or values.get("table"):
            return values
        files = {"train_files": [f"{stem}_train"], "val_file": f"{stem}_val", "test_file": f"{stem}_test"}
        return {**values, **{key: name for key, name in files.items() if not values.get(key)}}

    @model_validator(mode="after")
    def _text_fits_the_encoder(self) -> "RetrievalConfig":
        key, longest = self.longest_text
        return require(self, self.max_text_tokens <= longest, f"max_text_tokens must be at most {key}, {longest}")

    @model_validator(mode="after")
    def _momentum_encoders_count(self) -> "RetrievalConfig":
        return require(self, self.keep != "fixed", "keep: fixed is not there for retrieval yet: its GFLOPs count momentum encoders")

    @property
    def longest_text(self) -> tuple[str, int]:
        """The key that limits the text length of the encoder, and its value in tokens."""
        return "bert.max_position_embeddings", self.bert_sizes.max_position_embeddings


class ClipRetrievalConfig(RetrievalConfig):
    """Keys of image-text retrieval with CLIP or SigLIP. The keys `vit` and `bert`, which published files hold, have no effect."""

    script: ClassVar[str] = "compress_retrieval_clip_dtp.py"

    task: Literal["retrieval_clip"] = Field("retrieval_clip", description=TASK)
    output_dir: Path = Field(Path("output/retrieval_clip"), description="folder that the run writes to")
    tokenizer: str = Field("clip", description="clip (OpenAI's vocabulary), a word list, or a folder of transformers")
    image_size: int = Field(336, ge=1, description="pixels along one side; higher shows more detail, GFLOPs grow with its square")
    clip: ClipSizes = Field(ClipSizes(), description="family and sizes of both towers; missing keys: as in ViT-L/14")
    max_text_tokens: int = Field(77, ge=3, description="largest length of a caption in tokens; cut captions keep their end token")
    mag_projection: Literal["auto", "on", "off"] = Field("on", description="map tokens to sd_dim before alignment, a map per block")

    @model_validator(mode="after")
    def _texts_are_read_where_they_end(self) -> "ClipRetrievalConfig":
        length, longest = self.max_text_tokens, self.clip.context_length
        whole = self.clip.family == "clip" or length == longest
        require(self, whole, f"max_text_tokens is {length}; SigLIP pads its texts to clip.context_length, {longest}")
        authors = "variant: the authors' CLIP reads another token than the end of text once it prunes; use paper"
        return require(self, self.variant == "paper", authors)

    @property
    def patches_fit(self) -> bool:
        return super().patches_fit or self.clip.family == "siglip"  # which leaves out the edge of a picture

    @property
    def longest_text(self) -> tuple[str, int]:
        return "clip.context_length", self.clip.context_length

    @property
    def patch_size(self) -> int:
        return self.clip.patch_size

    @property
    def depth(self) -> int:
        return max(self.clip.vision_layers, self.clip.text_layers)


class CaptionConfig(Config):
    """Keys of captioning: describe an image."""

    script: ClassVar[str] = "compress_caption_dtp.py"

    task: Literal["caption"] = Field("caption", description=TASK)
    train_files: list[str] = Field(["coco_karpathy_train"], min_length=1, description="annotation files to train on, without .json")
    val_file: str = Field("coco_karpathy_val", description="annotation file that selects the checkpoint")
    test_file: str = Field("coco_karpathy_test", description="annotation file that is evaluated once, at the end")
    coco_gt_root: Path | None = Field(
        None, description="folder of COCO's ground truth, FILE_gt.json; none: use the captions of the annotation files"
    )
    output_dir: Path = Field(Path("output/caption"), description="folder that the run writes to")
    batch_size: int | None = Field(None, ge=1, exclude=True, description="sets both batch sizes, as published files do")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share of the target on wrong words; higher regularises more")
    prompt: str = Field("a picture of ", description="start of every caption; not part of the loss or of the result")
    max_text_tokens: int = Field(40, ge=3, description="largest length of a training caption in tokens; longer captions are cut")
    num_beams: int = Field(3, ge=1, description="beams of the beam search; higher is better but slower")
    sample: bool = Field(False, description="nucleus sampling with the run's seed, instead of beam search")
    top_p: float = Field(0.9, gt=0, le=1, description="sampling: probability mass of the words to draw from; higher varies more")
    max_length: int = Field(20, ge=2, description="largest length of a generated caption, in tokens with the prompt")
    min_length: int = Field(5, ge=1, description="smallest length of a generated caption, in tokens with the prompt")

    @model_validator(mode="before")
    @classmethod
    def _one_batch_size(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("batch_size") is None:
            return values
        both = dict.fromkeys(("batch_size_train", "batch_size_test"), values["batch_size"])
        if other := [key for key, value in both.items() if values.get(key, value) != value]:
            raise ValueError(f"batch_size is {values['batch_size']} and {other[0]} {values[other[0]]}")
        return {**values, **both}

    @field_validator("prompt")
    @classmethod
    def _ends_before_the_next_word(cls, prompt: str) -> str:
        return f"{prompt.strip()} " if prompt.strip() else ""

    @model_validator(mode="after")
    def _texts_fit_the_decoder(self) -> "CaptionConfig":
        longest, least = self.bert_sizes.max_position_embeddings, 2 + len(self.prompt.split())
        for key in ("max_text_tokens", "max_length"):
            fits = least < getattr(self, key) <= longest
            words = f"{key} must be more than {least}, for the prompt, and at most bert.max_position_embeddings, {longest}"
            require(self, fits, words)
        return self

    @property
    def depth(self) -> int:
        return self.vit_sizes.depth  # the decoder does not prune

    @property
    def writing(self) -> dict[str, Any]:
        """The keyword arguments of `BlipCaption.generate`."""
        how = {"num_beams": 1, "top_p": self.top_p} if self.sample else {"num_beams": self.num_beams, "top_p": None}
        return {**how, "seed": self.seed, "max_length": self.max_length, "min_length": self.min_length}


class VqaConfig(Config):
    """Keys of visual question answering: answer a question about an image."""

    script: ClassVar[str] = "compress_vqa_dtp.py"
    text_with_image: ClassVar[bool] = True
    image_keys: ClassVar[tuple[str, ...]] = ("vqa_root", "vg_root")

    task: Literal["vqa"] = Field("vqa", description=TASK)
    vqa_root: Path = Field(Path("datasets/coco/images"), description="folder that image paths of VQAv2 are relative to")
    vg_root: Path = Field(Path("datasets/visual_genome"), description="folder that image paths of Visual Genome are relative to")
    train_files: list[str] = Field(
        ["vqa_train", "vqa_val", "vg_qa"], min_length=1, description="annotation files to train on, without .json"
    )
    val_file: str = Field(
        "", description="annotation file that selects the checkpoint; none: a held-out part of the training files"
    )
    test_file: str = Field("vqa_test", description="annotation file that is answered once, at the end")
    answer_list: str = Field("answer_list", description="file of the candidate answers, without .json")
    drop_path: float = Field(0.1, ge=0, lt=1, description="stochastic depth, rising from 0 to this; higher regularises more")
    output_dir: Path = Field(Path("output/vqa"), description="folder that the run writes to")
    image_size: int = Field(480, ge=1, description="pixels along one side; higher shows more detail, GFLOPs grow with its square")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share of the target on wrong words; higher regularises more")
    decoder_layers: int | None = Field(None, ge=1, description="layers of the answer decoder; none: as many as in `bert`")
    inference: Literal["rank", "generate"] = Field("rank", description="rank: choose from answer_list; generate: write freely")
    k_test: int = Field(128, ge=1, description="rank: candidates whose full likelihood is computed; higher is better but slower")
    num_beams: int = Field(3, ge=1, description="generate: beams of the beam search; higher is better but slower")
