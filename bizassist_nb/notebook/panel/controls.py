"""One control for each field of `Settings`, made from what the field says about itself."""

import dataclasses
import html
import math
import tomllib
from typing import Any, Final

import ipywidgets as w
import tomli_w

from bizassist_nb.core.settings import UNNAMED, Settings
from bizassist_nb.models.named import NAMED
from bizassist_nb.notebook.views import labelled
from bizassist_nb.training.preflight import on_t4

# Range of a slider: (base, least exponent, most, step). Any value can be typed beside it.
_SLIDERS: Final = {"subset": (10, 0, 4.3, 0.05), "rank": (2, 0, 9, 1)}
_OTHER: Final = "other …"
_SUGGESTED: Final = {"model": ("auto", *NAMED), "data": ("dolly", "sample")}
_PLACES: Final = {"model": "a folder", "data": "a file"}
_LABELS: Final = {"subset": "rows to train on", "rank": "LoRA rank", "runs_dir": "folder of runs"}


def fold(title: str, *content: Any) -> Any:
    """Content behind a button that shows it. panel.css does so without the kernel, and unlike an `Accordion`'s title
    the button can be reached by keys.
    """
    button = w.ToggleButton(description=title, icon="caret-right", tooltip=f"show or hide: {title}")
    return w.VBox([button.add_class("bn-fold"), w.VBox(content).add_class("bn-folded")])


def offer(menu: Any, names: list[str]) -> None:
    """List these names in a menu; what is chosen stays chosen, else of a dropdown the first is."""
    if list(menu.options) != names:
        chosen = menu.value
        menu.options = names
        if isinstance(menu, w.SelectMultiple):
            menu.value = [name for name in chosen if name in names]
        else:
            menu.value = chosen if chosen in names else next(iter(names), None)


def alert(words: str) -> str:
    """Words that something is wrong, as HTML."""
    return f'<div class="bn-alert" role="alert">⚠ {html.escape(words)}</div>'


class Entry:
    """Inputs in a row and, below them, what is wrong with their value. Only the update loop calls its methods."""

    def __init__(self, *inputs: Any):
        self.inputs = inputs
        self._problem = w.HTML().add_class("bn-problem")
        self.view = w.VBox([w.Box(inputs).add_class("bn-row"), self._problem]).add_class("bn-field")

    def complain(self, problem: str) -> None:
        """Show what is wrong; nothing for an empty text."""
        self._problem.value = f'<span role="alert">⚠ {html.escape(problem)}</span>' if problem else ""


class Control(Entry):
    """The entry of one setting."""

    def __init__(self, field: "dataclasses.Field[Any]"):
        self.name, self.limits = field.name, field.metadata
        self.label = _LABELS.get(field.name, field.name.replace("_", " "))
        super().__init__(*self._inputs(getattr(Settings(), field.name)))

    def _labelled(self, kind: Any, **state: Any) -> Any:
        return labelled(kind, self.label, self.limits["text"], **state)

    def _inputs(self, default: Any) -> list[Any]:
        if self.limits["choices"]:
            return [self._labelled(w.Dropdown, options=self.limits["choices"], value=default)]
        if self.name == "system_prompt":
            return [self._labelled(w.Textarea, value=default, rows=3)]
        if isinstance(default, float):
            return [self._labelled(w.FloatText, value=default, step=None)]
        if isinstance(default, int):
            return [self._labelled(w.IntText, value=default)]
        return [self._labelled(w.Text, value=self._written(default))]

    def read(self) -> Any:
        """The value as it stands; text that is no value of the setting stays as it is, and `Settings` refuses it."""
        value = self.inputs[0].value
        if "keys" in self.limits:
            table = value.strip().removeprefix(self.name).strip().removeprefix("=").strip()  # as in a cell, too
            try:
                return tomllib.loads(f"table = {table if table.startswith('{') else f'{{ {table} }}'}")["table"]
            except tomllib.TOMLDecodeError:
                return value
        if not self.limits["words"]:
            return value
        try:
            return type(self.limits["least"])(value)
        except ValueError:
            return value.strip()

    def put(self, value: Any) -> None:
        """Show this value."""
        self.inputs[0].value = self._written(value)

    def _written(self, value: Any) -> Any:
        if "keys" in self.limits:
            return ", ".join(line.strip() for line in tomli_w.dumps(value).splitlines())
        return str(value) if self.limits["words"] else value


class Slider(Control):
    """A slider for the usual values, and a number beside it for any."""

    def _inputs(self, default: Any) -> list[Any]:
        base, least, most, step = _SLIDERS[self.name]
        ends = {"base": base, "min": least, "max": most, "step": step}
        self._slider = self._labelled(w.FloatLogSlider, value=default, readout=False, **ends)
        self._number = labelled(w.IntText, f"{self.label}, as a number", self.label, value=default)
        self._seen = (self._slider.value, default)
        self._range = (base**least, base**most)
        return [self._slider, self._number.add_class("bn-number")]

    def read(self) -> int:
        """The number; where only the slider was moved, the number first follows it."""
        slid, number = self._slider.value, self._number.value
        if number != self._seen[1]:
            self.put(number)
        elif slid != self._seen[0]:
            # A front end moves a slider whose value is between two steps to one of them, and reports that.
            if number < 1 or abs(math.log(slid / number, self._slider.base)) > 0.51 * self._slider.step:
                self._number.value = number = int(float(f"{slid:.2g}"))
            self._seen = (slid, number)
        return int(number)

    def put(self, value: int) -> None:
        """Show this value; the slider stops at its ends."""
        self._number.value = value
        self._slider.value = min(max(value, self._range[0]), self._range[1])
        self._seen = (self._slider.value, value)


class Choice(Control):
    """Names to choose from, and a text for any other."""

    def _inputs(self, default: Any) -> list[Any]:
        words = {name: f"{name} ({on_t4(name):.1f} GiB on a T4; {NAMED[name].licence})" for name in NAMED}
        options = [(words.get(name, name), name) for name in (*_SUGGESTED[self.name], _OTHER)]
        self._choice = self._labelled(w.Dropdown, options=options, value=default)
        where = f"hub id (owner/name) or path of {_PLACES[self.name]}"
        self._text = labelled(w.Text, f"{self.label}: which", self.label, placeholder=where)
        self._text.layout.display = "none"
        return [self._choice, self._text.add_class("bn-which")]

    def read(self) -> str:
        """The name chosen, or the text."""
        other = self._choice.value == _OTHER
        self._text.layout.display = None if other else "none"
        return str(self._text.value if other else self._choice.value)

    def complain(self, problem: str) -> None:
        """Show what is wrong; what to write where nothing is written yet."""
        super().complain(problem if self.read() else f"write a {self._text.placeholder}")

    def put(self, value: str) -> None:
        """Show this value; of a value that is yet to be named, an empty text with the cursor in it."""
        known, unnamed = value in _SUGGESTED[self.name], value == UNNAMED
        self._choice.value = value if known else _OTHER
        self._text.value = "" if known or unnamed else value
        if unnamed:
            self.read()  # which shows the text
            self._text.send({"do": "focus"})


def control(field: "dataclasses.Field[Any]") -> Control:
    """The control for that field."""
    kind = Slider if field.name in _SLIDERS else Choice if field.name in _SUGGESTED else Control
    return kind(field)
