"""Exact answers: the problems have the answers they claim, and greedy decoding is judged without being run."""

import itertools

import pytest
import torch
from sparsify_export.passes.errors import InputError
from sparsify_export.runtime.exact import ExactAnswers, exact_answers, make_problems

PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}


class Letters:
    """A tokenizer of single characters; the question's last one and the space behind it are one token."""

    bos_token_id = None

    def __call__(self, text, *, add_special_tokens, verbose):
        assert not add_special_tokens
        ids = [ord(letter) for letter in text]
        joined = [i for i, pair in enumerate(itertools.pairwise(text)) if pair in (("=", " "), (">", " "))]
        for i in reversed(joined):
            ids[i : i + 2] = [128 + ids[i]]
        return {"input_ids": ids}


def test_every_answer_is_right():
    problems = make_problems(count=20, seed=3)
    assert [p.task for p in problems] == ["copying"] * 20 + ["brackets"] * 20 + ["arithmetic"] * 20
    for problem in problems:
        *shots, last = problem.prompt.split("\n")
        for line in [*shots, last + problem.answer]:
            question, _, answer = line.partition(" = " if problem.task == "arithmetic" else " -> ")
            if problem.task == "copying":
                assert answer == question
            elif problem.task == "brackets":
                assert answer.split() == [PAIRS[opened] for opened in reversed(question.split())]
            else:
                assert int(answer) == sum(map(int, question.split(" + ")))


def test_the_seed_decides_the_problems():
    assert make_problems() == make_problems()
    assert make_problems() != make_problems(seed=1)
    assert len({problem.prompt for problem in make_problems()}) == len(make_problems())


def knows(texts):
    """A model that goes on with the text that it knows to begin like this one."""

    def logits(ids):
        scores = torch.zeros(1, ids.shape[1], 256)
        for i in range(ids.shape[1]):
            head = ids[0, : i + 1].tolist()
            for text in texts:
                if text[: i + 1] == head and len(text) > i + 1:
                    scores[0, i, text[i + 1]] = 1
        return scores

    return logits


def tokens(text):
    return Letters()(text, add_special_tokens=False, verbose=False)["input_ids"]


def test_one_wrong_token_makes_an_answer_wrong():
    problems = make_problems(count=2)
    texts = [tokens(f"{problem.prompt}{problem.answer}\n") for problem in problems]
    assert exact_answers(knows(texts), Letters(), count=2).scores == {"copying": 1, "brackets": 1, "arithmetic": 1}
    texts[0][-4] += 1  # inside the answer
    texts[2][-1] = ord("7")  # goes on where the line should end
    texts[4] = tokens(problems[4].prompt + "\n")  # does not answer; the question's last token is another one then
    said = []
    found = exact_answers(knows(texts), Letters(), count=2, progress=lambda *told: said.append(told))
    assert found == ExactAnswers({"copying": 0.5, "brackets": 0.5, "arithmetic": 0.5}, 2, 0)
    assert str(found) == "copying 50%, brackets 50%, arithmetic 50%"
    assert said[-1] == ("exact answers", 6, 6)


def test_long_problems_and_damaged_models_are_refused():
    with pytest.raises(InputError, match=r"have \d+ tokens, and the model takes 20"):
        exact_answers(knows([]), Letters(), limit=20)
    with pytest.raises(InputError, match="not finite"):
        exact_answers(lambda ids: torch.full((1, ids.shape[1], 256), float("nan")), Letters())
