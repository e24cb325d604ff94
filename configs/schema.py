"""Every key of the YAML files: its type, default, constraint and meaning.

One flat namespace with the published key names. `Config` holds what all tasks share; each task adds a subclass.
An empty value (`key:`) means none and is refused where a value is needed; `pretrained:` may be empty.
"""

import re
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from configs.sizes import BERT_SIZES, VIT_SIZES, Bert, BertSizes, ClipSizes, Section, Vit, VitSizes, require

TASK = "which of the scripts the file is for; tools that take any file need it"


class Augment(Section):
    """What training does to a picture."""

    crop_scale: tuple[float, float] = Field((0.5, 1.0), description="share of the area that a random crop keeps; [1, 1] is off")
    flip: bool = Field(True, description="mirror half of the pictures, where no sentence names left or right")
    randaugment: bool = Field(True, description="two random operations of strength 5")
    swap: bool = Field(True, description="NLVR2: exchange the two pictures half the time, and left and right in the sentence")

    @model_validator(mode="after")
    def _ordered(self) -> "Augment":
        low, high = self.crop_scale
        return require(self, 0 < low <= high <= 1, "crop_scale must be two numbers with 0 < first <= second <= 1")


class Config(Section):
    """The keys that all tasks share."""

    script: ClassVar[str] = ""
    image_keys: ClassVar[tuple[str, ...]] = ("image_root",)  # of the folders with the pictures

    task: str = Field("", description=TASK)

    # data
    image_root: Path = Field(Path("datasets/images"), description="the folder that the annotations' image paths start from")
    ann_root: Path = Field(Path("datasets/annotations"), description="the folder of the annotation files")
    train_files: list[str] = Field([], description="names of the annotation files to train on, without .json")
    val_file: str = Field("", description="name of the annotation file that selects the checkpoint")
    test_file: str = Field("", description="name of the annotation file that is evaluated once, at the end")
    tokenizer: Path = Field(Path("pretrained/bert-base-uncased"), description="a vocab.txt, or a folder that holds one")
    image_size: int = Field(384, ge=1, description="pixels along one side; more costs GFLOPs by the square and helps details")
    augment: Augment = Field(Augment(), description="what training does to a picture")
    text_only: bool = Field(False, description="an ablation that blanks all pictures")
    num_workers: int = Field(4, ge=0, description="processes that read pictures; results do not depend on it")

    # model
    pretrained: str = Field("", description="path of the weights to start from; empty: random weights")
    vit: Vit = Field("base", description="base, large, or a mapping of sizes")
    bert: Bert = Field("base", description="base, or a mapping of sizes")
    vit_grad_ckpt: bool = Field(False, description="recompute activations in the backward pass: less memory, slower")
    vit_ckpt_layer: int = Field(0, ge=0, description="with vit_grad_ckpt, how many of the last blocks recompute")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the last block, rising from 0: more regularises")

    # the method
    method: Literal["dtp", "random", "none"] = Field(
        "dtp", description="what prunes; random: a baseline; none: dense, p is 0 but for sparse weights"
    )
    p: float = Field(0.5, ge=0, lt=1, description="share of the GFLOPs to remove; 0 trains or evaluates uncompressed")
    variant: Literal["paper", "released"] = Field("paper", description="released: the formulas of the authors' checkpoints")
    keep: Literal["max", "mean", "instance"] = Field("max", description="what the counts of a batch become")
    prune_from: int = Field(0, ge=0, description="the first block that prunes; a later one keeps more")
    tis: list[Literal["cls", "self", "token"]] = Field(
        ["cls", "self", "token"], min_length=1, description="the terms of the token importance score"
    )
    merge: bool = Field(True, description="merge the pruned tokens into one, instead of dropping them")
    mag_projection: Literal["auto", "on", "off"] = Field(
        "auto", description="map tokens to sd_dim before alignment; auto: where their widths differ"
    )
    sd_num: int = Field(100, ge=1, description="learnable tokens shared by both modalities")
    sd_dim: int = Field(768, ge=1, description="channels of a learnable token")
    sd_init_std: float | None = Field(None, gt=0, description="initial deviation of learnable tokens; none: 0.02 (released: 1)")
    sim_weight: float = Field(0.1, ge=0, description="weight of the similarity loss; higher aligns the modalities more")
    ramp_epochs: int | None = Field(None, ge=0, description="epochs over which p is reached; none: a third of the epochs")
    calibration_size: int = Field(256, ge=1, description="training samples on which p is measured; more is steadier and slower")

    # weights and distillation (MADTP++)
    sparsity_type: str = Field("", description="N:M weight sparsity: 2:4, 1:4, 4:8 (m4n2_1d is 2:4); empty: dense weights")
    sparse_layers: Literal["mlp", "attention", "all"] = Field("all", description="which linear layers of the blocks become sparse")
    mask_schedule: Literal["once", "refresh"] = Field("once", description="refresh: choose the masks anew in the ramp's epochs")
    refit_weights: bool = Field(
        True, description="kept weights take over from masked ones, by least squares on the calibration slice (variant: paper)"
    )
    order: Literal["weights_first", "tokens_first", "together", "adaptive"] = Field(
        "together", description="in which order weights and tokens go; adaptive: step by step what costs the least accuracy"
    )
    sparse_unit: Literal["block", "tower"] = Field("block", description="order: adaptive masks the attention or MLP of one")
    sparse_kernels: bool = Field(
        False, description="on a GPU: run 2:4 layers by its sparse kernels where that is measured to be faster; evaluation only"
    )
    distill: bool = Field(False, description="learn from the uncompressed model too; better at high p, and slower")
    teacher: str = Field("", description="path of the uncompressed model's weights; empty: those of 'pretrained'")
    distill_temperature: float = Field(2.0, gt=0, description="divides the logits of teacher and student")
    distill_vision: float = Field(1.0, ge=0, description="weight of the images' class tokens")
    distill_language: float = Field(10.0, ge=0, description="weight of the texts' class tokens")
    distill_logits: float = Field(1.0, ge=0, description="weight of the logits")

    # optimisation
    batch_size_train: int = Field(16, ge=1, description="samples per process and step")
    batch_size_test: int = Field(32, ge=1, description="samples per process at evaluation")
    init_lr: float = Field(1e-5, gt=0, description="learning rate of the first epoch; higher learns faster, until it diverges")
    min_lr: float = Field(0.0, ge=0, description="where the cosine schedule ends")
    weight_decay: float = Field(0.05, ge=0, description="higher keeps weights smaller")
    max_epoch: int = Field(5, ge=1, description="epochs")
    epoch_steps: int | None = Field(
        None, ge=1, description="end an epoch after so many steps: calibrate, validate and save more often; none: all samples"
    )
    lr_schedule: Literal["epoch", "step"] = Field("epoch", description="whether the cosine moves once an epoch or at every step")
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises to init_lr")
    clip_grad: float = Field(0.0, ge=0, description="largest norm of the gradient; 0: no limit; steadies training from scratch")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over the wrong answers")
    amp: bool = Field(False, description="mixed precision: faster on a GPU, less exact")

    # the run
    seed: int = Field(42, ge=0, description="of weights, order and augmentation")
    device: str | None = Field(None, pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu or cuda; none: cuda when there is one")
    output_dir: Path = Field(Path("output"), description="the folder that the run writes to")
    evaluate: bool = Field(False, description="evaluate the pretrained weights, do not train")
    resume: str = Field("", description="a checkpoint of a run to go on with; 'last': output_dir/checkpoint_last.pth")

    @field_validator("pretrained", "resume", "teacher", "sparsity_type", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return "" if value is None else value

    @field_validator("sparsity_type", mode="after")
    @classmethod
    def _as_n_of_m(cls, value: str) -> str:
        named = re.fullmatch(r"m(\d+)n(\d+)_1d", value)
        value = f"{named[2]}:{named[1]}" if named else value
        kept, group = map(int, value.split(":")) if re.fullmatch(r"\d+:\d+", value) else (not value, 2)
        if not 0 < kept < group:
            raise ValueError(f"{value!r} is no N:M pattern; write 2:4, 1:4 or 4:8, or nothing for dense weights")
        return value

    @model_validator(mode="before")
    @classmethod
    def _nothing_removes_nothing(cls, values: Any) -> Any:
        nothing = isinstance(values, dict) and values.get("method") == "none" and not values.get("sparsity_type")
        return {**values, "p": 0.0} if nothing else values

    @field_validator("mag_projection", mode="before")
    @classmethod
    def _yaml_switch(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @field_validator("train_files", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _keys_fit_one_another(self) -> "Config":
        patch, both = self.patch_size, self.order == "adaptive" and self.mask_schedule == "refresh"
        require(self, self.image_size % patch == 0, f"image_size must be a multiple of the patch size, {patch}")
        require(self, not both, "order: adaptive chooses its masks once; mask_schedule must be once")
        return require(self, self.prune_from < self.depth, f"prune_from must be below the number of blocks, {self.depth}")

    @property
    def patch_size(self) -> int:
        return self.vit_sizes.patch_size

    @property
    def depth(self) -> int:
        """Blocks of the deeper tower."""
        return max(self.vit_sizes.depth, self.bert_sizes.num_hidden_layers)

    @property
    def vit_sizes(self) -> VitSizes:
        return VIT_SIZES[self.vit] if isinstance(self.vit, str) else self.vit

    @property
    def bert_sizes(self) -> BertSizes:
        return BERT_SIZES[self.bert] if isinstance(self.bert, str) else self.bert

    @property
    def uncompressed(self) -> bool:
        """Whether the model is dense: no pruner, no learnable tokens."""
        return self.p == 0 or self.method == "none"

    @property
    def packed(self) -> bool:
        """Whether batches go without padding; the authors' masks do not follow their tokens, and need it."""
        return self.variant == "paper"

    @property
    def pattern(self) -> tuple[int, int] | None:
        """N and M of sparse weights; None where they stay dense."""
        if not self.sparsity_type or self.p == 0:
            return None
        kept, group = self.sparsity_type.split(":")
        return int(kept), int(group)

    @property
    def refits(self) -> bool:
        """Whether masking fits kept weights anew; the authors' form masks alone."""
        return self.refit_weights and self.variant == "paper"

    @property
    def distill_weights(self) -> dict[str, float]:
        """The weight of each loss of distillation, by name."""
        return {key: getattr(self, key) for key in ("distill_vision", "distill_language", "distill_logits")}

    @property
    def resume_path(self) -> Path | None:
        """The checkpoint to go on with, or None to start afresh."""
        if self.resume == "last":
            return self.output_dir / "checkpoint_last.pth"
        return Path(self.resume) if self.resume else None

    def annotation_file(self, name: str) -> Path:
        """The path of the annotation file `name`, which may or may not end in .json."""
        return self.ann_root / f"{name.removesuffix('.json')}.json"


class NlvrConfig(Config):
    """NLVR2: is the sentence true of the two pictures?"""

    script: ClassVar[str] = "compress_nlvr_dtp.py"

    task: Literal["nlvr"] = Field("nlvr", description=TASK)
    train_files: list[str] = Field(["nlvr_train"], min_length=1, description="annotation files to train on, without .json")
    val_file: str = Field("nlvr_dev", description="annotation file that selects the checkpoint")
    test_file: str = Field("nlvr_test", description="annotation file that is evaluated once, at the end")
    output_dir: Path = Field(Path("output/nlvr"), description="the folder that the run writes to")
    statements_per_pair: int = Field(
        1, ge=1, description="training statements that share one encoding of their pictures; more is faster and less random"
    )
    images: Literal["both", "left"] = Field("both", description="left: an ablation that shows the left picture twice")


RETRIEVAL_FILES = {"coco": "coco_karpathy", "flickr": "flickr30k"}


class RetrievalConfig(Config):
    """Image-text retrieval: which caption belongs to a picture, and which picture to a caption?"""

    script: ClassVar[str] = "compress_retrieval_dtp.py"

    task: Literal["retrieval"] = Field("retrieval", description=TASK)
    dataset: Literal["coco", "flickr"] = Field("coco", description="whose annotation files are read; flickr is Flickr30k")
    train_files: list[str] = Field([], description="annotation files to train on, without .json; none: the data set's")
    val_file: str = Field("", description="annotation file that selects the checkpoint; none: the data set's")
    test_file: str = Field("", description="annotation file that is evaluated once, at the end; none: the data set's")
    output_dir: Path = Field(Path("output/retrieval"), description="the folder that the run writes to")
    max_text_tokens: int = Field(35, ge=3, description="the longest caption in tokens; longer ones are cut")
    embed_dim: int = Field(256, ge=1, description="channels of the space in which pictures and captions meet")
    queue_size: int = Field(57600, ge=1, description="features of earlier batches to compare with; more is harder and costs memory")
    momentum: float = Field(0.995, ge=0, lt=1, description="how slowly the momentum encoders follow; higher is steadier")
    alpha: float = Field(0.4, ge=0, le=1, description="share of the targets that the momentum encoders give")
    negative_all_rank: bool = Field(True, description="draw hard negatives from the batches of all processes")
    k_test: int = Field(256, ge=1, description="candidates that the matching head ranks anew; more is better and slower")

    @model_validator(mode="before")
    @classmethod
    def _files_of_the_data_set(cls, values: Any) -> Any:
        stem = RETRIEVAL_FILES.get(str(values.get("dataset", "coco"))) if isinstance(values, dict) else None
        if stem is None:
            return values
        files = {"train_files": [f"{stem}_train"], "val_file": f"{stem}_val", "test_file": f"{stem}_test"}
        return {**values, **{key: name for key, name in files.items() if not values.get(key)}}

    @model_validator(mode="after")
    def _text_fits_the_encoder(self) -> "RetrievalConfig":
        key, longest = self.longest_text
        return require(self, self.max_text_tokens <= longest, f"max_text_tokens must be at most {key}, {longest}")

    @property
    def longest_text(self) -> tuple[str, int]:
        """The key that limits what the text encoder reads, and its value in tokens."""
        return "bert.max_position_embeddings", self.bert_sizes.max_position_embeddings


class ClipRetrievalConfig(RetrievalConfig):
    """Image-text retrieval by CLIP. Published files carry `vit` and `bert`, of which CLIP's towers take nothing."""

    script: ClassVar[str] = "compress_retrieval_clip_dtp.py"

    task: Literal["retrieval_clip"] = Field("retrieval_clip", description=TASK)
    output_dir: Path = Field(Path("output/retrieval_clip"), description="the folder that the run writes to")
    tokenizer: str = Field("clip", description="clip: OpenAI's vocabulary, or the path of a list of words")
    image_size: int = Field(336, ge=1, description="pixels along one side; more costs GFLOPs by the square and helps details")
    clip: ClipSizes = Field(ClipSizes(), description="sizes of both towers; those of ViT-L/14 where not given")
    max_text_tokens: int = Field(77, ge=3, description="the longest caption in tokens; longer ones are cut before their end")
    mag_projection: Literal["auto", "on", "off"] = Field("on", description="map tokens to sd_dim before alignment, a map per block")

    @model_validator(mode="after")
    def _authors_read_another_token(self) -> "ClipRetrievalConfig":
        return require(
            self,
            self.variant == "paper",
            "variant: the authors' CLIP reads another token than the end of text once it prunes; use paper",
        )

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
    """Captioning: what is in the picture?"""

    script: ClassVar[str] = "compress_caption_dtp.py"

    task: Literal["caption"] = Field("caption", description=TASK)
    train_files: list[str] = Field(["coco_karpathy_train"], min_length=1, description="annotation files to train on, without .json")
    val_file: str = Field("coco_karpathy_val", description="annotation file that selects the checkpoint")
    test_file: str = Field("coco_karpathy_test", description="annotation file that is evaluated once, at the end")
    coco_gt_root: Path | None = Field(
        None, description="the folder of COCO's ground truth, FILE_gt.json; none: the annotation files' own captions"
    )
    output_dir: Path = Field(Path("output/caption"), description="the folder that the run writes to")
    batch_size: int | None = Field(None, ge=1, exclude=True, description="sets both batch sizes, as published files do")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share of the target spread over the wrong words")
    prompt: str = Field("a picture of ", description="what every caption begins with; it is no part of the loss or of the result")
    max_text_tokens: int = Field(40, ge=3, description="the longest training caption in tokens; longer ones are cut")
    num_beams: int = Field(3, ge=1, description="captions kept at a time while one is written; more is better and slower")
    sample: bool = Field(False, description="draw the words by nucleus sampling under the run's seed; off: beam search")
    top_p: float = Field(0.9, gt=0, le=1, description="sampling: draw from the likeliest words of this share; more varies more")
    max_length: int = Field(20, ge=2, description="the longest caption to write, in tokens with its prompt")
    min_length: int = Field(5, ge=1, description="the shortest")

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
        """How `BlipCaption.generate` is to write: its keyword arguments."""
        how = {"num_beams": 1, "top_p": self.top_p} if self.sample else {"num_beams": self.num_beams, "top_p": None}
        return {**how, "seed": self.seed, "max_length": self.max_length, "min_length": self.min_length}


class VqaConfig(Config):
    """Visual question answering: what is the answer to the question about the picture?"""

    script: ClassVar[str] = "compress_vqa_dtp.py"
    image_keys: ClassVar[tuple[str, ...]] = ("vqa_root", "vg_root")

    task: Literal["vqa"] = Field("vqa", description=TASK)
    vqa_root: Path = Field(Path("datasets/coco/images"), description="the folder that the image paths of VQAv2 start from")
    vg_root: Path = Field(Path("datasets/visual_genome"), description="the folder that those of Visual Genome start from")
    train_files: list[str] = Field(
        ["vqa_train", "vqa_val", "vg_qa"], min_length=1, description="annotation files to train on, without .json"
    )
    val_file: str = Field(
        "", description="annotation file that selects the checkpoint; none: a held-out slice of the training files"
    )
    test_file: str = Field("vqa_test", description="annotation file that is answered once, at the end")
    answer_list: str = Field("answer_list", description="file of the candidate answers, without .json")
    output_dir: Path = Field(Path("output/vqa"), description="the folder that the run writes to")
    image_size: int = Field(480, ge=1, description="pixels along one side; more costs GFLOPs by the square and helps details")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share of the target spread over the wrong words")
    decoder_layers: int | None = Field(None, ge=1, description="layers of the answer decoder; none: as many as `bert` has")
    inference: Literal["rank", "generate"] = Field("rank", description="rank: choose from answer_list; generate: write freely")
    k_test: int = Field(128, ge=1, description="candidates whose whole likelihood is computed; more is better and slower")
    num_beams: int = Field(3, ge=1, description="answers kept at a time while one is generated")
