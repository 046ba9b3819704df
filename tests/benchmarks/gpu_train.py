"""Training on a GPU, measured. Usage: gpu_train.py MODEL_FOLDER ROWS.json OUT PART ...

MODEL_FOLDER holds Mistral-7B's architecture in NF4 with a chat template, ROWS.json at least 1,000 rows. Each part
runs in a process of its own (Unsloth patches its libraries for good) and appends JSON lines to OUT as soon as it has
them. Parts joined by + load their models side by side, and those of speed train one after the other, in that order.
PART@STEPS has another number of steps, of which all but the first five are counted.

seed          a plain script of the configuration of the notebook that this package grew out of (Unsloth, micro-batch
              1 x 4, checkpointing on, 8-bit Adam); of seed and ours the same rows, in the same order
ours-4, ours-16        our run with the engine that "auto" takes, 4 or 16 rows a step. Of some warm steps, which kernels
                       ran, and how long the GPU had work
unsloth-4, unsloth-16  the same with Unsloth
plain-4                the same with plain transformers, without CUDA graphs
seed-t4, ours-t4       seed and unsloth-4 in float16 in 14.5 GiB
mixed-t4               rows of 2,048 tokens among others, so, with checkpoints and scoring
memory-graphs, memory-unsloth, memory-checkpointing (Unsloth's), memory-plain    estimated and measured peaks
t4            whole runs in float16 in 14.5 GiB, cut as for a T4: 1,000 rows; rows that are all 2,048 tokens long; too
              much at once

The first five steps of each configuration are not counted: kernels are compiled in them.
"""

import contextlib
import dataclasses
import gc
import importlib.metadata
import itertools
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).parent.parent / "gpu"))

WARM = 5
STEPS = int(os.environ.get("STEPS", "20"))
"""The step after the last that is counted; `PROFILED` of those that follow are profiled."""
PROFILED = 3
ALL = STEPS + PROFILED + 1
HELD_OUT = 64


def write(out: Path, **found) -> None:
    with out.open("a") as file:
        file.write(json.dumps(found, default=msgspec.to_builtins) + "\n")
    print(json.dumps(found, default=msgspec.to_builtins)[:1500], flush=True)


def fresh() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def gib(size: int) -> float:
    return round(size / 2**30, 2)


TURNS = Path("/tmp/gpu_train_turns")


def await_turn() -> None:
    """Wait until all parts have loaded and those before this one have trained, or died: then the GPU is its alone."""
    if not (part := os.environ.get("PART")):
        return
    (TURNS / f"{part}.loaded").touch()
    others = os.environ["PARTS"].split(",")
    for mark in [*(f"{other}.loaded" for other in others), *others[: others.index(part)]]:
        while not (TURNS / mark).exists():
            time.sleep(0.05)


def end_turn() -> None:
    """Let the next part train."""
    if part := os.environ.get("PART"):
        (TURNS / part).touch()


# --- our run -------------------------------------------------------------------------------------------------------


class Watch:
    """Where the time of our run goes: of the host by stage, and of the GPU by kernel."""

    def __init__(self, out: Path, name: str, frozen: bool):
        """Nothing is measured until `watched`. `frozen` keeps Python's collector from what there is before training."""
        self.out, self.name, self.frozen = out, name, frozen
        self.host: dict[str, list[float]] = defaultdict(list)
        self.callback: dict[int, float] = defaultdict(float)
        self.peak = 0, 0

    def timed(self, stage: str, function):
        """The function, with the host's seconds in it noted."""

        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.host[stage].append(time.perf_counter() - start)

        return call

    def of_callback(self, function):
        """A method of our callback, with the seconds in it noted by step."""

        def call(callback, args, state, control, **kwargs):
            start = time.perf_counter()
            try:
                return function(callback, args, state, control, **kwargs)
            finally:
                self.callback[state.global_step] += time.perf_counter() - start

        return call

    @contextlib.contextmanager
    def watched(self):
        """Have trainers built meanwhile measured."""
        from bizassist_nb.training import trainer

        build, methods = trainer.build_trainer, ("on_step_end", "on_log")
        before = {name: getattr(trainer.RunCallback, name) for name in methods}
        trainer.build_trainer = lambda *args, **kwargs: self.instrument(build(*args, **kwargs))
        for name in methods:
            setattr(trainer.RunCallback, name, self.of_callback(before[name]))
        yield
        trainer.build_trainer = build
        for name in methods:
            setattr(trainer.RunCallback, name, before[name])

    def instrument(self, trained):
        """The trainer, measured."""
        import torch
        from transformers import TrainerCallback

        if self.frozen:
            gc.collect()
            gc.freeze()
        trained.compute_loss = self.timed("forward", trained.compute_loss)
        trained.accelerator.backward = self.timed("backward", trained.accelerator.backward)
        trained.accelerator.clip_grad_norm_ = self.timed("clip", trained.accelerator.clip_grad_norm_)
        trained.get_batch_samples = self.timed("batch", trained.get_batch_samples)
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        watch = self

        class Profiling(TrainerCallback):
            def on_train_begin(self, *_, **__):
                await_turn()
                fresh()

            def on_train_end(self, *_, **__):
                torch.cuda.synchronize()
                watch.peak = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
                end_turn()

            def on_step_begin(self, _args, state, *_, **__):
                if state.global_step == 1:
                    trained.optimizer.step = watch.timed("optimizer", trained.optimizer.step)
                if state.global_step == STEPS:
                    torch.cuda.synchronize()
                    profiler.start()

            def on_step_end(self, _args, state, *_, **__):
                if state.global_step == STEPS + PROFILED:
                    torch.cuda.synchronize()
                    profiler.stop()
                    watch.kernels(profiler)

        trained.add_callback(Profiling())
        return trained

    def kernels(self, profiler) -> None:
        """Write which kernels ran, in milliseconds a step."""
        took: dict[str, list[float]] = defaultdict(list)
        for event in profiler.events():
            if event.device_type.name == "CUDA":
                took[event.name].append(event.time_range.elapsed_us() / 1000)
        most = sorted(took.items(), key=lambda item: -sum(item[1]))[:20]
        write(
            self.out,
            part="kernels",
            name=self.name,
            busy=round(sum(map(sum, took.values())) / PROFILED, 1),
            launches=round(sum(map(len, took.values())) / PROFILED),
            most=[[name[:70], round(len(ms) / PROFILED), round(sum(ms) / PROFILED, 2)] for name, ms in most],
        )


def ours(model: str, rows: str, out: Path, name: str, frozen: bool = False, **changes) -> None:
    """A run by the worker's own code, in this process; warm steps are counted."""
    if changes["engine"] == "unsloth":
        import unsloth  # noqa: F401 - before everything it patches

    from bizassist_nb import Settings
    from bizassist_nb.api import Run
    from bizassist_nb.runs import records
    from bizassist_nb.training import worker

    used = ALL * changes.get("batch_size", 4)
    values = {"model": model, "data": rows, "subset": used, "held_out": HELD_OUT, "warmup_steps": 5}
    settings = Settings(**(values | {"evaluate_every": STEPS // 2} | changes))
    path = Path(tempfile.mkdtemp(prefix="gpu_train_"))
    (path / "settings.toml").write_text(settings.to_toml())
    fresh()
    watch = Watch(out, name, frozen)
    worker.answer_apart = lambda _: None  # answers are not what is measured
    worker.answer, worker.counted = (lambda *_, **__: []), (lambda *_: None)
    with watch.watched():
        status = worker.main(str(path))
    gc.unfreeze()
    run = Run(path)
    warm = run.steps[WARM:STEPS]
    seconds = sum(step.seconds for step in warm) or 1e-9
    scored = {event.step for event in run.events if isinstance(event, records.Evaluation)}
    callback = [watch.callback[step.step] for step in warm if step.step not in scored]
    write(
        out,
        part="ours",
        name=name,
        tokens_per_second=round(sum(step.tokens for step in warm) / seconds),
        all_tokens_per_second=round(sum(s.tokens for s in run.steps) / (sum(s.seconds for s in run.steps) or 1e-9)),
        median_tokens_per_second=round(statistics.median([s.tokens / s.seconds for s in warm] or [0])),
        step_seconds=round(seconds / max(1, len(warm)), 4),
        median_step=round(statistics.median([s.seconds for s in warm] or [0]), 4),
        host_ms={stage: round(1000 * statistics.median(s)) for stage, s in watch.host.items()},
        callback_ms=round(1000 * statistics.mean(callback or [0]), 3),
        allocated=gib(watch.peak[0]),
        reserved=gib(watch.peak[1]),
        status=status,
        error=run.error,
        scoring=[[e.who, e.step, round(e.seconds, 2)] for e in run.events if isinstance(e, records.Evaluation)],
        fits=[event for event in run.events if isinstance(event, records.Fit)],
        preflight=run.last(records.Preflight),
        losses=[round(step.loss, 4) for step in run.steps],
        seconds=[round(step.seconds, 3) for step in run.steps],
        tokens=[step.tokens for step in run.steps],
        checkpoints=[e.step for e in run.events if isinstance(e, records.Checkpoint)],
        states=[[e.state, round(e.time - run.events[0].time, 1)] for e in run.events if isinstance(e, records.State)],
    )


# --- the plain script ----------------------------------------------------------------------------------------------


def seed(model_folder: str, rows: str, out: Path, name: str, batch: int = 4, fp16: bool = False, **changes) -> None:
    """The seed notebook's configuration in a plain script: the same token ids and labels, in the same order."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    from bizassist_nb import Settings
    from bizassist_nb.data.rows import read_table, split
    from bizassist_nb.models import base as models

    settings = Settings(model=model_folder, data=rows, subset=ALL * batch, held_out=HELD_OUT)
    chat = models.load_tokenizer(model_folder)
    training, _ = split(read_table(rows).rows, subset=settings.subset, held_out=HELD_OUT, seed=settings.seed)
    examples, _ = chat.examples(training, system_prompt=settings.system_prompt, max_length=2048)
    fresh()
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_folder, max_seq_length=2048, load_in_4bit=True, dtype=torch.float16 if fp16 else None
    )
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, lora_dropout=0, target_modules=models.linear_layers(model),
        random_state=settings.seed, use_gradient_checkpointing="unsloth",
    )  # fmt: skip
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            torch.cuda.synchronize()
            times.append(time.perf_counter())

    config = {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": batch, "max_steps": ALL,
        "learning_rate": 2e-4, "warmup_steps": 5, "optim": "adamw_8bit", "lr_scheduler_type": "linear", "seed": 3407,
        "train_sampling_strategy": "sequential", "dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": 2048,
        "fp16": fp16, "bf16": not fp16, "logging_steps": 1, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "output_dir": "/tmp/gpu_train/plain",
    }  # fmt: skip
    dataset = Dataset.from_list([{"input_ids": e.input_ids, "labels": e.labels} for e in examples])
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**(config | changes)),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    await_turn()
    trainer.train()
    end_turn()
    lengths = [len(e.input_ids) for e in examples]
    tokens = [sum(lengths[i : i + batch]) for i in range(0, len(lengths), batch)]
    seconds = times[STEPS - 1] - times[WARM - 1]
    write(
        out,
        part="seed",
        name=name,
        tokens_per_second=round(sum(tokens[WARM:STEPS]) / seconds),
        step_seconds=round(seconds / (STEPS - WARM), 4),
        allocated=gib(torch.cuda.max_memory_allocated()),
        reserved=gib(torch.cuda.max_memory_reserved()),
        losses=[round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry],
        seconds=[round(b - a, 3) for a, b in itertools.pairwise(times)],
        tokens=tokens,
    )
    trainer.accelerator.free_memory()


# --- memory --------------------------------------------------------------------------------------------------------


SIZES = {
    # name: (hidden, intermediate, layers, heads, key-value heads, vocabulary, tied)
    "llama-1b": (2048, 5632, 22, 32, 4, 32768, False),
    "llama-3b": (3072, 8192, 28, 24, 8, 128256, True),
}


def build(name: str, tokenizer: str) -> str:
    """A random Llama of that size in 16 bits, on disk; the folder."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = Path("/tmp/gpu_train/models") / name
    if not folder.is_dir():
        hidden, intermediate, layers, heads, groups, vocabulary, tied = SIZES[name]
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=groups, vocab_size=vocabulary, tie_word_embeddings=tied, bos_token_id=1,
            eos_token_id=2, max_position_embeddings=8192,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        part = folder.with_name(f"{name}.{os.getpid()}")
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(part)
        with contextlib.suppress(OSError):  # the other process was quicker
            part.rename(folder)
        del model
        fresh()
    return str(folder)


def memory(
    folder: str, out: Path, name: str, engine_name: str, rank: int, shapes, checkpointing: bool, graphs: bool
) -> None:
    """Peaks of single steps of rows of some lengths, through our trainer, beside their estimates.

    Of CUDA graphs, whose longest is captured at the start, each length has a trainer of its own.
    """
    import torch

    from bizassist_nb import Settings
    from bizassist_nb.api import Run
    from bizassist_nb.data.tokens import Example
    from bizassist_nb.models import base as models
    from bizassist_nb.runs import records
    from bizassist_nb.training import engines, preflight, trainer
    from bizassist_nb.training.spool import SpoolingJournal

    settings = Settings(model=folder, rank=rank, engine=engine_name, warmup_steps=0)
    engine = dataclasses.replace(engines.choose(engine_name), graphs=graphs)
    base = models.resolve(folder)
    on = preflight.device()
    fresh()
    model = engines.load(engine, base, settings, checkpointing=checkpointing)
    loaded = torch.cuda.memory_allocated()
    draw = random.Random(0)

    def step(shape):
        rows = [[draw.randrange(1000, 30000) for _ in range(length)] for length in shape]
        return [Example(n, ids, ids, truncated=False) for n, ids in enumerate(rows)]

    peaks: list[tuple[int, int]] = []

    def on_step_end(self, *_, **__):
        peaks.append((torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()))
        fresh()

    fit = records.Fit(
        micro_batch=4, checkpointing=checkpointing, precision=on.precision, reason="measured", graphs=graphs
    )
    model_shape = preflight.shape(base.source)
    before, trainer.RunCallback.on_step_end = trainer.RunCallback.on_step_end, on_step_end
    try:
        for group in [[shape] for shape in shapes] if graphs else [shapes]:
            path = Path(tempfile.mkdtemp(prefix="gpu_train_"))
            (path / "settings.toml").write_text(settings.to_toml())
            first = len(peaks)
            training = trainer.Training(
                Run(path), SpoolingJournal(path), _stop(), engine, model, models.load_tokenizer(folder),
                [step(shape) for shape in [group[0], *group]],  # the first twice: Adam's moments come into being in it
            )  # fmt: skip
            trainer.train(training, fit)
            if graphs:  # captured in the first step
                peaks[first + 1] = (max(peak[0] for peak in peaks[first:]), max(peak[1] for peak in peaks[first:]))
            del peaks[first]
            model.zero_grad(set_to_none=True)
            fresh()
    finally:
        trainer.RunCallback.on_step_end = before
    for shape, (allocated, reserved) in zip(shapes, peaks, strict=False):
        parts = preflight.Placement(model_shape, rank, engine, on).peak(shape, checkpointing=checkpointing)
        expected = sum(parts.values())
        write(
            out,
            part="memory",
            model=name,
            engine=engine_name + (", graphs" if graphs else ""),
            rank=rank,
            rows=list(shape),
            checkpointing=checkpointing,
            precision=on.precision,
            estimate=round(expected, 2),
            parts={key: round(value, 2) for key, value in parts.items()},
            loaded=gib(loaded),
            allocated=gib(allocated),
            reserved=gib(reserved),
            off=round(expected / (allocated / 2**30) - 1, 3),
            ram=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        )
    model = None
    fresh()


_STOP = []


def _stop():
    from bizassist_nb.training.stop import Stop

    if not _STOP:
        _STOP.append(Stop())
    return _STOP[0]


# --- the parts -----------------------------------------------------------------------------------------------------


def part_seed(model: str, rows: str, out: Path) -> None:
    import unsloth  # noqa: F401 - before everything it patches

    seed(model, rows, out, "seed: 1 x 4, checkpointing, 8-bit Adam")


def part_seed_t4(model: str, rows: str, out: Path) -> None:
    import t4
    import unsloth  # noqa: F401 - before everything it patches

    t4.pretend()
    seed(model, rows, out, "seed in 14.5 GiB, float16", fp16=True)


def part_ours_t4(model: str, rows: str, out: Path) -> None:
    import t4
    import unsloth  # noqa: F401 - before everything it patches

    t4.pretend(as_fast=True)
    ours(model, rows, out, "ours in 14.5 GiB, float16", engine="unsloth")


def part_ours(model: str, rows: str, out: Path, engine: str = "auto", batch_size: int = 4) -> None:
    ours(model, rows, out, f"ours, {engine}, batch_size {batch_size}", engine=engine, batch_size=batch_size)


def part_plain_4(model: str, rows: str, out: Path) -> None:
    from bizassist_nb.training import engines

    engines.can_graph = lambda: False
    part_ours(model, rows, out, engine="transformers")


def part_mixed_t4(model: str, rows: str, out: Path) -> None:
    """Dolly rows among rows of 2,048 tokens, in 14.5 GiB and float16, with checkpoints and scoring on the way."""
    import t4
    import unsloth  # noqa: F401 - before everything it patches

    t4.pretend()
    dolly = json.loads(Path(rows).read_text("utf-8"))
    text = " ".join(row["response"] for row in dolly[:400])
    long = [{"instruction": f"Tell all about item {n}.", "response": text[n * 300 :][:30000]} for n in range(30)]
    data = Path(tempfile.mkdtemp(prefix="gpu_train_")) / "mixed.json"
    data.write_text(json.dumps(dolly[:130] + long))
    changes = {"data": str(data), "checkpoint_minutes": 0.1}
    ours(
        model,
        str(data),
        out,
        "Dolly rows among rows of 2,048 tokens, in 14.5 GiB, float16",
        engine="unsloth",
        **changes,
    )


def part_memory(
    model: str, rows: str, out: Path, engine: str = "transformers", graphs: bool = False, checkpointing: bool = False
) -> None:
    if engine == "unsloth":
        import unsloth  # noqa: F401 - before everything it patches
    shapes = [(128,) * 4, (512, 300, 200, 100), (512,) * 4]
    if engine == "unsloth" or graphs:
        shapes.append((1024 if graphs else 2048,) * 4)
    for name, rank in (("mistral-7b", 16), ("llama-3b", 64), ("llama-1b", 16)):
        folder = model if name == "mistral-7b" else build(name, model)
        memory(folder, out, name, engine, rank, shapes, checkpointing, graphs)


def part_t4(model: str, rows: str, out: Path, dolly: int = 1000, long: int = 16) -> None:
    """Whole runs in 14.5 GiB, side by side: the rows given, rows of 2,048 tokens, and those with too much at once.

    What has come of them is also written when they are stopped early, by the seconds in T4_SECONDS.
    """
    import t4

    from bizassist_nb import Settings
    from bizassist_nb.api import Run
    from bizassist_nb.runs import records

    text = " ".join(row["response"] for row in json.loads(Path(rows).read_text("utf-8"))[:400])
    longest = Path("/tmp/gpu_train/long.json")
    longest.parent.mkdir(exist_ok=True)
    longest.write_text(
        json.dumps(
            [{"instruction": f"Tell all about item {n}.", "response": text[n * 300 :][:30000]} for n in range(long + 4)]
        )
    )
    started = {}
    for name, arguments, changes in (
        ("long", (), {"data": str(longest), "subset": long, "held_out": 4}),
        ("too much", ("--unaware",), {"data": str(longest), "subset": long, "held_out": 4}),
        ("dolly", (), {"data": rows, "subset": dolly, "checkpoint_minutes": 0.5}),
    ):
        path = Path(tempfile.mkdtemp(prefix="gpu_train_")) / f"t4-{name.replace(' ', '-')}"
        path.mkdir(parents=True)
        (path / "settings.toml").write_text(Settings(model=model, engine="unsloth", **changes).to_toml())
        log = (path / "log").open("w")
        process = subprocess.Popen(
            [sys.executable, t4.__file__, str(path), *arguments], stdout=log, stderr=log, cwd=path
        )
        started[name] = (path, process)
    end = time.monotonic() + float(os.environ.get("T4_SECONDS", "3600"))
    for name, (path, process) in started.items():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(1, end - time.monotonic()))
        run = Run(path)
        steps = run.steps
        write(
            out,
            part="t4",
            name=name,
            states=[e.state for e in run.events if isinstance(e, records.State)],
            error=run.last(records.Error),
            fits=[event for event in run.events if isinstance(event, records.Fit)],
            preflight=run.last(records.Preflight),
            peak=[line for line in (path / "log").read_text("utf-8").splitlines() if line.startswith("peak")],
            data=(data := run.last(records.Data)) and data.training,
            steps=len(steps),
            losses=[step.loss for step in steps][:: max(1, len(steps) // 10)],
            checkpoints=[e.step for e in run.events if isinstance(e, records.Checkpoint)],
            evaluations=[[e.who, e.loss, e.seconds] for e in run.events if isinstance(e, records.Evaluation)],
            training_seconds=round(sum(step.seconds for step in steps), 1),
            tokens=sum(step.tokens for step in steps),
            learned=(run.last(records.Memory), (run.path / "adapter").is_dir()),
        )
        if process.poll() is None:
            process.kill()


PARTS = {
    "seed": part_seed,
    "seed-t4": part_seed_t4,
    "ours-t4": part_ours_t4,
    "mixed-t4": part_mixed_t4,
    "ours-4": part_ours,
    "ours-16": lambda *args: part_ours(*args, batch_size=16),
    "unsloth-4": lambda *args: part_ours(*args, engine="unsloth"),
    "unsloth-16": lambda *args: part_ours(*args, engine="unsloth", batch_size=16),
    "plain-4": part_plain_4,
    "memory-plain": part_memory,
    "memory-graphs": lambda *args: part_memory(*args, graphs=True),
    "memory-unsloth": lambda *args: part_memory(*args, engine="unsloth"),
    "memory-checkpointing": lambda *args: part_memory(*args, engine="unsloth", checkpointing=True),
    "t4": part_t4,
}


def main(model: str, rows: str, out: str, *parts: str) -> None:
    target = Path(out).absolute()
    if len(parts) == 1 and parts[0].startswith("--"):
        PARTS[parts[0].removeprefix("--")](model, str(Path(rows).absolute()), target)
        return
    import torch

    names = ("torch", "transformers", "peft", "trl", "bitsandbytes", "unsloth", "unsloth_zoo", "accelerate")
    versions = {name: importlib.metadata.version(name) for name in names}
    write(target, part="machine", device=torch.cuda.get_device_name(0), versions=versions)
    for group in parts:
        start = time.perf_counter()
        command = [sys.executable, __file__, model, rows, out]
        shutil.rmtree(TURNS, ignore_errors=True)
        TURNS.mkdir()
        running = {}
        together = group.split("+")
        for part in together:
            name, _, steps = part.partition("@")
            environment = os.environ | {"PART": part, "PARTS": ",".join(together)} | ({"STEPS": steps} if steps else {})
            running[part] = subprocess.Popen([*command, f"--{name}"], env=environment)
        while any(process.poll() is None for process in running.values()):
            for part in (part for part, process in running.items() if process.poll() is not None):
                (TURNS / f"{part}.loaded").touch()
                (TURNS / part).touch()
            time.sleep(0.1)
        statuses = [process.returncode for process in running.values()]
        write(target, part="done", parts=group, statuses=statuses, seconds=round(time.perf_counter() - start))


if __name__ == "__main__":
    main(*sys.argv[1:])
