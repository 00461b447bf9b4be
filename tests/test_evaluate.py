"""Perplexity against the formula, and its refusals."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from proxsparse import ProxsparseError, evaluate_perplexity
from proxsparse.config import CalibrationConfig, EvalConfig
from proxsparse.data.calibration import load_calibration
from proxsparse.data.tokenizing import added_prefix, tokenize_text
from proxsparse.jobs.compare import evaluate_models
from proxsparse.jobs.evaluate import remaining_loss, rolling_log_likelihood
from proxsparse.jobs.generate import generate

REF = Path(os.environ.get("PROXSPARSE_SHARED", Path(__file__).parents[2] / "shared"))


def test_equals_the_formula_and_ignores_batch_size(tiny_model: Any) -> None:
    model = tiny_model("llama").train()
    tokens = torch.randint(0, 96, (100,))
    with torch.no_grad():
        total, count = 0.0, 0
        for block in tokens[:96].view(6, 16):
            log_p = model(block[None]).logits[0].double().log_softmax(-1)
            total -= log_p[torch.arange(15), block[1:]].sum().item()
            count += 15
    expected = math.exp(total / count)
    for batch_size in (1, 4, 8):
        got = evaluate_perplexity(model, tokens, max_seq_length=16, batch_size=batch_size)
        assert got == pytest.approx(expected, rel=1e-5)
    assert evaluate_perplexity(model, tokens[:96].view(6, 16)) == pytest.approx(expected, rel=1e-5)
    assert model.training


def test_refusals(tiny_model: Any) -> None:
    with pytest.raises(ProxsparseError, match="pass the model's tokenizer"):
        evaluate_perplexity(tiny_model("llama"), "text")
    tokens = torch.zeros(10, dtype=torch.long)
    with pytest.raises(ProxsparseError, match="has 10 tokens, fewer than one block of 64"):
        evaluate_perplexity(tiny_model("llama"), tokens, max_seq_length=64)
    message = "--max-seq-length is 65, but the model has 64 positions: use at most 64"
    for data in (tokens, torch.zeros(1, 65, dtype=torch.long)):
        with pytest.raises(ProxsparseError, match=message):
            evaluate_perplexity(tiny_model("llama"), data, max_seq_length=65)


def _tokenizer(*before: str) -> Any:
    """Of words w0 to w89, with `before` put in front of every text."""
    special = {"<s>": 1, "</s>": 2, "[gMASK]": 3}
    words = {f"w{i}": i + 4 for i in range(90)}
    raw = Tokenizer(models.WordLevel({"<unk>": 0, **special, **words}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if before:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{' '.join(before)} $A", special_tokens=[(t, special[t]) for t in before]
        )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


_TEXT = " ".join(f"w{i * i % 89}" for i in range(100))


@pytest.mark.parametrize("before", [(), ("<s>",), ("[gMASK]", "<s>")])
def test_what_the_tokenizer_adds_begins_every_block(
    before: tuple[str, ...], tiny_model: Any
) -> None:
    model, tokenizer = tiny_model("llama"), _tokenizer(*before)
    prefix = added_prefix(tokenizer)
    assert tokenizer.convert_ids_to_tokens(prefix) == list(before)
    tokens = tokenize_text(_TEXT, tokenizer)
    room = 16 - len(prefix)
    losses = []
    for block in tokens[: 100 // room * room].view(-1, room):
        seen = torch.cat((torch.tensor(prefix, dtype=torch.int64), block))
        log_p = model(seen[None]).logits[0].double().log_softmax(-1)
        first = max(1, len(prefix))
        losses += [-log_p[i - 1, seen[i]].item() for i in range(first, 16)]
    expected = math.exp(sum(losses) / len(losses))
    for data in (_TEXT, tokens):
        got = evaluate_perplexity(model, data, tokenizer, max_seq_length=16)
        assert got == pytest.approx(expected, rel=1e-5)
    config = CalibrationConfig(max_seq_length=16)
    drawn = load_calibration([_TEXT], tokenizer, config, 100 // room)
    assert drawn.prefix == before
    assert (drawn.tokens[:, : len(prefix)] == torch.tensor(prefix)).all()
    sampled = load_calibration("self", tokenizer, config, 2, model)
    begin = prefix or [1]
    assert (sampled.tokens[:, : len(begin)] == torch.tensor(begin)).all()
    assert sampled.tokens.shape == (2, 16)
    if prefix:
        with pytest.raises(ProxsparseError, match="use at least"):
            evaluate_perplexity(model, _TEXT, tokenizer, max_seq_length=len(prefix))
    if len(prefix) > 1:  # a block of one token is refused for itself
        config = CalibrationConfig(max_seq_length=len(prefix))
        for source in ("self", [_TEXT]):
            with pytest.raises(ProxsparseError, match="use at least 3"):
                load_calibration(source, tokenizer, config, 1, model)


def test_add_bos_token_counts_without_a_template() -> None:
    tokenizer = _tokenizer()
    assert added_prefix(tokenizer) == []
    tokenizer.add_bos_token = True
    assert added_prefix(tokenizer) == [1]


def _rolling_windows(tokens: list[int], start: int, length: int) -> list[tuple[list[int], int]]:
    """What a model reads at once, and how many of its last tokens count: lm-eval's windows."""
    everything, windows = [start, *tokens], []
    scored = 0
    while scored < len(tokens):
        count = min(length, len(tokens) - scored)
        scored += count
        windows.append((everything[max(0, scored - length) : scored + 1], count))
    return windows


@pytest.mark.parametrize("before", [(), ("<s>",)])
@pytest.mark.parametrize("num_tokens", [1, 7, 16, 17, 32, 100])
def test_rolling_windows(before: tuple[str, ...], num_tokens: int, tiny_model: Any) -> None:
    model, tokenizer = tiny_model("llama"), _tokenizer(*before)
    text = " ".join(_TEXT.split()[:num_tokens])
    ids = tokenizer(text)["input_ids"]
    expected = 0.0
    for window, count in _rolling_windows(ids, 1, 16):
        log_p = model(torch.tensor([window[:-1]])).logits[0].double().log_softmax(-1)
        places = range(len(window) - 1 - count, len(window) - 1)
        expected += sum(log_p[i, window[i + 1]].item() for i in places)
    for batch_size in (1, 3):
        got = rolling_log_likelihood(
            model, text, tokenizer, max_seq_length=16, batch_size=batch_size
        )
        assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("before", [(), ("<s>",)])
@pytest.mark.parametrize("num_tokens", [1, 16, 17, 100])
def test_rolling_is_lm_evals(before: tuple[str, ...], num_tokens: int, tiny_model: Any) -> None:
    lm_eval = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    model, tokenizer = tiny_model("llama"), _tokenizer(*before)
    text = " ".join(_TEXT.split()[:num_tokens])
    got = rolling_log_likelihood(model, text, tokenizer, max_seq_length=16)
    theirs = lm_eval.HFLM(pretrained=model, tokenizer=tokenizer, max_length=16, batch_size=1)
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    assert got == pytest.approx(theirs.loglikelihood_rolling([request])[0], rel=1e-5)


def test_eval_on_disk(tiny_model: Any, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    _tokenizer("<s>").save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(_TEXT)
    name, data = str(tmp_path / "model"), str(tmp_path / "text.txt")

    def evaluate(**settings: Any) -> dict[str, Any]:
        config = EvalConfig(data=data, device="cpu", **settings)
        return evaluate_models([name], config)[name]

    result = evaluate(max_seq_length=16)
    assert result["max_seq_length"] == 16 and result["source"] == data
    assert result["prefix"] == ["<s>"]
    assert result["tokens"] == 90
    rolled = evaluate(max_seq_length=16, rolling=True)
    nats = 101 * math.log(rolled["perplexity"])
    assert rolled["word_perplexity"] == pytest.approx(math.exp(nats / 100))
    assert rolled["bits_per_byte"] == pytest.approx(nats / len(_TEXT) / math.log(2))
    with pytest.raises(ProxsparseError, match="--max-seq-length is 65, but the model has 64"):
        evaluate(max_seq_length=65)
    for number in (64, 10**9):
        with pytest.raises(ProxsparseError, match="model has 64 positions: give --max-new-tokens"):
            generate(name, "w1", max_new_tokens=number, device="cpu")
    with pytest.raises(ProxsparseError, match="shorter prompt"):
        generate(name, _TEXT, max_new_tokens=1, device="cpu")


def test_remaining_loss() -> None:
    assert remaining_loss(10, 10, 20) == 0
    assert remaining_loss(20, 10, 20) == 1
    assert remaining_loss(math.sqrt(200), 10, 20) == pytest.approx(0.5)


@pytest.mark.slow
@pytest.mark.skipif(not (REF / "models/ref").is_dir(), reason="needs the shared reference model")
def test_reference_model_on_held_out_text() -> None:
    """The dense figure behind the quality table, 27.546 (there in bfloat16)."""
    model = AutoModelForCausalLM.from_pretrained(REF / "models/ref", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(REF / "models/ref")
    text = (REF / "data/heldout.txt").read_text(encoding="utf-8")
    assert evaluate_perplexity(model, text, tokenizer) == pytest.approx(27.546, rel=1e-3)
