"""Trainings of tests/training/test_distributed.py, started by `torchrun` or `accelerate launch`.

    train_in_processes.py CASES.json
    train_in_processes.py bonbon train …

The first form trains each case: its groups and model, the trainer's settings, and the folder that
weights and log are saved into. The second is `bonbon`, on a CPU where FSDP shards weights too.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from bonbon.cli.main import main
from bonbon.groups.shards import read_groups
from bonbon.models.loading import load_policy
from bonbon.training.trainer import BoNBoNConfig, BoNBoNTrainer


def allow_fsdp_on_cpu() -> None:
    """accelerate shards weights on accelerators alone, though FSDP2 itself runs on a CPU too."""
    plain = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def whole(trainer: BoNBoNTrainer) -> dict[str, torch.Tensor]:
    """The trained parameters, gathered where they are sharded."""
    gathered = trainer.gathered_weights()
    if gathered is not None:
        return gathered
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def train(case: dict[str, Any]) -> None:
    groups = list(read_groups(Path(case["groups"])))
    held_out = groups[: case["held_out"]]
    model, tokenizer = load_policy(case["model"], dtype="float32", device="cpu")
    out = Path(case["out"])
    args = BoNBoNConfig(str(out), **case["settings"])
    trainer = BoNBoNTrainer(
        model.to(getattr(torch, case["dtype"])),
        args,
        train_dataset=groups,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear") if case["lora"] else None,
    )
    trainer.train()
    evaluation = trainer.evaluate()
    sharded = any(isinstance(value, DTensor) for value in trainer.model.parameters())
    weights = whole(trainer)
    if args.process_index == 0:
        save_file(weights, out / "weights.safetensors")
        log = {"history": trainer.state.log_history, "evaluation": evaluation, "sharded": sharded}
        (out / "log.json").write_text(json.dumps(log))


if __name__ == "__main__":
    allow_fsdp_on_cpu()
    if sys.argv[1] == "bonbon":
        del sys.argv[1]
        main()
    for case in json.loads(Path(sys.argv[1]).read_text()):
        train(case)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
