"""The loop over epochs on a made-up task: what is selected, when test is looked at, how a run goes on."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from configs.load import load_config, parse_command_line
from configs.schema import NlvrConfig
from engine.compress import run_experiment
from engine.experiment import Evaluation, Experiment
from madtp.rule import OFF, PruneSetting
from utils import Run, UserError

DENSE = 10.0


class Toy(nn.Module):
    """One weight, which counts the epochs it was trained for; its GFLOPs rise with the temperature."""

    depth = 1

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def gflops(self, setting) -> float:
        knee = 10 + 3 * float(self.weight)  # training moves it, so that each epoch needs its own temperature
        return DENSE if setting.temperature is None else DENSE * (0.2 + 0.75 * setting.temperature / (knee + setting.temperature))


class Sampler:
    """A sampler that records the epoch that the loop sets."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Batches(list):
    """A loader: some batches, and a sampler."""

    def __init__(self):
        super().__init__([{"x": torch.ones(3)}] * 2)
        self.sampler = Sampler()


def experiment(folder: Path, scores: list[float], **settings) -> tuple[Experiment, list]:
    """An experiment whose validation accuracy after epoch i is scores[i]; and the list of what it evaluated."""
    config = NlvrConfig(output_dir=folder, p=0.5, max_epoch=len(scores), init_lr=0.1, weight_decay=0.0, device="cpu").model_copy(
        update=settings
    )
    model, evaluated = Toy(), []

    def losses(model, batch, setting):
        trained = experiment.loaders["train"].sampler.epoch + 1.0
        with torch.no_grad():  # what an optimiser might have done: the epoch is the weight
            model.weight.copy_(torch.tensor([trained]))
        return {"task": (model.weight * 0).sum()}

    def evaluate(model, loader, setting):
        assert not model.training
        split = next(name for name, other in experiment.loaders.items() if other is loader)
        epoch = round(float(model.weight)) - 1
        evaluated.append((split, epoch, setting))
        score = scores[epoch] if split == "val" else 1.0
        return Evaluation({"acc": score}, model.gflops(setting), {f"{split}-0": {"prediction": True}})

    experiment = Experiment(
        config,
        Run(torch.device("cpu")),
        model,
        {split: Batches() for split in ("train", "calibration", "val", "test")},
        losses,
        evaluate,
        gflops=lambda model, batch, setting: torch.full((3,), model.gflops(setting), dtype=torch.float64),
        score="acc",
        reference=12.5,
    )
    return experiment, evaluated


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_the_best_epoch_within_the_budget_is_selected_on_validation(tmp_path):
    """Epoch 0 scores best, but is not at p yet. Equals do not replace the earlier one."""
    task, evaluated = experiment(tmp_path, [99.0, 60.0, 80.0, 80.0], ramp_epochs=2)
    result = run_experiment(task)
    assert result["epoch"] == 2 and result["metrics"] == {"val": {"acc": 80.0}, "test": {"acc": 1.0}}
    assert float(task.model.weight.detach()) == 3
    assert torch.load(tmp_path / "checkpoint_best.pth")["epoch"] == 2 and torch.load(tmp_path / "checkpoint_last.pth")["epoch"] == 3
    assert [split for split, *_ in evaluated] == ["val"] * 5 + ["test"]  # test once, at the end
    assert evaluated[-1][1] == 2 and evaluated[-1][2].temperature == result["temperature"]


def test_the_log_tells_which_epochs_were_selected(tmp_path):
    run_experiment(experiment(tmp_path, [99.0, 60.0, 80.0, 80.0], ramp_epochs=2)[0])
    assert [entry["selected"] for entry in log_of(tmp_path)] == [False, True, True, False]


def test_the_target_is_lowered_while_it_is_ramped_and_met(tmp_path):
    run_experiment(experiment(tmp_path, [1.0] * 6)[0])
    log = log_of(tmp_path)
    assert [entry["gflops"]["target"] for entry in log] == pytest.approx([7.5] + [5.0] * 5)
    distance = [abs(entry["gflops"]["measured"] / entry["gflops"]["target"] - 1) for entry in log]
    assert distance[0] <= 0.1 and max(distance[1:]) <= 0.005  # on the way it is met before the epoch's training, then after it
    assert [entry["lr"] for entry in log] == pytest.approx([0.05 * (1 + math.cos(math.pi * epoch / 6)) for epoch in range(6)])


def test_the_result_names_what_it_costs(tmp_path):
    result = run_experiment(experiment(tmp_path, [50.0])[0])
    gflops = result["gflops"]
    assert (gflops["uncompressed"], gflops["target"], gflops["reference"]) == (10.0, 5.0, 12.5)
    assert gflops["measured"] == gflops["deployment"] == gflops["val"] == gflops["test"] == pytest.approx(5, rel=0.01)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert json.loads((tmp_path / "predictions_test.json").read_text()) == {"test-0": {"prediction": True}}


def test_uncompressed_runs_never_prune(tmp_path):
    task, evaluated = experiment(tmp_path, [50.0, 60.0], p=0.0)
    result = run_experiment(task)
    assert result["temperature"] is None and result["method"] == "none"
    assert result["gflops"]["measured"] == DENSE and {setting for *_, setting in evaluated} == {OFF}


@pytest.mark.parametrize("dies_in", [1, 3])
def test_a_run_that_died_goes_on_as_if_it_had_not(tmp_path, dies_in):
    scores = [70.0, 60.0, 80.0, 75.0]
    expected = run_experiment(experiment(tmp_path / "whole", scores)[0])
    task, _ = experiment(tmp_path / "parts", scores)

    class DyingSampler(Sampler):
        def set_epoch(self, epoch: int) -> None:
            super().set_epoch(epoch)
            if epoch == dies_in:
                raise KeyboardInterrupt

    task.loaders["train"].sampler = DyingSampler()
    with pytest.raises(KeyboardInterrupt):
        run_experiment(task)
    assert not (tmp_path / "parts" / "result.json").exists()
    assert run_experiment(experiment(tmp_path / "parts", scores, resume="last")[0]) == expected
    whole, parts = (
        [{k: v for k, v in entry.items() if k != "seconds"} for entry in log_of(tmp_path / name)] for name in ("whole", "parts")
    )
    assert whole == parts


def test_a_run_goes_on_in_another_folder(tmp_path):
    run_experiment(experiment(tmp_path / "first", [70.0, 60.0])[0])
    task, _ = experiment(tmp_path / "second", [70.0, 60.0, 50.0], resume=str(tmp_path / "first" / "checkpoint_last.pth"))
    assert run_experiment(task)["epoch"] == 0
    assert [entry["epoch"] for entry in log_of(tmp_path / "second")] == [0, 1, 2]


def test_what_a_resumed_run_does_otherwise_is_said(tmp_path, caplog):
    run_experiment(experiment(tmp_path, [70.0, 60.0])[0])
    with caplog.at_level("INFO"):
        run_experiment(experiment(tmp_path, [70.0, 60.0, 50.0], resume="last")[0])
    assert [text for text in caplog.messages if "--resume" in text] == ["--resume: max_epoch was 2 and is 3 from here on"]


def test_a_run_that_begins_anew_leaves_nothing_to_resume_of_the_one_before(tmp_path):
    run_experiment(experiment(tmp_path, [70.0, 60.0])[0])
    task, _ = experiment(tmp_path, [70.0, 60.0], overwrite=True)
    task.loaders["train"].sampler = None  # dies in its first epoch
    with pytest.raises(AttributeError):
        run_experiment(task)
    with pytest.raises(UserError, match="no such checkpoint to resume from"):
        run_experiment(experiment(tmp_path, [70.0, 60.0], resume="last")[0])


def test_a_new_run_is_not_to_remove_what_it_sets_out_from(tmp_path):
    run_experiment(experiment(tmp_path, [70.0])[0])
    for key in ("pretrained", "teacher"):
        with pytest.raises(UserError, match="checkpoint_last.pth: a new run in .* would remove it; give another folder"):
            run_experiment(experiment(tmp_path, [70.0], **{key: str(tmp_path / "checkpoint_last.pth")})[0])
    assert (tmp_path / "checkpoint_last.pth").is_file() and (tmp_path / "checkpoint_best.pth").is_file()


def test_a_run_under_another_rule_does_not_go_on(tmp_path):
    """Its weights and its best score are another task's."""
    run_experiment(experiment(tmp_path, [70.0, 60.0])[0])
    with pytest.raises(UserError, match=r"checkpoint_last.pth: a run with p 0.5 cannot go on with 0.3"):
        run_experiment(experiment(tmp_path, [70.0, 60.0, 50.0], p=0.3, resume="last")[0])


def test_what_another_run_selected_is_not_taken_for_this_ones(tmp_path):
    run_experiment(experiment(tmp_path / "first", [70.0, 60.0])[0])
    (tmp_path / "first" / "checkpoint_best.pth").unlink()
    run_experiment(experiment(tmp_path / "second", [90.0])[0])
    last = str(tmp_path / "first" / "checkpoint_last.pth")
    task, _ = experiment(tmp_path / "second", [70.0, 60.0, 50.0], resume=last, overwrite=True)
    with pytest.raises(UserError, match="no epoch came within"):  # the third scores lower than the first did
        run_experiment(task)


def test_the_config_of_a_run_starts_it_anew(tmp_path):
    """Whatever it went on from, and though it was evaluated in its own folder."""
    run_experiment(experiment(tmp_path, [70.0, 60.0])[0])
    run_experiment(experiment(tmp_path, [70.0, 60.0], resume="last")[0])
    task, _ = experiment(tmp_path, [70.0, 60.0], evaluate=True, overwrite=True)
    task.checkpoint = SAVED
    run_experiment(task)
    config = load_config(NlvrConfig, tmp_path / "config.yaml")
    assert not config.evaluate and not config.resume and not config.overwrite


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="give another folder with --output_dir"):
        run_experiment(experiment(tmp_path / "file", [50.0])[0])


def test_a_ramp_that_does_not_end_is_refused_before_any_epoch(tmp_path):
    task, evaluated = experiment(tmp_path, [50.0], ramp_epochs=2)
    with pytest.raises(UserError, match="^with ramp_epochs: 2 the ramp ends in epoch 2, but max_epoch is 1"):
        run_experiment(task)
    assert not evaluated


def test_no_epoch_within_the_budget_is_reported(tmp_path):
    task, _ = experiment(tmp_path, [50.0])
    task.model.gflops = lambda setting: DENSE * (1 if setting.temperature is None else 0.3 if setting.temperature < 5 else 0.7)
    with pytest.raises(UserError, match="no epoch came within 1% of the target"):
        run_experiment(task)


def test_a_target_that_is_jumped_over_is_named_once_after_the_first_epoch_at_p(tmp_path, caplog):
    """Not only when all epochs are over."""
    task, evaluated = experiment(tmp_path, [50.0] * 4, ramp_epochs=2)
    task.model.gflops = lambda setting: DENSE * (1 if setting.temperature is None else 0.3 if setting.temperature < 5 else 0.75)
    said: list[int] = []  # epochs that had been evaluated by then

    class Listener(logging.Handler):
        def emit(self, record):
            if "the run ends without a result" in record.getMessage():
                said.append(len(evaluated))

    logging.getLogger("madtp").addHandler(listener := Listener())
    with caplog.at_level("INFO"), pytest.raises(UserError, match="no epoch came within 1% of the target"):
        run_experiment(task)
    logging.getLogger("madtp").removeHandler(listener)
    assert said == [1]  # epoch 0 is on the way to p, epoch 1 at it
    (line,) = (text for text in caplog.messages if "the run ends without a result" in text)
    assert "p = 0.5 than 3.0000 GFLOPs, -40.0 % off" in line and "choose p = 0.700, or raise calibration_size above 256" in line


def test_a_target_that_is_met_is_not_talked_about(tmp_path, caplog):
    with caplog.at_level("INFO"):
        run_experiment(experiment(tmp_path, [50.0, 60.0])[0])
    assert not any("ends without a result" in text for text in caplog.messages)


def test_a_target_out_of_reach_names_the_range_of_p(tmp_path):
    with pytest.raises(UserError, match=r"p = 0.9 is out of reach: .* removes 0.050 to 0.793 of the GFLOPs \(1.0000 wanted"):
        run_experiment(experiment(tmp_path, [50.0], p=0.9)[0])


SAVED = {
    "method": "dtp",
    "variant": "paper",
    "keep": "instance",
    "p": 0.5,
    "batch_size": 32,
    "temperature": 3.25,
    "prune_from": 0,
    "epoch": 7,
}


AUTHORS = {"temperature": 500.0, "epoch": 3}  # beside the weights


@pytest.mark.parametrize(
    ("difference", "same"),
    [
        ({}, True),
        ({"batch_size": 8}, True),  # under instance it makes no difference
        ({"keep": "max"}, False),
        ({"p": 0.4}, False),
        ({"variant": "released"}, False),
        ({"tis": ["self"]}, False),
        ({"merge": False}, False),
        ({"image_size": 224}, False),
        ({"temperature": None}, False),
    ],
)
def test_evaluation_uses_the_saved_temperature_only_for_the_rule_it_was_made_for(tmp_path, difference, same):
    task, evaluated = experiment(tmp_path, [50.0], evaluate=True, keep="instance")
    task.checkpoint = {**SAVED, **difference}
    result = run_experiment(task)
    assert (result["temperature"] == 3.25) == same and result["epoch"] == 7
    assert same or result["gflops"]["measured"] == pytest.approx(5, rel=0.005)
    assert [split for split, *_ in evaluated] == ["val", "test"] and not (tmp_path / "log.txt").exists()


def test_under_max_the_saved_temperature_belongs_to_a_batch_size(tmp_path):
    for batch_size, same in ((32, True), (8, False)):
        task, _ = experiment(tmp_path, [50.0], evaluate=True, keep="max", batch_size_test=batch_size, overwrite=True)
        task.checkpoint = {**SAVED, "keep": "max"}
        assert (run_experiment(task)["temperature"] == 3.25) == same


def test_a_checkpoint_that_is_not_at_p_is_evaluated_with_a_word(tmp_path, caplog):
    """The last one of a run that died before it was there, say."""
    for temperature, off in ((3.25, False), (50.0, True)):
        task, _ = experiment(tmp_path, [50.0], evaluate=True, keep="instance", overwrite=True)
        task.checkpoint = {**SAVED, "temperature": temperature}
        task.model.gflops = lambda setting: DENSE * {None: 1.0, 3.25: 0.503, 50.0: 0.9}[setting.temperature]
        caplog.clear()
        with caplog.at_level("INFO"):
            run_experiment(task)
        said = [text for text in caplog.messages if "off the target of p = 0.5" in text]
        assert len(said) == 3 * off and all("costs 9.0000 GFLOPs per sample, +80.0 % off" in text for text in said)


def test_a_slice_that_fills_no_batch_is_named_where_batches_matter(tmp_path, caplog):
    for keep, named in (("max", True), ("instance", False)):
        task, _ = experiment(tmp_path, [50.0], evaluate=True, keep=keep, calibration_size=16, overwrite=True)
        task.checkpoint = {**SAVED, "keep": keep}
        caplog.clear()
        with caplog.at_level("INFO"):
            run_experiment(task)
        assert any("set calibration_size to 32 or more" in text for text in caplog.messages) == named


def test_a_run_says_which_flags_of_the_authors_scripts_it_does_not_need(tmp_path, caplog):
    (tmp_path / "x.yaml").write_text("")
    flags = ["--config", str(tmp_path / "x.yaml"), "--world_size", "8", "--dist_url", "env://"]
    run, _ = experiment(tmp_path, [50.0])
    run.config._command_line = parse_command_line("", NlvrConfig, flags).command_line
    with caplog.at_level("INFO"):
        run_experiment(run)
    said = [text for text in caplog.messages if "has no effect" in text]
    assert [text.split()[0] for text in said] == ["--world_size", "--dist_url"]


def test_an_authors_checkpoint_is_not_evaluated_under_the_papers_formulas_unasked(tmp_path):
    """Whatever the file says of the variant: all shipped ones say paper."""
    for task, advice in (("nlvr", "evaluate it with --set variant=released"), ("retrieval_clip", "cannot be evaluated pruned")):
        run, evaluated = experiment(tmp_path, [50.0], evaluate=True, pretrained="theirs.pth", variant="paper", task=task)
        run.checkpoint = AUTHORS
        with pytest.raises(UserError, match=f"^theirs.pth: is a compressed checkpoint of the authors' code.*{advice}"):
            run_experiment(run)
        assert not evaluated and not (tmp_path / "result.json").exists()


def test_who_asks_for_the_papers_formulas_has_them_calibrated(tmp_path):
    (tmp_path / "x.yaml").write_text("variant: paper\n")
    asked = parse_command_line("", NlvrConfig, ["--config", str(tmp_path / "x.yaml"), "--set", "variant=paper"])
    run, _ = experiment(tmp_path, [50.0], evaluate=True)
    run.config = asked.model_copy(update={"output_dir": tmp_path, "evaluate": True, "device": "cpu"})
    run.checkpoint = AUTHORS
    result = run_experiment(run)
    assert result["temperature"] != AUTHORS["temperature"] and result["gflops"]["measured"] == pytest.approx(5, rel=0.005)


def test_an_authors_checkpoint_is_a_start_of_training_under_either_variant(tmp_path):
    run, _ = experiment(tmp_path, [50.0])
    run.checkpoint = AUTHORS
    assert run_experiment(run)["gflops"]["measured"] == pytest.approx(5, rel=0.01)


@pytest.mark.parametrize(("temperature", "used"), [(500.0, 500.0), (0.0, None)])
def test_an_authors_checkpoint_brings_its_temperature_and_none_is_off(tmp_path, temperature, used, caplog):
    """Their formulas given, p is what that temperature removes, and nothing is off the target."""
    task, evaluated = experiment(tmp_path, [50.0], evaluate=True, variant="released", keep="max")
    task.checkpoint = {**AUTHORS, "temperature": temperature}
    with caplog.at_level("INFO"):
        result = run_experiment(task)
    assert result["temperature"] == used and {setting.temperature for *_, setting in evaluated} == {used}
    measured = result["gflops"]["measured"]
    with torch.no_grad():
        assert measured == pytest.approx(task.model.gflops(PruneSetting(used))) and measured > 9  # far from p = 0.5
    assert result["reduce_ratio"] == pytest.approx(1 - measured / DENSE) and result["gflops"]["target"] == pytest.approx(measured)
    assert not any("off the target" in text for text in caplog.messages)
    assert any(f"temperature {temperature:g} of the authors' checkpoint removes" in text for text in caplog.messages)
