"""Tasks in which a model writes, against the harness's torch model."""

import contextlib
import functools
import io
import json
import re
import sys
from pathlib import Path

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from optima_tpu.errors import UserError
from optima_tpu.evaluate.__main__ import main
from optima_tpu.evaluate.harness import DecoderLM
from optima_tpu.evaluate.model import open_evaluated
from optima_tpu.evaluate.task_settings import Asking
from optima_tpu.evaluate.tasks import load_tasks, run_tasks, task_results
from optima_tpu.report.progress import Progress
from tests.support.meshes import mesh
from tests.support.runs import only_error
from tests.support.tiny_models import tiny_folder

pytestmark = pytest.mark.usefixtures("own_tasks_only")

CONTEXT = 1024
CHAT = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% if not loop.last %}{{ '<end>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<end>assistant:' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT
TASKS = Path(lm_eval.__file__).parent / "tasks"
LETTERS = "abcdef"


def pairs_tokenizer():
    """Bytes, letter pairs (256 to 291), EOS ``</s>`` 292, ``<end>`` 293."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(first, second) for first in LETTERS for second in LETTERS]
    core = Tokenizer(models.BPE({text: index for index, text in enumerate([*alphabet, *map("".join, merges)])}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["</s>", "<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", chat_template=CHAT)


def write_model(path, seed, liked=range(256, 294)):
    """Saves a tiny model with the head's rows for ``liked`` tokens tripled."""
    tokenizer = pairs_tokenizer()

    def change(arrays):
        arrays["lm_head.weight"][list(liked)] *= 3

    options = dict(vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, tie_word_embeddings=False)
    tiny_folder(path, seed=seed, change=change, **options)
    tokenizer.save_pretrained(path)
    eos = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("fa")]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("written") / "model", 0)


@pytest.fixture(scope="module")
def reference():
    """The harness's own model of a folder, with one request at a time."""
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    return functools.cache(lambda folder: HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1))


def opened(folder, shape=(2, 2), context=None, progress=None):
    model, tokenizer, _ = open_evaluated(str(folder), mesh(*shape))
    return DecoderLM(model, tokenizer, progress or Progress(), context=context)


def instances(arguments):
    return [Instance("generate_until", {}, entry, 0, ("a_task", number, 1)) for number, entry in enumerate(arguments)]


TEXTS = ["f", "a", "bc", "de fa", "Question: what is abc?", "Größe", "a b c d e f " * 4, "cafe " * 11]
TEXTS += ["fade", "bead", "deaf", "faced"]


def test_answers_are_those_of_transformers(folder, reference):
    lm, theirs = opened(folder, context=128), reference(folder)
    theirs._max_length = lm.max_length
    free = lm.generate_until(instances([(text, {"until": [], "max_gen_toks": 24}) for text in TEXTS]))
    assert len(set(free)) > 6 and len({len(answer) for answer in free}) > 2  # some end at an EOS token
    # From the second letter of a token to the first of another.
    middle = next(answer[3:5] for answer in free if len(answer) > 9)
    requests = [
        (text, {"until": until, "max_gen_toks": new, "do_sample": False, "temperature": 0.0})
        for until, new in (([], 24), (middle, 24), ([middle, "e"], 20), (["<end>"], 24))
        for text in TEXTS
    ]
    requests += [("a long text " * 30, {"until": ["\n\n"], "max_gen_toks": 24}), ("abc", {"max_new_tokens": 1})]
    answers = lm.generate_until(instances(requests))
    assert answers == theirs.generate_until(instances(requests), disable_tqdm=True)
    assert answers[: len(TEXTS)] == free
    ended = [(answer, complete) for answer, complete in zip(answers[len(TEXTS) :], free) if answer != complete]
    assert ended and all(complete.startswith(answer + middle) for answer, complete in ended)
    # In another batch. An empty prompt is the token that comes before every text.
    before, same, other = lm.generate_until(instances([("", requests[0][1]), ("</s>", requests[0][1]), requests[5]]))
    assert before == same and other == answers[5]


def test_prompts_of_a_chat_are_those_of_the_harness(folder, reference, capsys):
    lm, theirs = opened(folder), reference(folder)
    turns = [{"role": role, "content": f"the {role} says"} for role in ("system", "user", "assistant")]
    for template in (CHAT, NO_SYSTEM):
        lm.tokenizer.chat_template = theirs.tokenizer.chat_template = template
        lm.__dict__.pop("_takes_system", None)
        for messages, answer_next in ((turns[:2], True), (turns, False), (turns[1:], False), (turns[1:2], True)):
            expected = theirs.apply_chat_template([*messages], answer_next)
            assert lm.apply_chat_template([*messages], answer_next) == expected
        assert lm.chat_template(True) == theirs.chat_template(True) == template
    assert capsys.readouterr().out.count("its chat template takes no system message, so the prompts have none") == 1
    theirs.tokenizer.chat_template = CHAT


QUESTIONS = [
    f"A box holds {count} pens. How many pens are in {boxes} boxes?" for count, boxes in ((3, 2), (4, 5), (7, 7), (2, 9), (6, 1))
]
DIGITS = range(15, 25)  # the bytes of "0" to "9" in the order of the alphabet
ASKING = Asking(fewshot=2, chat=True, multiturn=True, system="Answer with a number.", generation="max_gen_toks=12")


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    """Returns (pruned model, dense model, data of GSM8K); both write digits.

    The data has the pruned model's own answers to three of five questions.
    """
    root = tmp_path_factory.mktemp("school")
    folders = [write_model(root / name, seed, DIGITS) for seed, name in enumerate(("pruned", "dense"))]
    data = root / "data"
    data.mkdir()

    def write(split, answers):
        lines = [
            json.dumps({"question": text, "answer": f"So it is.\n#### {answer}"}) for text, answer in zip(QUESTIONS, answers)
        ]
        (data / f"{split}.jsonl").write_text("\n".join(lines))

    write("train", [6, 20, 49, 18, 6])
    write("test", ["none"] * 5)
    lm = opened(folders[0], (4, 2), progress=Progress(quiet()))
    tasks = load_tasks(["gsm8k"], lm, ASKING, str(TASKS / "gsm8k"), {"gsm8k": data})
    samples = run_tasks(lm, tasks, ASKING, samples=True)["samples"]["gsm8k"]
    answers = [
        re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", sample["resps"][0][0])[-1]
        for sample in samples
        if sample["filter"] == "strict-match"
    ]
    write("test", [*answers[:3], "no", "number"])
    return *folders, data


def quiet():
    from rich.console import Console

    return Console(quiet=True)


def test_gsm8k_is_scored_offline_as_by_the_harness_for_both_models(school, reference, tmp_path):
    pruned, dense, data = school
    printed = io.StringIO()
    words = ["--tasks", "gsm8k", "--data", f"gsm8k={data}", "--include_path", str(TASKS / "gsm8k"), "--fewshot", "2"]
    words += ["--mesh", "4x2"]
    words += ["--apply_chat_template", "true", "--system_instruction", ASKING.system, "--gen_kwargs", ASKING.generation]
    with contextlib.redirect_stdout(printed):
        assert main([str(pruned), "--against", str(dense), *words, "--output", str(tmp_path / "out")]) == 0
    record, harness = (json.loads((tmp_path / "out" / name).read_text()) for name in ("evaluation.json", "lm_eval.json"))
    result = record["tasks"]["gsm8k"]
    scores = result["metrics"]
    assert scores["exact_match,flexible-extract"] == 0.6 and scores["exact_match,strict-match"] == 0
    assert scores["exact_match_stderr,flexible-extract"] == pytest.approx((0.6 * 0.4 / 4) ** 0.5)
    assert harness["chat_template"] == CHAT and harness["fewshot_as_multiturn"]
    output = " ".join(printed.getvalue().split())
    for expected in (
        "model: writing 5 answers of up to 12 tokens, 5 at once",
        "tokens a second",
        "gsm8k exact_match,flexible-extract 5 0.6000 ± 0.24",
    ):
        assert expected in output, output

    from lm_eval.evaluator import evaluate

    for folder, own in ((pruned, scores), (dense, result["against"])):
        tasks = load_tasks(["gsm8k"], opened(folder), ASKING, str(TASKS / "gsm8k"), {"gsm8k": data})
        tasks["tasks"]["gsm8k"].set_fewshot_seed(seed=1234)
        theirs = task_results(tasks, evaluate(reference(folder), tasks, **ASKING.prompts))["gsm8k"]
        assert own == pytest.approx(theirs.metrics)

    # Results of a chat are not those of plain prompts.
    plain = [word for word in words if word not in ("--apply_chat_template", "true")]
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        again = [str(pruned), "--against", str(dense), *plain, "--against_results", str(tmp_path / "out")]
        assert main([*again, "--output", str(tmp_path / "again")]) == 2
    assert "got another --fewshot_as_multiturn: True in that evaluation, False here" in only_error(error.getvalue())


def test_a_package_that_a_task_needs_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, name)
    line = {"key": 1, "prompt": "Write without commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match=r"task ifeval needs the package langdetect.*: pip install 'lm_eval\[ifeval\]'$"):
        load_tasks(["ifeval"], opened(folder), Asking(), str(TASKS / "ifeval"), {"ifeval": tmp_path})
