"""Hugging Face Trainer on the same workload: GPT2LMHeadModel of the same shape, the same tokens, everything else off.

python hf_trainer.py WORKLOAD.json, or torchrun --nproc-per-node N hf_trainer.py WORKLOAD.json
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from workload import Workload, write_rank_report


class Sequences(Dataset):
    """Consecutive sequences of the memory-mapped tokens; the model shifts the labels itself."""

    def __init__(self, workload: Workload):
        self.stream, self.length = workload.stream(), workload.sequence_length

    def __len__(self) -> int:
        """Whole sequences in the stream."""
        return len(self.stream) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """input_ids and labels, int64 [sequence_length]."""
        ids = torch.from_numpy(self.stream[index * self.length : (index + 1) * self.length].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


class StepTimes(TrainerCallback):
    """The time from the end of one optimizer step to the end of the next."""

    def __init__(self, cuda: bool):
        self.cuda, self.seconds = cuda, []

    def on_train_begin(self, *args, **kwargs) -> None:
        """Start the clock."""
        self.last = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        """Wait for the device, as the other contestants do, and take the time."""
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def main(path: Path) -> None:
    """Train and report the time of every step."""
    w = Workload.read(path)
    cuda = w.device == "cuda"
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=w.layers,
            n_embd=w.hidden_size,
            n_head=w.heads,
            n_positions=w.sequence_length,
            vocab_size=w.vocab_size,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )
    model.set_attn_implementation("sdpa")
    arguments = TrainingArguments(
        output_dir=str(path.parent / "hf"),
        max_steps=w.steps,
        per_device_train_batch_size=w.micro_batch_size,
        learning_rate=w.learning_rate,
        weight_decay=w.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=w.clip_grad_norm,
        lr_scheduler_type="cosine",
        optim="adamw_torch_fused",
        bf16=w.precision == "bf16",
        use_cpu=not cuda,
        ddp_backend=("nccl" if cuda else "gloo") if "RANK" in os.environ else None,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=cuda,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    times = StepTimes(cuda)
    Trainer(model=model, args=arguments, train_dataset=Sequences(w), callbacks=[times]).train()
    device_bytes = torch.cuda.max_memory_allocated() if cuda else None
    write_rank_report(path, step_seconds=times.seconds, device_bytes=device_bytes)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
