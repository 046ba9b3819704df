"""panel.ipynb, run top to bottom as it is: it shows what is committed, where that does not vary."""

import pytest


@pytest.mark.slow
def test_the_panel_tour(panel_tour):
    assert panel_tour.returncode == 0, panel_tour.stdout
