"""The experiment's notebook, run top to bottom as it is: it shows what is committed, where that does not vary."""

import pytest


@pytest.mark.slow
def test_the_experiment(experiment):
    assert experiment.returncode == 0, experiment.stdout
