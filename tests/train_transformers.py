"""Train a tiny Llama by the Trainer of transformers, on CPU.

    torchrun --nproc-per-node 2 tests/train_transformers.py FOLDER

Losses and weights of three steps go to FOLDER/result.pt. Processes share batches of four rows.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from moba_flex import MoBAConfig
from moba_flex.integrations.transformers import apply

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def main(folder: Path) -> None:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
    apply(model, MoBAConfig(block_size=8, top_k=3))
    rows = torch.randint(3, 61, (12, 90))
    data = [{"input_ids": row, "labels": row} for row in rows]
    processes = int(os.environ["WORLD_SIZE"])
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4 // processes,
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="sgd",
        use_cpu=True,
        ddp_backend="gloo",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        torch.save({"losses": losses, "weights": weights}, folder / "result.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
