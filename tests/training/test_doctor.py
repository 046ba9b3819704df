"""What `doctor` finds wrong, from real metadata and a real folder; tests/test_cli.py has a machine that is well."""

from importlib.metadata import version

from bizassist_nb.training import doctor


def test_versions_outside_what_the_metadata_asks_for_are_named(tmp_path, monkeypatch):
    folder = tmp_path / "asker-1.0.dist-info"
    folder.mkdir()
    wanted = (
        "numpy<1",
        "psutil>=1",
        "no-such-thing>=2",
        "unsloth-thing>=1; extra == 'unsloth'",
        "ruff<0.1; extra == 'x'",
    )
    lines = ["Metadata-Version: 2.1", "Name: asker", "Version: 1.0", *(f"Requires-Dist: {text}" for text in wanted)]
    (folder / "METADATA").write_text("\n".join([*lines, "Requires-Dist: pytest<1; extra == 'unsloth'", ""]))
    monkeypatch.syspath_prepend(tmp_path)
    assert dict(doctor.out_of_range("asker")) == {
        "⚠ numpy": f"{version('numpy')} is installed; asker needs <1",
        "⚠ no-such-thing": "is not installed; asker needs >=2",
        "⚠ pytest": f"{version('pytest')} is installed; asker needs <1",
    }
    assert list(doctor.out_of_range("nobody-s-package")) == []


def test_a_folder_in_which_no_run_can_be_trained_is_named_with_the_reason():
    report = dict(doctor.report("/proc/runs").rows)  # a file system in which nobody can write
    assert report["runs"].startswith("/proc/runs: ")
    assert "no run can be trained there (FileNotFoundError" in report["runs"]
    assert "Google Drive" not in report
