"""Publishing a model: what goes out, what is refused, nothing unasked."""

import pytest
from huggingface_hub import CommitOperationDelete
from huggingface_hub.errors import OfflineModeIsEnabled

from optima_tpu.errors import UserError
from optima_tpu.models.checkpoints.export import SIDECAR
from optima_tpu.push import collect, main, push
from optima_tpu.runtime.checksums import write_sums

TOKEN = "hf_" + "abcdefghij" * 4


class FakeHub:
    """Stands in for ``HfApi``, and records the calls."""

    def __init__(self, existing: tuple[str, ...] | None = None):
        self.existing, self.made, self.files, self.deleted = existing, [], {}, []

    def repo_exists(self, repository):
        return self.existing is not None

    def list_repo_files(self, repository):
        return self.existing

    def create_repo(self, repository, private):
        self.made.append((repository, private))

    def create_commit(self, repository, operations, commit_message):
        for each in operations:
            if isinstance(each, CommitOperationDelete):
                self.deleted.append(each.path_in_repo)
            else:
                self.files[each.path_in_repo] = each.path_or_fileobj


@pytest.fixture
def run(tmp_path):
    """The files of a run that this command reads."""
    folder = tmp_path / "run/hf"
    folder.mkdir(parents=True)
    for name, text in {SIDECAR: "{}", "README.md": "# A model", "model.safetensors": "weights"}.items():
        (folder / name).write_text(text)
    write_sums(folder)
    for name, text in {"run.json": "{}", "report.json": f'"{tmp_path}/run/hf"', "report.html": "<p>"}.items():
        (folder.parent / name).write_text(text)
    return folder.parent


def refuse(question):
    raise AssertionError(f"nobody should be asked {question}")


def test_the_folder_goes_out_once_somebody_agreed(run, capsys):
    hub, asked = FakeHub(), []
    push(collect(str(run)), "org/name", hub, lambda question: not asked.append(question))
    assert set(hub.files) == {SIDECAR, "README.md", "model.safetensors", "sha256-all.json"}
    assert hub.made == [("org/name", True)] and "makes it private" in asked[0]
    assert "README.md" in capsys.readouterr().out
    hub = FakeHub(())
    with pytest.raises(UserError, match="nothing was published"):
        push(collect(str(run / "hf")), "org/name", hub, lambda question: False)
    assert not hub.files and not hub.made


def test_a_dry_run_lists_the_files_and_asks_no_hub(run, capsys):
    assert main([str(run), "ada/half", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "model.safetensors" in printed and "nothing was sent; a new repository ada/half would be private" in printed
    assert main([str(run / "nowhere"), "half", "--dry-run"]) == 2
    assert "expected ORG/NAME, got 'half'" in capsys.readouterr().err  # before the folder is read


def test_weights_of_another_model_do_not_stay_beside_the_new_ones(run):
    hub, asked = FakeHub(("README.md", "model-00001-of-00002.safetensors", "packed.json", "notes.txt", "model.safetensors")), []
    push(collect(str(run)), "org/name", hub, lambda question: not asked.append(question))
    assert hub.deleted == ["model-00001-of-00002.safetensors", "packed.json"] and not hub.made
    assert "deletes its model-00001-of-00002.safetensors, packed.json" in asked[0]


@pytest.mark.parametrize(
    "text, said",
    [
        (f"token: {TOKEN}", "a token"),
        ("see /home/ada/models/x", "the path /home/ada/models/x"),
        ("in '/workspace/ada/x'", "the path /workspace/ada/x"),
        ("gs://ada/runs", "the path gs://ada/runs"),
        ("WANDB_API_KEY=0123456789abcdef0123", "a token"),
        (f"{TOKEN} in /home/ada", "a token (hf_abc...) and the path /home/ada"),
    ],
)
def test_what_looks_private_needs_a_word_of_its_own(run, text, said):
    (run / "hf/README.md").write_text(text)
    for words in ({}, {"include_report": True}):
        with pytest.raises(UserError, match="README.md holds") as refused:
            collect(str(run), **words)
        assert said in str(refused.value) and TOKEN not in str(refused.value)
    assert {"README.md", "report.html", "report.json"} <= collect(str(run), include_report=True, include_private=True).keys()


def test_the_report_holds_paths(run):
    with pytest.raises(UserError, match="report.json holds the path"):
        collect(str(run), include_report=True)
    (run / "report.json").write_text('"/srv/of/another/machine"')
    with pytest.raises(UserError, match="report.html and report.json hold paths of the machine that made them"):
        collect(str(run), include_report=True)


def test_a_file_that_no_export_wrote_needs_a_word_of_its_own(run):
    (run / "hf/.env").write_text("x=1")
    with pytest.raises(UserError, match=".env was not written by the export"):
        collect(str(run))
    assert ".env" in collect(str(run), include_private=True)


@pytest.mark.parametrize(
    "error, said",
    [
        (RuntimeError("Name or service not known"), "the hub can't be reached .Name or service not known."),
        (
            OfflineModeIsEnabled("offline mode is enabled"),
            "HF_HUB_OFFLINE is set, so nothing was sent: unset it, or type --dry-run",
        ),
    ],
)
def test_without_a_network_it_ends_in_a_line(run, error, said):
    class NoNetwork(FakeHub):
        def repo_exists(self, repository):
            raise error

    with pytest.raises(UserError, match=said):
        push(collect(str(run)), "org/name", NoNetwork(), refuse)


def test_what_cannot_be_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="which has no optima_tpu.json"):
        collect(str(tmp_path))
    for repository in ("name", "org/name/x"):
        with pytest.raises(UserError, match="expected ORG/NAME"):
            push(collect(str(run)), repository, FakeHub(), refuse)
    weights = run / "hf/model.safetensors"
    weights.write_text("changed")
    with pytest.raises(UserError, match="model.safetensors has changed"):
        collect(str(run))
    weights.unlink()
    with pytest.raises(UserError, match="model.safetensors is missing"):
        collect(str(run))
