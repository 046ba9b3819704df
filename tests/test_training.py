"""Training for real, on a CPU: both engines, the worker's run directory, stopping and resuming, and what is refused."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from live_kernel import wait_until
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bizassist_nb import Settings, finetune
from bizassist_nb.api import Run
from bizassist_nb.core.errors import RunError
from bizassist_nb.data.rows import Row, split
from bizassist_nb.results.model_card import card
from bizassist_nb.results.summary import diverged, run_html, run_text
from bizassist_nb.results.verdict import Score
from bizassist_nb.runs.journal import Journal
from bizassist_nb.runs.run import ENDED
from bizassist_nb.training import launch
from bizassist_nb.training.checkpoints import CHECKSUMS, checkpoints
from bizassist_nb.training.evaluation import evaluate
from bizassist_nb.training.worker import Worker


def quick(tiny, tmp_path, **changes):
    values = {
        "model": str(tiny), "data": "sample", "subset": 12, "held_out": 4, "max_length": 512, "engine": "transformers",
        "runs_dir": str(tmp_path),
    }  # fmt: skip
    return Settings(**(values | changes))


def begun(settings, name) -> Run:
    """A run that was ended as soon as it had taken its first step."""
    run = launch.start(settings, name)
    wait_until(lambda: run.steps or run.status in ENDED)
    run.kill()
    return run


@pytest.mark.parametrize("engine", ["transformers", pytest.param("unsloth", marks=pytest.mark.slow)])
def test_adapter_moves_and_no_base_weight_does(engine, tiny, tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("train_once.py")), engine, str(tiny), str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["adapter"] == found["moved"] == 2 * 7 * 2
    assert found["four_bit"] == 2 * 7
    assert found["base_moved"] == []
    assert len(found["losses"]) == 2


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
        assert found[who]["loss"] == pytest.approx(before[who]["loss"], abs=1e-4)
        assert found["general"][who]["loss"] == pytest.approx(before["general"][who]["loss"], abs=1e-4)
    assert run.answers == answers  # greedy, by the same plain model


def test_run_directory_holds_everything(trained):
    path = trained.path
    assert trained.status == "finished"
    for name in ("settings.toml", "environment.json", "events.jsonl", "evaluation.json", "README.md", "worker.log"):
        assert (path / name).stat().st_size, name
    assert (path / "loss.png").read_bytes().startswith(b"\x89PNG")
    adapter = {file.name for file in (path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"} <= adapter
    assert trained.environment["model"] == "smollm2-135m"
    assert trained.environment["engine"] == "unsloth"
    assert {"torch", "trl", "peft", "unsloth", "bizassist-nb"} <= trained.environment["versions"].keys()
    parameters = trained.last("parameters")
    assert (parameters["trainable"], parameters["total"]) == (4_884_480, 139_399_488)
    assert "trainable parameters: 4,884,480 of 139,399,488" in (path / "worker.log").read_text()
    assert [step.step for step in trained.steps] == list(range(1, trained.total_steps + 1))
    assert sum(step.tokens for step in trained.steps) == trained.last("data")["training"]["tokens"]


def test_the_learning_rate_is_the_one_asked_for(tiny, tmp_path):
    """It rises to that, and falls towards 0."""
    run = finetune(quick(tiny, tmp_path, learning_rate=3e-3, epochs=2), "rates")
    rates = [step.learning_rate for step in run.steps]
    assert max(rates) == pytest.approx(3e-3)
    assert rates.index(max(rates)) == 1
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_memory_is_about_what_was_expected(trained):
    expected, measured = trained.last("preflight"), trained.last("memory")
    assert measured["of"] == "process"
    assert expected["memory"] == "RAM"
    assert expected["ram"] == pytest.approx(measured["peak"] / 2**30, rel=0.15)
    assert expected["ram"] > expected["peak"]


def test_tuned_is_better_on_held_out_rows(trained):
    found = trained.evaluation
    assert found["tuned"]["loss"] < found["base"]["loss"] - 2 * found["standard_error"]
    assert found["verdict"] == "helped"
    assert trained.held_out[0] == (0, pytest.approx(found["base"]["loss"]))
    assert trained.held_out[-1][1] == pytest.approx(found["tuned"]["loss"])


def test_card_says_what_came_of_it(trained):
    text = (trained.path / "README.md").read_text()
    assert trained.evaluation["sentence"] in text
    assert "| answers that loop |" in text
    assert trained.answers[0]["tuned"]["text"] not in text  # nor rows: a card is published, and rows may be private
    assert "most improved" not in text
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in text
    assert "| rank | 16 |" in text


def test_bad_rows_are_listed_and_the_rest_is_used(tiny, tmp_path, rows_file):
    rows = [{"instruction": f"Question {i}?", "response": f"Answer {i}."} for i in range(100)]
    rows[3] = {"instruction": "Only a question"}
    rows[50]["response"] = "  "
    rows[99]["instruction"] = 7
    run = begun(quick(tiny, tmp_path, data=str(rows_file(rows)), subset=90, held_out=7, batch_size=30), "bad-rows")
    data = run.last("data")
    assert (data["usable"], data["rejected"]) == (97, 3)
    assert [bad["number"] for bad in data["rejected_rows"]] == [4, 51, 100]
    assert "row 4 is not used" in (run.path / "worker.log").read_text()


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
    settings = quick(tiny, tmp_path, epochs=5, max_length=128)
    whole = finetune(settings, "whole")
    halted = launch.start(settings, "halted")
    wait_until(lambda: len(halted.steps) >= 2)
    halted.stop()
    wait_until(lambda: halted.status == "stopped")
    done = len(halted.steps)
    assert 2 <= done < 15
    resumed = finetune(settings, "halted", resume=True)
    assert resumed.status == "finished"
    assert resumed.last("resumed")["step"] == done
    assert [step.loss for step in resumed.steps] == [step.loss for step in whole.steps]
    weights = [run.adapter / "adapter_model.safetensors" for run in (whole, resumed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_run_that_ended_before_its_first_checkpoint_begins_again_from_the_start(tmp_path, monkeypatch):
    from bizassist_nb.training import trainer
    from bizassist_nb.training.spool import SpoolingJournal

    def begin() -> int:
        return trainer.train(trainer.Training(run, journal, None, None, None, None, [[]]), None)

    unwrap = SimpleNamespace(unwrap_model=lambda *_, **__: None)
    done = SimpleNamespace(train=lambda **_: None, accelerator=unwrap, state=SimpleNamespace(global_step=1))
    monkeypatch.setattr(trainer, "build_trainer", lambda *_: done)
    (tmp_path / "settings.toml").write_text(Settings().to_toml())
    run, journal = Run(tmp_path), SpoolingJournal(tmp_path)
    begin()
    assert run.last("resumed") is None
    journal.write("step", step=1, loss=2.0, learning_rate=1e-4, gradient_norm=0.5, tokens=9, seconds=1.0)
    begin()
    assert run.last("resumed")["step"] == 0
    assert run.steps == []


def test_memory_that_runs_out_in_held_out_scoring_costs_that_score_alone(tmp_path):
    from bizassist_nb.training.spool import SpoolingJournal

    (tmp_path / "settings.toml").write_text(Settings(evaluate_every=5).to_toml())
    run, offered = Run(tmp_path), []
    errors = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), None, RuntimeError("a bug")]

    def on_held_out(_model, _between):
        if error := errors.pop(0):
            raise error
        return [Score(1, 6.0, 3)]

    worker = Worker(run, SpoolingJournal(tmp_path), SimpleNamespace(asked=False))
    worker.evaluation_set = SimpleNamespace(on_held_out=on_held_out, held_out=[None] * 4)
    worker.best = SimpleNamespace(offer=lambda *found: offered.append(found[:2]))
    worker.model = worker.chat = None
    worker.steps = [[]] * 100
    for step in range(1, 15):
        worker.score_after_step(step)
    assert (offered, run.held_out) == ([(10, 2.0)], [(10, 2.0)])
    assert "held-out rows: not scored after step 5: memory ran out (OutOfMemoryError: CUDA out of" in run_text(run)
    with pytest.raises(RuntimeError, match="a bug"):
        worker.score_after_step(15)


@pytest.mark.parametrize(("steps", "kept"), [(3, True), (4, False)])
def test_scores_of_a_stopped_run_go_once_it_is_trained_further(tmp_path, steps, kept):
    from bizassist_nb.training.checkpoints import save_checkpoint

    save_checkpoint(tmp_path, 3, lambda folder: (folder / "weights").touch())
    files = [tmp_path / "evaluation.json", tmp_path / "answers.json"]
    for file in (tmp_path / "settings.toml", *files):
        file.touch()
    worker = Worker(Run(tmp_path), Journal(tmp_path), None)
    worker.steps = [[]] * steps
    worker.forget_scores()
    assert [file.exists() for file in files] == [kept, kept]


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_killed_run_resumes_from_its_last_whole_checkpoint_and_runs_no_code_from_it(tiny, tmp_path):
    settings = quick(tiny, tmp_path, epochs=20, checkpoint_minutes=0.0, max_length=128)
    run = launch.start(settings, "killed")
    wait_until(lambda: (saved := run.last("checkpoint")) is not None and saved["step"] >= 4)
    run.kill()
    wait_until(lambda: run.status == "lost")
    assert "ended without a word" in run.error
    newest, before = checkpoints(run.path)
    assert not [path for path in run.path.rglob("*") if path.suffix in (".bin", ".pkl")]
    with (newest.path / "optimizer.pt").open("r+b") as file:
        file.seek(1000)
        file.write(b"?")
    launch.start(settings, "killed", resume=True)
    wait_until(lambda: len(run.steps) > newest.step)
    run.stop()
    wait_until(lambda: run.status == "stopped" and not run.alive)
    assert run.last("resumed")["step"] == before.step
    assert run.last("damaged")["checkpoint"] == str(newest.path)
    words = f"{newest.path}: optimizer.pt is not what was written; the one before it was used"
    assert words in run_text(run)

    # One that is whole, but was not written by this package.
    forged = checkpoints(run.path)[0].path
    torch.save(Evil(tmp_path / "run by a pickle"), forged / "optimizer.pt")
    sums = json.loads((forged / CHECKSUMS).read_text())
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
    assert "lower learning_rate than 0.0002, under a new name" in str(caught.value)
    run = Run(tmp_path / "nan")
    assert (run.status, len(run.steps)) == ("failed", 4)
    assert run.last("checkpoint")["step"] == 4
    assert "--resume" not in run_text(run) + run_html(run)
    assert "begin anew under a new name, with a lower learning_rate than 0.0002" in run_text(run)


@pytest.mark.parametrize("who", ["base", "tuned"])
def test_only_an_adapter_that_was_broken_in_training_has_diverged(who, tmp_path):
    (tmp_path / "settings.toml").write_text(Settings().to_toml())
    run, journal = Run(tmp_path), Journal(tmp_path)
    worker = Worker(run, journal, None)
    worker.evaluation_set = SimpleNamespace(on_held_out=lambda *_: [Score(1, float("nan"), 5)])
    worker.model = None
    with pytest.raises(RunError, match=f"held-out loss of {who}") as caught:
        worker.score(who, 3, lambda: None)
    journal.write("state", state="failed")
    journal.write("error", message=str(caught.value), expected=True)
    assert diverged(run) == (who == "tuned")


def test_float16_may_overflow_while_its_scaling_settles_but_not_for_ever(tmp_path):
    from bizassist_nb.training.spool import SpoolingJournal
    from bizassist_nb.training.trainer import RunCallback

    (tmp_path / "settings.toml").write_text(Settings().to_toml())
    run = Run(tmp_path)
    callback = RunCallback(SpoolingJournal(tmp_path), SimpleNamespace(asked=False), [[]] * 99, 10.0, lambda _: None)
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
    assert [event["gradient_norm"] for event in run.events[19:22]] == [None, 1.5, None]
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


@pytest.fixture(scope="module", params=["last", "best"])
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
    return finetune(quick(tiny, folder, keep=request.param, **changes), "worse")


def test_held_out_rows_are_scored_while_training(worsening):
    assert [step for step, _ in worsening.held_out] == [0, 2, 4, 6]
    scored = [event["step"] for event in worsening.events if event["event"] == "evaluation"]
    assert scored == [0, 2, 4, 6] + ([2] if worsening.settings.keep == "best" else [])
    losses = [loss for _, loss in worsening.held_out]
    assert losses == sorted(losses)


def test_the_best_adapter_is_kept_and_saved_if_asked(worsening):
    losses = dict(worsening.held_out)
    if worsening.settings.keep == "best":
        assert worsening.evaluation["tuned"]["loss"] == pytest.approx(losses[2])
        assert "The adapter saved is that of step 2, the best on the held-out rows." in worsening._repr_html_()
        assert not (worsening.path / "best").exists()
        # Scored anew from the files, which hold just that adapter.
        assert evaluate(worsening)["tuned"]["loss"] == pytest.approx(losses[2], abs=1e-4)
        return
    assert worsening.evaluation["tuned"]["loss"] == pytest.approx(losses[6])
    assert "Held-out loss has risen since step 2" in worsening._repr_html_()
    assert f"the best checkpoint is kept in {worsening.path / 'best'}" in worsening._repr_html_()
    published = card(worsening)
    assert "the best checkpoint is kept in best (" in published
    assert str(worsening.path) not in published
    files = [worsening.path / name / "adapter_model.safetensors" for name in ("best", "adapter")]
    assert files[0].read_bytes() != files[1].read_bytes()


@pytest.mark.slow
def test_answers_that_could_not_be_made_leave_the_run_good(tiny, tmp_path, monkeypatch):
    """Unsloth's answers come from a process of their own; here that one is killed, as for want of memory."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'bizassist_nb.training.fixed_prompts' in sys.orig_argv:\n    os._exit(9)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    run = finetune(quick(tiny, tmp_path, engine="unsloth"), "silent")
    assert run.status == "finished"
    assert run.evaluation["answers"] is None
    assert "the fixed prompts could not be answered (status 9" in run._repr_html_()
    assert str(run.path) not in run.last("unanswered")["reason"]
    monkeypatch.undo()
    readme = run.path / "README.md"
    assert "could not be answered" in readme.read_text()
    assert str(run.path) not in readme.read_text()
    assert evaluate(run)["answers"]["prompts"] >= 12
    for said in (run._repr_html_(), readme.read_text()):
        assert "could not be answered" not in said


def test_learning_on_all_tokens_counts_them_all(tiny, tmp_path):
    data = begun(quick(tiny, tmp_path, train_on="all", subset=4, held_out=2), "all").last("data")
    assert data["training"]["trained_tokens"] == data["training"]["tokens"]
    assert data["held_out"]["trained_tokens"] < data["held_out"]["tokens"]  # what is scored is the answer


def test_the_report_shows_a_row_with_its_mask(trained):
    html = trained._repr_html_()
    shown = trained.last("data")["shown"]
    learned = [text for text, learned in shown["runs"] if learned]
    assert len(learned) == 1
    assert learned[0].endswith("<|im_end|>")
    assert f"row {shown['number']} as the model reads it" in html
    assert "&lt;|im_start|&gt;assistant\n<mark>" in html
