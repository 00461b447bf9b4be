"""Trains, from nothing, the small language model that `proxsparse demo` prunes.

    PYTHONPATH=. python benchmarks/train_demo_model.py --with-tests --compile --seconds 240

A Llama of 3.2 M parameters with a byte-level BPE tokenizer, on the text of Python's standard
library (proxsparse/data/corpus.py). The pruning methods only rank as they do on large models when
little is left to learn, so the run is long for the size: some 500 M tokens, minutes on a data-
centre GPU. That is dozens of passes over the text; the weights kept are those of the lowest held-
out loss. With --steps the run repeats for a seed (on a GPU up to the order of its atomic
additions); with --seconds its length depends on the machine.

Writes config.json, generation_config.json, model.safetensors (bfloat16), tokenizer.json,
tokenizer_config.json and training.json (settings, losses, text fingerprint).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import tokenizers
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from proxsparse.data.corpus import stdlib_texts

END_OF_TEXT = "<|endoftext|>"  # id 0: stands before every document, and is bos, eos and pad
CONTEXT = 512
VOCABULARY = 4096
# The largest rates that stay stable at this size; betas and decay as usual for language models.
WARM_UP = 0.02  # share of the run
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--steps", type=int, help="length of the run in steps")
    budget.add_argument("--seconds", type=float, help="length of the run in seconds of training")
    parser.add_argument("--corpus", type=Path, help="a standard library (default: this Python's)")
    parser.add_argument("--with-tests", action="store_true", help="also train on its test suite")
    parser.add_argument("--batch-size", type=int, default=128, help=f"crops of {CONTEXT} tokens")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--eval-every", type=int, default=250, help="steps between evaluations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parents[1] / "proxsparse" / "demo_model"
    )
    args = parser.parse_args()
    if (args.steps or args.seconds) <= 0 or args.batch_size < 1 or args.eval_every < 1:
        parser.error("--steps, --seconds, --batch-size and --eval-every must be positive")
    return args


def train_tokenizer(texts: Sequence[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE: every text can be encoded, and decodes to itself."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> Tensor:
    """int64 [T]: all documents in a row, each behind an END_OF_TEXT."""
    pieces = []
    for start in range(0, len(texts), 64):  # encodings are far larger than their ids
        for encoding in tokenizer.encode_batch_fast(list(texts[start : start + 64])):
            pieces.append(torch.tensor([0, *encoding.ids]))
    return torch.cat(pieces)


def build_model(seed: int) -> LlamaForCausalLM:
    """3.2 M parameters; every linear layer's input dimension is a multiple of 64."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def loss_of(model: LlamaForCausalLM, crops: Tensor) -> Tensor:
    """Mean negative log-likelihood, in nats, of tokens 2..T of each row of crops [B, T]."""
    with torch.autocast(crops.device.type, torch.bfloat16, enabled=crops.is_cuda):
        logits = model(input_ids=crops[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), crops[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokens: Tensor, batch_size: int) -> float:
    """Loss over the blocks of CONTEXT tokens of a text [T]; the remainder is dropped."""
    blocks = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    batches = torch.split(blocks, batch_size)
    return sum(loss_of(model, batch).item() * len(batch) for batch in batches) / len(blocks)


def learning_rate(peak: float, progress: float) -> float:
    """Linear warm-up, then half a cosine down to 0; progress in [0, 1]."""
    if progress < WARM_UP:
        return peak * max(progress / WARM_UP, 0.01)
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def train(
    model: LlamaForCausalLM, tokens: Tensor, heldout: Tensor, args: argparse.Namespace
) -> list[dict[str, float]]:
    """Trains the model in place, leaves it with the best weights seen; returns the evaluations."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    loss_fn: Callable[..., Tensor] = torch.compile(loss_of) if args.compile else loss_of
    generator = torch.Generator(tokens.device).manual_seed(args.seed)
    offsets = torch.arange(CONTEXT + 1, device=tokens.device)

    history: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    step, progress, start = 0, 0.0, time.perf_counter()
    while progress < 1:
        lr = learning_rate(args.lr, progress)
        for group in optimizer.param_groups:
            group["lr"] = lr
        first = torch.randint(
            len(tokens) - CONTEXT, (args.batch_size, 1), generator=generator, device=tokens.device
        )
        loss = loss_fn(model, tokens[first + offsets])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step == 1:  # the first step also compiles, which is no training time
            loss.item()
            start = time.perf_counter()
        seconds = time.perf_counter() - start
        progress = step / args.steps if args.steps else seconds / args.seconds

        if step % args.eval_every == 0 or progress >= 1:
            record = {"step": step, "train_loss": loss.item()}
            record["seconds"] = round(time.perf_counter() - start, 1)
            record["heldout_loss"] = evaluate(model, heldout, args.batch_size)
            if not math.isfinite(record["train_loss"]):
                raise SystemExit(f"the loss is not finite at step {step}; lower --lr")
            if not history or record["heldout_loss"] < min(h["heldout_loss"] for h in history):
                best = {name: value.clone() for name, value in model.state_dict().items()}
            history.append(record)
            rate = step * args.batch_size * CONTEXT / max(record["seconds"], 1e-9)
            print(
                f"step {step:6d}  {min(progress, 1):4.0%}  lr {lr:.2e}  loss {loss.item():.3f}  "
                f"held-out {record['heldout_loss']:.4f} "
                f"(ppl {math.exp(record['heldout_loss']):.3f})  {rate:,.0f} tok/s",
                flush=True,
            )
    model.load_state_dict(best)
    return history


def save(
    output: Path,
    model: LlamaForCausalLM,
    tokenizer: tokenizers.Tokenizer,
    report: dict[str, object],
) -> None:
    """Writes the directory that AutoModelForCausalLM and AutoTokenizer load."""
    # Padding belongs to generation alone: in the model's config it would freeze that token's
    # embedding.
    model.generation_config.pad_token_id = 0
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save(str(output / "tokenizer.json"))
    # By hand: transformers 5 names a class here that transformers 4 does not know.
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT),
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    for name, content in (("tokenizer_config", tokenizer_config), ("training", report)):
        (output / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    args = parse_args()
    texts = [text for _, text in stdlib_texts("train", args.corpus)]
    heldout_text = [text for _, text in stdlib_texts("heldout", args.corpus)]
    tokenizer = train_tokenizer(texts)
    if args.with_tests:
        texts += [text for _, text in stdlib_texts("tests", args.corpus)]
    tokens = encode(tokenizer, texts).to(args.device)
    heldout = encode(tokenizer, heldout_text).to(args.device)
    model = build_model(args.seed).to(args.device)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{num_parameters / 1e6:.2f} M parameters, {len(tokens) / 1e6:.2f} M tokens to train on, "
        f"{len(heldout) / 1e6:.3f} M held out, {args.device}",
        flush=True,
    )

    history = train(model, tokens, heldout, args)
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # measure what is saved; buffers are not, and stay exact
            parameter.copy_(parameter.bfloat16())
    loss = evaluate(model, heldout, args.batch_size)
    best = min(history, key=lambda record: record["heldout_loss"])
    report = {
        "heldout_perplexity": math.exp(loss),
        "heldout_loss": loss,
        "best_step": best["step"],
        "steps": history[-1]["step"],
        "seconds": history[-1]["seconds"],
        "tokens_seen": history[-1]["step"] * args.batch_size * CONTEXT,
        "num_parameters": num_parameters,
        "num_train_tokens": len(tokens),
        "num_heldout_tokens": len(heldout),
        "text_sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        "with_tests": args.with_tests,
        "batch_size": args.batch_size,
        "context": CONTEXT,
        "lr": args.lr,
        "warm_up": WARM_UP,
        "betas": BETAS,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": MAX_GRAD_NORM,
        "seed": args.seed,
        "compile": args.compile,
        "device": torch.cuda.get_device_name() if tokens.is_cuda else args.device,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "history": history,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    save(args.output, model, tokenizer, report)
    print(f"held-out perplexity {math.exp(loss):.3f} (bfloat16 weights); wrote {args.output}")


if __name__ == "__main__":
    main()
