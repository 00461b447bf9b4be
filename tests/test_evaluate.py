"""Perplexity against the formula, and its refusals."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from proxsparse import ProxsparseError, evaluate_perplexity
from proxsparse.jobs.evaluate import remaining_loss

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
    with pytest.raises(ProxsparseError, match="has 10 tokens, fewer than one block of 512"):
        evaluate_perplexity(tiny_model("llama"), torch.zeros(10, dtype=torch.long))


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
