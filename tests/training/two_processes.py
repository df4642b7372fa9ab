"""One of two processes that train under accelerate on gloo; `test_two_processes` starts them and reads their notes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

import sparse_ref_attn as sra
from tests.training.batches import Batch, tuned

RUNS = {  # model: what is drawn, and whether the module is patched inside DDP or before it is wrapped
    "klein": (sra.RandomDrop((0.1, 0.9), per_sample=True), "before"),
    "kontext": (sra.RandomDrop((0.3, 0.7)), "after"),
    "flux2": (sra.IsolateReferences(drop=sra.RandomDrop((0.3, 0.7))), "after"),  # two forwards for each backward
}
STEPS = 3


def train(name: str, out: Path) -> dict[str, Any]:
    """Three steps, a checkpoint, three more; then those three again from the checkpoint."""
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    assert accelerator.num_processes == 2
    assert torch.distributed.get_backend() == "gloo"
    drop, when = RUNS[name]
    model = tuned(name)
    weights = {key: p for key, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2)
    handle = sra.patch_for_training(model, drop) if when == "before" else None
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
    handle = sra.patch_for_training(wrapped, drop) if handle is None else handle
    accelerator.register_for_checkpointing(handle)
    notes: dict[str, Any] = {"kept": []}

    def steps(first: int) -> None:
        for step in range(first, first + STEPS):
            loss = Batch(name, seed=10 * step + accelerator.process_index).loss(wrapped)
            accelerator.backward(loss)
            notes["kept"].append([selection.indices.tolist() for selection in handle.kept])
            if step == 0:
                torch.save({key: p.grad for key, p in weights.items()}, out / f"{name}-{accelerator.process_index}.pt")
            optimizer.step()
            optimizer.zero_grad()

    def state() -> list[float]:
        return [p.double().sum().item() for p in weights.values()]

    steps(0)
    accelerator.save_state(str(out / name))
    steps(STEPS)
    notes["end"] = state()
    accelerator.load_state(str(out / name))
    assert state() != notes["end"]
    steps(STEPS)
    notes["again"] = state()
    accelerator.free_memory()
    return notes


def main(out: Path) -> None:
    notes = {name: train(name, out) for name in RUNS}
    rank = torch.distributed.get_rank()
    (out / f"notes-{rank}.json").write_text(json.dumps(notes))
    torch.distributed.destroy_process_group()
