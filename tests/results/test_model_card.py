"""What the head of a model card says of licence and language."""

import pytest
from huggingface_hub import ModelCard
from random_run import environment

from bizassist_nb.core.files import write_json
from bizassist_nb.core.settings import Settings
from bizassist_nb.results.model_card import card
from bizassist_nb.runs.run import RunDirectory


@pytest.mark.parametrize(
    ("model", "data", "licence", "name", "language"),
    [
        ("mistral-7b", "dolly", "apache-2.0", None, ["en"]),
        ("gemma-3-1b", "sample", "other", "Gemma Terms of Use", ["en"]),
        ("owner/model", "owner/rows", None, None, None),
    ],
)
def test_licence_and_language_are_said_where_they_are_known(tmp_path, model, data, licence, name, language):
    run = RunDirectory.create(tmp_path / "run", Settings(model=model, data=data))
    write_json(run.path / "environment.json", environment(model, "x"))
    head = ModelCard(card(run)).data.to_dict()
    assert (head.get("license"), head.get("license_name"), head.get("language")) == (licence, name, language)
