"""One run in several processes, as on several GPUs: here two on a CPU, which talk by gloo, with a tiny model."""

import contextlib
import dataclasses
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from live_kernel import wait_until
from safetensors.torch import load_file

from bizassist_nb import Settings, finetune
from bizassist_nb.api import Run
from bizassist_nb.core.errors import EngineError, SettingsError
from bizassist_nb.results.summary import run_text
from bizassist_nb.runs import records
from bizassist_nb.runs.journal import is_locked
from bizassist_nb.runs.run import ENDED
from bizassist_nb.training import launch
from bizassist_nb.training.checkpoints import newest_checkpoint
from bizassist_nb.training.distributed.launcher import Processes, processes
from bizassist_nb.training.distributed.rank import FIT
from bizassist_nb.training.forecast import forecast

TWO = "distributed_type: MULTI_GPU\nuse_cpu: true\nnum_machines: 1\nnum_processes: 2\n"
FSDP = TWO.replace("MULTI_GPU", "FSDP") + "fsdp_config:\n  fsdp_version: 2\n"
STEPS = 12
WITH_GRAPHS = {
    "micro_batch": 2,
    "checkpointing": False,
    "precision": "float32",
    "reason": "as on a GPU",
    "graphs": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    (folder / "two.yaml").write_text(TWO)
    return folder


@pytest.fixture(scope="module")
def settings(tiny, folder) -> Settings:
    """9 rows in 5 epochs: 11 steps of 4, and one of a single row, of which the second process has nothing."""
    return Settings(
        model=str(tiny), data="sample", subset=9, held_out=2, max_length=256, epochs=5, learning_rate=0.02,
        micro_batch=2, engine="transformers", checkpoint_minutes=0.0, evaluate_every=6, runs_dir=str(folder / "runs"),
        accelerate_config=str(folder / "two.yaml"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def together(settings) -> Run:
    return finetune(settings, "together")


def ranks(run: Run) -> dict[str, psutil.Process]:
    """The processes of a run that is being trained, by rank."""
    launcher = (run.path / "worker.lock").read_text("utf-8")
    children = psutil.Process(int(launcher)).children() if launcher and is_locked(run.path) else []
    found = {}
    for child in children:
        with contextlib.suppress(psutil.Error):  # one that has just ended, or not yet begun
            found[child.environ().get("RANK")] = child
    return {rank: child for rank, child in found.items() if rank}


def left(run: Run) -> list[psutil.Process]:
    """The processes that have to do with a run."""
    mine = {os.getpid(), os.getppid()}
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.pid not in mine and str(run.path) in (process.info["cmdline"] or [])
    ]


def ended(run: Run) -> str:
    wait_until(lambda: run.status in ENDED and not is_locked(run.path))
    assert left(run) == []
    return run.status


def test_two_processes_learn_what_one_does(settings, together):
    alone = finetune(dataclasses.replace(settings, accelerate_config=""), "alone")
    losses = [[step.loss for step in run.steps] for run in (alone, together)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] - losses[0][-1] > 0.05  # it did learn
    for name in ("tokens", "learning_rate"):
        assert [getattr(step, name) for step in together.steps] == [getattr(step, name) for step in alone.steps]
    norms = [[step.gradient_norm for step in run.steps] for run in (alone, together)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    for who in ("base", "tuned"):
        scores = [getattr(run.evaluation, who).loss for run in (alone, together)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    curves = [
        [(event.step, event.rows) for event in run.events if isinstance(event, records.Evaluation)]
        for run in (alone, together)
    ]
    assert curves[0] == curves[1]
    assert [answer.base for answer in together.answers] == [answer.base for answer in alone.answers]


@pytest.mark.slow
def test_graphs_in_every_process_learn_the_same(settings, together, monkeypatch):
    monkeypatch.setenv(FIT, json.dumps(WITH_GRAPHS))
    run = finetune(dataclasses.replace(settings, evaluate_every=1000), "graphs")
    assert run.last(records.Fit).graphs
    assert len([event for event in run.events if isinstance(event, records.Parameters)]) == 1  # started once
    losses = [[step.loss for step in each.steps] for each in (run, together)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_a_model_that_no_graph_computes_starts_all_processes_again_without(settings, monkeypatch):
    monkeypatch.setenv(FIT, json.dumps(WITH_GRAPHS))
    run = finetune(dataclasses.replace(settings, epochs=1, dropout=0.1, evaluate_every=1000), "dropout")
    assert run.status == "finished"
    fits = [event for event in run.events if isinstance(event, records.Fit)]
    assert [fit.graphs for fit in fits] == [True, False]
    assert "no CUDA graphs of this model (it has dropout" in fits[1].reason
    assert [step.step for step in run.steps] == [1, 2, 3]


def test_the_first_process_alone_writes_the_run(together):
    assert together.status == "finished"
    assert [step.step for step in together.steps] == list(range(1, STEPS + 1))
    states = [event.state for event in together.events if isinstance(event, records.State)]
    assert states == ["starting", "loading", "scoring", "training", "scoring", "answering", "saving", "finished"]
    kinds = [type(event).__name__.lower() for event in together.events]
    assert (kinds.count("data"), kinds.count("checkpoint"), kinds.count("evaluation")) == (1, STEPS, 3)
    assert together.environment.device.startswith("2 × CPU")
    assert "processes: 2, each with 2 of the 4 examples of a step" in run_text(together)
    assert str(together.settings.accelerate_config) not in (together.path / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_ending_in_every_way_and_going_on_is_as_if_nothing_had_been(settings, together, tmp_path, monkeypatch):
    # The second process is killed.
    run = launch.start(settings, "broken")
    wait_until(lambda: len(run.steps) >= 2 or run.status in ENDED)
    ranks(run)["1"].kill()
    assert ended(run) == "failed"
    assert "one of its processes (rank 1 of this machine) was ended by SIGKILL" in run.error
    assert "What was saved stays" in run.error
    killed = newest_checkpoint(run.path).step

    # It is stopped.
    launch.start(Settings(runs_dir=settings.runs_dir), "broken", resume=True)
    wait_until(lambda: len(run.steps) > killed + 1 or run.status in ENDED)
    run.stop()
    assert ended(run) == "stopped"
    assert run.last(records.Resumed).step == killed
    stopped = len(run.steps)
    assert newest_checkpoint(run.path).step == run.steps[-1].step == stopped < STEPS - 3

    # Memory runs out in the second process, two steps later; both go on with less.
    (tmp_path / "sitecustomize.py").write_text(FULL)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    finetune(Settings(runs_dir=settings.runs_dir), "broken", resume=True)
    assert ended(run) == "finished"
    resumed = [event.step for event in run.events if isinstance(event, records.Resumed)]
    assert resumed == [killed, stopped, stopped + 2]
    assert run.last(records.Fit).micro_batch == 1
    assert "memory ran out with 2 rows at once (OutOfMemoryError: CUDA out of memory" in run.last(records.Fit).reason

    losses = [[step.loss for step in each.steps] for each in (run, together)]
    assert losses[0][: stopped + 2] == losses[1][: stopped + 2]
    as_if_nothing_had_been(run, together)


def as_if_nothing_had_been(run: Run, together: Run) -> None:
    """It learnt what the run learnt that ended by itself."""
    losses = [[step.loss for step in each.steps] for each in (run, together)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    first, second = (load_file(each.adapter / "adapter_model.safetensors") for each in (run, together))
    assert first.keys() == second.keys()
    moved = max(float(tensor.abs().max()) for name, tensor in second.items() if "lora_B" in name)
    assert all(torch.allclose(first[name], second[name], rtol=0, atol=0.02 * moved) for name in first)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(settings, together):
    run = launch.start(settings, "fewer")
    wait_until(lambda: len(run.steps) >= 2 or run.status in ENDED)
    run.stop()
    assert ended(run) == "stopped"
    kept = run.path / "settings.toml"
    kept.write_text(kept.read_text("utf-8").replace(settings.accelerate_config, ""))
    finetune(Settings(runs_dir=settings.runs_dir), "fewer", resume=True)
    assert not run.environment.device.startswith("2")
    as_if_nothing_had_been(run, together)


@pytest.mark.slow
def test_a_sharded_base_learns_the_same_and_a_run_goes_on_with_or_without(settings, together, tmp_path, monkeypatch):
    config = tmp_path / "accelerate.yaml"
    config.write_text(FSDP)
    same = Settings(runs_dir=settings.runs_dir)

    # The base is sharded, and the run is stopped.
    run = launch.start(dataclasses.replace(settings, accelerate_config=str(config)), "sharded")
    wait_until(lambda: len(run.steps) >= 2 or run.status in ENDED)
    run.stop()
    assert ended(run) == "stopped"
    stopped = run.steps[-1].step
    assert newest_checkpoint(run.path).step == stopped < 6
    files = [{path.name for path in newest_checkpoint(each.path).path.iterdir()} for each in (run, together)]
    assert files[0] == files[1]

    # It goes on with a whole base in each process, of which one is killed.
    config.write_text(TWO)
    launch.start(same, "sharded", resume=True)
    wait_until(lambda: len(run.steps) >= stopped + 2 or run.status in ENDED)
    ranks(run)["1"].kill()
    assert ended(run) == "failed"
    killed = newest_checkpoint(run.path).step

    # It is sharded again, memory runs out, and it goes on with less.
    config.write_text(FSDP)
    (tmp_path / "sitecustomize.py").write_text(FULL)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    finetune(same, "sharded", resume=True)
    assert ended(run) == "finished"
    resumed = [event.step for event in run.events if isinstance(event, records.Resumed)]
    assert resumed[:2] == [stopped, killed]
    assert run.last(records.Fit).step == resumed[2] > killed
    assert run.last(records.Fit).micro_batch == 1

    as_if_nothing_had_been(run, together)
    for who in ("base", "tuned"):
        losses = [getattr(each.evaluation, who).loss for each in (run, together)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert [answer.base for answer in run.answers] == [answer.base for answer in together.answers]
    states = [event.state for event in run.events if isinstance(event, records.State)]
    assert states[-5:] == ["training", "scoring", "answering", "saving", "finished"]
    sharded = run.last(records.Sharded)
    assert sharded.shard == pytest.approx(sharded.whole / 2, rel=0.01)
    sizes = f"of its {sharded.whole / 2**20:.1f} MiB each process holds {sharded.shard / 2**20:.1f}"
    assert f"base: sharded: {sizes}" in run_text(run)
    log = (run.path / "worker.log").read_text("utf-8")
    assert log.count("trainable parameters") == 4  # the first process says so at each of four starts, no other does


@pytest.mark.slow
def test_a_process_has_a_whole_block_only_while_it_computes(tmp_path):
    """Against a whole base, by tests/shards.py in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(Path(__file__).parents[1] / "shards.py")
    result = subprocess.run([*command, script, str(tmp_path / "base")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 2
    for each in found:
        assert each["held"] == pytest.approx(each["whole"] / 2, rel=0.01)
        for passes in each["passes"]:
            assert passes["losses"] == pytest.approx(passes["whole_losses"], rel=1e-6)
            assert passes["gradient_differs"] < 1e-6
            # Of a block's bytes each had its half before and after, and while it computed the other blocks' halves.
            assert passes["fullest"] <= each["held"] + each["block"] / 2 + each["outside"] / 2
            assert passes["after"] == each["held"]


FULL = """
import os
if os.environ.get("RANK") == "1" and "BIZASSIST_FIT" not in os.environ:
    import torch.distributed

    gather, left = torch.distributed.all_gather_object, [2]

    def full(into, value):
        if isinstance(value, tuple):  # whether to stop and to save
            if not left[0]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            left[0] -= 1
        return gather(into, value)

    torch.distributed.all_gather_object = full
"""
"""A sitecustomize.py: what the first process says after a step reaches the second twice, then its memory is full."""


@pytest.mark.slow
def test_memory_that_runs_out_in_one_process_over_a_row_to_be_scored_ends_the_run(settings, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(FULL.replace("tuple", "list").replace("[2]", "[0]"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    run = launch.start(settings, "full")
    assert ended(run) == "failed"
    assert "memory ran out while the held-out rows were scored after step 0 (OutOfMemoryError" in run.error


@pytest.mark.slow
def test_before_training_a_stop_and_a_kill_leave_no_process(settings):
    run = launch.start(settings, "early")
    wait_until(lambda: len(ranks(run)) == 2)
    run.stop()  # while they are being imported
    assert ended(run) == "stopped"
    assert run.steps == []
    launch.start(settings, "early", resume=True)
    wait_until(lambda: len(ranks(run)) == 2)
    run.kill()
    wait_until(lambda: not is_locked(run.path))
    assert left(run) == []
    assert run.status == "lost"


def test_more_gpus_than_there_are_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match='gpus = 2: this machine has no CUDA GPU; take "auto"'):
        finetune(Settings(gpus=2, runs_dir=str(tmp_path / "runs")))
    with pytest.raises(SettingsError, match='gpus = "all": this machine has no CUDA GPU'):
        finetune(Settings(gpus="all", runs_dir=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(SettingsError, match="gpus = 8: this machine has 4 CUDA GPUs; take 4"):
        processes(Settings(gpus=8, batch_size=8))
    with pytest.raises(SettingsError, match="batch_size = 6: has to be a multiple of the 4 processes"):
        processes(Settings(gpus="all", batch_size=6))


def test_gpus_become_processes_of_accelerate(monkeypatch):
    from accelerate.commands.launch import launch_command_parser

    assert processes(Settings()) == processes(Settings(gpus=1)) == Processes(1, [])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for gpus, count in ((2, 2), ("all", 4)):
        found = processes(Settings(gpus=gpus, batch_size=8))
        told = launch_command_parser().parse_args([*found.arguments, "--module", "m"])
        assert found.count == told.num_processes == count
        assert not found.sharded
        assert (told.multi_gpu, told.num_machines, told.main_process_port, told.mixed_precision) == (True, 1, 0, "no")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "accelerate cannot read it (FileNotFoundError: The passed configuration file"),
        ("num_processes: 2\nmain: [1, 2\n", "line 3, column 1"),
        ("a: b: c\n", "mapping values are not allowed here"),
        ("num_processes: 2\n\0", "special characters are not allowed"),
        ("", "write one with: accelerate config"),
        ("- 2\n", "write one with: accelerate config"),
        ("num_processes: 2\n", "accelerate cannot read it (ValueError: A `distributed_type` must be specified"),
        (TWO + "procs: 2\n", "unknown keys (['procs'])"),
        (TWO.replace("MULTI_GPU", "MULTI_CPU"), "distributed_type is MULTI_CPU"),
        (TWO.replace("MULTI_GPU", "DEEPSPEED"), "distributed_type is DEEPSPEED; take MULTI_GPU"),
        (
            FSDP + "  fsdp_offload_params: true\n",
            "fsdp_offload_params: the parts of a base stay on their GPUs",
        ),
        (TWO + "fsdp_config: 2\n", "accelerate cannot read it (AttributeError: "),
        (FSDP + "parallelism_config:\n  parallelism_config_tp_size: 2\n", "parallelism_config: "),
        (TWO.replace("processes: 2", "processes: 1"), "num_processes is 1 and num_machines 1"),
        (TWO.replace("machines: 1", "machines: 2").replace("processes: 2", "processes: 3"), "num_processes is 3"),
        (TWO.replace("use_cpu: true\n", ""), "it asks for 2 processes on this machine, which has 0 CUDA GPUs"),
        (TWO.replace("processes: 2", "processes: 3"), "batch_size = 4: has to be a multiple of the 3 processes"),
    ],
)
def test_a_configuration_that_cannot_be_used_says_where_and_why(text, said, tmp_path):
    path = tmp_path / "accelerate.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        finetune(Settings(accelerate_config=str(path), runs_dir=str(tmp_path / "runs")))
    assert said in str(caught.value)
    assert str(path) in str(caught.value) or "batch_size" in said
    assert not (tmp_path / "runs").exists()


def test_unsloth_is_refused_for_a_sharded_base_before_anything_is_written(tmp_path):
    path = tmp_path / "accelerate.yaml"
    path.write_text(FSDP)
    with pytest.raises(EngineError, match='engine = "unsloth" cannot be used under FSDP'):
        finetune(Settings(engine="unsloth", accelerate_config=str(path), runs_dir=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "several-gpus.md").read_text("utf-8")


def test_the_configurations_of_the_page_are_those_of_accelerate(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    def read(name: str, batch_size: int):
        path = tmp_path / name
        path.write_text(PAGE.partition(f"```yaml\n# {name}\n")[2].partition("```")[0])
        found = processes(Settings(accelerate_config=str(path), batch_size=batch_size))
        told = _validate_launch_command(launch_command_parser().parse_args([*found.arguments, "--module", "m"]))[0]
        assert (told.multi_gpu, told.use_fsdp) == (not found.sharded, found.sharded)
        assert found.count == told.num_processes
        return found, told

    found, told = read("first.yaml", 64)
    assert (found.count, found.sharded, told.num_machines, told.machine_rank) == (16, False, 2, 0)
    assert (told.main_process_ip, told.main_process_port) == ("10.0.0.1", 29500)
    found, told = read("fsdp.yaml", 8)
    assert (found.count, found.sharded, told.num_machines) == (2, True, 1)
    found, told = read("fsdp-first.yaml", 64)
    assert (found.count, found.sharded, told.num_machines, told.fsdp_version) == (16, True, 2, 2)


def test_the_table_of_the_page_is_what_its_script_prints():
    script = runpy.run_path(str(ROOT / "tests" / "benchmarks" / "several.py"), run_name="several")
    assert script["table"]() in PAGE


def test_before_it_starts_a_run_is_reckoned_for_the_share_of_each_gpu(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    settings = Settings(model=str(tiny), data="sample", subset=16, held_out=2, max_length=256, batch_size=8, gpus=2)
    *_, found = forecast(settings)
    assert found.steps == 2
    assert found.fit.micro_batch == 4
    *_, alone = forecast(dataclasses.replace(settings, gpus=1))
    assert alone.fit.micro_batch == 8
    assert found.expected.parts["activations"] == pytest.approx(alone.expected.parts["activations"] / 2, rel=0.3)
