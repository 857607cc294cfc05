"""Make the built-in teacher again, or one of its kind from your own text: tokenizer and weights.

`python -m kvpipe.pipeline.builtin_teacher` takes about 25 minutes on one CPU core. The seeds are fixed, so
the same library versions on the same kind of CPU give the same teacher. The old teacher stays in place
unless the new one, read back from disk, solves enough problems that it was not trained on. A teacher of other text
is only measured: `--dataset problems.jsonl --output teachers/mine`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..data import builtin
from ..data.corpus import BUILTIN_DATASET, load_corpus
from ..data.sample import Sample, Segment, extract_answer
from ..data.tokenize import prompt_ids, tokenize
from .evaluate import generate_answers
from .losses import IGNORED, next_token_loss

DEFAULT_OUTPUT = Path(next(iter(builtin.__path__))) / "qwen"
REQUIRED_EXACT_MATCH = 0.97

SEED = 0
TRAIN_SAMPLES = 60_000
TEST_SAMPLES = 2_000
EPOCHS = 3
BATCH_SIZE = 16
LEARNING_RATE = 2.5e-3

VOCABULARY = 512
MAX_TOKENS = 2048
EOS = "<|endoftext|>"
PAD = "<|pad|>"


def main(
    output: Annotated[Path, typer.Option(help="Folder of the teacher; replaced if there.")] = DEFAULT_OUTPUT,
    dataset: Annotated[str, typer.Option(help="word-problems, a .jsonl file or a Hub data set.")] = BUILTIN_DATASET,
    vocabulary: Annotated[int, typer.Option(help="Tokens of the tokenizer.")] = VOCABULARY,
    epochs: Annotated[int, typer.Option(help="Passes over the training split.")] = EPOCHS,
) -> None:
    """Train a teacher of the built-in kind and put it into OUTPUT: the built-in one only if it is good enough."""
    # One thread: the order of summation, and with it the weights, then depends on no core count.
    torch.set_num_threads(1)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".builtin-teacher-", dir=output.parent) as scratch:
        made = Path(scratch) / "new"
        # What is held out here contains what an extraction of the same text holds out.
        splits = load_corpus(dataset, TRAIN_SAMPLES, TEST_SAMPLES, SEED).splits
        make_teacher(made, splits["train"], vocabulary, epochs)
        if dataset == BUILTIN_DATASET:
            _require_good(exact_match(made, splits["test"]), output)
        else:
            typer.echo(f"cross-entropy {cross_entropy(made, splits['test']):.4f} nats a token on held-out text")
        if output.exists():
            output.rename(Path(scratch) / "old")
        made.rename(output)
    typer.echo(f"wrote {output}")


def _require_good(exact_match: float, output: Path) -> None:
    typer.echo(f"exact match {exact_match:.2%} on {TEST_SAMPLES} test problems")
    if exact_match < REQUIRED_EXACT_MATCH:
        typer.echo(f"below {REQUIRED_EXACT_MATCH:.0%}: {output} is left as it was", err=True)
        raise typer.Exit(1)


def make_teacher(folder: Path, samples: Sequence[Sample], vocabulary: int, epochs: int) -> None:
    """Train tokenizer and model, and save both: the weights in bfloat16."""
    tokenizer = train_tokenizer(samples, vocabulary)
    model = train_model(samples, tokenizer, epochs)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def exact_match(folder: Path, samples: Sequence[Sample]) -> float:
    """The share of problems whose answer a saved teacher generates."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [prompt_ids(sample).tolist() for sample in tokenize(samples, tokenizer, MAX_TOKENS)]
    texts = generate_answers(model.eval(), tokenizer, prompts, max_new_tokens=64)
    exact = [extract_answer(text) == sample.answer for text, sample in zip(texts, samples, strict=True)]
    return sum(exact) / len(exact)


@torch.inference_mode()
def cross_entropy(folder: Path, samples: Sequence[Sample]) -> float:
    """Of a saved teacher on reasoning and answers, in nats a token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").float().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total = count = 0.0
    for features in _training_features(samples, tokenizer):
        ids, labels = (torch.tensor(features[name])[None] for name in ("input_ids", "labels"))
        total += float(next_token_loss(model(ids).logits, labels, reduction="none").sum())
        count += int((labels[:, 1:] != IGNORED).sum())
    return total / count


def train_tokenizer(samples: Sequence[Sample], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE that writes every digit as a token of its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    # A token's characters include its leading space, so that the spans cover the text without gaps.
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((sample.text for sample in samples), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """The teacher's architecture with random weights."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def train_model(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, epochs: int) -> PreTrainedModel:
    """Train in float32 on the reasoning and the answer; the prompt is only read."""
    set_seed(SEED)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=400,
            weight_decay=0.01,
            adam_beta2=0.99,
            train_sampling_strategy="group_by_length",
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=SEED,
            logging_steps=250,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        model = new_model(tokenizer)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=_training_features(samples, tokenizer),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )
        trainer.train()
    model.config.use_cache = True  # the Trainer turned it off
    return model


def _training_features(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    features = []
    for sample in tokenize(samples, tokenizer, MAX_TOKENS):
        labels = sample.input_ids.copy()
        labels[sample.segment_ids == Segment.PROMPT] = IGNORED
        features.append({"input_ids": sample.input_ids.tolist(), "labels": labels.tolist()})
    return features


if __name__ == "__main__":
    typer.run(main)
