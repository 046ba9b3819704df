"""What Python code and the front ends do with runs: start, open, plot, merge, export and compare them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bizassist_nb.core.errors import RunError
from bizassist_nb.core.settings import Settings, user_path
from bizassist_nb.runs.run import RunDirectory, check_name, list_runs

if TYPE_CHECKING:
    from bizassist_nb.results.loss_plot import LossFigure
    from bizassist_nb.results.run_comparison import RunComparison


class Run(RunDirectory):
    """A run, read from its directory, that can plot, merge, export and show itself.

    Raises:
        RunError: where the directory holds no run.
    """

    def plot(self) -> "LossFigure":
        """The loss curve as a matplotlib Figure."""
        from bizassist_nb.results.loss_plot import loss_figure

        return loss_figure(self)

    def merge(self, base: Literal["trained", "original"] = "trained") -> Path:
        """Merge the adapter into the weights it was trained on, or the 16-bit originals; the folder of the model."""
        from bizassist_nb.export.merge import merge

        return merge(self, base)

    def export(
        self,
        to: Literal["merged", "adapter", "hub", "gguf"],
        *,
        base: Literal["trained", "original"] = "trained",
        repo: str | None = None,
        private: bool = False,
        show: Callable[[str], None] = lambda _: None,
    ) -> Path | str:
        """Write the merged model, as GGUF too, or complete the adapter's folder (its path), or upload it (its address).

        `base` is for "merged", `repo` and `private` are for "hub"; `show` is told what is being done.
        """
        from bizassist_nb.export.adapter import complete_adapter, upload
        from bizassist_nb.export.gguf import convert
        from bizassist_nb.export.merge import merge

        if to != "hub" and (repo or private):
            raise RunError(f"a repository is for an export to the hub, not to {to}")
        if to != "merged" and base != "trained":
            raise RunError(f"another base is for an export to merged, not to {to}")
        if to == "merged":
            return merge(self, base, show=show)
        if to == "gguf":
            return convert(self, show=show)
        return complete_adapter(self) if to == "adapter" else upload(self, repo, private=private)

    def _repr_html_(self) -> str:
        from bizassist_nb.results.summary import run_html

        return run_html(self)


def finetune(
    settings: Settings,
    name: str | None = None,
    *,
    data: Any = None,
    resume: bool = False,
    replace: bool = False,
) -> Run:
    """Train a run to its end in a process of its own, and give it back.

    `data` is a table in place of what the settings name, a DataFrame of pandas or polars or a datasets.Dataset; the run
    keeps a copy. `replace` moves a run that has the name already into the folder .bin beside it. Resuming a run whose
    worker lives, as it does when its kernel was restarted, is following it to its end.

    The first interrupt (Ctrl-C, ■) stops the run after its step, with a checkpoint; the second ends it at once.

    Raises:
        DataError: if the data cannot be used.
        RunError: if the name cannot be used, or the run failed, with the reason.
        SettingsError: if there are fewer GPUs than asked for, or their configuration cannot be used.
    """
    from bizassist_nb.training import launch

    begin = functools.partial(launch.begin, settings, name, data=data, resume=resume, replace=replace)
    return Run(launch.follow(begin).path)


def open_run(name: str, runs_dir: str | Path = "runs") -> Run:
    """The run of that name.

    Raises:
        RunError: if there is none; the message lists those there are.
    """
    known = [run.name for run in list_runs(runs_dir)]
    if check_name(name) not in known:
        raise RunError(
            f"there is no run {name!r} in {Path(runs_dir).absolute()}; the runs there: {', '.join(known) or 'none yet'}"
        )
    return Run(user_path(runs_dir) / name)


def compare(*runs_or_names: RunDirectory | str) -> "RunComparison":
    """Runs, given themselves or by name, beside one another.

    Raises:
        RunError: if none is given, or there is none of that name.
    """
    from bizassist_nb.results.run_comparison import RunComparison

    if not runs_or_names:
        raise RunError('which runs? compare("first", "second"), or the runs themselves')
    found = [open_run(run) if isinstance(run, str) else run for run in runs_or_names]
    if damage := next(filter(None, (run.damage for run in found)), None):
        raise RunError(damage)
    return RunComparison(found)
