"""Make a built-in teacher again, or one of its kind from your own text: tokenizer and weights.

`python -m kvpipe.pipeline.builtin_teacher qwen` takes about 25 minutes on one CPU core. The seeds are fixed, so
the same library versions on the same kind of CPU give the same teacher. The old teacher stays in place
unless the new one, read back from disk, solves enough problems that it was not trained on. A teacher of other text
is only measured: `--dataset problems.jsonl --output teachers/mine`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..data import builtin
from ..data.corpus import BUILTIN_DATASETS, load_corpus
from ..data.sample import Sample, Segment, extract_answer
from ..data.tokenize import prompt_ids, tokenize
from .generation import generate_texts
from .losses import IGNORED, next_token_loss
from .teacher_recipes import RECIPES, TeacherRecipe, new_model, train_tokenizer

BUILTIN = Path(next(iter(builtin.__path__)))
REQUIRED_EXACT_MATCH = 0.97

SEED = 0
TRAIN_SAMPLES = 60_000
TEST_SAMPLES = 2_000
EPOCHS = 3
BATCH_SIZE = 16
LEARNING_RATE = 2.5e-3
MAX_NEW_TOKENS = 160


def main(
    recipe: Annotated[Literal["qwen", "llama", "gpt2"], typer.Argument(help="Which of the built-in ones.")] = "qwen",
    output: Annotated[Path | None, typer.Option(help="Folder; replaced if there. \\[default: the built-in's]")] = None,
    dataset: Annotated[str | None, typer.Option(help="Built-in, .jsonl or Hub. \\[default: the recipe's]")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Tokens. \\[default: the recipe's]")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training split.")] = EPOCHS,
) -> None:
    """Train a teacher of a built-in kind and put it into OUTPUT: a built-in one only if it is good enough."""
    # One thread: the order of summation, and with it the weights, then depends on no core count.
    torch.set_num_threads(1)
    known = RECIPES[recipe]
    chosen = replace(known, dataset=dataset or known.dataset, vocabulary=vocabulary or known.vocabulary)
    if output is None and (chosen, epochs) != (known, EPOCHS):
        raise typer.BadParameter(
            "a teacher of another recipe than the built-in one has a folder of its own", param_hint="--output"
        )
    place = output or BUILTIN / recipe
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".builtin-teacher-", dir=place.parent) as scratch:
        made = Path(scratch) / "new"
        # What is held out here contains what an extraction of the same text holds out.
        splits = load_corpus(chosen.dataset, TRAIN_SAMPLES, TEST_SAMPLES, SEED).splits
        make_teacher(made, splits["train"], chosen, epochs)
        if chosen.dataset in BUILTIN_DATASETS:
            _require_good(exact_match(made, splits["test"]), place)
        else:
            typer.echo(f"cross-entropy {cross_entropy(made, splits['test']):.4f} nats a token on held-out text")
        if place.exists():
            place.rename(Path(scratch) / "old")
        made.rename(place)
    typer.echo(f"wrote {place}")


def _require_good(exact_match: float, output: Path) -> None:
    typer.echo(f"exact match {exact_match:.2%} on {TEST_SAMPLES} test problems")
    if exact_match < REQUIRED_EXACT_MATCH:
        typer.echo(f"below {REQUIRED_EXACT_MATCH:.0%}: {output} is left as it was", err=True)
        raise typer.Exit(1)


def make_teacher(folder: Path, samples: Sequence[Sample], recipe: TeacherRecipe, epochs: int) -> None:
    """Train tokenizer and model, and save both: the weights in bfloat16."""
    tokenizer = train_tokenizer(samples, recipe)
    model = train_model(samples, tokenizer, recipe, epochs)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def exact_match(folder: Path, samples: Sequence[Sample]) -> float:
    """The share of problems whose answer a saved teacher generates."""
    # In float32: its weights are what is judged, and few CPUs are quick in bfloat16.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [prompt_ids(sample).tolist() for sample in tokenize(samples, tokenizer, tokenizer.model_max_length)]
    texts = generate_texts(model.eval(), tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS)
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


def train_model(
    samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, recipe: TeacherRecipe, epochs: int
) -> PreTrainedModel:
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
        model = new_model(tokenizer, recipe)
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
    for sample in tokenize(samples, tokenizer, tokenizer.model_max_length):
        labels = sample.input_ids.copy()
        labels[sample.segment_ids == Segment.PROMPT] = IGNORED
        features.append({"input_ids": sample.input_ids.tolist(), "labels": labels.tolist()})
    return features


if __name__ == "__main__":
    typer.run(main)
