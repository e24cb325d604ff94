"""Configs: files, overrides, and errors that a user can act on."""

from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from configs.load import WITHOUT_EFFECT, load_config, parse_command_line, save_config
from configs.schema import CaptionConfig, ClipRetrievalConfig, NlvrConfig, RetrievalConfig, VqaConfig
from tasks.registry import TASKS, load_any_config
from utils import UserError

# The keys of the NLVR2 YAML as BLIP and its compressed descendants publish it.
PUBLISHED = """
image_root: '/export/share/datasets/vision/NLVR2/'
ann_root: 'annotation'
pretrained: 'pretrained/model_base_nlvr.pth'
vit: 'base'
batch_size_train: 16
batch_size_test: 64
vit_grad_ckpt: False
vit_ckpt_layer: 0
max_epoch: 15
image_size: 384
weight_decay: 0.05
init_lr: 3e-5
min_lr: 0
sd_num: 100
sd_dim: 768
"""
PUBLISHED_RETRIEVAL = """
image_root: '/export/share/datasets/vision/flickr30k/'
ann_root: 'annotation'
dataset: 'flickr'
pretrained: 'pretrained/model_base_retrieval_flickr.pth'
vit: 'base'
batch_size_train: 16
batch_size_test: 64
vit_grad_ckpt: True
vit_ckpt_layer: 4
init_lr: 1e-5
image_size: 384
queue_size: 57600
alpha: 0.4
k_test: 128
negative_all_rank: False
weight_decay: 0.05
min_lr: 0
max_epoch: 6
sd_num: 100
sd_dim: 768
"""


FILES = sorted(str(path) for path in Path("configs").rglob("*.yaml") if path.name != "tables.yaml")


def test_clip_has_a_head_for_every_64_channels_unless_told_otherwise():
    base = ClipRetrievalConfig(
        image_size=224, clip={"patch_size": 32, "vision_width": 768, "text_width": 512, "vision_layers": 12}
    ).clip
    large, told = ClipRetrievalConfig().clip, ClipRetrievalConfig(clip={"vision_width": 128, "vision_heads": 4}).clip
    assert (base.vision_heads, base.text_heads) == (12, 8) and (large.vision_heads, large.text_heads) == (16, 12)
    assert told.vision_heads == 4


def refusal(tmp_path: Path, text: str, *flags: str) -> str:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        parse_command_line("test", NlvrConfig, ["--config", str(path), *flags])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("path", FILES)
def test_a_saved_config_is_the_same_config(path: str, tmp_path: Path) -> None:
    config = load_any_config(path, {"output_dir": str(tmp_path), "init_lr": 3e-6})
    assert config.script in Path(path).read_text().splitlines()[0]
    save_config(config, tmp_path / "config.yaml")
    assert load_any_config(tmp_path / "config.yaml") == config
    assert (tmp_path / "config.yaml").read_text().startswith(f"# python {config.script} --config ")


def test_a_published_yaml_loads_unchanged(tmp_path: Path) -> None:
    (tmp_path / "nlvr.yaml").write_text(PUBLISHED)
    config = load_config(NlvrConfig, tmp_path / "nlvr.yaml")
    assert config.init_lr == 3e-5 and config.vit_sizes.embed_dim == 768 and config.sd_num == 100
    assert config.annotation_file(config.val_file) == Path("annotation/nlvr_dev.json")


@pytest.mark.parametrize("cls", [RetrievalConfig, ClipRetrievalConfig])
def test_a_published_yaml_for_retrieval_loads_unchanged(cls: type[RetrievalConfig], tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(PUBLISHED_RETRIEVAL.replace("384", "336" if cls is ClipRetrievalConfig else "384"))
    config = load_config(cls, tmp_path / "x.yaml")
    assert (config.k_test, config.negative_all_rank, config.queue_size, config.alpha) == (128, False, 57600, 0.4)
    assert config.annotation_file(config.test_file) == Path("annotation/flickr30k_test.json")


def test_a_data_set_brings_its_files_unless_others_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("")
    named = {"train_files": "a", "val_file": "b"}
    for settings, train, val, test in (
        ({}, "coco_karpathy_train", "coco_karpathy_val", "coco_karpathy_test"),
        ({"dataset": "flickr"}, "flickr30k_train", "flickr30k_val", "flickr30k_test"),
        ({"dataset": "flickr", **named}, "a", "b", "flickr30k_test"),
    ):
        config = load_config(RetrievalConfig, path, settings)
        assert (config.train_files, config.val_file, config.test_file) == ([train], val, test)


@pytest.mark.parametrize(
    ("cls", "settings", "said"),
    [
        (RetrievalConfig, {"dataset": "vg"}, "key 'dataset' must be one of 'coco', 'flickr', got 'vg'"),
        (RetrievalConfig, {"dataset": ["coco"]}, "key 'dataset' must be one of 'coco', 'flickr', got ['coco']"),
        (RetrievalConfig, {"alpha": 1.5}, "key 'alpha' must be at most 1, got 1.5"),
        (
            RetrievalConfig,
            {"max_text_tokens": 600},
            "max_text_tokens must be at most bert.max_position_embeddings, 512; change",
        ),
        (ClipRetrievalConfig, {"clip.context_length": 20}, "max_text_tokens must be at most clip.context_length, 20; change"),
        (ClipRetrievalConfig, {"clip.vision_widht": 20}, "unknown key 'clip.vision_widht'; did you mean 'clip.vision_width'?"),
        (ClipRetrievalConfig, {"clip.text_heads": 7}, "vision_width and text_width must be multiples of"),
        (ClipRetrievalConfig, {"variant": "released"}, "the authors' CLIP reads another token"),
        (ClipRetrievalConfig, {"image_size": 384}, "image_size must be a multiple of the patch size, 14"),
    ],
)
def test_a_mistake_about_retrieval_is_named_in_one_line(
    cls: type[RetrievalConfig], settings: dict, said: str, tmp_path: Path
) -> None:
    (tmp_path / "x.yaml").write_text("")
    with pytest.raises(UserError) as error:
        load_config(cls, tmp_path / "x.yaml", settings)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("task", TASKS)
def test_every_key_is_described(task: str) -> None:
    assert all(field.description for field in TASKS[task].config_class.model_fields.values())


@pytest.mark.parametrize("text", ["init_lr: 3e-6", "init_lr: '3e-6'", "init_lr: 0.000003"])
def test_numbers_are_read_as_yaml_of_any_version_writes_them(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    assert load_config(NlvrConfig, tmp_path / "x.yaml").init_lr == 3e-6


def test_flags_go_before_set_and_set_before_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("p: 0.1\nseed: 1\nmax_epoch: 1\naugment: {flip: false}\n")
    flags = "--set p=0.2 --set seed=2 --set augment.crop_scale=[0.9,1] --p 0.3 --epoch 7 --amp --resume".split()
    config = parse_command_line("test", NlvrConfig, ["--config", str(tmp_path / "x.yaml"), *flags])
    assert (config.p, config.seed, config.max_epoch, config.amp) == (0.3, 2, 7, True)
    assert config.augment.crop_scale == (0.9, 1) and config.augment.flip is False
    assert config.resume_path == Path("output/nlvr/checkpoint_last.pth")


def test_to_resume_by_itself_is_to_resume_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(f"output_dir: {tmp_path}\n")
    flags = ["--config", str(tmp_path / "x.yaml"), "--resume", "auto"]
    assert parse_command_line("test", NlvrConfig, flags).resume_path is None
    for name in ("checkpoint_previous.pth", "checkpoint_last.pth"):
        (tmp_path / name).write_text("")
        assert parse_command_line("test", NlvrConfig, flags).resume_path == tmp_path / "checkpoint_last.pth"


def test_an_epoch_of_accumulated_steps_has_more_batches() -> None:
    assert NlvrConfig(epoch_steps=10, accumulate=4).epoch_batches == 40 and NlvrConfig(accumulate=4).epoch_batches is None
    assert not NlvrConfig().overwrite


@pytest.mark.parametrize(
    ("flags", "sparse", "method"),
    [
        ([], None, "dtp"),
        (["--enable-sparse-api", "--token_reduce"], (2, 4), "dtp"),
        (["--enable-sparse-api"], (2, 4), "none"),
        (["--enable-sparse-api", "--set", "method=random"], (2, 4), "none"),
        (["--enable-sparse-api", "--token_reduce", "--set", "method=none"], (2, 4), "dtp"),
        (["--enable-sparse-api", "--token_reduce", "--set", "method=random"], (2, 4), "random"),
        (["--enable-sparse-api", "--token_reduce", "--set", "sparsity_type=1:4"], (1, 4), "dtp"),
        (["--enable-sparse-api", "--token_reduce", "--weight-sparse-pattern", "4:8", "--set", "sparsity_type=1:4"], (4, 8), "dtp"),
        (["--enable-sparse-api", "--weight-sparse-pattern", "m8n4_1d", "--token_reduce"], (4, 8), "dtp"),
        (["--enable-sparse-api", "--weight-sparse-pattern", "m8n4_1d_faster", "--token_reduce"], (4, 8), "dtp"),
        (["--enable-sparse-api", "--weight-sparse-pattern", "m8n2_1d_faster", "--token_reduce"], (2, 8), "dtp"),
        (["--enable-sparse-api", "--weight-sparse-pattern", "m32n8_1d_faster", "--token_reduce"], (8, 32), "dtp"),
        (["--set", "sparsity_type=1:4"], (1, 4), "dtp"),
        (["--set", "sparsity_type=2:4", "--p", "0"], None, "dtp"),  # uncompressed is uncompressed
    ],
)
def test_the_published_flags_for_sparse_weights_are_keys(flags, sparse, method, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("image_size: 384\n")
    config = parse_command_line("test", NlvrConfig, ["--config", str(tmp_path / "x.yaml"), *flags])
    assert (config.pattern, config.method) == (sparse, method)


@pytest.mark.parametrize(("flags", "sparse"), [([], (1, 4)), (["--weight-sparse-pattern", "m4n2_1d"], (2, 4))])
def test_the_pattern_of_the_file_holds_unless_the_command_line_has_one(flags, sparse, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text('sparsity_type: "1:4"\n')
    arguments = ["--config", str(tmp_path / "x.yaml"), "--enable-sparse-api", "--token_reduce", *flags]
    assert parse_command_line("test", NlvrConfig, arguments).pattern == sparse


def test_adaptive_masks_are_not_refreshed(tmp_path: Path) -> None:
    assert "adaptive chooses its masks once" in refusal(tmp_path, "order: adaptive\nmask_schedule: refresh\n")


@pytest.mark.parametrize("pattern", ["4:2", "0:4", "2", "m4n2"])
def test_what_is_no_pattern_is_refused(pattern, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(f"sparsity_type: '{pattern}'\n")
    with pytest.raises(UserError, match=f"sparsity_type: '{pattern}' is no N:M pattern; write 2:4"):
        load_config(NlvrConfig, tmp_path / "x.yaml")


def test_a_pattern_along_both_sides_is_refused_by_that_reason(tmp_path: Path) -> None:
    said = refusal(tmp_path, "", "--enable-sparse-api", "--weight-sparse-pattern", "m4n2_2d_greedy")
    assert "'m4n2_2d_greedy' is a pattern along both sides of a weight; use one along the input, such as m4n2_1d" in said


# The flags of the published scripts of MADTP and MADTP++, as they stand behind the name of the script.
PUBLISHED_COMMANDS = (
    "--p 0.5 --epoch 15 --pretrained pretrained/model_base_nlvr.pth --config {config} --output_dir output/a",
    "--epoch 25 --p 0.8 --pretrained pretrained/model_base_nlvr.pth --config {config} --enable-sparse-api"
    " --weight-sparse-pattern m8n4_1d_faster --amp --token_reduce --output_dir output/a",
    "--evaluate --pretrained output/a/checkpoint_best.pth --config {config} --enable-sparse-api --from-dense-checkpoint 0"
    " --weight-sparse-pattern m8n4_1d_faster --amp --token_reduce --output_dir output/a",
    "--config {config} --device cpu --seed 42 --world_size 8 --dist_url env:// --distributed True --w_sp_attn 1.44e-2"
    " --w_sp_mlp 5e-4 --reset-info-resume",
)


@pytest.mark.parametrize("flags", PUBLISHED_COMMANDS)
def test_published_command_lines_run_unchanged_and_the_log_says_what_became_of_them(flags, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(PUBLISHED)
    arguments = flags.format(config=tmp_path / "x.yaml").split()
    config = parse_command_line("test", NlvrConfig, arguments)
    said = config.command_line.notes
    ignored = {flag for flag in arguments if flag in WITHOUT_EFFECT}
    assert {note.split()[0] for note in said if "has no effect: " in note} == ignored
    pattern = "--weight-sparse-pattern m8n4_1d_faster is sparsity_type 4:8"
    assert (pattern in said) == ("m8n4_1d_faster" in arguments) and len(said) == len(ignored) + (pattern in said)


def test_the_keys_of_the_command_line_are_known(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("variant: paper\np: 0.3\n")
    config = parse_command_line("test", NlvrConfig, ["--config", str(tmp_path / "x.yaml"), "--set", "keep=mean", "--seed", "1"])
    assert config.command_line.keys == {"keep", "seed"}
    assert config.model_copy(update={"p": 0.1}).command_line.keys == {"keep", "seed"}
    assert load_config(NlvrConfig, tmp_path / "x.yaml").command_line.keys == set()


def test_no_launcher_takes_the_second_name_of_p_for_its_own(tmp_path: Path) -> None:
    """Before the options of a script stands its name, and torchrun still reads them: of --p it may make --print-completion."""
    (tmp_path / "x.yaml").write_text("")
    flags = ["--config", str(tmp_path / "x.yaml"), "--reduce_ratio", "0.3", "--set", "seed=1", "--evaluate"]
    launched = get_args_parser().parse_args(["--nproc_per_node=2", "compress_nlvr_dtp.py", *flags])
    assert launched.training_script_args == flags
    assert parse_command_line("test", NlvrConfig, launched.training_script_args).p == 0.3


@pytest.mark.parametrize(("cls", "rate"), [(NlvrConfig, 0.1), (VqaConfig, 0.1), (RetrievalConfig, 0.0), (CaptionConfig, 0.0)])
def test_a_published_yaml_trains_with_the_stochastic_depth_that_the_authors_code_sets(cls, rate, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("image_root: a\npretrained: b\n" if cls is not VqaConfig else "vqa_root: a\n")
    assert load_config(cls, tmp_path / "x.yaml").drop_path == rate


@pytest.mark.parametrize("path", [path for path in FILES if "shapes" in path])
def test_the_models_of_the_small_world_train_at_full_depth(path: str) -> None:
    assert load_any_config(path).drop_path == 0


def test_an_unknown_key_is_answered_with_the_nearest(tmp_path: Path) -> None:
    assert refusal(tmp_path, "bach_size_train: 3").endswith(
        "x.yaml: unknown key 'bach_size_train'; did you mean 'batch_size_train'?"
    )
    assert refusal(tmp_path, "", "--set", "vit.patch_size=8", "--set", "vit.dpth=8").endswith("did you mean 'vit.depth'?")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("init_lr: abc", "key 'init_lr' must be a number, got 'abc'"),
        ("max_epoch: 1.5", "key 'max_epoch' must be a whole number, got 1.5"),
        ("amp: perhaps", "key 'amp' must be true or false, got 'perhaps'"),
        ("p: 1", "key 'p' must be below 1, got 1"),
        ("p: -0.1", "key 'p' must be at least 0, got -0.1"),
        ("p: .nan", "key 'p'"),
        ("p:", "key 'p' must be a number, got None"),
        ("keep: fixed", "keep: fixed is for --evaluate"),
        ("guide: text\nmag: false", "guide: text needs the learnable tokens that collect it"),
        ("guide: text\nmethod: tome", "guide: text needs the learnable tokens that collect it"),
        ("keep: most", "key 'keep' must be one of 'max', 'mean', 'instance', 'fixed', got 'most'"),
        ("vit: huge", "key 'vit' must be one of 'base', 'large', got 'huge'"),
        ("vit: {patch_size: 8}", "key 'vit.embed_dim' is missing; add it"),
        ("prune_from: 12", "prune_from must be below the number of blocks, 12"),
        ("image_size: 100", "image_size must be a multiple of the patch size, 16"),
        ("a: b: c", "x.yaml:1: not valid YAML"),
        ("p: 0.5\nvit: [1", "x.yaml:2: not valid YAML"),
        ("- p", "must hold `key: value` lines, got list"),
    ],
)
def test_a_mistake_in_the_file_is_named_in_one_line(text: str, expected: str, tmp_path: Path) -> None:
    assert expected in refusal(tmp_path, text)


def test_a_mistake_on_the_command_line_is_named_as_such(tmp_path: Path) -> None:
    assert refusal(tmp_path, "", "--p", "1.5") == "command line: key 'p' must be below 1, got '1.5'"
    assert refusal(tmp_path, "", "--set", "amp") == "--set amp: write it as --set key=value"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.yaml: No such file"):
        load_config(NlvrConfig, tmp_path / "none.yaml")


def test_a_pattern_without_sparse_weights_is_refused(tmp_path: Path) -> None:
    assert "belongs to --enable-sparse-api; add it" in refusal(tmp_path, "", "--weight-sparse-pattern", "m4n2_1d")


def test_tokens_alone_may_be_asked_for_by_their_flag(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("method: none")
    config = parse_command_line("test", NlvrConfig, ["--config", str(tmp_path / "x.yaml"), "--token_reduce", "--p", "0.5"])
    assert (config.method, config.sparsity_type, config.p) == ("dtp", "", 0.5)


def test_without_a_method_and_sparse_weights_nothing_is_to_be_removed() -> None:
    assert NlvrConfig(method="none", p=0.5).p == 0
    assert NlvrConfig(method="none", p=0.3, sparsity_type="2:4").p == 0.3


def test_one_batch_size_for_both_and_none_beside_others(tmp_path: Path) -> None:
    config = CaptionConfig(batch_size=8)
    assert (config.batch_size_train, config.batch_size_test) == (8, 8)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(CaptionConfig, tmp_path / "config.yaml", {"batch_size_train": 4}).batch_size_test == 8
    with pytest.raises(UserError, match="batch_size is 4 and batch_size_train 8; change one of them"):
        load_config(CaptionConfig, tmp_path / "config.yaml", {"batch_size": 4})


@pytest.mark.parametrize(("prompt", "joined"), [("a picture of", "a picture of "), (" so ", "so "), ("", "")])
def test_a_prompt_ends_before_the_next_word(prompt, joined) -> None:
    assert CaptionConfig(prompt=prompt).prompt == joined


@pytest.mark.parametrize(("key", "value"), [("max_length", 5), ("max_length", 513), ("max_text_tokens", 4)])
def test_a_caption_has_room_behind_its_prompt_and_fits_the_decoder(key, value) -> None:
    with pytest.raises(ValueError, match=f"{key} must be more than 5, for the prompt, and at most"):
        CaptionConfig(**{key: value})


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text("image_root: ~/images\npretrained: ~/a.pth\ntokenizer: ~/words\nprompt: ~/ \n")
    flags = "--config ~/x.yaml --output_dir=~/out --set coco_gt_root=~/gt --set teacher=~/b.pth --resume=~/c.pth"
    config = parse_command_line("test", CaptionConfig, flags.split())
    paths = (config.image_root, config.tokenizer, config.output_dir, config.coco_gt_root, config.resume_path)
    assert paths == tuple(tmp_path / name for name in ("images", "words", "out", "gt", "c.pth"))
    assert (config.pretrained, config.teacher) == (f"{tmp_path}/a.pth", f"{tmp_path}/b.pth")
    assert config.annotation_file("~/a") == tmp_path / "a.json"
    assert config.prompt == "~/ "  # no path


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("p: 0.25\n", encoding="utf-8-sig")
    assert load_config(NlvrConfig, tmp_path / "x.yaml").p == 0.25


@pytest.mark.parametrize(
    ("text", "flags", "ramp", "shortened"),
    [
        ("ramp_epochs: 2", ["--epoch", "1"], 1, True),
        ("ramp_epochs: 3\nalign_epochs: 1", ["--epoch", "3"], 2, True),
        ("ramp_epochs: 2", ["--epoch", "2"], 2, False),
        ("ramp_epochs: 2", ["--set", "max_epoch=1"], 2, False),  # not by the flag: the engine refuses it
        ("", ["--epoch", "1", "--set", "ramp_epochs=2"], 2, False),
        ("ramp_epochs: 2\nsparsity_type: '2:4'", ["--epoch", "1"], 2, False),
    ],
)
def test_fewer_epochs_than_the_file_shorten_its_ramp_and_the_log_says_so(
    text: str, flags: list[str], ramp: int, shortened: bool, tmp_path: Path
) -> None:
    (tmp_path / "x.yaml").write_text(text)
    config = parse_command_line("test", NlvrConfig, ["--config", str(tmp_path / "x.yaml"), *flags])
    assert config.ramp_epochs == ramp
    assert any("the ramp is shortened from ramp_epochs" in note for note in config.command_line.notes) == shortened
