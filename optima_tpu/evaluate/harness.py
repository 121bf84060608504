"""Runs the Language Model Evaluation Harness with a decoder on the mesh.

Tokenisation follows the harness's own model for transformers (``lm_eval/models/huggingface.py``, version 0.4.13). The tokenizer
adds its own special tokens, but not to a text that already begins with BOS. An empty context becomes BOS, or EOS if the tokenizer
has no BOS. A text that is too long loses its beginning. Every token of a document is scored once.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from optima_tpu.data import tokenizing
from optima_tpu.errors import UserError, naming, plural
from optima_tpu.evaluate.answers import Ends, Question, Rules, read_rules
from optima_tpu.evaluate.likelihood import Likelihood, Request, likelihoods, make_plan
from optima_tpu.models.generate import Prompt, Sampling, generate, plan_generation
from optima_tpu.models.model import Model
from optima_tpu.report.pace import Step
from optima_tpu.report.progress import Progress
from optima_tpu.runtime.device_memory import device_budget
from optima_tpu.runtime.mesh import DATA
from optima_tpu.runtime.processes import SharedError, from_first

Asked = tuple[tuple[str, str] | None, list[int], list[int]]
"""A request of the harness: (context and continuation as texts or None, tokens of the context, tokens of the continuation)."""

_TOGETHER = 16
"""Answers that are written at once on a slice of the data axis, for every sequence of ``Decoder.batch``, if memory allows."""


class DecoderLM(TemplateLM):
    """Adapts a decoder to the harness: log-likelihoods and greedy answers.

    Args:
      name: the name of the model in ``progress``, such as "pruned".
      context: the most tokens that the model reads at once; None takes the model's limit.
      budget: bytes that may be used of each device; None takes what ``device_budget`` allows.

    Raises:
      UserError: ``context`` is more than the model can read, or the tokenizer has neither BOS nor EOS.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        progress: Progress,
        name: str = "model",
        context: int | None = None,
        budget: float | None = None,
    ):
        super().__init__()
        self._budget = device_budget(None) if budget is None else budget
        self.tokenizer, self._decoder, self._progress, self._name = tokenizer, model.decoder, progress, name
        limit = resolve_max_length(model.pretrained.config, tokenizer)
        if context is not None and context > limit:
            raise UserError(f"expected --context of at most {limit}, the model's context, got {context}")
        self.max_length = context or limit
        bos = tokenizer.bos_token_id
        prefix = tokenizer.eos_token_id if bos is None else bos
        if prefix is None:
            raise UserError(
                f"expected a tokenizer with a BOS or an EOS token in {model.pretrained.origin}, got one without: "
                "use the tokenizer that was published with the model"
            )
        self._prefix = prefix
        self._ends = Ends.of(model.pretrained, tokenizer)
        # Some families need BOS although their tokenizer does not add it.
        self._forced = tokenizer.bos_token_id if model.decoder.family.needs_bos else None

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text.

        The tokenizer adds special tokens unless the text begins with BOS or the caller decides.
        """
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        # verbose=False: transformers would warn of every text that is longer than the model's context.
        with tokenizing(self.tokenizer):
            ids = self.tokenizer.encode(string, verbose=False, **options)
        if self._forced is None or add_special_tokens is not None or ids[:1] == [self._forced]:
            return ids
        return [self._forced, *ids]

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        for request in requests:
            _, continuation = request.args
            if not continuation:
                raise UserError(f"{_place(request)}: expected a text to score, got an empty one; correct the data set")
        return super().loglikelihood(requests, disable_tqdm=True)  # our own progress replaces tqdm

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[float]:
        windows: list[Asked] = []
        counts = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            if not tokens:
                raise UserError(f"{_place(request)}: expected a text to score, got an empty document; correct the data set")
            pairs = get_rolling_token_windows(
                token_list=tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            before = len(windows)
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            counts.append(len(windows) - before)
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[str]:
        questions: list[Question] = []
        long = 0
        for request in requests:
            text, rules = request.args[0], self.rules(request)
            tokens = self.tok_encode(text) or [self.prefix_token_id]
            self._check_ids(tokens)
            room = self.max_length - rules.new
            long += len(tokens) > room
            questions.append(Question(tuple(tokens[-room:]), rules))
        self._note_cut(long, len(questions), "prompts, with the tokens to write,")
        return self._in_all(DecoderLM._write, questions)

    def rules(self, request: Instance) -> Rules:
        """The rules of an answer. Raises UserError if they can't be kept."""
        with naming(f"task {request.task_name}"):
            rules = read_rules(request.args[1])
        if rules.new >= self.max_length:
            raise UserError(
                f"task {request.task_name} asks for answers of up to {rules.new} tokens, expected fewer than the "
                f"{self.max_length} tokens that the model reads at once: give --gen_kwargs "
                f"max_gen_toks={max(self.max_length // 2, 1)} or another number"
            )
        return rules

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a chat.

        Without a generation prompt, the model continues the last message.

        Without a generation prompt, the answer continues the last message.
        """
        if chat_history[0]["role"] == "system" and not self._takes_system:
            chat_history = chat_history[1:]
        return self._chat(chat_history, add_generation_prompt)

    @functools.cached_property
    def _takes_system(self) -> bool:
        """Whether the chat template takes a system message."""
        try:
            self._chat([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], True)
        except jinja2.TemplateError:
            self._progress.note(f"{self._name}: its chat template takes no system message, so the prompts have none")
            return False
        return True

    def _chat(self, messages: list[dict[str, str]], answer_next: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer_next, continue_final_message=not answer_next
            )
        )

    def _loglikelihood_tokens(self, requests: Sequence[Asked], **kwargs: Any) -> list[tuple[float, bool]]:
        limit, long = self.max_length, 0
        to_score: list[Request] = []
        for texts, context, continuation in requests:
            shown = "a window" if texts is None else f"{texts[1]!r:.60}"
            if not continuation:
                raise UserError(f"expected a continuation of at least one token, got {shown}, which adds no token to its context")
            if not context:  # the harness moves the context's trailing spaces to the continuation; without BOS nothing is left
                given = "none" if texts is None else f"{texts[0]!r:.60}"
                raise UserError(f"expected a context of at least one token before {shown}, got {given}; correct the data set")
            if len(continuation) > limit:
                raise UserError(
                    f"expected continuations of at most {limit} tokens, the context (--context, at most the model's limit), "
                    f"got {shown} with {len(continuation)}: raise --context, or leave the task out"
                )
            tokens = (context + continuation)[-(limit + 1) :]
            self._check_ids(tokens)
            long += len(context) + len(continuation) > limit + 1
            to_score.append(Request(tuple(tokens[:-1]), tuple(continuation)))
        self._note_cut(long, len(to_score), "texts")
        return [(each.logarithm, each.greedy) for each in self._in_all(DecoderLM._score, to_score)]

    def _check_ids(self, tokens: Sequence[int]) -> None:
        vocab = self._decoder.config.vocab
        if max(tokens) >= vocab:
            raise UserError(
                f"expected token ids below {vocab}, the number of rows of the model's embedding, got {max(tokens)}: "
                "the tokenizer does not belong to this model; use the one that was published with it"
            )

    def _note_cut(self, long: int, count: int, what: str) -> None:
        if long:
            self._progress.note(
                f"{long:,} of {count:,} {what} are longer than the {self.max_length} tokens that the model reads at once: their "
                "beginning is cut off"
            )

    def _in_all(self, work: "Callable[[DecoderLM, Any], list[Any]]", inputs: Sequence[Any]) -> list[Any]:
        """Runs a method in every process; others wait in :meth:`follow`."""
        return self._do(*from_first(lambda: (work, inputs)))

    def follow(self) -> None:
        """Computes, in other processes, what process 0 sends until None."""
        while (sent := from_first(lambda: None)) is not None:
            self._do(*sent)

    def _do(self, work: "Callable[[DecoderLM, Any], list[Any]]", inputs: Sequence[Any]) -> list[Any]:
        try:
            return work(self, inputs)
        except UserError as error:  # such as a model that does not fit: all processes find it
            raise SharedError(str(error)) from error

    def _begin(self, name: str, steps: list[Step]) -> None:
        """Starts the first stage of ``progress.ahead``, with its steps.

        A later stage of the same kind takes the same steps.
        """
        (first, *_), *ahead = self._progress.ahead or [[Step(name)]]
        self._progress.ahead = [steps if stage[0].kind == first.kind else stage for stage in ahead]
        self._progress.stage(name, len(steps), steps)

    def _score(self, requests: Sequence[Request]) -> list[Likelihood]:
        plan = make_plan(self._decoder, requests, self.max_length)
        lengths, steps = [group.length for wave in plan.waves for group in wave], plan.steps(self._decoder)
        self._begin(
            f"{self._name}: {plural(len(requests), 'continuation')} in {plural(len(plan.texts), 'text')} of up "
            f"to {max(lengths)} tokens",
            steps,
        )
        return likelihoods(self._decoder, plan, self._progress.advance)

    def _write(self, questions: Sequence[Question]) -> list[str]:
        distinct = list(dict.fromkeys(questions))
        plan = plan_generation(
            self._decoder,
            [Prompt(question.prompt, question.rules.new) for question in distinct],
            Sampling(min(len(self.tokenizer), self._decoder.config.vocab)),
            advice="to write answers, take a --mesh with a larger model axis, a --dtype of fewer bytes, or a smaller --context",
            budget=self._budget,
            limit=_TOGETHER * self._decoder.batch * self._decoder.mesh.shape[DATA],
        )
        if self._ends.penalty != 1:
            self._progress.note(
                f"{self._name}: generation_config.json asks for a repetition_penalty of {self._ends.penalty:g}, which is not "
                "applied; transformers applies it"
            )
        self._begin(
            f"{self._name}: writing {plural(len(distinct), 'answer')} of up to "
            f"{max(question.rules.new for question in distinct)} tokens, {max(len(batch.prompts) for batch in plan.batches)} at "
            "once",
            [Step("writing answers")] * plan.steps,
        )
        began = time.monotonic()
        written = generate(
            self._decoder,
            plan,
            lambda number, tokens: self._ends.answer(tokens, distinct[number].rules.until)[1],
            self._progress.advance,
        )
        self._progress.note(f"{sum(map(len, written)) / (time.monotonic() - began):,.0f} tokens a second")
        texts = {question: self._ends.answer(tokens, question.rules.until)[0] for question, tokens in zip(distinct, written)}
        return [texts[question] for question in questions]


def _place(request: Instance) -> str:
    return f"document {request.doc_id} of task {request.task_name}"
