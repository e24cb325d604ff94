"""Weights for retrieval, as BLIP, OpenAI, transformers and the authors' code publish them: what is read, what starts anew."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from clip.model import ClipSize
from madtp.blocks import Guidance
from madtp.pruning import TokenPruner
from madtp.rule import PruneSetting, PruningRule
from models.clip_retrieval import ClipRetrieval
from models.momentum import NO_IMAGE
from models.weights.blip import load_retrieval_weights
from models.weights.clip import load_clip_weights
from models.weights.reading import interpolate_position_embedding, read_checkpoint
from tests import tiny
from utils import UserError

INSTANCE = PruningRule(keep="instance")
LOAD = {"blip": load_retrieval_weights, "clip": load_clip_weights, "siglip": load_clip_weights}
POSITION = {"blip": "visual_encoder{}.pos_embed", **dict.fromkeys(("clip", "siglip"), "visual{}.positional_embedding")}
KINDS = pytest.mark.parametrize("kind", tiny.PAIR_MODELS)
QUEUES = ("image_queue", "text_queue", "idx_queue", "ptr_queue")


def shifted(model: nn.Module) -> dict[str, Tensor]:
    """Weights of such a model that are not its own, but for the facts about them."""
    return {name: tensor + (name != "unseen") for name, tensor in model.state_dict().items()}


def online(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights without momentum encoders and queues, as they are published."""
    return {name: tensor for name, tensor in weights.items() if name not in QUEUES and not name.split(".")[0].endswith("_m")}


def refusal(kind: str, weights: dict[str, Tensor], rule: PruningRule | None = None) -> str:
    with pytest.raises(UserError) as error:
        LOAD[kind](tiny.PAIR_MODELS[kind](rule), weights, "x.pth")
    assert str(error.value).startswith("x.pth: ") and "\n" not in str(error.value)
    return str(error.value)


@KINDS
def test_a_trained_model_is_loaded_whole_and_its_momentum_encoders_stay_its_own(kind):
    model, other = tiny.PAIR_MODELS[kind](INSTANCE), tiny.PAIR_MODELS[kind](INSTANCE)
    weights = shifted(model)
    LOAD[kind](other, weights, "x")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in other.state_dict().items())


@KINDS
def test_momentum_encoders_that_are_missing_start_as_the_online_ones(kind):
    model = tiny.PAIR_MODELS[kind]()
    before, weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}, online(shifted(model))
    LOAD[kind](model, weights, "x")
    for name, tensor in model.state_dict().items():
        part, *rest = name.split(".")
        expected = before[name] if name in QUEUES else weights[".".join([part.removesuffix("_m"), *rest])]
        assert torch.equal(tensor, expected), name


def test_of_momentum_encoders_that_are_there_in_part_the_rest_starts_as_the_online_ones():
    model = tiny.retrieval()
    weights = {name: tensor for name, tensor in shifted(model).items() if not name.startswith("text_proj_m.")}
    load_retrieval_weights(model, weights, "x")
    assert torch.equal(model.text_proj_m.weight, weights["text_proj.weight"])
    assert torch.equal(model.vision_proj_m.weight, weights["vision_proj_m.weight"])


@KINDS
def test_queues_of_another_size_start_anew_and_the_rest_is_loaded(kind):
    model = tiny.PAIR_MODELS[kind]()
    before, weights = {name: model.state_dict()[name].clone() for name in QUEUES}, shifted(model)
    features = torch.zeros(len(model.image_queue), 9)
    longer = {"image_queue": features, "text_queue": features, "idx_queue": torch.zeros(1, 9).long()}
    LOAD[kind](model, {**weights, **longer}, "x")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name in QUEUES else weights[name]), name


@KINDS
def test_position_embeddings_of_both_towers_are_interpolated(kind):
    model, prefix = tiny.PAIR_MODELS[kind](), int(kind != "siglip")
    weights = shifted(model)
    names = [POSITION[kind].format(suffix) for suffix in ("", "_m")]
    torch.manual_seed(0)
    for name in names:
        weights[name] = torch.randn(*weights[name].shape[:-2], prefix + 64, 20)
    LOAD[kind](model, weights, "x")
    for name in names:
        expected = interpolate_position_embedding(weights[name].reshape(1, -1, 20), prefix + 16, prefix)
        assert torch.equal(model.state_dict()[name].reshape(1, -1, 20), expected)
    assert not torch.equal(*(model.state_dict()[name] for name in names))


@KINDS
@pytest.mark.parametrize("shape", [(1 + 16, 24), (1 + 14, 20)], ids=["width", "no square"])
def test_position_embeddings_that_do_not_fit_are_named(kind, shape):
    weights, name = shifted(tiny.PAIR_MODELS[kind]()), POSITION[kind].format("")
    weights[name] = torch.zeros(*weights[name].shape[:-2], *shape)
    assert f"shapes do not fit: {name} is " in refusal(kind, weights)


@KINDS
def test_unknown_and_missing_weights_are_refused_by_name(kind):
    weights = shifted(tiny.PAIR_MODELS[kind]())
    assert "holds foreign.weight, which this model does not have" in refusal(kind, {**weights, "foreign.weight": torch.ones(1)})
    norm = "visual_encoder.norm.weight" if kind == "blip" else "visual.ln_post.weight"
    assert f"lacks {norm}; is it a checkpoint of this kind" in refusal(kind, {k: v for k, v in weights.items() if k != norm})
    pruned = shifted(tiny.PAIR_MODELS[kind](INSTANCE))
    assert "holds space_dict" in refusal(kind, pruned)
    assert "shapes do not fit: space_dict is 6x24" in refusal(kind, {**pruned, "space_dict": torch.zeros(6, 24)}, INSTANCE)


@KINDS
def test_what_compression_adds_may_be_missing(kind):
    model, weights = tiny.PAIR_MODELS[kind](INSTANCE), shifted(tiny.PAIR_MODELS[kind]())
    tokens = model.learnable_tokens.clone()
    LOAD[kind](model, weights, "x")
    assert torch.equal(model.learnable_tokens, tokens)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())


def test_blips_pretrained_weights_bring_what_retrieval_does_not_have():
    """A decoder, position ids, a pointer by its older name and without a dimension; no matching head."""
    model = tiny.retrieval()
    weights = {name: tensor for name, tensor in shifted(model).items() if not name.startswith("itm_head.")}
    head, pointer = model.itm_head.weight.clone(), model.ptr_queue.clone()
    more = {"text_decoder.bert.x": torch.ones(1), "text_encoder.embeddings.position_ids": torch.arange(5)[None]}
    del weights["ptr_queue"]
    load_retrieval_weights(model, {**weights, **more, "queue_ptr": torch.zeros(()).long()}, "x")
    assert torch.equal(model.itm_head.weight, head) and torch.equal(model.ptr_queue, pointer)
    assert torch.equal(model.temp, weights["temp"])
    assert torch.equal(model.image_queue, weights["image_queue"])


@KINDS
def test_image_ids_without_the_features_that_they_number_are_left_out(kind):
    model = tiny.PAIR_MODELS[kind]()
    weights = {name: tensor for name, tensor in shifted(model).items() if name != "text_queue"}
    LOAD[kind](model, {**weights, "idx_queue": torch.arange(tiny.QUEUE)[None]}, "x")
    assert (model.idx_queue == NO_IMAGE).all()


class Named(nn.Module):
    """Weights under their dotted names, to be written as an archive of TorchScript."""

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        for name in {name.split(".")[0] for name in weights}:
            if name in weights:
                self.register_parameter(name, nn.Parameter(weights[name], requires_grad=False))
            else:
                part = {key.removeprefix(f"{name}."): tensor for key, tensor in weights.items() if key.startswith(f"{name}.")}
                self.add_module(name, Named(part))


def openais_archive(path: Path, weights: dict[str, Tensor], size: ClipSize) -> None:
    """Half precision but for the scale, and three numbers beside the weights."""
    numbers = {
        "input_resolution": torch.tensor(size.image_size),
        "context_length": torch.tensor(size.context_length),
        "vocab_size": torch.tensor(size.vocab_size),
    }
    halves = {name: tensor.half() if tensor.dim() else tensor for name, tensor in online(weights).items()}
    torch.jit.save(torch.jit.script(Named({**halves, **numbers})), path)


@torch.no_grad()
def test_openais_archives_are_read(tmp_path):
    source, model = tiny.clip(), tiny.clip(INSTANCE)
    weights = shifted(source)
    openais_archive(tmp_path / "ViT-T-8.pt", weights, tiny.CLIP)
    load_clip_weights(model, read_checkpoint(tmp_path / "ViT-T-8.pt")["model"], "ViT-T-8.pt")
    for name, tensor in model.state_dict().items():
        part, *rest = name.split(".")
        origin = ".".join([part.removesuffix("_m"), *rest])
        assert tensor.dtype in (torch.float32, torch.long)
        if name not in QUEUES and "pruner" not in name and name != "space_dict":
            torch.testing.assert_close(tensor, weights[origin], atol=0, rtol=1e-3, msg=name)
    assert model.encode_image(tiny.images(1)[:, 0]).feature.isfinite().all()


class Writes(nn.Module):
    """An archive of it writes a file when it is loaded."""

    def __init__(self, path: Path):
        super().__init__()
        self.weight, self.path = nn.Parameter(torch.ones(2)), str(path)

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, str]:
        return self.weight, self.path

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, str]):
        torch.save(state[0], state[1])
        self.weight, self.path = state
        self.training, self._is_full_backward_hook = False, None

    def forward(self) -> Tensor:
        return self.weight


def test_an_archive_that_would_run_code_is_refused_and_does_not(tmp_path):
    torch.jit.save(torch.jit.script(Writes(tmp_path / "ran")), tmp_path / "evil.pt")
    with pytest.raises(UserError, match="evil.pt: not plain weights: .* could run code"):
        read_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
    torch.jit.load(tmp_path / "evil.pt")  # that it would have
    assert (tmp_path / "ran").exists()


def test_an_archive_that_is_cut_off_is_refused(tmp_path):
    path = tmp_path / "ViT-T-8.pt"
    openais_archive(path, shifted(tiny.clip()), tiny.CLIP)
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(UserError, match="ViT-T-8.pt: not a readable checkpoint .* is it cut off"):
        read_checkpoint(path)


@torch.no_grad()
def test_the_authors_checkpoints_are_read(tmp_path):
    """Their names of a block's map W, momentum copies beside, a queue for eight GPUs, and what a run adds."""
    size = tiny.CLIP
    make = {"make_pruner": lambda dim: TokenPruner(dim, 5, 24, INSTANCE, "on"), "learnable_tokens": (5, 24, 1.0)}
    source, model = (tiny.with_lively_weights(ClipRetrieval(size, queue, 0.9, **make)).eval() for queue in (40, 7))
    ours, theirs = "pruner.alignment.projection.", "query_model.q_map.0."
    weights = shifted(source)
    torch.save(
        {"model": {name.replace(ours, theirs): tensor for name, tensor in weights.items()}, "temperature": 3.5, "epoch": 4},
        tmp_path / "checkpoint_best.pth",
    )
    checkpoint = read_checkpoint(tmp_path / "checkpoint_best.pth")
    assert sum(theirs in name for name in checkpoint["model"]) == 2 * 2 * (size.vision_layers + size.text_layers)
    load_clip_weights(model, checkpoint["model"], "checkpoint_best.pth")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items() if name not in QUEUES)
    assert checkpoint["temperature"] == 3.5 and model.image_queue.shape == (12, 7)
    model.encode_image(tiny.images(1)[:, 0], Guidance(PruneSetting(3.5)))


def test_of_transformers_weights_all_are_translated():
    """Outputs are compared in the towers' tests; this test checks that no weight of a model of another size is left out."""
    shared = {"hidden_act": "quick_gelu"}
    config = CLIPConfig(
        vision_config={"hidden_size": 20, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 2, **shared}
        | {"image_size": 48, "patch_size": 8},
        text_config={"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, **shared}
        | {"max_position_embeddings": 14, "vocab_size": 40},
        projection_dim=12,
    )
    model, weights = tiny.clip(), CLIPModel(config).state_dict()
    load_clip_weights(model, {**weights, "text_model.embeddings.position_ids": torch.arange(14)[None]}, "transformers")
    query = weights["vision_model.encoder.layers.2.self_attn.q_proj.weight"]
    assert torch.equal(model.visual.transformer.resblocks[2].attn.in_proj_weight[:20], query)
    assert torch.equal(model.text_projection, weights["text_projection.weight"].t())
    expected = interpolate_position_embedding(weights["vision_model.embeddings.position_embedding.weight"][None], 17)[0]
    assert torch.equal(model.visual_m.positional_embedding, expected)
    assert "holds text_model.x" in refusal("clip", {**weights, "text_model.x": torch.ones(1)})
