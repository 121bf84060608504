"""The command that compares a model here with torch."""

import pytest

from optima_tpu import check
from optima_tpu.models.general import block
from optima_tpu.models.layers import project
from tests.support.references import BY_MODEL, tiny

torch = pytest.importorskip("torch")
pytest.importorskip("torchax")


def checked(folder, name: str, capsys) -> tuple[int, str]:
    reference = BY_MODEL[name]
    tiny(reference, reference.first)[1].save_pretrained(folder)
    capsys.readouterr()
    return check.run(check.read([str(folder), "--length", "24"])), capsys.readouterr().out


@pytest.mark.parametrize(("name", "ways"), [("GPTJForCausalLM", ["general"]), ("LlamaForCausalLM", ["family", "general"])])
def test_every_way_agrees_with_torch(tmp_path, capsys, name, ways):
    status, printed = checked(tmp_path, name, capsys)
    assert status == 0 and printed.startswith(f"model        {tmp_path}: {name}\n")
    assert [line.split()[0] for line in printed.splitlines() if "the logits agree with torch: " in line] == ways
    assert "weights to prune in" in printed and " MiB in float32" in printed


def test_a_difference_is_said_and_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(block, "project", lambda x, weight: project(x, weight) * 1.01)
    status, printed = checked(tmp_path, "OlmoForCausalLM", capsys)
    assert (
        status == 1
        and "\ngeneral      refused: the general way cannot run a OlmoForCausalLM: the input of self_attn.o_proj" in printed
    )
