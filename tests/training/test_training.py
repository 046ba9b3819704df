"""Training for real, on a CPU: both engines, the worker's run directory, stopping and resuming, and what is refused."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pages
import pandas
import pytest
import torch
from live_kernel import wait_until
from peft.tuners.lora import LoraLayer
from random_run import random_run
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Phi3Config, Phi3ForCausalLM

from bizassist_nb import Settings, finetune
from bizassist_nb.api import Run
from bizassist_nb.assistant import decoding
from bizassist_nb.assistant.assistant import Assistant
from bizassist_nb.assistant.loaded import loaded_base
from bizassist_nb.core.errors import DataError, RunError, SettingsError
from bizassist_nb.data.rows import Row, split
from bizassist_nb.data.tokens import Example
from bizassist_nb.models.base import pinned, resolve
from bizassist_nb.results.model_card import card
from bizassist_nb.results.summary import diverged, run_html, run_text
from bizassist_nb.results.verdict import Score
from bizassist_nb.runs import records
from bizassist_nb.runs.journal import Journal
from bizassist_nb.runs.rows import rows_of
from bizassist_nb.runs.run import ENDED
from bizassist_nb.training import launch, trainer
from bizassist_nb.training.checkpoints import CHECKSUMS, checkpoints
from bizassist_nb.training.evaluation import evaluate
from bizassist_nb.training.trainer import plan
from bizassist_nb.training.worker import Worker


def quick(tiny, tmp_path, **changes):
    values = {
        "model": str(tiny), "data": "sample", "subset": 12, "held_out": 4, "max_length": 512, "engine": "transformers",
        "runs_dir": str(tmp_path),
    }  # fmt: skip
    return Settings(**(values | changes))


def test_a_row_is_stored_once_however_many_epochs_it_is_in(tiny_chat):
    examples = [Example(i, [i] * 9, [i] * 9, truncated=False) for i in range(40)]
    steps = plan(examples, Settings(epochs=25))
    dataset = trainer.dataset_of([row for step in steps for row in step])
    assert [row["input_ids"][0] for row in dataset] == [row.number for step in steps for row in step]
    assert len(dataset) == 1000
    assert dataset.data.num_rows == 40


@pytest.fixture(scope="module")
def phi(tiny, tmp_path_factory) -> Path:
    """A random model of two blocks whose layers have Phi-3's names, with the tiny model's tokenizer."""
    config = Phi3Config(
        vocab_size=8192, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("phi")
    Phi3ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def adapted_layers(run) -> set[str]:
    with safe_open(run.adapter / "adapter_model.safetensors", framework="pt") as file:
        return {key.split(".lora_")[0].rpartition(".")[2] for key in file.keys()}  # noqa: SIM118 - no mapping


@pytest.mark.slow
def test_every_linear_layer_is_adapted_whatever_its_name(phi, tmp_path):
    run = finetune(quick(phi, tmp_path, subset=4, max_length=256), "all")
    assert adapted_layers(run) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert run.environment.revision == pinned(resolve(str(phi))).revision
    with safe_open(run.adapter / "adapter_model.safetensors", framework="pt") as file:
        assert len(file.keys()) == 2 * 2 * 4  # A and B of each in both blocks
    assert Assistant(run).ask("Why?", max_new_tokens=2).tuned is not None


@pytest.mark.slow
def test_layers_can_be_named_and_one_that_is_not_there_is_refused(phi, tmp_path):
    some = finetune(quick(phi, tmp_path, subset=4, max_length=256, target_modules="o_proj, down_proj"), "some")
    assert adapted_layers(some) == {"o_proj", "down_proj"}
    every = finetune(quick(phi, tmp_path, subset=4, max_length=256), "every")
    assert set(Assistant(some, every).ask("Why?", max_new_tokens=2).answers) == {
        "base",
        "tuned (some)",
        "tuned (every)",
    }
    with pytest.raises(
        RunError, match=r"no linear layer 'q_proj'; they have down_proj, gate_up_proj, o_proj, qkv_proj"
    ):
        finetune(quick(phi, tmp_path, target_modules="q_proj, o_proj"), "none")


def begun(settings, name) -> Run:
    """A run that was ended as soon as it had taken its first step."""
    run = launch.start(settings, name)
    wait_until(lambda: run.steps or run.status in ENDED)
    run.kill()
    return run


@pytest.mark.parametrize("engine", ["transformers", pytest.param("unsloth", marks=pytest.mark.slow)])
def test_adapter_moves_and_no_base_weight_does(engine, tiny, tmp_path):
    script = str(Path(__file__).parents[1] / "train_once.py")
    command = [sys.executable, script, engine, str(tiny), str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["adapter"] == found["moved"] == 2 * 7 * 2
    assert found["four_bit"] == 2 * 7
    assert found["base_moved"] == []
    assert len(found["losses"]) == 2


def test_a_run_of_one_step_learns(tiny, tmp_path):
    run = finetune(quick(tiny, tmp_path, subset=4), "one")
    assert [step.learning_rate for step in run.steps] == [run.learning_rate]
    adapter = load_file(run.adapter / "adapter_model.safetensors")
    assert all(float(tensor.abs().max()) > 0 for name, tensor in adapter.items() if "lora_B" in name)


def test_the_learning_rate_rises_from_the_first_step_and_falls_to_the_last(tiny, tmp_path):
    run = finetune(quick(tiny, tmp_path, warmup_steps=2, subset=16), "rising")
    shares = [step.learning_rate / run.learning_rate for step in run.steps]
    assert shares == pytest.approx([0.5, 1, 1, 0.5])


@pytest.mark.parametrize(
    ("scheduler", "shares"),
    [
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.853, 0.5, 0.146]),
        ("constant", [0.5] + [1] * 5),
    ],
)
def test_the_scheduler_says_how_the_rate_falls(scheduler, shares):
    asked = Settings(scheduler=scheduler, warmup_steps=2)
    assert [trainer.share_of_peak(asked, step, 6) for step in range(6)] == pytest.approx(shares, abs=1e-3)


def test_settings_of_other_notebooks_hold_in_training_chat_and_merge(tiny, tmp_path):
    asked = {
        "rank": 4,
        "alpha": 8,
        "rslora": True,
        "scheduler": "cosine",
        "warmup_steps": 0,
        "report_to": "tensorboard",
    }
    run = finetune(quick(tiny, tmp_path, **asked), "others")
    assert [step.learning_rate / run.learning_rate for step in run.steps] == pytest.approx([1, 0.75, 0.25])
    loaded = loaded_base(run.model)
    name = loaded.adapter(run)
    assert {layer.scaling[name] for layer in loaded.model.modules() if isinstance(layer, LoraLayer)} == {4.0}
    assert decoding.scales(loaded.model, {name: [0.0, 0.5]}) == {name: [0.0, 2.0]}
    assert run.merge().is_dir()
    assert run.last(records.Merge).parity.passed
    assert list((run.path / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("tracker", ["trackio", "wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_refused_before_there_is_a_run(tiny, tmp_path, monkeypatch, tracker):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=f'report_to = "{tracker}": it is not installed; pip install {tracker}'):
        launch.start(quick(tiny, tmp_path, report_to=tracker), "tracked")
    assert not list(tmp_path.iterdir())


def test_a_warm_up_longer_than_the_run_is_said(tiny, tmp_path):
    run = begun(quick(tiny, tmp_path, warmup_steps=40), "short")
    assert "still rises at the last of the 3 steps: warmup_steps = 40" in run_text(run)


@pytest.fixture(scope="module")
def by_engine(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    return [finetune(quick(tiny, folder, engine=engine), engine) for engine in ("transformers", "unsloth")]


@pytest.mark.slow
def test_engines_give_the_same_losses(by_engine):
    ours, theirs = ([step.loss for step in run.steps] for run in by_engine)
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [0, 1], ids=["transformers", "unsloth"])
def test_scoring_anew_gives_the_same(by_engine, engine):
    run = by_engine[engine]
    before, answers = run.evaluation, run.answers
    found = evaluate(run)
    for who in ("base", "tuned"):
        assert getattr(found, who).loss == pytest.approx(getattr(before, who).loss, abs=1e-4)
        assert getattr(found.general, who).loss == pytest.approx(getattr(before.general, who).loss, abs=1e-4)
    assert run.answers == answers  # greedy, by the same plain model


def test_run_directory_holds_everything(trained):
    path = trained.path
    assert trained.status == "finished"
    for name in ("settings.toml", "environment.json", "events.jsonl", "evaluation.json", "README.md", "worker.log"):
        assert (path / name).stat().st_size, name
    assert (path / "loss.png").read_bytes().startswith(b"\x89PNG")
    adapter = {file.name for file in (path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"} <= adapter
    assert trained.environment.model == "smollm2-135m"
    assert trained.environment.engine == "unsloth"
    assert {"torch", "trl", "peft", "unsloth", "bizassist-nb"} <= trained.environment.versions.keys()
    parameters = trained.last(records.Parameters)
    assert (parameters.trainable, parameters.total) == (4_884_480, 139_399_488)
    assert "trainable parameters: 4,884,480 of 139,399,488" in (path / "worker.log").read_text("utf-8")
    assert [step.step for step in trained.steps] == list(range(1, trained.total_steps + 1))
    assert sum(step.tokens for step in trained.steps) == trained.last(records.Data).training.tokens


def test_the_learning_rate_is_the_one_asked_for(tiny, tmp_path):
    """It rises to that, and falls towards 0."""
    run = finetune(quick(tiny, tmp_path, learning_rate=3e-3, epochs=2), "rates")
    rates = [step.learning_rate for step in run.steps]
    assert max(rates) == pytest.approx(3e-3)
    assert rates.index(max(rates)) == 0  # one step of six warms up
    assert rates == sorted(rates, reverse=True)


def test_memory_is_about_what_was_expected(trained):
    expected, measured = trained.last(records.Preflight), trained.last(records.Memory)
    assert measured.of == "process"
    assert expected.memory == "RAM"
    assert expected.ram == pytest.approx(measured.peak / 2**30, rel=0.15)
    assert expected.ram > expected.peak


def test_tuned_is_better_on_held_out_rows(trained):
    found = trained.evaluation
    assert found.tuned.loss < found.base.loss - 2 * found.standard_error
    assert found.verdict == "helped"
    assert trained.held_out[0] == (0, pytest.approx(found.base.loss))
    assert trained.held_out[-1][1] == pytest.approx(found.tuned.loss)


def test_card_says_what_came_of_it(trained):
    text = (trained.path / "README.md").read_text("utf-8")
    assert trained.evaluation.sentence in text
    assert "| answers that loop |" in text
    assert trained.answers[0].tuned.text not in text  # nor rows: a card is published, and rows may be private
    assert "most improved" not in text
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in text
    assert "| rank | 16 |" in text


def test_bad_rows_are_listed_and_the_rest_is_used(tiny, tmp_path, rows_file):
    rows = [{"instruction": f"Question {i}?", "response": f"Answer {i}."} for i in range(100)]
    rows[3] = {"instruction": "Only a question"}
    rows[50]["response"] = "  "
    rows[99]["instruction"] = 7
    run = begun(quick(tiny, tmp_path, data=str(rows_file(rows)), subset=90, held_out=7, batch_size=30), "bad-rows")
    data = run.last(records.Data)
    assert (data.usable, data.rejected) == (97, 3)
    assert [bad.number for bad in data.rejected_rows] == [4, 51, 100]
    assert "row 4 is not used" in (run.path / "worker.log").read_text("utf-8")


def test_every_row_too_long_fails_and_says_what_to_raise(tiny, tmp_path):
    with pytest.raises(RunError, match="raise max_length"):
        finetune(quick(tiny, tmp_path, max_length=16), "long")


def test_a_tokenizer_without_a_template_fails_and_says_so(tiny, tmp_path):
    import shutil

    bare = shutil.copytree(tiny, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(RunError, match="has no chat template"):
        finetune(quick(bare, tmp_path), "bare-run")


def test_stop_saves_and_resume_ends_as_if_nothing_had_been(tiny, tmp_path):
    others = {"scheduler": "cosine", "weight_decay": 0.1, "rslora": True}
    settings = quick(tiny, tmp_path, epochs=5, max_length=128, **others)
    whole = finetune(settings, "whole")
    halted = launch.start(settings, "halted")
    wait_until(lambda: len(halted.steps) >= 2)
    halted.stop()
    wait_until(lambda: halted.status == "stopped")
    done = len(halted.steps)
    assert 2 <= done < 15
    (group,) = torch.load(checkpoints(halted.path)[-1].path / "optimizer.pt")["param_groups"][:1]
    assert group["weight_decay"] == 0.1
    resumed = finetune(settings, "halted", resume=True)
    assert resumed.status == "finished"
    assert resumed.last(records.Resumed).step == done
    assert [step.loss for step in resumed.steps] == [step.loss for step in whole.steps]
    weights = [run.adapter / "adapter_model.safetensors" for run in (whole, resumed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_run_that_ended_before_its_first_checkpoint_begins_again_from_the_start(tmp_path, monkeypatch):
    from bizassist_nb.training import trainer
    from bizassist_nb.training.spool import SpoolingJournal

    def begin() -> int:
        return trainer.train(trainer.Training(run, journal, None, None, None, None, [[]]), None)

    unwrap = SimpleNamespace(unwrap_model=lambda *_, **__: None)
    done = SimpleNamespace(
        train=lambda **_: None, accelerator=unwrap, state=SimpleNamespace(global_step=1), graphs=None
    )
    monkeypatch.setattr(trainer, "build_trainer", lambda *_: done)
    (tmp_path / "settings.toml").write_text(Settings().to_toml())
    run, journal = Run(tmp_path), SpoolingJournal(tmp_path)
    begin()
    assert run.last(records.Resumed) is None
    journal.write(records.Step(step=1, loss=2.0, learning_rate=1e-4, gradient_norm=0.5, tokens=9, seconds=1.0))
    begin()
    assert run.last(records.Resumed).step == 0
    assert run.steps == []


def test_memory_that_runs_out_in_held_out_scoring_costs_that_score_alone(tmp_path):
    from bizassist_nb.training.spool import SpoolingJournal

    (tmp_path / "settings.toml").write_text(Settings(evaluate_every=5).to_toml())
    run, offered = Run(tmp_path), []
    errors = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), None, RuntimeError("a bug")]

    def score(_model, _between):
        if error := errors.pop(0):
            raise error
        return [Score(1, 6.0, 3)]

    worker = Worker(run, SpoolingJournal(tmp_path), SimpleNamespace(asked=False))
    worker.evaluation_set = SimpleNamespace(score=score, validation=[None] * 4)
    worker.best = SimpleNamespace(offer=lambda *found: offered.append(found[:2]))
    worker.model = worker.chat = None
    worker.steps = [[]] * 100
    for step in range(1, 15):
        worker.score_after_step(step)
    assert (offered, run.held_out) == ([(10, 2.0)], [(10, 2.0)])
    assert "held-out rows: not scored after step 5: memory ran out (OutOfMemoryError: CUDA out of" in run_text(run)
    with pytest.raises(RuntimeError, match="a bug"):
        worker.score_after_step(15)


def test_memory_that_runs_out_over_a_single_row_costs_the_verdict_and_not_the_run(tmp_path):
    (tmp_path / "settings.toml").write_text(Settings().to_toml())

    def compare(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    worker = Worker(Run(tmp_path), Journal(tmp_path), SimpleNamespace(check=lambda: None))
    worker.evaluation_set, worker.model = SimpleNamespace(compare=compare), SimpleNamespace(disable_adapter=None)
    worker.engine = SimpleNamespace(name="transformers")
    assert worker._score_tuned(7) == (None, False)
    assert "held-out rows: not scored after step 7: memory ran out (OutOfMemoryError: CUDA" in run_text(worker.run)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: device-side assert triggered"), ValueError("odd template")]
)
def test_a_failure_while_the_prompts_are_answered_does_not_fail_the_run(error, tmp_path, monkeypatch):
    from bizassist_nb.training import worker as module

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(module, "answer", fail)
    (tmp_path / "settings.toml").write_text(Settings().to_toml())
    worker = Worker(Run(tmp_path), Journal(tmp_path), SimpleNamespace(check=lambda: None))
    worker.engine, worker.model, worker.chat = SimpleNamespace(name="transformers"), None, None
    assert worker.answer() is None
    said = worker.run.last(records.Unanswered).reason
    assert said == (
        f"the fixed prompts could not be answered: {type(error).__name__}: {error}; "
        f"try again with: bizassist evaluate {tmp_path.name}"
    )


def test_prompts_are_answered_fewer_at_once_where_memory_runs_out(tiny, tmp_path, monkeypatch):
    from bizassist_nb.assistant import decoding
    from bizassist_nb.assistant.loaded import loaded_base
    from bizassist_nb.training.fixed_prompts import answer

    run = random_run(tmp_path / "random", tiny)
    loaded = loaded_base(run.model)
    adapter = loaded.adapter(run)
    loaded.use([adapter])
    together, decode, sizes = answer(run, loaded.model, loaded.chat, adapter), decoding.decode, []

    def short_of_memory(model, batch, generation):
        sizes.append(len(batch.prompts))
        if len(batch.prompts) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return decode(model, batch, generation)

    monkeypatch.setattr(decoding, "decode", short_of_memory)
    apart = answer(run, loaded.model, loaded.chat, adapter)
    assert sizes == [56, *[28, 16, 8, 8, 12, 8, 4] * 2]
    assert [(one.base.text, one.tuned.text) for one in apart] == [(one.base.text, one.tuned.text) for one in together]


@pytest.mark.parametrize(("steps", "kept"), [(3, True), (4, False)])
def test_scores_of_a_stopped_run_go_once_it_is_trained_further(tmp_path, steps, kept):
    from bizassist_nb.training.checkpoints import save_checkpoint
    from bizassist_nb.training.spool import SpoolingJournal

    save_checkpoint(tmp_path, 3, lambda folder: (folder / "weights").touch())
    files = [tmp_path / "evaluation.json", tmp_path / "answers.json"]
    for file in (tmp_path / "settings.toml", *files):
        file.touch()
    worker = Worker(Run(tmp_path), SpoolingJournal(tmp_path), None)
    worker.steps = [[]] * steps
    worker.forget_scores()
    assert [file.exists() for file in files] == [kept, kept]


@pytest.mark.slow
@pytest.mark.parametrize("damaged", ["score.json", "adapter_model.safetensors"])
def test_a_damaged_best_adapter_does_not_end_a_resumed_run(tiny, tmp_path, damaged):
    settings = quick(tiny, tmp_path, epochs=8, evaluate_every=1, max_length=128, checkpoint_minutes=0.0)
    run = launch.start(settings, "stopped")
    wait_until(lambda: (tmp_path / "stopped" / "best").is_dir())
    run.stop()
    wait_until(lambda: run.status == "stopped" and not run.alive)
    (run.path / "best" / damaged).write_text("{")
    resumed = finetune(Settings(runs_dir=str(tmp_path)), "stopped", resume=True)
    assert resumed.status == "finished"
    assert "the best adapter so far is taken from the steps that follow" in run_text(resumed)


@pytest.mark.slow
def test_unsloth_is_imported_before_what_it_patches(tiny, tmp_path):
    run = finetune(quick(tiny, tmp_path, engine="unsloth", subset=6, max_length=160), "run")
    assert run.environment.engine == "unsloth"
    assert "should be imported before" not in (run.path / "worker.log").read_text("utf-8")


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_killed_run_resumes_from_its_last_whole_checkpoint_and_runs_no_code_from_it(tiny, tmp_path):
    settings = quick(tiny, tmp_path, epochs=20, checkpoint_minutes=0.0, max_length=128)
    run = launch.start(settings, "killed")
    wait_until(lambda: (saved := run.last(records.Checkpoint)) is not None and saved.step >= 4)
    run.kill()
    wait_until(lambda: run.status == "lost")
    assert run.error.startswith("it was ended at once, as somebody asked")
    newest, before = checkpoints(run.path)
    assert not [path for path in run.path.rglob("*") if path.suffix in (".bin", ".pkl")]
    with (newest.path / "optimizer.pt").open("r+b") as file:
        file.seek(1000)
        file.write(b"?")
    launch.start(settings, "killed", resume=True)
    wait_until(lambda: len(run.steps) > newest.step)
    run.stop()
    wait_until(lambda: run.status == "stopped" and not run.alive)
    assert run.last(records.Resumed).step == before.step
    assert run.last(records.Damaged).checkpoint == str(newest.path)
    words = f"{newest.path}: optimizer.pt is not what was written; the one before it was used"
    assert words in run_text(run)

    # One that is whole, but was not written by this package.
    forged = checkpoints(run.path)[0].path
    torch.save(Evil(tmp_path / "run by a pickle"), forged / "optimizer.pt")
    sums = json.loads((forged / CHECKSUMS).read_text("utf-8"))
    sums["optimizer.pt"] = hashlib.sha256((forged / "optimizer.pt").read_bytes()).hexdigest()
    (forged / CHECKSUMS).write_text(json.dumps(sums))
    with pytest.raises(RunError, match=r"holds something else than tensors.*Delete that folder"):
        finetune(settings, "killed", resume=True)
    assert not (tmp_path / "run by a pickle").exists()


def test_two_workers_cannot_train_one_run(tiny, tmp_path):
    settings = quick(tiny, tmp_path)
    run = launch.start(settings, "one")
    with pytest.raises(RunError, match="being trained by another process"):
        launch.start(settings, "one", resume=True)
    run.kill()


def test_rows_of_a_notebook_are_kept_for_resuming_and_evaluating(tiny, tmp_path):
    frame = pandas.DataFrame([{"question": f"What is {n}?", "reply": str(n)} for n in range(40)])
    settings = quick(tiny, tmp_path, columns={"instruction": "question", "response": "reply"})
    with pytest.raises(DataError, match=r"frame\.parquet holds no usable row among 40: row 1: has no column 'answer'"):
        finetune(quick(tiny, tmp_path, data="{frame}", columns={"response": "answer"}), data=frame)
    assert not list(tmp_path.iterdir())
    run = launch.start(settings, "table", data=frame)
    run.kill()
    wait_until(lambda: run.status == "lost")
    with pytest.raises(RunError, match="has its rows already"):
        finetune(Settings(runs_dir=str(tmp_path)), "table", data=frame, resume=True)
    run = finetune(Settings(runs_dir=str(tmp_path)), "table", resume=True)
    assert (run.status, run.settings.data) == ("finished", "{data}")
    assert run.environment.fingerprint == hashlib.sha256((run.path / "data.parquet").read_bytes()).hexdigest()
    assert str(tmp_path) not in card(run)
    assert evaluate(run).base.rows == 4
    frame[:30].to_parquet(run.path / "data.parquet")
    with pytest.raises(RunError, match="has changed since it began"):
        rows_of(run)


def test_resume_refuses_other_settings_and_names_them(tiny, tmp_path):
    run = launch.start(quick(tiny, tmp_path), "one")
    run.kill()
    wait_until(lambda: run.status == "lost")
    with pytest.raises(RunError, match="other settings \\(rank\\)"):
        launch.start(quick(tiny, tmp_path, rank=8), "one", resume=True)


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_its_checkpoints(tiny, tmp_path, rows_file):
    """A model in which one token's embedding is broken, and a training row with that token in the fifth step."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = AutoConfig.from_pretrained(tiny)
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config)
    (broken,) = tokenizer.encode("~", add_special_tokens=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[broken] = float("nan")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{"instruction": f"Question {i}?", "response": "Answer."} for i in range(12)]
    training, _ = split([Row(i + 1, **row) for i, row in enumerate(rows)], subset=8, held_out=2, seed=42)
    rows[training[4].number - 1]["response"] = "~"
    changes = {"data": str(rows_file(rows)), "subset": 8, "held_out": 2, "batch_size": 1, "checkpoint_minutes": 0.0}
    with pytest.raises(RunError, match="the loss became nan at step 5") as caught:
        finetune(quick(folder, tmp_path, **changes), "nan")
    run = Run(tmp_path / "nan")
    lower = f"lower learning_rate than {run.learning_rate}"
    assert f"{lower}, under a new name" in str(caught.value)
    assert (run.status, len(run.steps)) == ("failed", 4)
    assert run.last(records.Checkpoint).step == 4
    assert "--resume" not in run_text(run) + run_html(run)
    assert f"begin anew under a new name, with a {lower}" in run_text(run)


@pytest.mark.parametrize("who", ["base", "tuned"])
def test_only_an_adapter_that_was_broken_in_training_has_diverged(who, tmp_path):
    (tmp_path / "settings.toml").write_text(Settings().to_toml())
    run, journal = Run(tmp_path), Journal(tmp_path)
    worker = Worker(run, journal, None)
    worker.evaluation_set = SimpleNamespace(score=lambda *_: [Score(1, float("nan"), 5)])
    worker.model = None
    with pytest.raises(RunError, match=f"held-out loss of {who}") as caught:
        worker.score(who, 3, lambda: None)
    journal.write(records.State(state="failed"))
    journal.write(records.Error(message=str(caught.value), expected=True))
    assert diverged(run) == (who == "tuned")


def test_float16_may_overflow_while_its_scaling_settles_but_not_for_ever(tmp_path):
    from bizassist_nb.training.spool import SpoolingJournal
    from bizassist_nb.training.trainer import RunCallback, Training

    (tmp_path / "settings.toml").write_text(Settings().to_toml())
    run = Run(tmp_path)
    callback = RunCallback(Training(run, SpoolingJournal(tmp_path), None, None, None, None, [[]] * 99))
    callback.on_train_begin(None, None, None)

    def step(number, norm, fp16=True):
        logs = {"loss": 2.0, "grad_norm": norm, "learning_rate": 1e-4}
        args = SimpleNamespace(fp16=fp16, learning_rate=2e-4)
        callback.on_log(args, SimpleNamespace(global_step=number), None, logs)

    for number in range(1, 21):
        step(number, float("inf"))
    step(21, 1.5)
    for number in range(22, 46):
        step(number, float("nan"))
    assert [event.gradient_norm for event in run.events[19:22]] == [None, 1.5, None]
    with pytest.raises(RunError, match="gradient's norm became nan at step 46"):
        step(46, float("nan"))
    assert len(run.steps) == 45
    with pytest.raises(RunError, match="gradient's norm became inf at step 47"):
        step(47, float("inf"), fp16=False)


def test_a_base_that_scores_no_number_is_refused(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    with pytest.raises(RunError, match="held-out loss of base is nan"):
        finetune(quick(folder, tmp_path), "nan")


CHOICES = {"last": {}, "best": {"keep": "best"}, "early": {"stop_early": 1}}


@pytest.fixture(scope="module", params=CHOICES)
def worsening(request, tiny, tmp_path_factory):
    """A run that learns to answer "yes", while those who are held out answer "no": each score is worse than before."""
    folder = tmp_path_factory.mktemp("worsening")
    rows = [Row(i + 1, f"Question {i}?", "no " * 9) for i in range(20)]
    trained_on = {row.number for row in split(rows, subset=12, held_out=4, seed=42)[0]}
    texts = [
        {"instruction": r.instruction, "response": "yes " * 9 if r.number in trained_on else r.response} for r in rows
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    changes = {"data": str(folder / "rows.jsonl"), "epochs": 2, "learning_rate": 0.05, "evaluate_every": 2}
    return finetune(quick(tiny, folder, **CHOICES[request.param], **changes), "worse")


def test_held_out_rows_are_scored_while_training(worsening):
    end = 5 if worsening.settings.stop_early else 6
    scored = [event.step for event in worsening.events if isinstance(event, records.Evaluation)]
    assert scored == [step for step, _ in worsening.held_out] == [0, 2, 4, end]
    assert worsening.steps[-1].step == end
    losses = [loss for _, loss in worsening.held_out]
    assert losses == sorted(losses)


def test_the_best_adapter_is_kept_and_saved_if_asked(worsening):
    losses = dict(worsening.held_out)
    if worsening.settings.stop_early:
        return
    if worsening.settings.keep == "best":
        assert worsening.evaluation.tuned.loss == pytest.approx(losses[2], abs=losses[4] - losses[2])
        page = pages.read(worsening._repr_html_())
        assert "The adapter saved is that of step 2, the best on the held-out rows." in page
        assert not (worsening.path / "best").exists()
        # Scored anew from the files, which hold just that adapter.
        assert worsening.evaluation.tuned.loss == pytest.approx(evaluate(worsening).tuned.loss, abs=1e-4)
        return
    assert worsening.evaluation.tuned.loss == pytest.approx(losses[6])
    assert "Held-out loss has risen since step 2" in pages.read(worsening._repr_html_())
    assert f"the best checkpoint is kept in {worsening.path / 'best'}" in pages.read(worsening._repr_html_())
    published = card(worsening)
    assert "the best checkpoint is kept in best (" in published
    assert str(worsening.path) not in published
    files = [worsening.path / name / "adapter_model.safetensors" for name in ("best", "adapter")]
    assert files[0].read_bytes() != files[1].read_bytes()


def test_rows_that_choose_an_adapter_do_not_judge_it(worsening):
    validation, data = worsening.last(records.Evaluation).rows, worsening.last(records.Data)
    chooses = worsening.settings.validates
    assert (data.validation, validation, worsening.evaluation.base.rows) == ((1, 1, 3) if chooses else (0, 4, 4))
    assert ("4 held out (1 for validation, the others for the test)" in run_text(worsening)) == chooses


def test_a_run_ends_early_where_the_validation_loss_rises_and_ends_there_again_when_resumed(worsening):
    if not worsening.settings.stop_early:
        assert worsening.last(records.Ended) is None
        return
    assert "after step 5 of 6: the loss on the validation rows was lowest after step 2" in run_text(worsening)
    # As if it had been killed after its last step, before it was scored.
    adapter = (worsening.path / "adapter" / "adapter_model.safetensors").read_bytes()
    found = worsening.evaluation
    lines = (worsening.path / "events.jsonl").read_text("utf-8").splitlines(keepends=True)
    kept = next(place for place, line in enumerate(lines) if '"ended"' in line)
    copy = worsening.path.parent / "again"
    shutil.copytree(worsening.path, copy)
    (copy / "events.jsonl").write_text("".join(lines[:kept]))
    shutil.rmtree(copy / "adapter")
    (copy / "evaluation.json").unlink()
    again = finetune(Settings(runs_dir=str(copy.parent)), "again", resume=True)
    assert (again.status, again.steps[-1].step, again.evaluation.rows) == ("finished", 5, found.rows)
    assert (again.path / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.slow
def test_answers_that_could_not_be_made_leave_the_run_good(tiny, tmp_path, monkeypatch):
    """Unsloth's answers come from a process of their own; here that one is killed, as for want of memory."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'bizassist_nb.training.fixed_prompts' in sys.orig_argv:\n    os._exit(9)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    run = finetune(quick(tiny, tmp_path, engine="unsloth"), "silent")
    assert run.status == "finished"
    assert run.evaluation.answers is None
    assert "the fixed prompts could not be answered: their process ended with status 9 (" in pages.read(
        run._repr_html_()
    )
    assert str(run.path) not in run.last(records.Unanswered).reason
    monkeypatch.undo()
    readme = run.path / "README.md"
    assert "could not be answered" in readme.read_text("utf-8")
    assert str(run.path) not in readme.read_text("utf-8")
    assert evaluate(run).answers.prompts >= 12
    for said in (run._repr_html_(), readme.read_text("utf-8")):
        assert "could not be answered" not in said


def test_learning_on_all_tokens_counts_them_all(tiny, tmp_path):
    data = begun(quick(tiny, tmp_path, train_on="all", subset=4, held_out=2), "all").last(records.Data)
    assert data.training.trained_tokens == data.training.tokens
    assert data.held_out.trained_tokens < data.held_out.tokens  # what is scored is the answer


def test_the_report_shows_a_row_with_its_mask(trained):
    html = trained._repr_html_()
    shown = trained.last(records.Data).shown
    learned = [text for text, learned in shown.runs if learned]
    assert len(learned) == 1
    [row] = [row for row in rows_of(trained)[1] if row.number == shown.number]
    assert f"{row.response}<|im_end|>".startswith(learned[0])  # it may be cut at max_length
    assert f"row {shown.number} as the model reads it" in html
    assert "&lt;|im_start|&gt;assistant\n<mark>" in html
