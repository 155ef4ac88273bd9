"""Train the embedded base model `embedded:tiny-lm` from scratch on public-domain books.

    python examples/tiny_lm/train.py --books books_*.jsonl.zst --held-out other_books.jsonl.zst --output tiny-lm

Each input is JSON lines with a `text` field, one book a line, plain or compressed with zstd. The model in the package
was made by this script from 628 Project Gutenberg books (the GitHub repository rcdm-uga/Gutenberg_Text at
commit a0b16d3) and judged on twelve others. It needs a CUDA device and ten minutes; the schedule follows the clock
(`--minutes`), and the learning rate falls to zero along half a cosine. A larger one for comparisons, of 104 million
parameters:

    python examples/tiny_lm/train.py --books books_*.jsonl.zst --held-out other_books.jsonl.zst --output lm-104m \
        --width 896 --layers 11 --vocabulary 8192 --batch 128 --lr 1.5e-3
"""

import argparse
import io
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 512  # tokens a training sequence


def read_books(paths: list[Path]) -> list[str]:
    """The text of every book, in the order of the files."""
    books = []
    for path in paths:
        raw = path.read_bytes()
        if path.suffix == ".zst":
            import zstandard

            raw = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(raw)).read()
        books += [json.loads(line)["text"] for line in raw.decode().split("\n") if line.strip()]
    return books


def train_tokenizer(books: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with split digits: every string can be encoded, none is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(books, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<eos>", eos_token="<eos>", pad_token="<pad>", model_max_length=1024
    )


def encode(tokenizer: PreTrainedTokenizerFast, books: list[str]) -> torch.Tensor:
    """All books as one line of token ids, each closed by <eos>."""
    pieces = [book[i : i + 100_000] for book in books for i in range(0, len(book), 100_000)]
    last = np.cumsum([-(-len(book) // 100_000) for book in books]) - 1  # the piece that ends each book
    encoded = [np.asarray(e.ids, dtype=np.int32) for e in tokenizer.backend_tokenizer.encode_batch_fast(pieces)]
    for i in last:
        encoded[i] = np.append(encoded[i], tokenizer.eos_token_id).astype(np.int32)
    return torch.from_numpy(np.concatenate(encoded)).long()


def build_model(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> LlamaForCausalLM:
    """A Llama with heads of 64 numbers; width 256 and 6 layers make 5.4 million parameters, 10.8 MB in bfloat16."""
    heads = width // 64
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=16 * round(8 * width / 3 / 16),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def next_token_loss(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per token of rows (batch, CONTEXT + 1)."""
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, tokens: torch.Tensor, batch: int) -> float:
    rows = tokens[: len(tokens) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    rows = rows[: len(rows) // batch * batch]
    model.eval()
    losses = [next_token_loss(model, part).item() for part in rows.split(batch)]
    model.train()
    return sum(losses) / len(losses)


def learning_rate(progress: float, peak: float) -> float:
    """Warm up over 2 %, then fall along half a cosine to zero."""
    return peak * min(progress / 0.02, 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--width", type=int, default=256, help="a multiple of 128")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--minutes", type=float, default=7.0, help="length of training, evaluation included")
    parser.add_argument("--batch", type=int, default=256, help="sequences a step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.width % 128:
        parser.error("--width must be a multiple of 128: heads of 64 numbers, two for each key")

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    start = time.perf_counter()
    books, other_books = read_books(args.books), read_books(args.held_out)
    tokenizer = train_tokenizer(books[::4], args.vocabulary)
    train_tokens, test_tokens = encode(tokenizer, books).cuda(), encode(tokenizer, other_books).cuda()
    bytes_per_token = sum(len(book.encode()) for book in other_books) / len(test_tokens)
    print(
        f"{len(books)} books, {len(train_tokens) / 1e6:.1f} M tokens; held out: {len(other_books)} books, "
        f"{len(test_tokens) / 1e6:.2f} M tokens of {bytes_per_token:.2f} bytes; {time.perf_counter() - start:.0f} s",
        flush=True,
    )

    model = build_model(tokenizer, args.width, args.layers).cuda()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    compiled = torch.compile(model)
    next_token_loss(compiled, train_tokens[: args.batch * (CONTEXT + 1)].view(args.batch, -1)).backward()
    held_out_loss(compiled, test_tokens, args.batch)
    optimizer.zero_grad()

    generator = torch.Generator("cuda").manual_seed(args.seed)
    offsets = torch.arange(CONTEXT + 1, device="cuda")
    curve, step, next_report = [], 0, 0.0
    start = time.perf_counter()
    while (progress := (time.perf_counter() - start) / (60 * args.minutes)) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.lr)
        first = torch.randint(len(train_tokens) - CONTEXT, (args.batch, 1), generator=generator, device="cuda")
        loss = next_token_loss(compiled, train_tokens[first + offsets])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if progress >= next_report:
            curve.append((step, held_out_loss(compiled, test_tokens, args.batch)))
            print(f"step {step:6d} train {loss.item():.4f} held out {curve[-1][1]:.4f}", flush=True)
            next_report = progress + 0.05
        elif step % 20 == 0:
            loss.item()  # keep the clock honest: the schedule must not run ahead of the device
    curve.append((step, held_out_loss(compiled, test_tokens, args.batch)))

    tokens = step * args.batch * CONTEXT
    nats = curve[-1][1]
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    tokenizer_file = args.output / "tokenizer.json"
    tokenizer_file.write_text(
        json.dumps(json.loads(tokenizer_file.read_text()), ensure_ascii=False, separators=(",", ":"))
    )
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": tokens,
        "epochs": round(tokens / len(train_tokens), 1),
        "held_out_nats_per_token": round(nats, 4),
        "held_out_bits_per_byte": round(nats / math.log(2) / bytes_per_token, 4),
        "held_out_curve": [(s, round(value, 4)) for s, value in curve],
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    (args.output / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
