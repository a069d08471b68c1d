"""Train the demo's reward model: Bradley-Terry on pairs labelled by VADER's compound score.

Openings are cut from drawn stories, and the story model continues each of them. Of every two
continuations of one opening, the one with the higher VADER score is preferred; ties are left out.
The body starts from the story model's weights. Deterministic for a seed and a number of threads.

    python scripts/train_reward_model.py --stories build/stories \
        --story-model src/bonbon/demo/story-model --out src/bonbon/demo/reward-model
"""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaForSequenceClassification
from transformers import PreTrainedTokenizerBase as Tokenizer

from bonbon.config.sampling import SamplingConfig
from bonbon.demo.sentiment import compound
from bonbon.groups.group import Group
from bonbon.groups.prompts import PromptRow
from bonbon.models.loading import load_policy
from bonbon.models.padding import pad
from bonbon.rewards.model import RewardModel
from bonbon.rewards.reward import score_groups
from bonbon.sampling.completion_text import completion_text
from bonbon.sampling.transformers import TransformersSampler
from bonbon.system.progress import progress_bar
from train_story_model import build_optimizer, read_stories

CARD = """---
license: mit
pipeline_tag: text-classification
tags: [demo, reward-model]
---
# BoNBoN's reward model

How happy a short children's story goes on: a Llama-style model of {parameters:,} parameters with a
scalar head, for `bonbon demo`. It reads an opening and its continuation as a pair of texts.

- Data: {groups:,} openings cut from drawn stories, {n} continuations of each by the demo's story
  model at temperature 1, a third of them cut short; {pairs:,} pairs of continuations of one
  opening, labelled by the compound score of vaderSentiment (MIT); {ties:.1%} of the pairs tied and
  were left out. The body starts from the story model's weights (MIT).
- Training: Bradley-Terry loss, AdamW, learning rate {lr:g}, {epochs} passes, {minutes:.0f} minutes
  on 2 CPU cores.
- On {held:,} openings held out: pair accuracy {accuracy:.3f}, loss {loss:.3f} nats a pair.
- Limits: it has learned a word list's idea of happiness on this story model's sentences; anywhere
  else it means nothing, and a policy that optimises it hard will find its errors.

Made by `scripts/train_reward_model.py`.
"""


def cut_opening(text: str, generator: np.random.Generator) -> str:
    """Cut a piece of 8 to 24 words from a sentence's start; half of them end with a sentence."""
    starts = [0] + [match.end() for match in re.finditer(r'[.!?]"?\s+', text[: len(text) // 2])]
    words = text[generator.choice(starts) :].split()
    opening = " ".join(words[: generator.integers(8, 25)])
    sentences = re.match(r'.*[.!?]"?(?=\s|$)', opening)
    return sentences.group() if sentences and generator.random() < 0.5 else opening


def shortened(group: Group, length: int, tokenizer: Tokenizer) -> Group:
    """Cut every completion of a group to its first `length` tokens."""
    ids = tuple(completion[:length] for completion in group.token_ids)
    texts = tuple(completion_text(tokenizer, group.prompt_token_ids, row) for row in ids)
    return replace(group, token_ids=ids, completions=texts)


def labelled_groups(args: argparse.Namespace, generator: np.random.Generator) -> list[Group]:
    """Draw groups of continuations, with VADER's scores as rewards."""
    stories, _ = read_stories(args.stories)
    chosen = generator.choice(len(stories), args.groups, replace=False)
    rows = [
        PromptRow(f"opening-{i}", cut_opening(stories[index][0], generator))
        for i, index in enumerate(chosen)
    ]
    config = SamplingConfig(n=args.n, max_new_tokens=args.tokens, seed=args.seed)
    model, tokenizer = load_policy(str(args.story_model))
    sampler = TransformersSampler(model, tokenizer, config)
    with progress_bar("drawing continuations", 0, "prompts") as bar:
        groups = sampler.sample(sampler.encode(rows), progress=bar.tokens)
    groups = [
        shortened(group, int(generator.integers(12, args.tokens)), tokenizer)
        if generator.random() < 1 / 3
        else group
        for group in groups
    ]
    scores = score_groups(compound, groups)
    return [group.with_rewards(s) for group, s in zip(groups, scores, strict=True)]


def encode(reward: RewardModel, groups: list[Group]) -> list[list[list[int]]]:
    return [[reward.encode(group.prompt, text) for text in group.completions] for group in groups]


def pair_losses(rewards: torch.Tensor, gold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute −ln σ(r_i − r_j) for all pairs with i the happier, and whether r_i > r_j.

    `rewards`, `gold`: (groups, n); the results are flat, one entry a pair.
    """
    difference = rewards[:, :, None] - rewards[:, None, :]
    margins = difference[gold[:, :, None] > gold[:, None, :]]
    return -F.logsigmoid(margins), margins > 0


def group_rewards(reward: RewardModel, groups: list[list[list[int]]]) -> torch.Tensor:
    """Compute rewards of encoded groups, (groups, n), with gradient."""
    rows = [row for group in groups for row in group]
    ids, mask = pad(rows, reward.tokenizer.pad_token_id, "right")
    return reward.model(input_ids=ids, attention_mask=mask).logits.view(len(groups), -1)


@torch.inference_mode()
def measure(reward: RewardModel, groups: list[Group]) -> tuple[float, float, int]:
    """Measure mean pair loss (nats), pair accuracy and number of pairs on held-out groups."""
    rewards = torch.tensor(score_groups(reward, groups))
    losses, right = pair_losses(rewards, torch.tensor([group.rewards for group in groups]))
    return float(losses.mean()), float(right.double().mean()), len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stories", type=Path, required=True)
    parser.add_argument("--story-model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--groups", type=int, default=5_000)
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="groups")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    generator = np.random.default_rng(args.seed)
    began = time.monotonic()

    groups = labelled_groups(args, generator)
    held, training = groups[: args.held_out], groups[args.held_out :]
    _, tokenizer = load_policy(str(args.story_model))
    model = LlamaForSequenceClassification.from_pretrained(
        args.story_model, num_labels=1, dtype=torch.float32
    )
    reward = RewardModel(model, tokenizer)
    encoded, gold = encode(reward, training), torch.tensor([group.rewards for group in training])
    steps_a_pass = len(training) // args.batch
    steps = args.epochs * steps_a_pass
    optimizer, scheduler = build_optimizer(model, args.lr, steps)
    model.train()
    for step in range(steps):
        if step % steps_a_pass == 0:
            order = generator.permutation(len(training))
        start = step % steps_a_pass * args.batch
        batch = order[start : start + args.batch]
        losses, right = pair_losses(group_rewards(reward, [encoded[i] for i in batch]), gold[batch])
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            accuracy = right.double().mean()
            print(f"step {step}/{steps} loss {losses.mean():.3f} right {accuracy:.3f}", flush=True)
    model.eval()
    held_loss, held_accuracy, _ = measure(reward, held)
    print(f"held out: loss {held_loss:.4f} nats a pair, accuracy {held_accuracy:.4f}")
    happier = gold[:, :, None] > gold[:, None, :]
    possible = len(training) * args.n * (args.n - 1) // 2
    card = CARD.format(
        parameters=model.num_parameters(),
        groups=len(groups),
        n=args.n,
        pairs=int(happier.sum()),
        ties=1 - int(happier.sum()) / possible,
        lr=args.lr,
        epochs=args.epochs,
        minutes=(time.monotonic() - began) / 60,
        held=len(held),
        accuracy=held_accuracy,
        loss=held_loss,
    )
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
