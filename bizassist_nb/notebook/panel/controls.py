"""One control for each field of `Settings`, made from what the field says about itself."""

import dataclasses
import html
import math
import tomllib
from typing import Any, Final

import ipywidgets as w
import tomli_w

from bizassist_nb.core.settings import Settings

_VERSION: Final = int(w.__version__.partition(".")[0])

# What a slider spans (any value can be typed beside it), as exponents of the base, with the exponents' step.
_SLIDERS: Final = {"subset": (10, 0, 4.3, 0.05), "rank": (2, 0, 9, 1)}
_OTHER: Final = "other …"
_SUGGESTED: Final = {"model": ("auto", "mistral-7b", "smollm2-135m"), "data": ("dolly", "sample")}
_LABELS: Final = {"subset": "rows to train on", "rank": "LoRA rank", "runs_dir": "folder of runs"}


def tip(text: str) -> dict[str, str]:
    """The keyword that gives a widget its tooltip: ipywidgets 8 renamed it."""
    return {"tooltip" if _VERSION >= 8 else "description_tooltip": text}


def fold(title: str, *content: Any) -> Any:
    """Content behind a button that shows it. The front end does so alone (panel.css), and keys reach it, which they
    do not with an `Accordion`.
    """
    button = w.ToggleButton(description=title, icon="caret-right", tooltip=f"show or hide: {title}")
    button.add_class("bn-fold")
    box = w.VBox(content)
    box.add_class("bn-folded")
    return w.VBox([button, box])


def control(field: "dataclasses.Field[Any]") -> "Control":
    """The control for that field."""
    if field.name in _SLIDERS:
        return Slider(field)
    return Choice(field) if field.name in _SUGGESTED else Control(field)


class Control:
    """A labelled input and, below it, what is wrong with its value. Only the pump calls its methods."""

    def __init__(self, field: "dataclasses.Field[Any]"):
        """Show the field's default."""
        self.name, self.field = field.name, field
        default = getattr(Settings(), field.name)
        self.label = _LABELS.get(field.name, field.name.replace("_", " "))
        self._problem = w.HTML()
        self._problem.add_class("bn-problem")
        self.inputs = self._inputs(default)
        row = w.Box(self.inputs)
        row.add_class("bn-row")
        self.view = w.VBox([row, self._problem])
        self.view.add_class("bn-field")

    def _inputs(self, default: Any) -> list[Any]:
        limits = self.field.metadata
        plain = {"description": self.label, **tip(limits["text"])}
        if limits["choices"]:
            return [w.Dropdown(options=limits["choices"], value=default, **plain)]
        if self.name == "system_prompt":
            return [w.Textarea(value=default, rows=3, **plain)]
        if isinstance(default, float):
            return [w.FloatText(value=default, step=None, **plain)]
        if isinstance(default, int):
            return [w.IntText(value=default, **plain)]
        return [w.Text(value=self._written(default), **plain)]

    def read(self) -> Any:
        """The value as it stands, valid or not."""
        return self._meant(self.inputs[0].value)

    def put(self, value: Any) -> None:
        """Show this value."""
        self.inputs[0].value = self._written(value)

    def complain(self, problem: str) -> None:
        """Say what is wrong, or nothing."""
        self._problem.value = f'<span role="alert">⚠ {html.escape(problem)}</span>' if problem else ""

    def _written(self, value: Any) -> Any:
        if self.name == "columns":
            return ", ".join(line.strip() for line in tomli_w.dumps(value).splitlines())
        return str(value) if self.field.metadata["words"] else value

    def _meant(self, value: Any) -> Any:
        """What a person who typed this meant; what makes no sense stays as it is, for `Settings` to refuse."""
        if self.name == "columns":
            try:
                return tomllib.loads(f"columns = {{ {value} }}")["columns"]
            except tomllib.TOMLDecodeError:
                return value
        if self.field.metadata["words"] and value.strip().lstrip("-").isdigit():
            return int(value)
        return value.strip() if self.field.metadata["words"] else value


class Slider(Control):
    """A slider for the usual values, and a number beside it for any."""

    def _inputs(self, default: Any) -> list[Any]:
        base, least, most, step = _SLIDERS[self.name]
        plain = {"description": self.label, **tip(self.field.metadata["text"])}
        self._slider = w.FloatLogSlider(
            value=default, base=base, min=least, max=most, step=step, readout=False, **plain
        )
        self._number = w.IntText(value=default, description=f"{self.label}, as a number", **tip(plain["description"]))
        self._number.add_class("bn-number")
        self._seen = (self._slider.value, default)
        self._range = (base**least, base**most)
        return [self._slider, self._number]

    def read(self) -> int:
        """The number; where only the slider was moved, the number first follows it."""
        slid, number = self._slider.value, self._number.value
        if number != self._seen[1]:
            self.put(number)
        elif slid != self._seen[0]:
            # A front end puts a slider that it was given a value between two steps on one of them, and says so.
            if number < 1 or abs(math.log(slid / number, self._slider.base)) > 0.51 * self._slider.step:
                self._number.value = number = _round(slid)
            self._seen = (slid, number)
        return int(number)

    def put(self, value: int) -> None:
        """Show this value, the slider as near to it as it goes."""
        self._number.value = value
        self._slider.value = min(max(value, self._range[0]), self._range[1])
        self._seen = (self._slider.value, value)


class Choice(Control):
    """Names to choose from, and a text for any other."""

    def _inputs(self, default: Any) -> list[Any]:
        plain = {"description": self.label, **tip(self.field.metadata["text"])}
        self._choice = w.Dropdown(options=[*_SUGGESTED[self.name], _OTHER], value=default, **plain)
        self._text = w.Text(
            description=f"{self.label}: which", placeholder=_PLACES[self.name], **tip(plain["description"])
        )
        self._text.add_class("bn-which")
        self._text.layout.display = "none"
        return [self._choice, self._text]

    def read(self) -> str:
        """The name chosen, or the text."""
        other = self._choice.value == _OTHER
        self._text.layout.display = None if other else "none"
        return str(self._text.value if other else self._choice.value)

    def put(self, value: str) -> None:
        """Show this value."""
        known = value in _SUGGESTED[self.name]
        self._choice.value = value if known else _OTHER
        self._text.value = "" if known else value


_PLACES: Final = {
    "model": "hub id (owner/name) or path of a folder",
    "data": "hub id (owner/name) or path of a file",
}


def _round(value: float) -> int:
    """To two digits, as a person would choose."""
    return int(float(f"{value:.2g}"))
