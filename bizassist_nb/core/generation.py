"""How an answer is made: who answers, and how its tokens are drawn."""

from typing import Final

BASE: Final = "base"


TUNED: Final = "tuned"
