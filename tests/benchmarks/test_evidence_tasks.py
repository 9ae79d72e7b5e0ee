"""The tasks: a model cut in two computes what the whole one does, and answers are scored right."""

import json

import pytest
import torch
import transformers
from torch.nn import functional

from benchmarks.evidence.cutting import cut, entering
from benchmarks.evidence.language import LanguageTask, named
from benchmarks.evidence.methods import METHODS, Adapter
from benchmarks.evidence.questions import Question, from_instructions
from benchmarks.evidence.task import Settings, batches, sample
from benchmarks.evidence.texts import TextTask, pooled
from benchmarks.evidence.training import train
from tests.benchmarks import evidence_models as tiny


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tiny.bert(tmp_path_factory.mktemp("bert"))
    return folder, TextTask(
        "toy", adapted=2, rows=tiny.rows(140), folder=folder, sizes=(80, 60, 20, 40)
    )


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    folder = tiny.llama(tmp_path_factory.mktemp("llama"))
    asked = tiny.questions(60)
    parts = {"train": {"toy": asked[:40]}, "validation": {"toy": asked[40:50]}}
    parts["test"] = {"toy": asked[50:]}
    made = LanguageTask("toy", parts, adapted=2, folder=folder, dtype=torch.float32)
    return folder, made, asked[50:]


def test_upper_part_of_an_encoder_gives_what_the_full_model_gives(texts):
    folder, task = texts
    whole = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = tiny.rows(140)
    task_rows = {text: label for text, label in rows}
    batch = next(batches(task.training(0), 60, 1, 0))
    body = task.fresh(0).body
    with torch.no_grad():
        own = pooled(body, batch)
        tokens = tokenizer(list(task_rows), padding=True, return_tensors="pt")
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        every = (whole(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    nearest = torch.cdist(own, every).min(1)
    torch.testing.assert_close(own, every[nearest.indices], atol=1e-5, rtol=1e-5)
    labels = torch.tensor(list(task_rows.values()))
    assert torch.equal(labels[nearest.indices], batch["labels"])


def test_model_that_adds_positions_to_given_embeddings_is_refused():
    batch = {
        "input_ids": torch.randint(2, 20, (2, 6)),
        "attention_mask": torch.ones(2, 6, dtype=torch.long),
    }
    with pytest.raises(ValueError, match="expected GPT2LMHeadModel to compute the same"):
        cut(tiny.gpt2(), 1, batch)


def test_entering_leaves_no_hook():
    model = tiny.gpt2()
    entering(model, {"input_ids": torch.ones(1, 3, dtype=torch.long)}, 1)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_parts_share_no_text_and_seeds_vary_the_training(texts):
    _, task = texts
    held_out = {id(e) for part in task._parts.values() for e in part}
    assert not held_out & {id(e) for e in task.training(0)}
    assert {id(e) for e in task.training(0)} != {id(e) for e in task.training(1)}


def test_sample_takes_each_example_once(texts):
    examples = texts[1].training(0)
    some = sample(examples, 16, 40, 0)
    assert [len(batch["labels"]) for batch in some] == [16, 16, 8]
    assert sum(len(batch["labels"]) for batch in sample(examples, 16, 1000, 0)) == len(examples)


def test_answers_are_scored_as_the_full_model_model_scores_them(language):
    folder, task, asked = language
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    right = 0
    for question in asked:
        losses = []
        for choice in question.choices:
            prompt = tokenizer(question.prompt)["input_ids"]
            reply = tokenizer(f" {choice}.")["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
            losses.append(float(functional.cross_entropy(logits, torch.tensor(reply))))
        right += losses.index(min(losses)) == question.right
    assert task.accuracy(task.fresh(0), "test") == {"toy": right / len(asked)}


def test_assembled_model_is_the_adapted_one(language):
    _, task, asked = language
    settings = Settings(rank=2, steps=3, batch_size=8, learn_from=16)
    model, spent = Adapter(task, settings)(METHODS["IPA, frozen"], seed=0)
    train(model, task, settings, 1e-1, 0, spent)
    whole = task.assembled(model)
    question = asked[0]
    ids = task._tokenizer(question.prompt, return_tensors="pt")["input_ids"]
    hidden = entering(task._full_model, {"input_ids": ids}, task._first)
    with torch.no_grad():
        body = model.body(inputs_embeds=hidden).last_hidden_state
        expected, before = model.output(body), task._full_model(ids).logits
        torch.testing.assert_close(whole(ids).logits, expected)
    assert (expected - before).abs().max() > 1e-3
    found = task.accuracy_by_generation(model, "test", beams=2, new_tokens=3)
    assert 0 <= found["toy"] <= 1


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("the answer is Good film", 1),
        ("bad, not good", 0),
        ("neither", None),
        ("good", 0),
    ],
)
def test_first_named_choice(text, choice):
    choices = ("bad", "good film") if choice != 0 or "bad" in text else ("good", "good film")
    assert named(text, choices) == choice


def test_longest_of_the_choices_at_one_place():
    assert named("answer10 it is", ("answer1", "answer10")) == 1


def test_files_of_the_paper(tmp_path):
    def row(answer):
        text = "Is it so?\n\nAnswer format: true/false"
        return {"instruction": text, "input": "", "output": "...", "answer": answer}

    (tmp_path / "commonsense_170k.json").write_text(json.dumps([row("true"), row("false")] * 3))
    with pytest.raises(FileNotFoundError, match="expected SET/test.json for one of boolq"):
        from_instructions(tmp_path, 2)
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "test.json").write_text(json.dumps([row("false")]))
    parts = from_instructions(tmp_path, 2)
    assert [len(rows) for part in parts.values() for rows in part.values()] == [4, 2, 1]
    assert parts["test"]["boolq"] == [Question(row("")["instruction"], ("true", "false"), 1)]
    (tmp_path / "boolq" / "test.json").write_text(json.dumps([row("maybe")]))
    with pytest.raises(ValueError, match="got 'maybe'"):
        from_instructions(tmp_path, 2)
