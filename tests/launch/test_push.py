"""Publishing a pruned model: what goes out, what is refused, and that nothing goes out unasked."""

import pytest

from optima_tpu.errors import UserError
from optima_tpu.models.checkpoints.export import SIDECAR
from optima_tpu.push import push
from optima_tpu.runtime.checksums import write_sums

TOKEN = "hf_" + "abcdefghij" * 4


class FakeHub:
    """Stands in for ``HfApi``, and keeps what it was asked for."""

    def __init__(self, there: bool = False):
        self.there, self.made, self.files = there, [], {}

    def repo_exists(self, repository):
        return self.there

    def create_repo(self, repository, private):
        self.made.append((repository, private))

    def create_commit(self, repository, operations, commit_message):
        self.files |= {each.path_in_repo: each.path_or_fileobj for each in operations}


@pytest.fixture
def run(tmp_path):
    """What a run leaves, as far as this command reads it."""
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
    push(str(run), "org/name", hub, lambda question: not asked.append(question))
    assert set(hub.files) == {SIDECAR, "README.md", "model.safetensors", "sha256-all.json"}
    assert hub.made == [("org/name", True)] and "makes it private" in asked[0]
    assert "README.md" in capsys.readouterr().out
    hub = FakeHub(there=True)
    with pytest.raises(UserError, match="nothing was published"):
        push(str(run / "hf"), "org/name", hub, lambda question: False)
    assert not hub.files and not hub.made


@pytest.mark.parametrize(
    "text, said", [(f"token: {TOKEN}", "a token"), ("see /home/ada/models/x", "the path /home/ada/models/x")]
)
def test_what_looks_private_needs_two_words(run, text, said):
    (run / "hf/README.md").write_text(text)
    for words in ({}, {"yes": True}, {"include_report": True}):
        hub = FakeHub()
        with pytest.raises(UserError, match="README.md holds") as refused:
            push(str(run), "org/name", hub, refuse, **words)
        assert said in str(refused.value) and TOKEN not in str(refused.value) and not hub.files
    push(str(run), "org/name", hub, refuse, include_report=True, yes=True)
    assert {"README.md", "report.html", "report.json"} <= hub.files.keys()


def test_the_report_holds_paths(run):
    with pytest.raises(UserError, match="report.json holds the path"):
        push(str(run), "org/name", FakeHub(), refuse, include_report=True)


def test_what_cannot_be_is_refused(run, tmp_path):
    for place, repository, said in (
        (tmp_path, "org/name", "which has no optima_tpu.json"),
        (run, "name", "expected ORG/NAME"),
        (run, "org/name/x", "expected ORG/NAME"),
    ):
        with pytest.raises(UserError, match=said):
            push(str(place), repository, FakeHub(), refuse)
    (run / "hf/model.safetensors").write_text("changed")
    with pytest.raises(UserError, match="model.safetensors has changed"):
        push(str(run), "org/name", FakeHub(), refuse)
