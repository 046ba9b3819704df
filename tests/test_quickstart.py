"""quickstart.ipynb, run top to bottom as it is: it shows what is committed, where that does not vary."""


def test_quickstart(quickstart):
    assert quickstart.returncode == 0, quickstart.stdout
